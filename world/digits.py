"""Handwritten digits: the 8 x 8 pictures that ship inside scikit-learn, made larger, one to three side by side.

    make(rng, split, level)   ->   Sample "digits": which digit, all from left to right, left, right, largest, coloured

    level 1   one or two, 40 or 48 px, upright, plain ground
    level 2   up to three, 32 to 48 px, noisy grounds
    level 3   two or three, 24 to 40 px, turned by up to 10 degrees

The last fifth of the 1,797 pictures is held out, by number: only split "heldout" shows one. A composition names what
is shown, "digits|12,345,7|0"; its last number is the first that makes its hash agree with this rule.
"""

import random
from functools import cache, lru_cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PIL

from world.sample import Image, Maker, Pixels, Sample, Split, Turn, held_out
from world.scene import COLOURS, ground_of

HELD_OUT_FROM = 1438  # of 1,797: the last 359, a fifth

PHRASES = {
    "digit": ("which digit is this?", "read the digit.", "what digit is in the picture?"),
    "all": ("read the digits from left to right.", "read all digits.", "which digits are these?"),
    "left": ("which digit is on the left?", "read the left digit.", "what is the left digit?"),
    "right": ("which digit is on the right?", "read the right digit.", "what is the right digit?"),
    "middle": ("which digit is in the middle?", "read the middle digit.", "what is the middle digit?"),
    "largest": ("what is the largest value?", "which value is largest?", "the largest value?"),
    "smallest": ("what is the smallest value?", "which value is smallest?", "the smallest value?"),
    "coloured": ("which digit is {colour}?", "read the {colour} digit.", "what is the {colour} digit?"),
    "count": ("how many digits are there?", "count the digits.", "number of digits?"),
}
DIGITS = tuple("0123456789")
PEN = ("red", "green", "blue", "purple", "orange")


class Scans(NamedTuple):
    """The whole set: ink 0..16 as uint8 (1797, 8, 8), and the digit that each picture shows."""

    ink: np.ndarray[Any, np.dtype[np.uint8]]
    digits: tuple[int, ...]


@cache
def load() -> Scans:
    """The set, read once. Raises ValueError when scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(
            "the family digits shows handwritten digits that ship inside scikit-learn, which is not installed; "
            "pip install scikit-learn"
        ) from error
    found = load_digits()
    ink, digits = found.images.astype(np.uint8), tuple(map(int, found.target))
    assert ink.shape == (1797, 8, 8), f"another set of digits: {ink.shape}"
    return Scans(ink, digits)


@cache
def _numbers(heldout: bool, digit: int) -> tuple[int, ...]:
    """Numbers of the pictures of one digit in one part of the set."""
    return tuple(i for i, d in enumerate(load().digits) if d == digit and (i >= HELD_OUT_FROM) == heldout)


@lru_cache(maxsize=100_000)
def composition(shown: tuple[int, ...]) -> str:
    """What decides the split: all pictures shown, then a number.

    World-wide a composition is held out by its hash, here by which pictures are shown. The number makes both agree.
    """
    heldout = {number >= HELD_OUT_FROM for number in shown}
    assert len(heldout) == 1, f"pictures of both parts of the set: {shown}"
    name = f"digits|{','.join(map(str, shown))}"
    return next(key for i in count() if held_out(key := f"{name}|{i}") in heldout)


@lru_cache(maxsize=4096)
def _scan(number: int, scale: int, turned: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One picture's ink, made larger: float32 (8 scale, 8 scale, 1), 0..1."""
    small = PIL.fromarray((load().ink[number].astype(np.uint16) * 255 // 16).astype(np.uint8))  # 16 is full ink
    large = small.resize((8 * scale, 8 * scale), PIL.Resampling.BICUBIC)
    if turned:
        large = large.rotate(turned, PIL.Resampling.BILINEAR)
    mask: np.ndarray[Any, np.dtype[np.float32]] = np.asarray(large, np.float32)[:, :, None] / np.float32(255)
    return mask


def make(rng: random.Random, split: Split, level: int) -> Sample:
    """One to three handwritten digits and up to 5 turns."""
    if level not in (1, 2, 3):
        raise ValueError(f"digits has levels 1 to 3, got {level}")
    least, most = {1: (1, 2), 2: (1, 3), 3: (2, 3)}[level]
    digits = [rng.randrange(10) for _ in range(rng.randint(least, most))]
    shown = tuple(rng.choice(_numbers(split == "heldout", digit)) for digit in digits)
    colours = rng.sample(PEN, len(digits)) if rng.random() < 0.5 else []
    pixels = paint(rng, level, shown, colours)
    texts = list(map(str, digits))
    asks: list[tuple[str, str, dict[str, str], str]] = []
    if len(digits) == 1:
        asks.append(("digit", texts[0], {}, ""))
    else:
        seen = ", ".join(texts) + "."
        asks.append(("all", "".join(texts), {}, ""))
        asks += [("left", texts[0], {}, ""), ("right", texts[-1], {}, "")]
        asks.append(("largest", max(texts), {}, seen) if rng.random() < 0.5 else ("smallest", min(texts), {}, seen))
        if len(digits) == 3:
            asks.append(("middle", texts[1], {}, ""))
    asks.append(("count", str(len(digits)), {}, ""))
    if colours and len(digits) > 1:
        i = rng.randrange(len(digits))
        asks.append(("coloured", texts[i], {"colour": colours[i]}, ""))
    turns = []
    for kind, answer, words, thinking in rng.sample(asks, min(5, len(asks))):
        question = rng.choice(PHRASES[kind]).format(**words)
        choices = ("1", "2", "3") if kind == "count" else () if kind == "all" else DIGITS
        turns.append(Turn(question, answer, f"digits/{kind}", composition(shown), thinking, choices=choices))
    return Sample("digits", tuple(turns), (Image(pixels),), level=level, split=split)


def paint(rng: random.Random, level: int, shown: tuple[int, ...], colours: list[str]) -> Pixels:
    """The pictures side by side, a little up or down; without colours in the ground's opposite."""
    scales = {1: (5, 6), 2: (4, 5, 6), 3: (3, 4, 5)}[level]
    lean = 10 if level == 3 else 0
    masks = [_scan(number, rng.choice(scales), rng.randint(-lean, lean)) for number in shown]
    gap = rng.randint(2, 8)
    spare = {1: 10, 2: 20, 3: 30}[level]
    height = max(56, max(m.shape[0] for m in masks) + rng.randint(4, spare))
    wanted = sum(m.shape[1] for m in masks) + gap * (len(masks) - 1)
    width = max(56, wanted + rng.randint(4, spare))
    pixels = ground_of(rng, height, width, level).astype(np.float32)
    mean = float(pixels.mean())
    x = rng.randint(2, width - wanted - 2)
    for i, mask in enumerate(masks):
        ink = np.array((240.0,) * 3 if mean < 100 else (15.0,) * 3, np.float32)
        if colours:
            factor = 0.6 if 100 <= mean < 180 else 0.85
            named = np.array(COLOURS[colours[i]], np.float32)
            ink = np.minimum(255, named + 40) if mean < 100 else named * np.float32(factor)
        rows, columns = mask.shape[:2]
        y = rng.randint(2, height - rows - 2)
        under = pixels[y : y + rows, x : x + columns]
        under += (ink - under) * mask
        x += columns + gap
    return np.clip(pixels, 0, 255).astype(np.uint8)


MAKERS: dict[str, Maker] = {"digits": make}
WEIGHTS: dict[str, float] = {"digits": 1.0}
