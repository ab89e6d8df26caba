"""Reports of whole, damaged and hostile run folders; the page is opened where a browser is installed.

pytest tests/evals/test_report.py
"""

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evals.report import (
    as_json,
    cells,
    main,
    make_report,
    markdown,
    picture,
    provenance,
    read_run,
    state_of,
    write_report,
)
from evals.report_page import write_page
from tests.evals.fake_run import HOSTILE, make_run, row


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("runs")
    return make_run(home / "first", 0, 24, 0.5), make_run(home / "second", 1, 24, 0.7)


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_page(make_report(runs), out, 10**7)
    return out.read_text(encoding="utf-8")


def block(page: str, name: str) -> Any:
    found = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def samples(page: str) -> list[dict[str, Any]]:
    return [one for packed in block(page, "chunks") for one in json.loads(gzip.decompress(base64.b64decode(packed)))]


# ---- numbers and files


def test_the_table_has_every_task_and_number(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main([str(runs[0]), "--no-files"])
    said = capsys.readouterr().out
    for text in ("world_picture", "kimi_gsm8k", "6 × 4", "@2 ", "@4 ", "per solved task", "isolation: bwrap"):
        assert text in said
    assert not (runs[0] / "report.md").exists()


def test_two_runs_are_compared_and_all_files_written(runs: tuple[Path, Path], tmp_path: Path) -> None:
    main([*map(str, runs), "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {f"report.{kind}" for kind in ("md", "json", "png", "svg", "html")}
    said = json.loads((tmp_path / "report.json").read_text())
    assert [run["label"] for run in said["runs"]] == ["first", "second"]
    by_name = {one["name"]: one for one in said["differences"]}
    pictures = by_name["world_picture"]
    assert pictures["n"] == 24 and pictures["second"] - pictures["first"] == pytest.approx(
        pictures["difference"]["value"]
    )
    assert said["runs"][0]["tasks"]["kimi_humaneval"]["pass_at"]["4"]["n"] == 6
    assert said["runs"][0]["run"]["model"]["weights_sha256"] == "9f2c" * 16
    text = (tmp_path / "report.md").read_text()
    assert "## second less first" in text and "settings.world\\_picture.gen" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 10, 11), line
    assert (tmp_path / "report.svg").read_text().lstrip().startswith("<?xml")


def test_the_same_runs_give_the_same_files(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(make_report(runs), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "x" / "nano", 0, 4), make_run(tmp_path / "y" / "nano", 0, 4)
    assert len({run.label for run in make_report([a, b, a]).runs}) == 3


def test_an_answer_has_one_state(tmp_path: Path) -> None:
    states = [
        state_of(row("t", 0) | values)
        for values in (
            {"score": 1.0},
            {"score": 0.5},
            {"score": 0.0},
            {"score": 0.0, "status": "truncated"},
            {"score": 0.0, "finish_reason": "length"},
            {"score": 0.0, "status": "silent"},
            {"score": None, "status": "infra_error"},
        )
    ]
    assert states == ["right", "partly", "wrong", "truncated", "truncated", "silent", "infra"]
    assert state_of(row("t", 0, score=17.2), unit=False) == "scored"
    assert state_of(row("t", 0, score=None, status="no_score")) == "unscored"


def test_too_many_infra_errors_are_said_everywhere(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0, 8)
    lost = [row("kimi_lost", n, score=None, status="infra_error") for n in range(3)]
    lost += [row("kimi_lost", n) for n in range(3, 9)]
    with (folder / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in lost)
    report = make_report([folder])
    assert "(!)" in cells(report.runs[0], report.summaries[0]["kimi_lost"])[2]
    assert any("not valid: 3 of 9" in line for line in markdown(report))
    assert as_json(report)["runs"][0]["tasks"]["kimi_lost"]["valid"] is False
    assert as_json(report)["runs"][0]["tasks"]["kimi_lost"]["isolation"] == "not stated"
    assert make_report([folder], infra_share=0.5).summaries[0]["kimi_lost"].valid


# ---- damage


def test_a_run_that_has_not_written_its_samples_says_why(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0, 4)
    (folder / "samples.jsonl").unlink()
    with pytest.raises(ValueError, match="written when a run ends, so this one was stopped before"):
        make_report([folder])
    other = make_run(tmp_path / "other", 0, 4)
    assert len(make_report([other, folder]).summaries[0]) == 4  # beside one that has them, it is a note


def test_a_run_that_was_killed_is_read_up_to_its_last_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0, 8)
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    count = whole.count(b"\n")
    path.write_bytes(whole[:-20])
    info = json.loads((folder / "run.json").read_text()) | {"finished": None}
    (folder / "run.json").write_text(json.dumps(info))
    run = read_run(folder)
    assert len(run.rows) == count - 1
    said = " ".join(run.problems)
    assert (
        f"line {count} is cut short" in said and "kimi_svg is not finished: 1 of 2" in said and "not finished" in said
    )


@pytest.mark.parametrize(
    "line, said",
    [
        ("[1, 2]", "a row is an object"),
        ('{"item_id": "x"}', "no task"),
        ('{"task": "t"}', "no item_id"),
        ('{"task": "t", "item_id": "x", "score": "good"}', "score must be a number"),
        ('{"task": "t", "item_id": "x", "score": NaN}', "score must be a number"),
        ("\x00\xff{{{{", "line 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_broken_lines_are_named_and_left_out(tmp_path: Path, line: str, said: str) -> None:
    folder = make_run(tmp_path / "run", 0, 4)
    path = folder / "samples.jsonl"
    good = path.read_text()
    path.write_text(f"{line}\n{good}", encoding="latin-1")
    run = read_run(folder)
    assert len(run.rows) == good.count("\n") and len(run.problems) == 1 and said in run.problems[0]


def test_odd_fields_are_mended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    odd = {"task": "t", "item_id": 7, "score": True, "media": "x.png", "tokens": [1], "evidence": "said", "repeat": "2"}
    odd |= {"gold": ["a", "b"], "prompt": None, "seconds": -1}
    (folder / "samples.jsonl").write_text(json.dumps(odd) + "\n")
    made = read_run(folder).rows[0]
    assert (made["item_id"], made["score"], made["media"], made["tokens"], made["repeat"]) == ("7", 1.0, [], {}, 0)
    assert (
        made["evidence"] == {"evidence": "said"} and json.loads(made["gold"]) == ["a", "b"] and made["seconds"] is None
    )
    write_page(make_report([folder]), tmp_path / "out.html", 0)


def test_an_answer_that_was_graded_again_counts_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [row("t", 0, score=0.0), row("t", 1), row("t", 0, score=1.0)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    run = read_run(folder)
    assert [one["score"] for one in run.rows] == [1.0, 1.0] and "more than once" in " ".join(run.problems)


@pytest.mark.parametrize("info", [None, "", "{", "[]", '{"tasks": [1]}', '{"tasks": {"t": 3}, "model": "x"}', "\udcff"])
def test_a_damaged_run_json_costs_a_sentence(tmp_path: Path, info: str | None) -> None:
    folder = make_run(tmp_path / "run", 0, 4)
    (folder / "run.json").unlink()
    if info is not None:
        (folder / "run.json").write_text(info, errors="surrogateescape")
    report = make_report([folder])
    assert report.runs[0].problems and len(report.summaries[0]) == 4
    write_page(report, tmp_path / "out.html", 0)
    assert list(markdown(report)) and json.dumps(as_json(report))


def test_what_is_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        make_report([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"neither run\.json nor samples\.jsonl"):
        make_report([tmp_path])
    (tmp_path / "samples.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no answer to report"):
        make_report([tmp_path])
    with pytest.raises(ValueError, match="at least one"):
        make_report([])


def test_only_pictures_of_the_run_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0, 4)
    good = next((folder / "media").iterdir())
    (folder / "media" / "evil.png").write_text("<svg onload='x'/>")
    (folder / "media" / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "outside.png").write_bytes(good.read_bytes())
    (folder / "media" / "out.png").symlink_to(tmp_path / "outside.png")
    assert picture(folder, f"media/{good.name}") == good
    for name in ("media/evil.png", "media/link.png", "media/out.png", "media/none.png", "media/../run.json"):
        assert picture(folder, name) is None
    for name in ("/etc/passwd", "http://x/a.png", "../outside.png", f"media/{good.name}\n", "media/x.svg"):
        assert picture(folder, name) is None


# ---- the page


def test_the_page_holds_every_sample_once(runs: tuple[Path, Path], page: str) -> None:
    data, shown = block(page, "data"), samples(page)
    rows = [one for folder in runs for one in read_run(folder).rows]
    assert len(shown) == len(rows) == len(data["columns"]["item"])
    assert sorted(one["reply"] for one in shown) == sorted(one["reply"] for one in rows)
    assert {one["key"] for one in shown} == {one["key"] for one in rows}
    named = {name for one in shown for name in one["media"]}
    assert named == set(data["media"]) and all(v.startswith("data:image/png;base64,") for v in data["media"].values())
    # the two answers to one question stand together, the first run's first
    assert data["columns"]["run"][:4] == [0, 1, 0, 1] and data["columns"]["item"][0] == data["columns"]["item"][1]


def test_the_policy_allows_this_script_and_style_and_nothing_else(page: str) -> None:
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found
    policy = dict(part.strip().split(" ", 1) for part in unescape(found[1]).split(";"))
    assert policy["default-src"] == "'none'" and policy["img-src"] == "data: 'self' file:"
    assert policy["require-trusted-types-for"] == "'script'" and policy["base-uri"] == "'none'"
    for name, pattern in (("script-src", r"<script>(.*)</script>"), ("style-src", r"<style>(.*)</style>")):
        body = re.search(pattern, page, re.DOTALL)
        assert body
        assert policy[name] == f"'sha256-{base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()}'"
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    assert script and not re.search(r"innerHTML\s*=|outerHTML|insertAdjacent|document\.write|\beval\b", script[1])


class Elements(HTMLParser):
    """Every element and attribute that a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_hostile_text_makes_no_element(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0, 24, hostile=True)
    info = json.loads((folder / "run.json").read_text())
    info |= {
        "isolation": HOSTILE[1],
        "guarantees": list(HOSTILE),
        "id": HOSTILE[0],
        "versions": {HOSTILE[0]: HOSTILE[2]},
    }
    info["tasks"][HOSTILE[0]] = {"metric": HOSTILE[1], "n": 3}
    (folder / "run.json").write_text(json.dumps(info))
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(row(HOSTILE[0], 0, reply=HOSTILE[6])) + "\n")
    report = make_report([folder])
    write_page(report, tmp_path / "out.html", 10**6)
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    elements = Elements(page).found
    allowed = "html head meta title style body a header div h1 h2 h3 p strong span ul li main section table thead tbody"
    allowed += " tr th td b br small svg line circle form fieldset legend label input select button details summary"
    allowed += " dl dt dd script dialog kbd noscript"
    assert {tag for tag, _ in elements} <= set(allowed.split())
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    assert [a["href"] for _, a in elements if "href" in a] == ["#samples"] and not [
        a for _, a in elements if "src" in a
    ]
    assert sum(tag == "script" for tag, _ in elements) == 3
    assert all(set(one["media"]) <= {None, *block(page, "data")["media"]} for one in samples(page))
    text = "\n".join(markdown(report))
    assert not re.search(r"(?<!\\)<(script|img|svg)", text) and "![" not in text


def test_many_pictures_lie_beside_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0, 8)
    write_page(make_report([folder]), tmp_path / "out.html", media_limit=10)
    (tmp_path / "elsewhere").mkdir()
    write_page(make_report([folder]), tmp_path / "elsewhere" / "r.html", media_limit=10)
    media = block((tmp_path / "elsewhere" / "r.html").read_text(), "data")["media"]
    assert media and all((tmp_path / "elsewhere" / source).is_file() for source in media.values())


def test_an_endless_answer_is_cut_in_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples.jsonl").write_text(json.dumps(row("t", 0, reply="x" * 10**6 + "the end")) + "\n")
    write_page(make_report([folder]), tmp_path / "r.html", 0)
    said = samples((tmp_path / "r.html").read_text())[0]["reply"]
    assert len(said) < 201_000 and said.endswith("the end") and "800,007 characters left out" in said


def test_provenance_names_everything(runs: tuple[Path, Path]) -> None:
    said = dict(provenance(read_run(runs[0])))
    assert said["settings.kimi_gsm8k.gen_kwargs.temperature"] == "1.0" and said["seeds.fewshot"] == "1234"
    assert said["guarantees"].startswith("no network; ")


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.slow
def test_a_browser_shows_hostile_samples_as_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0, 12, hostile=True)
    (tmp_path / "out").mkdir()
    write_page(make_report([folder]), tmp_path / "out" / "report.html", 10**6)
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--virtual-time-budget=4000", "--dump-dom", f"file://{tmp_path / 'out' / 'report.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"<title>run · evaluation report</title>", shown)  # no script of a sample has run
    elements = Elements(shown).found
    assert sum(tag == "article" for tag, _ in elements) == 20
    assert "1 to 20 of " in shown and "&lt;img src=x onerror=" in shown
    assert all((a.get("src") or "").startswith("data:image/png") for tag, a in elements if tag == "img")
    assert not [tag for tag, _ in elements if tag in ("iframe", "link", "base", "object")]
