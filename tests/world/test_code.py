"""Programs: gold passes its tests, what they print is what they print, wrong programs fail.

pytest tests/world/test_code.py
"""

import contextlib
import io

import pytest

import world
from world.check import check
from world.code import MAKERS, PROGRAMS
from world.sample import held_out, rng_of


@pytest.mark.parametrize("family", MAKERS)
def test_splits_are_disjoint_and_samples_repeat(family: str) -> None:
    of = {
        split: {t.composition for i in range(200) for t in world.sample(family, i, split, 0, 1 + i % 2).turns}
        for split in ("train", "heldout")
    }
    assert not any(map(held_out, of["train"])) and all(map(held_out, of["heldout"]))
    assert world.sample(family, 5).turns == world.sample(family, 5).turns


def test_a_program_gives_what_its_tests_expect() -> None:
    for maker, _ in PROGRAMS:
        for seed in range(150):
            program = maker(rng_of("program", seed), "train")
            space: dict = {}
            exec(program.code, space)
            for arguments, expected in program.tests:
                assert space["f"](*arguments) == expected, program.code
            assert len({str(expected) for _, expected in program.tests}) > 1 or program.kind == "dict", program.words


def test_parts_of_held_out_compositions_are_seen() -> None:
    seen = {p for i in range(400) for t in world.sample("function", i).turns for p in t.composition.split("|")[1:]}
    for i in range(100):
        for turn in world.sample("function", i, "heldout").turns:
            assert set(turn.composition.split("|")[1:]) <= seen, turn.composition


def test_predicted_output_is_the_output() -> None:
    for i in range(150):
        turn = world.sample("output", i, "train", 1, 1 + i % 3).turns[0]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(turn.question.split("\n", 1)[1], {})
        assert out.getvalue().strip() == turn.answer


def test_what_is_to_be_repaired_is_broken() -> None:
    failed = 0
    for i in range(20):
        turn = world.sample("repair", i).turns[0]
        assert check(turn, turn.answer)
        failed += not check(turn, turn.question.split(":\n", 1)[1])
    assert failed >= 15  # a mistake may not show on few inputs
