"""lm-eval's own tasks on data of this machine.

pytest tests/evals/test_stock.py
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import pytest

from evals import record, stock
from evals.tasks import Tasks

_spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
assert _spec is not None and _spec.loader is not None
published = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published)

LM_EVAL = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture()
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOONKIT_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(name: str, file: str) -> Any:
    return Tasks(include_path=str(LM_EVAL / file), include_defaults=False).load([name])["tasks"][name]


def test_the_hubs_names_are_those_of_the_suites() -> None:
    known = stock.kept()
    assert known["openai/openai_humaneval"] == "humaneval" and known["google-research-datasets/mbpp"] == "mbpp"
    assert known["openai/gsm8k"] == "gsm8k" and known["google/IFEval"] == "ifeval"
    assert {"cais/mmlu", "TIGER-Lab/MMLU-Pro", "Idavidrein/gpqa", "HuggingFaceH4/MATH-500"} <= set(known)


def test_gsm8k_reads_both_splits(here: Path) -> None:
    published.gsm8k(here / "gsm8k")
    with pytest.raises(ValueError, match=r"openai/gsm8k: the split 'train' is wanted, and .*gsm8k has test"):
        load("gsm8k", "gsm8k")
    published.lines(here / "gsm8k" / "train.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 6)
    task = load("gsm8k", "gsm8k")
    assert len(task.test_docs()) == 2 and len(task.fewshot_docs()) == 6
    (here / "gsm8k" / "test.jsonl").write_text('{"question": "broken"')
    with pytest.raises(ValueError, match=r"test\.jsonl:1: not JSON"):
        load("gsm8k", "gsm8k")


def test_mbpps_test_split_is_tasks_11_to_510(here: Path) -> None:
    rows = [published.MBPP | {"task_id": number} for number in (1, 10, 11, 510, 511, 600, 601, 974)]
    published.lines(here / "mbpp" / "mbpp.jsonl", rows)
    found = stock.load("google-research-datasets/mbpp", "full")
    assert found is not None
    assert {name: data["task_id"] for name, data in found.items()} == {
        "prompt": [1, 10],
        "test": [11, 510],
        "validation": [511, 600],
        "train": [601, 974],
    }


def test_ifevals_instructions_are_named_as_on_the_hub(here: Path) -> None:
    published.ifeval(here / "ifeval")
    found = stock.load("google/IFEval", None)
    assert found is not None
    assert [row["instruction_id_list"][0] for row in found["train"]] == ["punctuation:no_comma", "keywords:frequency"]


def test_a_programs_grader_is_known_behind_lm_evals_wrapping(here: Path) -> None:
    published.humaneval(here / "humaneval")
    record.install_code_eval()
    task = load("humaneval", "humaneval")
    assert task.UNSAFE_CODE and record._grades_in_our_sandbox(task)
    assert task.doc_to_text(task.test_docs()[0]).startswith("def add")


def test_a_copy_of_the_hub_under_its_whole_name(here: Path) -> None:
    place = here / "owner" / "sums"
    place.mkdir(parents=True)
    (place / "test.jsonl").write_text(json.dumps({"a": "1 + 1?", "b": "2"}) + "\n")
    (here / "t").mkdir()
    text = "task: t\ndataset_path: owner/sums\ntest_split: test\noutput_type: generate_until\n"
    (here / "t" / "t.yaml").write_text(text + 'doc_to_text: "{{a}}"\ndoc_to_target: "{{b}}"\n')
    task = Tasks(include_path=str(here / "t"), include_defaults=False).load(["t"])["tasks"]["t"]
    assert task.test_docs()[0]["b"] == "2"


def test_data_that_is_nowhere_is_one_message(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evals import suites

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    suites.network.cache_clear()
    with pytest.raises(ValueError, match=r"(?s)no data for t: .*OWNER/NAME"):
        (here / "t").mkdir()
        text = "task: t\ndataset_path: owner/nothing\ntest_split: test\noutput_type: generate_until\n"
        (here / "t" / "t.yaml").write_text(text + 'doc_to_text: "{{a}}"\ndoc_to_target: "{{b}}"\n')
        Tasks(include_path=str(here / "t"), include_defaults=False).load(["t"])
    suites.network.cache_clear()
