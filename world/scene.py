"""What pictures and clips share: colours, forms, grounds, and questions before their phrasing is chosen.

mask_of("star", 20)                  coverage of a form, (size, size, 1) in 0..1
ground_of(rng, height, width, level) a plain, noisy, sloping or striped ground, uint8 (height, width, 3)
phrase(rng, split, "clip", asks, PHRASES)   turns, each in a phrasing that its composition allows in the split
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as PIL
from PIL import ImageDraw

from world.sample import Check, Pixels, Split, Turn, belongs

EXACT = Check()

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 135, 30),
    "cyan": (50, 200, 215),
    "pink": (245, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
GROUNDS = {"white": (248, 248, 248), "black": (12, 12, 12), "gray": (128, 128, 128)}


@dataclass(frozen=True)
class Ask:
    """A question before its phrasing is chosen. about: compositions it tests; detail: what else its key holds."""

    kind: str
    answer: str
    choices: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    detail: str = ""
    words: dict[str, str] = field(default_factory=dict)
    thinking: str = ""
    check: Check = EXACT


def phrase(
    rng: random.Random, split: Split, family: str, questions: list[Ask], phrases: dict[str, tuple[str, ...]]
) -> Iterator[Turn]:
    """Turns of a split, in random order, each in a phrasing that its composition allows there."""
    for ask in rng.sample(questions, len(questions)):
        wordings = phrases[ask.kind]
        for number in rng.sample(range(len(wordings)), len(wordings)):
            keys = (*ask.about, f"{family}/{ask.kind}#{number}|{ask.answer}|{ask.detail}")
            # training: none of them is held out; held out: at least one is, and that one is the turn's composition
            fitting = [key for key in keys if belongs(key, split)]
            if fitting if split == "heldout" else len(fitting) == len(keys):
                yield Turn(
                    wordings[number].format(**ask.words),
                    ask.answer,
                    tests=f"{family}/{ask.kind}",
                    composition=fitting[0] if split == "heldout" else fitting[-1],
                    thinking=ask.thinking,
                    check=ask.check,
                    choices=ask.choices,
                )
                break


@lru_cache(maxsize=1024)
def mask_of(shape: str, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Coverage (size, size, 1) in 0..1, drawn at four times the size."""
    n = 4 * size
    picture = PIL.new("L", (n, n))
    draw = ImageDraw.Draw(picture)
    end = n - 1
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        draw.rectangle((0.06 * n, 0.06 * n, 0.94 * n, 0.94 * n), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (end, 0.95 * n), (0, 0.95 * n)], fill=255)
    elif shape == "star":
        turns = [(0.5 if k % 2 == 0 else 0.21, np.pi * k / 5) for k in range(10)]
        draw.polygon([(n * (0.5 + r * np.sin(a)), n * (0.53 - r * np.cos(a))) for r, a in turns], fill=255)
    elif shape == "cross":
        draw.rectangle((0.34 * n, 0, 0.66 * n, end), fill=255)
        draw.rectangle((0, 0.34 * n, end, 0.66 * n), fill=255)
    elif shape == "diamond":
        draw.polygon([(n / 2, 0), (0.88 * n, n / 2), (n / 2, end), (0.12 * n, n / 2)], fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, end, end), fill=255)
        draw.ellipse((0.28 * n, 0.28 * n, 0.72 * n, 0.72 * n), fill=0)
    elif shape == "heart":
        draw.ellipse((0, 0.05 * n, 0.54 * n, 0.58 * n), fill=255)
        draw.ellipse((0.46 * n, 0.05 * n, end, 0.58 * n), fill=255)
        draw.polygon([(0.06 * n, 0.46 * n), (0.94 * n, 0.46 * n), (n / 2, end)], fill=255)
    else:
        raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    small = np.asarray(picture.resize((size, size), PIL.Resampling.BOX), dtype=np.float32)
    return small[:, :, None] / np.float32(255)


def ground_of(rng: random.Random, height: int, width: int, level: int) -> Pixels:
    # Level 1 is dark: every form is brighter than its ground there, whatever its colour, and is learned many times
    # sooner than where the contrast may have either sign.
    base = np.array(GROUNDS["black" if level == 1 else rng.choice(list(GROUNDS))], np.float32) + rng.randint(-8, 8)
    ground = np.broadcast_to(base, (height, width, 3)).astype(np.float32)
    texture = rng.choice(("plain", "plain", "noise", "slope", "stripes") if level > 1 else ("plain", "plain", "noise"))
    if texture == "noise":
        noise = np.frombuffer(rng.randbytes(height * width), np.uint8).reshape(height, width, 1)
        ground += (noise.astype(np.float32) - 128) * (rng.choice((4, 8, 16)) / 128)
    elif texture == "slope":
        tilt = np.linspace(-24, 24, width if rng.random() < 0.5 else height, dtype=np.float32)
        ground += tilt[None, :, None] if len(tilt) == width else tilt[:, None, None]
    elif texture == "stripes":
        stripes = np.arange(height if rng.random() < 0.5 else width) // rng.randint(3, 7) % 2 * np.float32(20) - 10
        ground += stripes[:, None, None] if len(stripes) == height else stripes[None, :, None]
    return np.clip(ground, 0, 255).astype(np.uint8)
