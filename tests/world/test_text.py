"""Sums, problems and instructions: every answer worked out again by other means.

pytest tests/world/test_text.py
"""

import json
import re
from collections.abc import Iterator

import pytest

import world
from world.check import check
from world.sample import Split, Turn, held_out
from world.text import MAKERS, worked_addition, worked_product, worked_subtraction


def turns(family: str, n: int = 150, split: Split = "train") -> Iterator[Turn]:
    for index in range(n):
        yield from world.sample(family, index, split, 4, 1 + index % 3).turns


@pytest.mark.parametrize("family", MAKERS)
def test_gold_is_right_splits_are_disjoint_and_samples_repeat(family: str) -> None:
    train = {t.composition for t in turns(family)}
    for turn in turns(family, 60, "heldout"):
        assert held_out(turn.composition) and turn.composition not in train
        assert check(turn, turn.answer) and not check(turn, "") and not check(turn, "zz qq")
    assert not any(map(held_out, train))
    assert world.sample(family, 5) == world.sample(family, 5)


def test_sums_are_right_and_their_steps_too() -> None:
    for turn in turns("sum", 400):
        a, sign, b = re.fullmatch(r"sum\|(\d+)([+*-])(\d+)", turn.composition).groups()  # type: ignore[union-attr]
        assert int(turn.answer) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        for step in turn.thinking.split(".")[:-1]:
            left, right = step.strip().split("=")
            assert eval(left) == int(right.split()[0]), step  # digits and signs only
        digits = [step.split("=")[1].split() for step in turn.thinking.rstrip(".").split(".")]
        if sign == "+":  # the digits of the steps, read backwards, are the answer
            written = "".join(d[1] for d in reversed(digits))
            carry = digits[-1][2].removeprefix("c")
            assert int(("" if carry == "0" else carry) + written) == int(turn.answer)


@pytest.mark.parametrize(
    "worked, text",
    [
        (worked_addition(347, 586), "7+6+0=13 3 c1. 4+8+1=13 3 c1. 3+5+1=9 9 c0."),
        (worked_addition(5, 96), "5+6+0=11 1 c1. 0+9+1=10 0 c1."),
        (worked_subtraction(302, 45), "12-5-0=7 b1. 10-4-1=5 b1. 3-0-1=2 b0."),
        (worked_product(47, 6), "7*6+0=42 2 c4. 4*6+4=28 8 c2."),
    ],
)
def test_worked_steps(worked: str, text: str) -> None:
    assert worked == text


def test_word_problems_follow_from_their_numbers() -> None:
    for turn in turns("word"):
        last = turn.thinking.rstrip(".").split(". ")[-1]
        left, right = last.split("=")
        assert eval(left) == int(right) == int(turn.answer)
        assert set(re.findall(r"\d+", turn.thinking.split("=")[0])) <= set(re.findall(r"\d+", turn.question))


def test_sorting_keeps_everything() -> None:
    for turn in turns("sort"):
        given, back = turn.question.split(": ")[1].split(), "backwards" in turn.question
        values = [int(g) for g in given] if given[0].isdigit() else given
        assert turn.answer.split() == [str(v) for v in sorted(values, reverse=back)]


def test_the_tallest_is_taller_than_all() -> None:
    for turn in turns("logic", 300):
        if turn.tests == "logic/order":
            above = dict(re.findall(r"(\w+) is taller than (\w+)\.", turn.question))
            tops = set(above) - set(above.values())
            ends = set(above.values()) - set(above)
            assert {turn.answer} == (tops if "tallest" in turn.question else ends)
        elif turn.tests == "logic/truth":
            claim = turn.question.removeprefix("true or false: ").rstrip("?")
            assert turn.answer == str(eval(claim)).lower()


@pytest.mark.parametrize("family", ["tool", "proxy"])
def test_tool_rounds_have_the_released_form(family: str) -> None:
    for index in range(40):
        sample = world.sample(family, index)
        call, result = sample.turns[0].steps
        (made,) = call["tool_calls"]
        name = made["function"]["name"]
        assert made["id"] == f"functions.{name}:0" == result["tool_call_id"]
        assert name in {tool["function"]["name"] for tool in sample.tools}
        arguments = json.loads(made["function"]["arguments"])
        if family == "tool":
            assert str(eval(arguments["expression"])) == result["content"] == sample.turns[0].answer
        assert not sample.media, "zero vision: no picture is seen"
