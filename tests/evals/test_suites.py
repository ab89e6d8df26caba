"""Every suite from files in its published form: gold answers are right, silence is not, broken rows are named.

.venv/bin/python -m pytest tests/evals/test_suites.py
"""

import importlib.util
import json
import pickle
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import compress

import pytest

from evals import suites
from evals.graders import GOLDS
from evals.rows import Ref, Source, find_data, open_picture
from evals.suites import load, media, names, settings, task, verdict

_spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
assert _spec is not None and _spec.loader is not None
published = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published)

BENCHMARKS = sorted(name for name in names() if name.startswith("kimi_"))
WORLDS = sorted(name for name in names() if name.startswith("world_"))
SANDBOXED = ("function", "repository")
RIGHT = {  # where the task holds no answer, or another form of answer is asked for
    "livecodebench/abc_a": "```python\nprint(2 * int(input()))\n```",
    "livecodebench/3000": "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```",
    "polyglot/python/leap": "leap.py\n```python\ndef leap_year(year):\n    return year % 4 == 0\n```",
    "ifeval/1000": "No comma here.",
    "ifeval/1001": "A cat and a cat.",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.make_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    suites.network.cache_clear()
    yield
    suites.network.cache_clear()


def right(document: dict[str, Any]) -> str:
    fields = json.loads(document["task"])
    if document["id"] in RIGHT:
        return RIGHT[document["id"]]
    gold = GOLDS[fields["kind"]](fields["gold"], fields["data"])[0]
    return f"```\n{gold}\n```" if fields["kind"] in SANDBOXED and "predict" not in fields["data"] else gold


def kind_of(document: dict[str, Any]) -> str:
    return str(json.loads(document["task"])["kind"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_gold_is_right_and_silence_is_wrong(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(made))
    for document in load(name, profile="nano"):
        assert document["question"].count("<image>") == len(document["media"]) == len(media(document))
        assert {type(value) for key, value in document.items() if key != "media"} == {str}
        assert str(made) not in json.dumps(document), "a document names a folder of this machine"
        if kind_of(document) in SANDBOXED:
            continue  # the next tests: every one of them takes a sandbox
        assert verdict(document, f"<think>hm</think>{right(document)}").score == 1
        assert (verdict(document, "").score, verdict(document, "").status) == (0, "silent")
        assert verdict(document, "no, idea at all").score == 0
        assert verdict(document, "<think>hm", truncated=True).status == "truncated"


SMALL = ["humaneval", "humaneval_plus", "mbpp_plus", "cruxeval_input", "cruxeval_output", "livecodebench", "quixbugs"]


@pytest.mark.parametrize("name", SMALL)
def test_programs_are_run(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(made))
    for document in load(f"kimi_{name}"):
        found = verdict(document, right(document))
        assert found.score == 1, found.evidence
        assert verdict(document, "").score == 0
        assert verdict(document, "I do not know.").score == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kimi_swebench", "kimi_aider_polyglot"])
def test_repositories_are_tested(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(made))
    (document,) = load(name)
    found = verdict(document, f"<think>hm</think>{right(document)}")
    assert found.score == 1, found.evidence
    assert verdict(document, "").score == 0
    assert verdict(document, "leap.py\n```python\ndef leap_year(year):\n    return True\n```").score == 0
    assert [problem.id for problem in suites.problems(name)]


def test_another_input_with_the_same_output_counts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(made))
    (document,) = load("kimi_cruxeval_input")
    assert verdict(document, "[ANSWER]\nassert f(b=2, a='x') == ['x', 'x']\n[/ANSWER]").score == 1
    assert verdict(document, "[ANSWER]\nassert f('x', 3) == ['x', 'x']\n[/ANSWER]").score == 0


@pytest.mark.parametrize("name", WORLDS)
def test_the_world_is_a_suite(name: str) -> None:
    documents = load(name, 10, profile="nano")
    for document in documents:
        assert document["question"].count("<image>") == len(document["media"]) == len(media(document))
        if kind_of(document) not in SANDBOXED:
            assert verdict(document, document["answer"]).score == 1
            assert verdict(document, "").score == 0
    assert documents == load(name, 10, profile="nano")
    assert documents != load(name, 10, seed=8, profile="nano")


def test_the_world_asks_what_moonkit_score_asks() -> None:
    from evals.world import questions

    asked = {
        f"{sample.family}/{number}": sample.turns[number].question
        for sample, number in questions("chart", 3, "heldout", 7)
    }
    ours = [d["question"].removeprefix("<image>") for d in load("world_chart", 40) if "world/chart/" in d["id"]]
    assert ours[:3] == list(asked.values())


def test_protocols() -> None:
    ask = suites._words(suites._metadata("kimi_mmmu_pro"))
    text = ask({"images": "<image><image>", "question": "Which?", "options": "A. x"})
    assert text.startswith("<image><image>") and "'Answer: $LETTER'" in text
    assert settings("kimi_mmmu_pro").tokens == 65_536 and settings("kimi_ocrbench").tokens == 16_384
    assert settings("kimi_ocrbench", "k2_5").repeats == 1 and settings("kimi_gpqa_diamond").repeats == 8
    assert (settings("kimi_videomme").frames, settings("kimi_videomme").pixels) == (2048, 448)
    assert settings("kimi_swebench", "k2_5").thinking is False
    for name in names():
        nano = settings(name, "nano")
        assert (nano.tokens, nano.temperature, nano.repeats) == (256, 0, 1)
        assert nano.generation == {"until": [], "max_gen_toks": 256, "do_sample": False, "temperature": 0.0}


@pytest.mark.parametrize("name", sorted(names()))
def test_the_yaml_runs_with_the_settings_that_it_states(name: str) -> None:
    config = suites._suites()[name]
    assert config["generation_kwargs"] == settings(name).generation
    assert config.get("repeats", 1) == settings(name).repeats == task(name)["repeats"]
    assert name == config["task"] == config["metadata"]["name"]
    assert config["metadata"]["protocol"] and config["metadata"]["asks"] and config["metadata"]["grader"]


# ---- what breaks


def rewrite(path: Path, changes: dict[str, Any]) -> None:
    """The last row of a JSON-lines file, changed; None takes a field away."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1] |= changes
    rows[-1] = {key: value for key, value in rows[-1].items() if value is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


EVIL = b64encode(compress(pickle.dumps(Path("x")))).decode()

BROKEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("mbpp", "mbpp/mbpp.jsonl", {"task_id": 12, "test_list": "assert"}, "mbpp.jsonl:3: 'test_list' is neither JSON"),
    ("mbpp", "mbpp/mbpp.jsonl", {"task_id": 12, "test_list": []}, "mbpp.jsonl:3: 'test_list' is empty"),
    ("cruxeval_input", "cruxeval/cruxeval.jsonl", {"code": "x = 1"}, "cruxeval.jsonl:1: 'code' does not define f"),
    (
        "livecodebench",
        "livecodebench/test.jsonl",
        {"private_test_cases": EVIL},
        "test.jsonl:2: 'private_test_cases' is",
    ),
    ("livecodebench", "livecodebench/test.jsonl", {"metadata": "{}"}, "test.jsonl:2: functional tests need"),
    ("swebench", "swebench/test.jsonl", {"repo": "own/other"}, "test.jsonl:1: row 0 (own__sums-1): no repository"),
    (
        "mathvision",
        "math_vision_mini/testmini.jsonl",
        {"answer": "Q"},
        "testmini.jsonl:3: 'answer' is 'Q', which names",
    ),
    ("mathvision", "math_vision_mini/testmini.jsonl", {"image": "images/9.jpg"}, "testmini.jsonl:3: the picture"),
    ("pointing", "pointing/test.jsonl", {"regions": [[0, 0, 900, 9]]}, "test.jsonl:1: a region lies outside"),
    ("gsm8k", "gsm8k/test.jsonl", {"answer": "four"}, "test.jsonl:2: 'answer' has no '#### number'"),
    ("gsm8k", "gsm8k/test.jsonl", {"answer": "#### four"}, "test.jsonl:2: number: the gold 'four' is no number"),
    ("gsm8k", "gsm8k/test.jsonl", {"question": None}, "test.jsonl:2: no 'question'; the row has 'answer'"),
    ("ifeval", "ifeval/input_data.jsonl", {"kwargs": []}, "input_data.jsonl:2: 1 instructions with 0 kwargs"),
    ("ifeval", "ifeval/input_data.jsonl", {"instruction_id_list": ["no:such"]}, "input_data.jsonl:2: "),
    ("math500", "math500/test.jsonl", {"answer": " "}, "test.jsonl:2: 'answer' is empty"),
]


@pytest.mark.parametrize(("name", "file", "changes", "message"), BROKEN)
def test_a_broken_row_is_one_message_with_file_and_line(
    name: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(tmp_path))
    folder = file.split("/")[0]
    getattr(published, folder)(tmp_path / folder)
    rewrite(tmp_path / file, changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(f"kimi_{name}")


def test_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(tmp_path))
    for folder in ("gsm8k", "ai2d", "mnist_t10k", "gpqa", "docvqa", "chartqa"):
        getattr(published, folder)(tmp_path / folder)
    with (tmp_path / "gsm8k" / "test.jsonl").open("a") as file:
        file.write('{"question": "cut o')
    with pytest.raises(ValueError, match=r"test\.jsonl:3: not JSON"):
        load("kimi_gsm8k")
    (tmp_path / "ai2d" / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="not a Parquet file"):
        load("kimi_ai2d")
    (tmp_path / "mnist_t10k" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b no")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz: cannot be unpacked"):
        load("kimi_mnist")
    with (tmp_path / "gpqa" / "gpqa_diamond.csv").open("a") as file:
        file.write("rec2,only two\n")
    with pytest.raises(ValueError, match=r"gpqa_diamond\.csv:4: 2 fields, the header has 8"):
        load("kimi_gpqa_diamond")
    (tmp_path / "docvqa" / "documents" / "xnbl0037_1.png").write_bytes(b"GIF no")
    with pytest.raises(ValueError, match=r"xnbl0037_1\.png: not a picture"):
        media(load("kimi_docvqa", 1)[0])
    (tmp_path / "chartqa" / "test" / "png" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"test_augmented\.json:1: the picture '1\.png' is not in"):
        load("kimi_chartqa")


def test_missing_data_names_the_places_and_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="no data for kimi_docvqa") as caught:
        load("kimi_docvqa")
    assert str(tmp_path / "docvqa") in str(caught.value) and "questionId" in str(caught.value)
    assert "lmms-lab/DocVQA cannot be reached" in str(caught.value)
    (tmp_path / "docvqa").mkdir()
    with pytest.raises(ValueError, match=r"has no .*val_v1\.0"):
        load("kimi_docvqa")
    with pytest.raises(ValueError, match="no suite 'kimi_docqa'; known: kimi_docvqa"):
        load("kimi_docqa")
    with pytest.raises(ValueError, match="no profile"):
        settings("kimi_docvqa", "k3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load("kimi_docvqa", 0)


def test_a_question_that_spells_the_marker_moves_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(tmp_path))
    published.math_vision_mini(tmp_path / "math_vision_mini")
    rewrite(tmp_path / "math_vision_mini" / "testmini.jsonl", {"question": "what is <image> here?"})
    assert load("kimi_mathvision")[-1]["question"].count("<image>") == 1


def test_pictures_in_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base64 in TSV and JSON lines, after line breaks inside of quoted fields; bytes in Parquet, three groups."""
    monkeypatch.setenv("MOONKIT_DATA", str(tmp_path))
    colours = ["red", "lime", "blue", "white", "black"]
    packed = [b64encode(published.png(colour, (300, 200))).decode() for colour in colours]
    source = Source("t", tmp_path / "t")
    (tmp_path / "t").mkdir()
    lines = [f'{n}\t"two\nlines {n}"\t{text}' for n, text in enumerate(packed)]
    (tmp_path / "t" / "a.tsv").write_text("index\tquestion\timage\n" + "\n".join(lines) + "\n")
    published.lines(tmp_path / "t" / "b.jsonl", [{"question": "é", "image": text} for text in packed])
    published.table(tmp_path / "t" / "c.parquet", [{"image": published.png(colour)} for colour in colours])
    for file in ("a.tsv", "b.jsonl", "c.parquet"):
        refs = [row.picture("image") for row in source.rows(file)]
        shown = [open_picture(ref, find_data("t")).getpixel((5, 5)) for ref in reversed(refs)]
        assert shown == [(0, 0, 0), (255, 255, 255), (0, 0, 255), (0, 255, 0), (255, 0, 0)], file
        assert all(Ref(**json.loads(ref.text())) == ref for ref in refs)


def test_tables_with_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(tmp_path))
    picture = b64encode(published.png()).decode()
    letters = ["A", "B", "C", "D"]
    for folder, header, row in [
        ("chartqa", ["question", "answer", "split"], ["How many?", "20", "test_human"]),
        ("docvqa", ["question", "answer"], ["What date?", "['1/8/93', 'January 8']"]),
        ("ocrbench", ["question", "answer", "category"], ["what?", "['CENTRE']", "Regular Text Recognition"]),
        ("ai2d", ["question", *letters, "answer"], ["Which?", "4", "3", "2", "1", "C"]),
        ("realworldqa", ["question", *letters, "answer"], ["Where?", "Left", "Right", "", "", "B"]),
    ]:
        (tmp_path / folder).mkdir()
        cells = "\n".join("\t".join(each) for each in (["index", "image", *header], ["0", picture, *row]))
        (tmp_path / folder / f"{folder}.tsv").write_text(cells + "\n")
        (document,) = load(f"kimi_{folder}")
        assert media(document)[0].size == (40, 30)
        assert verdict(document, right(document)).score == 1
        assert document["answer"] == {"ai2d": "C", "realworldqa": "B"}.get(folder, document["answer"])
    assert "B. Right" in load("kimi_realworldqa")[0]["question"]


def test_contests_by_date(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(made))
    assert len(load("kimi_livecodebench", after="2024-10-05")) == 2
    with pytest.raises(ValueError, match="holds no question"):
        load("kimi_livecodebench", before="2024-10-05")
    with pytest.raises(ValueError, match="kimi_gsm8k has no option after; known: none"):
        load("kimi_gsm8k", after="2024-10-05")


def test_parts_of_videos(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(made))
    clips = {d["tests"]: media(d)[0] for d in load("kimi_mvbench", profile="nano")}
    assert clips["moving_count"].path is not None and clips["moving_count"].max_frames == 8
    part = clips["action_sequence"]  # 0.5 to 2.0 s at two a second; frame n of 8 a second has the shade 10 n
    assert len(part.frames) == 3 and part.fps == 2.0
    shades = [frame.getpixel((3, 3))[0] for frame in part.frames]
    assert [round(shade / 10) for shade in shades] == [6, 10, 14]
    frames = clips["episodic_reasoning"].frames  # 1 to 3 s of a folder with three a second
    assert [round(frame.getpixel((3, 3))[0] / 20) for frame in frames] == [3, 5, 6, 8]


def test_chosen_documents(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(made))
    everything = load("kimi_charxiv")
    assert load("kimi_charxiv", 2) == everything[:2]
    drawn = [[d["id"] for d in load("kimi_charxiv", 2, seed)] for seed in range(8)]
    assert len({tuple(each) for each in drawn}) > 1 and drawn[3] == [d["id"] for d in load("kimi_charxiv", 2, 3)]
    assert [d["cluster"] for d in load("kimi_docvqa")] == ["docvqa/document/279"] * 2


def test_graders_of_benchmarks() -> None:
    from evals.graders import Task, grade

    chart = Task("relaxed", ["200"], {"tolerance": 0.05})
    assert [grade(chart, said).score for said in ("200", "209.9", "190", "211", "2 hundred")] == [1, 1, 1, 0, 0]
    assert grade(Task("relaxed", ["5%"], {}), "0.05").score == 1
    assert grade(Task("relaxed", ["0"], {}), "0").score == 1 and grade(Task("relaxed", ["0"], {}), "0.01").score == 0
    read = Task("contains", ["CENTRE"], {})
    assert grade(read, "It says:\nCentre.").score == 1 and grade(read, "centr").score == 0
    formula = Task("contains", ["a ^ 2"], {"spaces": False})
    assert grade(formula, "$a^2$").score == 1 and grade(formula, "$A^2$").score == 0
    assert grade(Task("literal", "[3, 4]"), "The answer is [3,4]").score == 1
    for hostile in ("[" * 100_000, "{1: " * 5000, "9" * 30_000, "\x00", "1e999"):
        assert grade(Task("literal", "[3, 4]"), hostile).score == 0
        assert grade(chart, hostile).score == 0
    with pytest.raises(ValueError, match="no Python literal"):
        grade(Task("literal", "x y"), "1")


# ---- real data, where it is


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("humaneval", 164),
        ("mbpp", 500),
        ("cruxeval_input", 800),
        ("gsm8k", 1319),
        ("ifeval", 541),
        ("mathvision", 304),
        ("mnist", 300),
    ],
)
def test_real_data(name: str, count: int, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(data))
    documents = load(f"kimi_{name}", count + 1 if name != "mnist" else count)
    assert len(documents) == len({document["id"] for document in documents}) == count
    for document in documents[:: max(1, count // 20)]:
        media(document)
        if kind_of(document) not in (*SANDBOXED, "constraints"):
            assert verdict(document, right(document)).score == 1
            assert verdict(document, "").score == 0


# ---- lm-eval


def test_lm_eval_builds_and_scores_every_suite_offline(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("MOONKIT_DATA", str(made))
    manager = TaskManager(include_path=str(suites.FOLDER), include_defaults=False, metadata={"profile": "nano"})
    assert set(names()) | {"world"} == set(manager.all_tasks)
    built = manager.load(BENCHMARKS)["tasks"]
    assert set(built) == set(BENCHMARKS)
    for name, each in built.items():
        shown = each.doc_to_image(each.eval_docs[0])
        assert (shown is not None) == (suites._metadata(name)["part"] in ("vision", "video"))

    class Oracle(LM):
        """Right, then wrong, then right again."""

        MULTIMODAL = True

        def __init__(self, answers: dict[str, str]) -> None:
            super().__init__()
            self.answers, self.asked = answers, 0

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            out = []
            for request in requests:
                self.asked += 1
                out.append(self.answers.get(request.args[0], "") if self.asked % 2 else "no idea")
            return out

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

    chosen = ["kimi_docvqa", "kimi_mvbench", "kimi_gsm8k"]
    oracle = Oracle({d["question"]: right(d) for name in chosen for d in load(name, profile="nano")})
    tasks = [task(name, "nano") | {"repeats": 4} for name in chosen]
    found = simple_evaluate(oracle, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)
    assert found is not None
    for name in chosen:
        assert found["results"][name]["score,all"] == 0.5, "two of four samples are right"
        assert found["results"][name]["infra_errors,all"] == 0
        assert len(found["samples"][name][0]["filtered_resps"][0]) == 4
        assert found["configs"][name]["generation_kwargs"]["max_gen_toks"] == 256


def test_failed_machinery_is_left_out_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    from evals import graders

    monkeypatch.setitem(
        graders.KINDS, "exact", lambda gold, data, said: (None if "!" in said else float(said == gold), {})
    )
    document = {"task": json.dumps({"kind": "exact", "gold": "yes", "data": {"once": 1}})}
    assert suites.process_results(document, [["yes", "no", "!", "yes"]]) == {
        "score": 2 / 3,
        "truncated": 0,
        "infra_errors": 1,
    }
    assert "score" not in suites.process_results(document, [["!"]])
    with pytest.raises(ValueError, match="not a document of these suites"):
        verdict({"question": "?"}, "yes")


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "suites.md"
    assert page.read_text(encoding="utf-8") == "\n".join(suites.markdown()) + "\n", (
        "write it again: python -m evals.suites --markdown docs/suites.md"
    )


@pytest.mark.slow
def test_the_world_is_a_group_of_lm_eval() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.dummy import DummyLM
    from lm_eval.tasks import TaskManager

    class Silent(DummyLM):  # type: ignore[misc]
        MULTIMODAL = True

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [""] * len(requests)

    manager = TaskManager(include_path=str(suites.FOLDER), include_defaults=False)
    found = simple_evaluate(Silent(), tasks=["world"], task_manager=manager, limit=1, bootstrap_iters=0)
    assert found is not None and found["groups"]["world"]["score,all"] == 0
    assert sorted(found["group_subtasks"]["world"]) == WORLDS


@pytest.mark.parametrize(("language", "count"), [("es", 115), ("fr", 235), ("ja", 172)])
def test_instructions_in_other_languages(
    language: str, count: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONKIT_DATA", str(data))
    documents = suites.load("kimi_ifeval", language=language)
    assert len(documents) == count and documents[0]["id"].startswith(f"ifeval/{language}/")
    for document in documents:
        assert all(name.startswith(f"{language}:") for name in document["answer"].split(", "))
        assert suites.verdict(document, "").score == 0.0
        assert suites.verdict(document, "¿Qué? « Oui », 「はい」。\n\n* uno").status == "graded"


def test_longvideobench_as_the_hub_has_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "longvideobench"
    published.video(root / "videos" / "a.mp4")
    base = {"id": "a_0", "video_id": "a", "video_path": "a.mp4", "question": "What?", "correct_choice": 2}
    options = {f"option{number}": text for number, text in enumerate(("rose", "lily", "grass", "N/A", "N/A"))}
    published.table(root / "validation-00000-of-00001.parquet", [base | options | {"question_category": "TOS"}])
    monkeypatch.setenv("MOONKIT_DATA", str(tmp_path))
    (document,) = suites.load("kimi_longvideobench")
    assert document["answer"] == "C" and "C. grass" in document["question"] and "N/A" not in document["question"]
    assert suites.verdict(document, "C").score == 1.0
