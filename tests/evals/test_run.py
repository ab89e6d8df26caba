"""moonkit eval: one set of numbers on every path, run folders, kills, broken things in one sentence.

pytest tests/evals/test_run.py                    -m slow: 200 items on each path
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import evals
from evals import adapter, record, regrade, run
from evals.adapter import Moonkit
from evals.store import Store
from evals.tasks import Tasks

ROOT = Path(__file__).parents[2]
MODEL = "pretrained=untrained:tiny,thinking=false"

SUMS = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "What is {{{{a}}}}+{{{{b}}}}?"
doc_to_target: "{{{{c}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6, do_sample: {sample}, temperature: {temperature}}}
metric_list:
  - {{metric: !function grading.likeness, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2}}
"""
PICK = """task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{a}}}}+{{{{b}}}}="
doc_to_choice: ["1", "2", "three", "4"]
doc_to_target: "{{{{pick}}}}"
metadata: {{version: 1}}
"""
# never the same for two models, so that equal scores say something
GRADING = """
def likeness(references, predictions, **_):
    return sum(map(ord, predictions[0])) % 101 / 100
"""


def make_tasks(folder: Path, count: int, sample: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    lines = [{"id": f"s{i}", "a": i, "b": i + 1, "c": str(2 * i + 1), "pick": i % 4} for i in range(count)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"rows": rows, "sample": str(sample).lower(), "temperature": 1.0 if sample else 0.0}
    (folder / "sums.yaml").write_text(SUMS.format(**values))
    (folder / "pick.yaml").write_text(PICK.format(**values))
    (folder / "grading.py").write_text(GRADING)
    return folder


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def tiny() -> Moonkit:
    return Moonkit("untrained:tiny", thinking=False)


@pytest.fixture()
def quick(monkeypatch: pytest.MonkeyPatch, tiny: Moonkit) -> None:
    """The command line loads its model anew; here the weights are already there."""
    load = adapter.Kimi.from_pretrained

    def known(name: str, *rest: Any, **more: Any) -> Any:
        return tiny.kimi if name == "untrained:tiny" else load(name, *rest, **more)

    monkeypatch.setattr(adapter.Kimi, "from_pretrained", known)


@pytest.fixture()
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replies were really generated, a number per batch."""
    counts: list[int] = []
    real = adapter.generate

    def counting(kimi: Any, prompts: Any, *rest: Any) -> Iterator[dict[int, int]]:
        counts.append(len(prompts))
        return real(kimi, prompts, *rest)

    monkeypatch.setattr(adapter, "generate", counting)
    return counts


def moonkit_eval(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["moonkit eval", *arguments])
    run.main()


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: {key: value for key, value in found.items() if "," in key and "stderr" not in key}
        for name, found in results.items()
    }


def three_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, sample: bool) -> None:
    tasks = make_tasks(tmp_path / "tasks", count, sample)
    common = ["--tasks", "sums,pick", "--model_args", MODEL, "--include_path", str(tasks)]
    stock = [sys.executable, "-c"]
    # the stock command line; its own 13,000 tasks are left out, for they take longer than all of this
    stock += ["import functools, evals.adapter, lm_eval.tasks as t;"
              "t.TaskManager = functools.partial(t.TaskManager, include_defaults=False);"
              "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"]  # fmt: skip
    stock += ["run", "--model", "moonkit", *common, "--output_path", str(tmp_path / "stock"), "--log_samples"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(stock, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "stock").rglob("results_*.json")
    theirs = scores(json.loads(path.read_text())["results"])

    moonkit_eval(monkeypatch, *common, "--out", str(tmp_path / "ours"))
    ours = scores(json.loads((tmp_path / "ours" / "lm-eval.json").read_text())["results"])
    result = evals.evaluate(
        "untrained:tiny",
        ["sums", "pick"],
        include_path=tasks,
        model_args={"thinking": False},
        out=tmp_path / "api",
    )
    python = {name: {k: v for k, v in found.items() if "stderr" not in k} for name, found in result.scores.items()}
    assert theirs == ours == python and 0 < python["sums"]["likeness,none"] < 1
    rows = [[json.loads(line) for line in (tmp_path / n / "samples.jsonl").open()] for n in ("ours", "api")]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds")
    assert rows[0] == rows[1] and len(rows[0]) == 2 * count
    mean = sum(row["score"] for row in rows[0] if row["task"] == "sums") / count
    assert mean == pytest.approx(python["sums"]["likeness,none"])


def test_every_path_gives_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    three_paths(tmp_path, monkeypatch, 6, sample=False)


@pytest.mark.slow
def test_every_path_gives_the_same_scores_on_200_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_paths(tmp_path, monkeypatch, 200, sample=True)


def test_a_run_folder_says_what_was_run(tmp_path: Path, tiny: Moonkit, generated: list[int]) -> None:
    tasks = make_tasks(tmp_path / "tasks", 4, sample=True)
    result = evals.evaluate(tiny, ["sums", "pick"], include_path=tasks, repeats=3, limit=2, out=tmp_path / "r")
    told = json.loads((tmp_path / "r" / "run.json").read_text())
    assert told["finished"] and told["model"]["weights_sha256"] == tiny.identity["weights_sha256"]
    assert told["settings"]["sums"]["repeats"] == 3 and told["settings"]["sums"]["limit"] == 2
    assert told["tasks"]["sums"]["n"] == 2 and told["tasks"]["sums"]["metric"] == "likeness,none"
    assert (
        len(told["tasks"]["pick"]["data_sha256"]) == 64
        and told["versions"]["lm_eval"]
        and told["seeds"]["replies"] == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").open()]
    mine = [row for row in rows if row["task"] == "sums"]
    assert [(row["item_id"], row["repeat"]) for row in mine] == [
        ("s0", 0),
        ("s0", 1),
        ("s0", 2),
        ("s1", 0),
        ("s1", 1),
        ("s1", 2),
    ]
    assert len({row["reply"] for row in mine}) > 3 and len({row["key"] for row in mine}) == 6
    for row in mine:
        assert row["score"] == sum(map(ord, row["reply"])) % 101 / 100 and row["tokens"]["completion"] <= 6
        assert row["cluster"] == row["item_id"] and row["gold"] in ("1", "3") and row["kind"] == "lm-eval likeness"
    assert [row["score"] in (0.0, 1.0) and row["reply"] == "" for row in rows if row["task"] == "pick"] == [True, True]
    assert sum(generated) == 6 and result.folder == tmp_path / "r"

    again = evals.evaluate(tiny, ["sums", "pick"], include_path=tasks, repeats=3, limit=2, out=tmp_path / "r")
    assert sum(generated) == 6 and again.scores == result.scores
    with pytest.raises(ValueError, match="holds another run"):
        evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "r")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(ValueError, match="no run folder and not empty"):
        evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "other")


def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, generated: list[int]
) -> None:
    tasks = make_tasks(tmp_path / "tasks", 150, sample=True)
    command = ["--tasks", "sums", "--include_path", str(tasks), "--model_args", MODEL + ",max_batch_tokens=1"]
    command += ["--repeats", "2", "--limit", "150", "--out", str(tmp_path / "r")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-m", "moonkit", "eval", *command], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    kept = tmp_path / "r" / "store" / "replies.jsonl"
    while child.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "r" / "samples.jsonl").exists()
    with pytest.raises(
        ValueError, match="has not finished; the same command goes on with it: moonkit eval --tasks sums"
    ):
        regrade.regrade(tmp_path / "r")
    with open(kept, "ab") as file:
        file.write(b'{"key": "torn')
    with Store(kept.parent) as store:
        before = len(store)
    assert 5 <= before < 300
    monkeypatch.setattr(adapter, "REPLY_ROOM", 6)
    command = [each.replace("max_batch_tokens=1", "max_batch_tokens=4096") for each in command]
    moonkit_eval(monkeypatch, *command)
    assert sum(generated) == 300 - before
    with Store(kept.parent) as store:
        assert len(store) == 300
    assert len((tmp_path / "r" / "samples.jsonl").read_text().splitlines()) == 300


def test_an_unfinished_run_is_found_without_out(tmp_path: Path, tiny: Moonkit, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = make_tasks(tmp_path / "tasks", 3)
    with monkeypatch.context() as broken:
        broken.setattr(adapter, "generate", lambda *_: (_ for _ in ()).throw(RuntimeError("the device is\ngone")))
        with pytest.raises(ValueError, match=r"the model failed: the device is gone\. 0 of 3 new answers .* goes on"):
            evals.evaluate(tiny, ["sums"], include_path=tasks)
    (left,) = (tmp_path / "runs" / "eval").glob("*/run.json")
    result = evals.evaluate(tiny, ["sums"], include_path=tasks)
    assert result.folder.resolve() == left.parent.resolve() and result.record["finished"]
    assert evals.evaluate(tiny, ["sums"], include_path=tasks).folder != result.folder


def test_an_error_in_the_middle_loses_nothing(
    tmp_path: Path, tiny: Moonkit, monkeypatch: pytest.MonkeyPatch, generated: list[int]
) -> None:
    tasks = make_tasks(tmp_path / "tasks", 6)
    model = Moonkit(tiny.kimi, thinking=False, max_batch_tokens=1)
    real, calls = adapter.generate, []

    def fails(*arguments: Any) -> Iterator[dict[int, int]]:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no memory left")
        return real(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(adapter, "generate", fails)
        with pytest.raises(ValueError, match=r"no memory left\. 3 of 6 new answers are kept"):
            evals.evaluate(model, ["sums"], include_path=tasks, out=tmp_path / "r")
    assert sum(generated) == 3
    evals.evaluate(model, ["sums"], include_path=tasks, out=tmp_path / "r")
    assert sum(generated) == 6


def test_regrading_generates_nothing(
    tmp_path: Path,
    tiny: Moonkit,
    generated: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = make_tasks(tmp_path / "tasks", 3, sample=True)
    command = ["--tasks", "sums,pick", "--include_path", str(tasks), "--model_args", MODEL, "--repeats", "2"]
    moonkit_eval(monkeypatch, *command, "--out", str(tmp_path / "r"))
    count = sum(generated)
    (tasks / "grading.py").write_text("def likeness(references, predictions, **_):\n    return 0.25\n")
    monkeypatch.setattr(adapter, "Moonkit", None)
    moonkit_eval(monkeypatch, "regrade", str(tmp_path / "r"))
    shown = capsys.readouterr().out
    assert "is 0.2500" in shown and "was" in shown and sum(generated) == count == 6
    old = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").open()]
    new = [json.loads(line) for line in (tmp_path / "r-regraded" / "samples.jsonl").open()]
    assert {row["score"] for row in new if row["task"] == "sums"} == {0.25}
    for one, two in zip(old, new, strict=True):
        same = ("reply", "prompt", "key", "tokens", "finish_reason", "repeat", "item_id")
        assert [one[name] for name in same] == [two[name] for name in same]
        assert one["task"] != "pick" or one["score"] == two["score"]
    told = json.loads((tmp_path / "r-regraded" / "run.json").read_text())
    assert told["regraded_from"] == json.loads((tmp_path / "r" / "run.json").read_text())["id"]
    rows = tasks / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"a": 1', '"a": 7'))
    with pytest.raises(ValueError, match="sums, row 1, repeat 0: the data has changed"):
        regrade.regrade(tmp_path / "r", tmp_path / "again")


# ---- what is wrong, in one sentence


def test_an_unknown_task_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_tasks(tmp_path / "tasks", 1)
    tasks = Tasks(include_path=str(tmp_path / "tasks"), include_defaults=False)
    with pytest.raises(ValueError, match="no task 'sumss'; did you mean sums"):
        tasks.match_tasks(["sumss"])
    with pytest.raises(ValueError, match="no task 'sumss'"):
        tasks.load(["sumss"])
    with pytest.raises(ValueError, match="no task was named"):
        moonkit_eval(monkeypatch, "--limit", "3")
    with pytest.raises(ValueError, match="--model 'moonkitt' is not known; near: moonkit"):
        moonkit_eval(monkeypatch, "--model", "moonkitt", "--tasks", "sums")
    with pytest.raises(ValueError, match="--repeats must be at least 1"):
        moonkit_eval(monkeypatch, "--tasks", "sums", "--repeats", "0")


def test_ours_are_found_without_indexing_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tasks(tmp_path / "tasks", 1)
    tasks = Tasks(include_path=str(tmp_path / "tasks"))
    monkeypatch.setattr(tasks, "_index_all", lambda: pytest.fail("indexed all of lm-eval's tasks"))
    assert tasks.match_tasks(["sums"]) == ["sums"]
    loaded = tasks.load(["sums", "pick"])
    assert list(loaded["tasks"]) == ["sums", "pick"] and tasks.load(["sums", "pick"]) is loaded


def test_missing_data_and_broken_rows(tmp_path: Path, tiny: Moonkit, generated: list[int]) -> None:
    tasks = make_tasks(tmp_path / "tasks", 3)
    (tasks / "rows.jsonl").unlink()
    with pytest.raises((ValueError, OSError), match=r"rows\.jsonl"):
        evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "a")
    make_tasks(tasks, 3)
    (tasks / "sums.yaml").write_text(
        (tasks / "sums.yaml")
        .read_text()
        .replace('doc_to_text: "What is {{a}}+{{b}}?"', "doc_to_text: !function grading.ask")
    )
    asks = "\ndef ask(doc):\n    return 'What is ' + {'s1': None}.get(doc['id'], 'it')\n"
    (tasks / "grading.py").write_text(GRADING + asks)
    with pytest.raises(ValueError, match="sums, row s1: a broken row, TypeError"):
        evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "b")
    fussy = (
        "\ndef ask(doc):\n    return doc['id']\n" + "def likeness(references, predictions, **_):\n    return {}['x']\n"
    )
    (tasks / "grading.py").write_text(fussy)
    assert not generated
    with pytest.raises(ValueError, match="sums, row s0: a broken row, KeyError: it has no 'x'"):
        evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "c")
    assert sum(generated) == 3
    (tasks / "grading.py").write_text(GRADING + "\ndef ask(doc):\n    return doc['id']\n")
    assert evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "c").scores
    assert sum(generated) == 3  # nothing was lost


def test_code_outside_our_sandbox_needs_the_word(tmp_path: Path, tiny: Moonkit) -> None:
    tasks = make_tasks(tmp_path / "tasks", 1)
    (tasks / "sums.yaml").write_text((tasks / "sums.yaml").read_text() + "unsafe_code: true\n")
    with pytest.raises(ValueError, match=r"sums: lm-eval would run the model's code .* --confirm_run_unsafe_code"):
        evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "a")
    result = evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "b", confirm_run_unsafe_code=True)
    assert result.record["isolation"] == "none"


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    assert record.read_record(tmp_path) is None
    for text in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="is no run record"):
            record.read_record(tmp_path)
    with pytest.raises(ValueError, match="is no run folder"):
        regrade.regrade(tmp_path / "nothing")


def test_a_suite_with_a_picture(tmp_path: Path, tiny: Moonkit) -> None:
    model = Moonkit(tiny.kimi, thinking="true")
    name = "world_picture"
    result = evals.evaluate(model, [name], limit=2, out=tmp_path / "r", model_args=None)
    rows = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").open()]
    assert len(rows) == 2 and result.record["settings"][name]["chat_template"]
    for row in rows:
        assert row["media"] and all((tmp_path / "r" / one).is_file() for one in row["media"])
        assert row["status"] in ("graded", "silent", "truncated") and row["tokens"]["media"] > 0
        assert row["prompt"].endswith("<think>") and row["cluster"] and row["gold"]


def test_rows_of_a_task_are_there_before_the_next_one_begins(
    tmp_path: Path, tiny: Moonkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make_tasks(tmp_path / "tasks", 4)
    second = (tasks / "sums.yaml").read_text().replace("task: sums", "task: more")
    (tasks / "more.yaml").write_text(second.replace("What is", "Say what is"))
    real, seen = adapter.generate, []

    def one_task(kimi: Any, prompts: Any, *rest: Any) -> Iterator[dict[int, int]]:
        seen.append(len(prompts))
        if len(seen) == 2:
            raise RuntimeError("the power is gone")
        return real(kimi, prompts, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(adapter, "generate", one_task)
        with pytest.raises(ValueError, match="the power is gone"):
            evals.evaluate(tiny, ["sums", "more"], include_path=tasks, out=tmp_path / "r", limit=4)
    early = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").open()]
    assert [row["task"] for row in early] == ["sums"] * 4
    said = json.loads((tmp_path / "r" / "run.json").read_text())
    assert said["finished"] is None and said["tasks"]["sums"]["n"] == 4 and "more" not in said["tasks"]
    whole = evals.evaluate(tiny, ["sums", "more"], include_path=tasks, out=tmp_path / "r", limit=4)
    late = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").open()]
    assert len(late) == 8 and late[:4] == early
    assert {task["isolation"] for task in whole.record["tasks"].values()} == {"nothing was run"}


def test_lm_evals_own_tasks_have_a_running_score(
    tmp_path: Path, tiny: Moonkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make_tasks(tmp_path / "tasks", 3)
    (tasks / "grading.py").write_text(
        GRADING + "\nASKED = []\n" + GRADING.replace("    return", "    ASKED.append(1)\n    return")
    )
    said: list[str | None] = []
    real = record.Run._running
    monkeypatch.setattr(record.Run, "_running", lambda *a: said.append(real(*a)) or said[-1])
    result = evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "r")
    assert said[-1] == f"sums {result.scores['sums']['likeness,none']:.3f}" and len(said) == 3


@pytest.mark.parametrize("limit", [0, -3, 1.5, float("nan")])
def test_a_limit_that_means_nothing(tmp_path: Path, tiny: Moonkit, limit: float) -> None:
    tasks = make_tasks(tmp_path / "tasks", 2)
    with pytest.raises(ValueError, match="a number of items from 1 up, or a share"):
        evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "r", limit=limit)
    assert not (tmp_path / "r").exists()


def test_chosen_samples_keep_their_numbers(tmp_path: Path, tiny: Moonkit, generated: list[int]) -> None:
    tasks = make_tasks(tmp_path / "tasks", 6)
    result = evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "r", samples={"sums": [4, 1]})
    assert [(row["doc_id"], row["item_id"], bool(row["key"])) for row in result.rows] == [
        (1, "s1", True),
        (4, "s4", True),
    ]
    again, _ = regrade.regrade(tmp_path / "r")
    assert [row["score"] for row in again.rows] == [row["score"] for row in result.rows]
    for wrong in ([], [6], [-1], [1, 1]):
        with pytest.raises(ValueError, match="different whole numbers from 0 to 5 are wanted"):
            evals.evaluate(tiny, ["sums"], include_path=tasks, out=tmp_path / "w", samples={"sums": wrong})
