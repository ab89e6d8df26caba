"""Pictures and texts to read: answers found again from the scene and its pixels, splits, balance.

pytest tests/world/test_picture.py
"""

import random
from collections import Counter

import numpy as np
import pytest

import world
from world.check import check, overlap
from world.clip import COLOURS
from world.picture import Scene, Thing, asks, caption, draw_scene, paint
from world.sample import Image, held_out, rng_of

FAMILIES = ("picture", "caption", "point", "reading")


def things_in(pixels: np.ndarray, colour: str) -> int:
    """Connected blobs close to a colour: counted with a flood fill of our own."""
    near = np.abs(pixels.astype(int) - np.array(COLOURS[colour])).sum(2) < 60
    seen = np.zeros_like(near)
    blobs = 0
    for y, x in zip(*near.nonzero(), strict=True):
        if seen[y, x]:
            continue
        stack, size = [(y, x)], 0
        seen[y, x] = True
        while stack:
            i, j = stack.pop()
            size += 1
            for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if 0 <= a < near.shape[0] and 0 <= b < near.shape[1] and near[a, b] and not seen[a, b]:
                    seen[a, b] = True
                    stack.append((a, b))
        blobs += size >= 25
    return blobs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_a_function_of_its_number(family: str) -> None:
    for split in ("train", "heldout"):
        a, b = world.sample(family, 3, split, 1, 2), world.sample(family, 3, split, 1, 2)
        assert a.turns == b.turns
        first, second = a.media[0], b.media[0]
        assert isinstance(first, Image) and isinstance(second, Image) and np.array_equal(first.pixels, second.pixels)
        assert a.turns != world.sample(family, 4, split, 1, 2).turns


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_composition(family: str) -> None:
    of = {
        split: {t.composition for i in range(150) for t in world.sample(family, i, split, 0, 1 + i % 3).turns}
        for split in ("train", "seen", "heldout")
    }
    assert not any(map(held_out, of["train"] | of["seen"])) and all(map(held_out, of["heldout"]))
    assert not of["heldout"] & (of["train"] | of["seen"])


def test_training_never_shows_a_held_out_pair() -> None:
    for i in range(100):
        for fact in world.sample("caption", i, "train").turns[0].check.data["facts"]:
            assert not held_out(f"{fact[0]}|{fact[1]}")
    shown = [world.sample("caption", i, "heldout").turns[0].check.data["facts"] for i in range(50)]
    assert all(any(held_out(f"{c}|{s}") for c, s, _ in facts) for facts in shown)


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_is_right_and_silence_is_wrong(family: str) -> None:
    for i in range(40):
        for turn in world.sample(family, i, "heldout", 5, 1 + i % 3).turns:
            assert check(turn, turn.answer) and not check(turn, "") and not check(turn, "qq zz 0 0 0 0 0")


def test_counts_are_found_again_in_the_pixels() -> None:
    compared = 0
    for i in range(120):
        sample = world.sample("picture", i, "train", 9, 1)
        medium = sample.media[0]
        assert isinstance(medium, Image)
        for turn in sample.turns:
            colour = next((c for c in COLOURS if f" {c} " in f" {turn.question.rstrip('?')} "), None)
            # a thing inside a ring or over another splits or joins blobs: those scenes are left to the next test
            plain = not any(t.tests in ("picture/inside", "picture/overlap") for t in sample.turns)
            if turn.tests == "picture/count_colour" and colour and plain and "ring" not in str(sample.turns):
                compared += things_in(medium.pixels, colour) == int(turn.answer)
                assert things_in(medium.pixels, colour) >= 0
    assert compared >= 20


def scene() -> Scene:
    return Scene(
        100,
        100,
        (
            Thing("red", "circle", 5, 10, 20),
            Thing("red", "square", 70, 12, 24),
            Thing("blue", "star", 40, 70, 16),
        ),
    )


def test_answers_of_a_scene_made_by_hand() -> None:
    answers: dict[str, set[str]] = {}
    for seed in range(200):
        for ask in asks(random.Random(seed), scene()):
            words = " ".join(ask.words.values())
            answers.setdefault(f"{ask.kind} {words}".strip(), set()).add(ask.answer)
    assert all(len(given) == 1 for given in answers.values()), "one question, one answer"
    expected = {
        "count": "3",
        "count_colour red": "2",
        "count_colour blue": "1",
        "count_shape star": "1",
        "count_both red circle": "1",
        "colour star": "blue",
        "shape blue": "star",
        "exists red circle": "yes",
        "exists blue circle": "no",
        "largest": "red",
        "smallest": "blue",
        "more red blue": "red",
        "relation red circle red square left of": "yes",
        "relation red circle red square right of": "no",
        "relation blue star red circle below": "yes",
        "side red square blue star left right": "right",
        "nearest blue star": "red",
    }
    for question, answer in expected.items():
        if question in answers:
            assert answers[question] == {answer}, question
    assert len(expected.keys() & answers.keys()) >= 14


def test_a_caption_goes_from_top_to_bottom() -> None:
    text, facts = caption(scene())
    assert text == "red circle top left, red square top right, blue star bottom center"
    assert facts[2] == ["blue", "star", "bottom center"]


def test_boxes_hold_their_thing() -> None:
    for i in range(30):
        for turn in world.sample("point", i, "train", 2, 2).turns:
            box = turn.check.data["box"]
            assert overlap(box, box) == pytest.approx(1) and min(box) >= 0 and max(box) <= 99


def test_things_keep_clear_and_inside() -> None:
    for seed in range(100):
        for level in (1, 2, 3):
            made = draw_scene(rng_of("clear", seed), level)
            if made is None:
                continue
            for thing in made.things:
                assert thing.x >= 0 and thing.y >= 0 and thing.size >= 14
                assert thing.x + thing.size <= made.width and thing.y + thing.size <= made.height
            assert paint(rng_of(seed), made, level).shape == (made.height, made.width, 3)


def test_yes_and_no_are_balanced() -> None:
    given: Counter[str] = Counter()
    for i in range(800):
        for turn in world.sample("picture", i, "train", 3, 1 + i % 2).turns:
            if turn.tests == "picture/relation":
                given[turn.answer] += 1
    assert 0.42 < given["yes"] / sum(given.values()) < 0.58


def test_levels_are_checked() -> None:
    for family in FAMILIES:
        with pytest.raises(ValueError, match="levels 1 to 3"):
            world.sample(family, 0, level=4)
