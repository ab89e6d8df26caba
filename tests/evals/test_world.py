"""Scores on the world's questions: counting, intervals, tool rounds.

pytest tests/evals/test_world.py
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from evals.world import ASPECTS, Asked, answer, markdown, parts, questions, row, same_call, summarize, wilson
from world import sample
from world.sample import Sample, Turn


def turn(answer: str, choices: tuple[str, ...] = (), tests: str = "picture/count") -> Turn:
    return Turn("how many?", answer, tests, f"c|{answer}", choices=choices)


def asked(answers: list[str], replies: list[str], choices: tuple[str, ...] = ()) -> list[Asked]:
    turns = [turn(a, choices) for a in answers]
    return [
        Asked(Sample("picture", (t,)), t, reply, "", reply == t.answer, False)
        for t, reply in zip(turns, replies, strict=True)
    ]


def test_wilson_matches_known_values() -> None:
    # Brown, Cai and DasGupta (2001) tabulate the interval; 0 of 10 ends at 0.2775, 5 of 10 is symmetric
    assert wilson(0, 10)[0] == 0 and wilson(0, 10)[1] == pytest.approx(0.2775, abs=5e-4)
    low, high = wilson(5, 10)
    assert low + high == pytest.approx(1) and low == pytest.approx(0.2366, abs=5e-4)
    assert wilson(10, 10)[1] == 1


@pytest.mark.parametrize("right, n", [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_share(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a share"):
        wilson(right, n)


def test_chance_majority_and_blind() -> None:
    set_ = asked(["1", "1", "2", "3"], ["1", "2", "2", "3"], ("1", "2", "3"))
    score = summarize("count", set_, blind=asked(["1", "1", "2", "3"], ["1", "1", "1", "1"]))
    assert (score.right, score.n, score.majority, score.blind) == (3, 4, 0.5, 0.5)
    assert score.chance == pytest.approx(1 / 3) and score.one_frame is None
    assert "75.0" in row(score) and "33.3" in row(score)


def test_majority_is_taken_within_a_kind_of_question() -> None:
    yes = turn("yes", tests="a")
    red = turn("red", tests="b")
    both = [Asked(Sample("p", (t,)), t, "", "", False, False) for t in (yes, yes, red, red)]
    assert summarize("both", both).majority == 1.0


def test_every_question_about_a_picture_has_one_aspect() -> None:
    names = [name for names in ASPECTS.values() for name in names]
    assert len(names) == len(set(names))
    kinds = {turn.tests for i in range(400) for turn in sample("picture", i, "train", 1, 1 + i % 3).turns}
    assert kinds == {f"picture/{name}" for name in names}


def test_parts_are_aspects_and_kinds() -> None:
    kinds = ("picture/shape", "picture/count", "picture/colour", "picture/count")
    set_ = [Asked(Sample("picture", (t,)), t, "", "", False, False) for t in (turn("1", tests=k) for k in kinds)]
    assert parts(set_) == [
        ("picture: objects", [0, 2]),
        ("picture: counts", [1, 3]),
        ("picture/colour", [2]),
        ("picture/count", [1, 3]),
        ("picture/shape", [0]),
    ]
    assert parts(set_[:1]) == []


def test_chance_is_left_out_when_some_question_is_open() -> None:
    mixed = [*asked(["1"], ["1"], ("1", "2")), *asked(["cat"], ["cat"])]
    assert summarize("mixed", mixed).chance is None


def test_a_truncated_reply_is_counted() -> None:
    cut = replace(asked(["1"], ["1"])[0], truncated=True, right=False)
    assert summarize("cut", [cut]).truncated == 1


@pytest.mark.parametrize(
    "name, arguments, same",
    [
        ("calculator", '{"expression": "2+3"}', True),
        ("calculator", '{"expression":"2+3"}', True),
        ("calculator", '{"expression": "2+4"}', False),
        ("python", '{"expression": "2+3"}', False),
        ("calculator", "not json", False),
    ],
)
def test_a_call_counts_when_name_and_arguments_agree(name: str, arguments: str, same: bool) -> None:
    import json

    def parsed() -> Any:
        value = json.loads(arguments) if arguments.startswith("{") else None
        if value is None:
            raise ValueError("no JSON")
        return value

    call = SimpleNamespace(name=name, parsed=parsed)
    gold = {"tool_calls": [{"function": {"name": "calculator", "arguments": '{"expression": "2+3"}'}}]}
    assert same_call([call], gold) is same


def test_an_untrained_model_is_asked_and_scored() -> None:
    from fusion.model import Kimi

    kimi = Kimi.untrained("nano")
    asked_ = (
        questions("picture", 4, "heldout", 1) + questions("clip", 2, "heldout", 1) + questions("tool", 2, "seen", 1)
    )
    for blind in (False, True):
        replies = answer(kimi, asked_, max_new_tokens=4, batch=3, blind=blind)
        assert [a.turn for a in replies] == [sample.turns[number] for sample, number in asked_]
        assert not any(a.right and a.truncated for a in replies)
    table = list(markdown([summarize("all", replies)]))
    assert table[2].startswith("| all | 8 |") and table[2].count("|") == table[0].count("|")
