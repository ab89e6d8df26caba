"""Handwritten digits: answers from scikit-learn's labels, pixels from its pictures, the last fifth never trained on.

pytest tests/world/test_digits.py
"""

import re
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

from world import digits
from world.digits import PHRASES, make, paint
from world.sample import Image, Sample, Split, held_out, rng_of
from world.scene import COLOURS

SPLITS: tuple[Split, ...] = ("train", "seen", "heldout")


@lru_cache(maxsize=1)
def scans() -> Any:
    return load_digits()


@lru_cache(maxsize=8)
def samples(split: Split) -> tuple[Sample, ...]:
    return tuple(make(rng_of("test", split, index), split, 1 + index % 3) for index in range(300))


def pixels(sample: Sample) -> Any:
    (picture,) = sample.media
    assert isinstance(picture, Image)
    return picture.pixels


def shown(sample: Sample) -> list[int]:
    (composition,) = {turn.composition for turn in sample.turns}
    return [int(number) for number in composition.split("|")[1].split(",")]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_those_of_the_labels(split: Split) -> None:
    kinds = set()
    for sample in samples(split):
        labels = [int(scans().target[number]) for number in shown(sample)]
        for turn in sample.turns:
            kind = turn.tests.removeprefix("digits/")
            kinds.add(kind)
            expected = {
                "digit": labels[0],
                "all": "".join(map(str, labels)),
                "left": labels[0],
                "right": labels[-1],
                "middle": labels[len(labels) // 2],
                "largest": max(labels),
                "smallest": min(labels),
                "count": len(labels),
            }
            if kind == "coloured":
                assert int(turn.answer) in labels
            else:
                assert turn.answer == str(expected[kind]), (kind, labels)
            assert not turn.choices or turn.answer in turn.choices
            assert turn.thinking in ("", ", ".join(map(str, labels)) + ".")
            assert kind != "middle" or len(labels) == 3
            assert kind != "digit" or len(labels) == 1
    assert kinds == set(PHRASES)


def test_the_pixels_are_the_pictures_of_the_composition() -> None:
    """One digit at level 1 on plain ground, made small again, is nearest to its own 8 x 8 picture of all 1,797."""
    every = scans().images.reshape(1797, 64) / 16
    every = every - every.mean(axis=1, keepdims=True)
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    checked = 0
    for sample in samples("train"):
        seen = pixels(sample).astype(float)
        if sample.level != 1 or len(shown(sample)) > 1 or not (seen[:2] == seen[0, 0]).all():
            continue
        ink = np.abs(seen - seen[0, 0]).max(axis=-1)
        best = []
        for side in (40, 48):  # neither its size nor its place is told: try all
            near = side // 16  # the middle of every square of the picture keeps its value: interpolation is exact there
            for top in range(ink.shape[0] - side + 1):
                for left in range(ink.shape[1] - side + 1):
                    block = ink[top : top + side, left : left + side]
                    if ink.sum() - block.sum() > 1:
                        continue
                    small = block[near :: side // 8, near :: side // 8]
                    if side // 8 % 2 == 0:
                        small = (small + block[near - 1 :: side // 8, near - 1 :: side // 8]) / 2
                    v = small.reshape(64) - small.mean()
                    scores = every @ (v / np.linalg.norm(v))
                    best.append((float(scores.max()), int(scores.argmax())))
        score, number = max(best)
        assert number == shown(sample)[0], (number, shown(sample), score)
        checked += 1
        if checked == 12:
            break
    assert checked == 12


def test_a_colour_in_the_question_is_that_of_the_digit() -> None:
    """From left to right, the hue of the ink is the named one where the answer stands."""
    checked = 0
    for sample in samples("train"):
        labels = [int(scans().target[number]) for number in shown(sample)]
        for turn in sample.turns:
            if turn.tests != "digits/coloured" or labels.count(int(turn.answer)) > 1 or sample.level > 1:
                continue
            (colour,) = (word for word in re.findall(r"\w+", turn.question) if word in COLOURS)
            seen = pixels(sample).astype(float)
            colourful = seen - seen.mean(axis=-1, keepdims=True)  # grounds are gray: what is left is the ink's
            wanted = np.array(COLOURS[colour], float)
            wanted -= wanted.mean()
            others = [np.array(rgb, float) - np.mean(rgb) for name, rgb in COLOURS.items() if name in digits.PEN]
            norm = np.linalg.norm(colourful, axis=-1) + 1e-6
            like = colourful @ wanted / np.linalg.norm(wanted) / norm
            best = np.max([colourful @ o / np.linalg.norm(o) / norm for o in others], axis=0)
            mask = (norm > 25) & (like >= best - 1e-9)
            middle = np.flatnonzero(mask.any(axis=0)).mean() / seen.shape[1]
            at = labels.index(int(turn.answer))
            assert min(int(middle * len(labels)), len(labels) - 1) == at, (colour, middle, labels)
            checked += 1
    assert checked >= 10


def test_the_last_fifth_is_never_trained_on() -> None:
    numbers = {split: {number for sample in samples(split) for number in shown(sample)} for split in SPLITS}
    assert max(numbers["train"] | numbers["seen"]) < 1438 <= min(numbers["heldout"])
    assert round(len(scans().target) * 4 / 5) == 1438
    assert len(numbers["train"]) > 300 and len(numbers["heldout"]) > 150
    for split in SPLITS:
        for sample in samples(split):
            assert all(held_out(turn.composition) == (split == "heldout") for turn in sample.turns)


def test_all_digits_come_equally_often() -> None:
    counts = np.bincount([int(scans().target[n]) for sample in samples("train") for n in shown(sample)], minlength=10)
    assert counts.min() > 0.5 * counts.mean()


@pytest.mark.parametrize("level", (1, 2, 3))
def test_the_same_seed_gives_the_same_sample(level: int) -> None:
    a, b, c = (make(rng_of("again", seed), "train", level) for seed in (1, 1, 2))
    assert a.turns == b.turns and np.array_equal(pixels(a), pixels(b))
    assert a.turns != c.turns
    assert max(pixels(a).shape) <= 196 and min(pixels(a).shape[:2]) >= 56


def test_pictures_of_both_parts_are_refused() -> None:
    with pytest.raises(AssertionError, match="both parts"):
        digits.composition((3, 1500))


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits.load.cache_clear()
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        digits.load()
    monkeypatch.undo()
    assert len(digits.load().digits) == 1797


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="levels 1 to 3, got 0"):
        make(rng_of("level"), "train", 0)
    assert paint(rng_of("paint"), 1, (5,), []).dtype == np.uint8
