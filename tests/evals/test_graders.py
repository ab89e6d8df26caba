"""Graders: the gold is right, silence and nonsense are not, nothing raises but a broken task.

pytest tests/evals/test_graders.py
"""

import json
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.graders import GOLDS, KINDS, Task, Verdict, boxed, choice_of, grade, overlap, quantity, read_number
from tests.sandboxes import WHY, sandboxed

SQUARE = '<svg viewBox="0 0 10 10"><rect x="2" y="2" width="5" height="5" fill="red"/></svg>'
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9], 'r-o')\nplt.savefig('plot.png')"
ADD = {"prompt": "def add(a, b):\n", "entry_point": "add", "tests": ["assert add(2, 3) == 5", "assert add(1, 1) == 2"]}
CALC = {
    "files": {"calc.py": "def add(a, b):\n    return a - b\n"},
    "test_patch": {"test_calc.py": "from calc import add\n\n\ndef test_add():\n    assert add(12, 5) == 17\n"},
    "fail_to_pass": ["test_calc.py::test_add"],
    "pass_to_pass": [],
}
FIXED = {"calc.py": "def add(a, b):\n    return a + b\n"}
NO_COMMA = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
OPTIONS = {"options": ["3 cm", "5 cm", "a dog", "a red dog"]}
TASKS = {
    "exact": Task("exact", ["Paris", "City of Light"]),
    "choice": Task("choice", "B", OPTIONS),
    "number": Task("number", "12.5 cm", {"tolerance": 0.02}),
    "count": Task("count", 4),
    "anls": Task("anls", ["invoice 2024", "Invoice No. 2024"]),
    "edit": Task("edit", "the quick brown fox"),
    "boxes": Task("boxes", [[10, 10, 30, 30], [50, 50, 90, 70]]),
    "points": Task("points", [[10, 10, 30, 30], [50, 50, 90, 70]]),
    "contains": Task("contains", "Central Station"),
    "relaxed": Task("relaxed", "48.5"),
    "literal": Task("literal", "[1, 'a']"),
    "world": Task("world", "7", {"check": "number"}),
    "math": Task("math", "\\frac{3}{2}"),
    "constraints": Task("constraints", None, NO_COMMA),
    "svg": Task("svg", SQUARE, {"size": 64}),
    "plot": Task("plot", PLOT, {"size": 64}),
    "function": Task("function", "    return a + b\n", ADD),
    "repository": Task("repository", FIXED, CALC),
}
SAID = {
    "exact": "Paris",
    "choice": "B",
    "number": "125 mm",
    "count": "four",
    "anls": "Invoice 2024",
    "edit": "The quick brown fox",
    "boxes": "[10, 10, 30, 30] and [50, 50, 90, 70]",
    "points": "(20, 20), (60, 60)",
    "contains": "It says CENTRAL STATION.",
    "relaxed": "Answer: 49",
    "literal": "[1, 'a']",
    "world": "7",
    "math": "it is $\\boxed{1.5}$",
    "constraints": '"No comma here"',
    "svg": f"```svg\n{SQUARE}\n```",
    "plot": f"```python\n{PLOT}\n```",
    "function": "```python\ndef add(a, b):\n    return a + b\n```",
    "repository": json.dumps(FIXED),
}
BROKEN: list[tuple[Any, ...]] = [
    ("exact", ""),
    ("exact", []),
    ("exact", [" "]),
    ("exact", None),
    ("choice", "E", OPTIONS),
    ("choice", "AB", OPTIONS),
    ("choice", "A"),
    ("choice", "A", {"options": ["one"]}),
    ("number", "many"),
    ("count", "x"),
    ("anls", None),
    ("edit", ["a", ""]),
    ("boxes", []),
    ("boxes", [[3, 3, 1, 1]]),
    ("points", [[1, 2]]),
    ("contains", []),
    ("relaxed", " "),
    ("literal", "not a literal"),
    ("world", "seven", {"check": "number"}),
    ("math", "\\frac{1}{"),
    ("math", []),
    ("math", "1", {"tolerance": 2}),
    ("constraints", "a gold", NO_COMMA),
    ("constraints", None, {}),
    ("constraints", None, {"instruction_id_list": ["punctuation:no_colon"], "kwargs": [{}]}),
    ("svg", "no drawing"),
    ("svg", "<svg viewBox='0 0 1 1'></svg>"),
    ("svg", SQUARE, {"size": 5}),
    ("plot", ""),
    ("plot", "print(1)", {"seconds": 0}),
    ("function", "    return a - b\n", ADD),
    ("repository", {}, CALC),
]
LIGHT = [kind for kind in KINDS if kind not in ("function", "repository", "plot")]  # the others start sandboxes
EACH = [
    pytest.param(
        kind,
        marks=[pytest.mark.skipif(bool(WHY) and kind not in LIGHT, reason=WHY)]
        + ([pytest.mark.slow] if kind == "repository" else []),
    )
    for kind in KINDS
]


def test_every_kind_is_tested() -> None:
    assert set(KINDS) == set(GOLDS) == set(TASKS) == set(SAID) == {kind for kind, *_ in BROKEN}


@pytest.mark.parametrize("kind", EACH)
def test_gold_is_right_and_silence_is_not(kind: str) -> None:
    task = TASKS[kind]
    thinking = f"<think>maybe 17?\n(A) [1, 2, 3, 4]</think>{SAID[kind]}"
    for said in (thinking, SAID[kind], f"  {SAID[kind]}\n") if kind in LIGHT else (thinking,):
        verdict = grade(task, said)
        assert verdict == Verdict(1.0, "graded", verdict.evidence), verdict
    for silence in ("", "  \n", "<think>it is 4</think>", "<think>x</think> \n"):
        assert grade(task, silence).score == 0 and grade(task, silence).status == "silent"
    unfinished = grade(task, f"<think>it is {SAID[kind]}")
    assert (unfinished.score, unfinished.status) == (0, "truncated")
    assert grade(task, "", truncated=True).status == "truncated"
    assert grade(task, SAID[kind], truncated=True).score == 1
    if kind not in ("edit", "world"):  # a likeness is rarely 0; of the world's numbers a thought may be one
        cut = grade(task, "So, let me see", truncated=True)
        assert (cut.score, cut.status) == (0, "truncated"), "counted apart from a wrong answer"
    thought = grade(task, f"<think>{SAID[kind]}</think>I do not know, sorry")
    assert thought.score == 0 or kind == "edit", "what was only thought is not said"


@pytest.mark.parametrize("kind", LIGHT)
@settings(max_examples=150, deadline=None)
@given(said=st.one_of(st.text(max_size=300), st.text("0123456789[](),.-+eE/\\{}boxedABCD% \n", max_size=120)))
def test_nothing_that_is_said_raises(kind: str, said: str) -> None:
    verdict = grade(TASKS[kind], said)
    assert verdict.score is not None and 0 <= verdict.score <= 1


@pytest.mark.parametrize("kind", [each for each in EACH if each.values[0] not in LIGHT])
@pytest.mark.parametrize("said", ["```python\nimport " + "(" * 500, "import os\nos._exit(0)", "\0 import \ud800 {}"])
def test_nothing_that_is_said_raises_where_programs_run(kind: str, said: str) -> None:
    verdict = grade(TASKS[kind], said)
    assert verdict.score == 0, verdict


@pytest.mark.parametrize(
    "said",
    [
        "[" * 50_000,
        "9" * 50_000,
        "\\boxed{" * 20_000,
        "1e999999",
        "((A))" * 10_000,
        "a" * 300_000,
        "1/0",
        "½ ² ٣",
        "\0\ud800",
    ],
)
def test_hostile_answers_are_wrong_and_quick(said: str) -> None:
    for kind in LIGHT:
        start = time.process_time()
        assert grade(TASKS[kind], said).score == 0 or kind in ("edit", "anls"), kind
        assert time.process_time() - start < 10, f"{kind}: seconds of processor time for {said[:20]!r}"


@pytest.mark.parametrize("task", [each for each in BROKEN if each[0] in LIGHT])
def test_a_broken_task_is_an_error(task: Any) -> None:
    with pytest.raises(ValueError):
        grade(Task(*task), "anything")


@pytest.mark.parametrize("task", [each for each in BROKEN if each[0] in ("function", "plot")])
@sandboxed
def test_a_broken_task_of_programs_is_an_error(task: Any) -> None:
    with pytest.raises(ValueError):
        grade(Task(*task), "import this")


@pytest.mark.slow
@sandboxed
def test_a_broken_repository_is_an_error() -> None:
    with pytest.raises(ValueError):
        grade(Task("repository", {}, CALC), "anything")


def test_unknown_kinds_and_answers_that_are_no_text() -> None:
    with pytest.raises(ValueError, match=r"known: .*exact"):
        Task("vibes")
    with pytest.raises(ValueError, match="an answer is text"):
        grade(TASKS["exact"], None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("B) 5 cm", "B"),
        ("The answer is B.", "B"),
        ("the final answer is: **(B)**", "B"),
        ("$\\boxed{\\text{B}}$", "B"),
        ("I considered (A) and (C).\nAnswer: B", "B"),
        ("5 cm", "B"),
        ("It must be 5 cm.", "B"),
        ("a red dog", "D"),
        ("a dog", "C"),
        ("option B is right", "B"),
        ("A or B", None),
        ("(A) or (B)", None),
        ("none of these", None),
        ("E", None),
        ("", None),
    ],
)
def test_choices(said: str, letter: str | None) -> None:
    assert choice_of(said, OPTIONS["options"]) == letter


@pytest.mark.parametrize(
    ("said", "value", "unit"),
    [
        ("12", 12, ""),
        ("-3.5", Fraction(-7, 2), ""),
        ("it costs $1,200.50", Fraction(2401, 2), "$"),
        ("about 2/3 of it", Fraction(2, 3), ""),
        ("1.5e3 m", 1500, "m"),
        ("$2 \\times 10^{5}$ kg", 200000, "kg"),
        ("\\frac{3}{4}", Fraction(3, 4), ""),
        ("45^\\circ", 45, "°"),
        ("12\\%", 12, "%"),
        ("7 hours", 7, "hour"),
        ("30 apples", 30, ""),
        ("5\\text{ cm}", 5, "cm"),
        ("25 cm²", 25, "cm^2"),
        ("none", None, ""),
    ],
)
def test_quantities(said: str, value: Any, unit: str) -> None:
    read = quantity(said)
    assert read == (None if value is None else (Fraction(value), unit))


@pytest.mark.parametrize(
    ("gold", "said", "data", "score"),
    [
        ("12.5 cm", "0.125 m", {}, 1),
        ("12.5 cm", "12.5", {}, 1),
        ("12.5 cm", "12.5 kg", {}, 0),
        ("12.5 cm", "12.6 cm", {}, 0),
        ("12.5 cm", "12.6 cm", {"tolerance": 0.05}, 1),
        ("0", "0.001", {"tolerance": 0.05}, 0),
        ("0", "0.001", {"absolute": 0.01}, 1),
        ("0.25", "25%", {"percent_is_share": True}, 1),
        ("0.25", "25%", {}, 0),
        ("1/3", "\\boxed{\\frac{2}{6}}", {}, 1),
        ("100000000000000000001", "100000000000000000000", {}, 0),
    ],
)
def test_numbers(gold: str, said: str, data: dict[str, Any], score: float) -> None:
    assert grade(Task("number", gold, data), said).score == score


def test_counts() -> None:
    for said, score in (("4", 1), ("There are four.", 1), ("4 or 5", 0), ("4.5", 0), ("1,004", 0), ("four, yes 4", 1)):
        assert grade(Task("count", 4), said).score == score, said


def test_edit_distance_is_levenshteins() -> None:
    task = Task("anls", "hello world")
    assert grade(task, "hello word").score == pytest.approx(1 - 1 / 11) and grade(task, "xyz").score == 0


def test_boxes_are_matched_to_their_best() -> None:
    gold = [[0, 0, 10, 10], [20, 0, 30, 10]]
    task = Task("boxes", gold)
    assert grade(task, "[[20, 0, 30, 10], [0, 0, 10, 10]]").score == 1
    assert grade(task, "[0, 0, 10, 10]").score == pytest.approx(2 / 3)
    assert grade(task, "[0, 0, 10, 5] [20, 0, 30, 10]").score == pytest.approx(0.75)
    assert grade(task, str(gold * 50)).score < 0.05, "many boxes do not buy a hit"
    assert overlap([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3) and overlap([0, 0, 1, 1], [1, 1, 0, 0]) == 0
    task = Task("points", gold)
    assert grade(task, "(5, 5) (25, 5)").score == 1 and grade(task, "(5, 5) (6, 6)").score == pytest.approx(0.5)


def test_pieces() -> None:
    assert boxed("so \\boxed{\\frac{1}{2}} or \\boxed{3}") == "3" and boxed("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert boxed("\\boxed{x") is None and read_number("1/0") is None and read_number("1,2") is None
