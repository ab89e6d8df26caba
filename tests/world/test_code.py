"""Programs: gold passes its tests, what they print is what they print, wrong programs fail.

pytest tests/world/test_code.py
"""

import contextlib
import io
from typing import Any

import numpy as np
import pytest

import world
from world.check import check
from world.code import MAKERS, PROGRAMS
from world.sample import Image, Split, Turn, held_out, rng_of
from world.svg import GRID, NUMBERS, read, render, write


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


def _passes(source: str, turn: Turn) -> bool:
    """The unit tests in this process: for code that is ours, hundreds of times faster than a child each."""
    space: dict[str, Any] = {}
    try:
        exec(source, space)
        return all(space["f"](*arguments) == expected for arguments, expected in turn.check.data["tests"])
    except (TypeError, ValueError, RecursionError):  # what the mistakes of MISTAKES raise
        return False


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("family", ["function", "repair"])
def test_gold_programs_pass_their_tests(family: str, split: Split) -> None:
    for i in range(150):
        for turn in world.sample(family, i, split, 4, 1 + i % 3).turns:
            assert _passes(turn.answer, turn), turn
            assert len(turn.answer) <= 100


def test_gold_programs_pass_in_a_child_process() -> None:
    for i in range(2):
        for turn in (*world.sample("function", i, "heldout").turns[:2], *world.sample("repair", i, "heldout").turns):
            assert check(turn, turn.answer) and not check(turn, "def f(x):\n    return None")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_what_is_to_be_repaired_is_broken(split: Split) -> None:
    shown = [
        not _passes(turn.question.split(":\n", 1)[1], turn)
        for i in range(600)
        for turn in world.sample("repair", i, split, 0, 1 + i % 2).turns
    ]
    assert all(shown)


def test_a_constant_rarely_passes() -> None:
    turns = [t for i in range(300) for t in world.sample("function", i, "heldout").turns]
    constant = [t for t in turns if all(e == t.check.data["tests"][0][1] for _, e in t.check.data["tests"])]
    assert len(constant) < 0.02 * len(turns)


def test_drawings_are_what_is_seen_and_every_kind_is_held_out() -> None:
    kinds: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for split in ("train", "heldout"):
        for i in range(150):
            sample = world.sample("drawing", i, split, 0, 1 + i % 3)
            (turn,), (image,) = sample.turns, sample.media
            shapes = read(turn.answer)
            assert isinstance(image, Image) and 56 <= image.pixels.shape[0] <= 112
            assert np.array_equal(render(shapes, image.pixels.shape[0]), image.pixels)
            assert 1 <= len(shapes) <= sample.level and write(shapes) == turn.answer and check(turn, turn.answer)
            left, top, right, bottom = map(max, zip(*((-s.box[0], -s.box[1], *s.box[2:]) for s in shapes), strict=True))
            assert max(left, top) <= 0 and max(right, bottom) <= GRID, turn.answer
            kinds[split] |= {s.kind for s in shapes}
    assert kinds["train"] == kinds["heldout"] == set(NUMBERS)
