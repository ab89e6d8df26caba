"""Pictures with numbers and short words to read, in Pillow's own font, a free one that ships inside the library.

    make(rng, split, level)        ->   Sample "reading": one to four texts, up to 4 turns
    make_glyph(rng, split, level)  ->   Sample "glyph": one to three letters or digits on a small picture
    make_spelling(rng, split, level) -> Sample "spelling": an invented word, which only its letters can tell

    level 1   one or two texts, upright, letters of 30 px and more, plain ground
    level 2   up to three, 24 px and more, turned by up to 8 degrees, noisy grounds
    level 3   up to four, 14 px and more, up to 15 degrees

A held-out text is a number or word whose letters were never read together in training: composition "text|347".
"""

import random
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PIL
from PIL import ImageDraw, ImageFont

from world.sample import Image, Maker, Pixels, Sample, Split, Turn, belongs
from world.scene import COLOURS, ground_of
from world.words import WORDS, invented, spelled

PHRASES = {
    "number": ("read the number.", "what number is this?", "which number is in the picture?"),
    "word": ("read the word.", "what word is this?", "which word is in the picture?"),
    "glyph": ("read it.", "what does it say?"),
    "spelling": ("read the word.", "what word is this?", "which word is in the picture?"),
    "coloured": ("read the {colour} text.", "what is written in {colour}?", "what does the {colour} text say?"),
    "top": ("read the top line.", "what is written at the top?", "what does the top line say?"),
    "bottom": ("read the bottom line.", "what is written at the bottom?", "what does the bottom line say?"),
    "all": ("read everything from top to bottom.", "read all lines.", "what do the lines say?"),
}


# px of the font. A letter two patches wide is learned many times sooner than one within a patch.
SIZES = {1: (32, 44), 2: (24, 38), 3: (14, 30)}
SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789"


class Line(NamedTuple):
    """One text, placed: `x`, `y` of the upper left corner of its mask."""

    text: str
    colour: str
    mask: np.ndarray[Any, np.dtype[np.float32]]  # (height, width, 1), 0..1
    x: int
    y: int


@lru_cache(maxsize=64)
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=4096)
def _written(text: str, size: int, turned: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The text's coverage, cut to its ink: float32 (height, width, 1)."""
    font = _font(size)
    left, top, right, bottom = font.getbbox(text)
    picture = PIL.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(picture).text((2 - left, 2 - top), text, 255, font)
    if turned:
        picture = picture.rotate(turned, PIL.Resampling.BICUBIC, expand=True)
    box = picture.getbbox()
    assert box is not None, "a text has ink"
    ink = np.asarray(picture.crop(box), np.float32)
    mask: np.ndarray[Any, np.dtype[np.float32]] = ink[:, :, None] / np.float32(255)
    return mask


def _text(rng: random.Random, split: Split) -> str:
    while True:
        if rng.random() < 0.55:
            digits = rng.choices((1, 2, 3, 4), (1, 4, 4, 2))[0]
            text = str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))
            if digits == 1 and split != "heldout":
                return text  # ten digits are too few to hold one out
        elif split != "heldout" and rng.random() < 0.5:
            text = invented(rng)  # 140 words would be learned by heart
        else:
            text = rng.choice(WORDS)
        if belongs(f"text|{text}", split) and (len(text) > 1 or split != "heldout"):
            return text


def _lines(rng: random.Random, split: Split, level: int) -> tuple[int, int, list[Line]] | None:
    count = rng.randint(1, {1: 2, 2: 3, 3: 4}[level])
    low, high = SIZES[level]
    lean = {1: 0, 2: 8, 3: 15}[level]
    colours = rng.sample([c for c in COLOURS if c != "yellow"], count)
    masks = []
    texts: list[str] = []
    while len(texts) < count:
        text = _text(rng, split)
        if text not in texts:
            texts.append(text)
    for text in texts:
        masks.append(_written(text, rng.randint(low, high), rng.randint(-lean, lean)))
    gap = rng.randint(4, 10)
    height = sum(m.shape[0] for m in masks) + gap * (count + 1)
    width = max(m.shape[1] for m in masks) + 2 * gap
    height, width = max(56, height + rng.randint(0, 14)), max(56, width + rng.randint(0, 28))
    if max(height, width) > 196:
        return None
    spare = height - sum(m.shape[0] for m in masks) - gap * (count - 1)
    y = rng.randint(2, max(2, spare - 2))
    lines = []
    for text, colour, mask in zip(texts, colours, masks, strict=True):
        lines.append(Line(text, colour, mask, rng.randint(2, width - mask.shape[1] - 2), y))
        y += mask.shape[0] + gap
    if y - gap > height:
        return None
    return height, width, lines


def _paint(rng: random.Random, height: int, width: int, lines: list[Line], level: int) -> Pixels:
    pixels = ground_of(rng, height, width, level).astype(np.float32)
    dark = float(pixels.mean()) < 100
    for line in lines:
        rgb = np.array(COLOURS[line.colour], np.float32)
        rgb = np.minimum(255, rgb + 40) if dark else rgb * (0.45 if pixels.mean() < 180 else 0.75)  # contrast
        rows, columns = line.mask.shape[:2]
        under = pixels[line.y : line.y + rows, line.x : line.x + columns]
        under[:] = under + (rgb - under) * line.mask
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _fitted(rng: random.Random, text: str, level: int) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int, int]:
    """A text's mask, and height and width of the smallest picture of whole tokens (28 px) around it."""
    mask = _written(text, rng.randint(*SIZES[level]), rng.randint(-4, 4) * (level - 1))
    height, width = (28 * -(-(side + 4) // 28) for side in mask.shape[:2])
    return mask, height, width


def _placed(
    rng: random.Random, text: str, mask: np.ndarray[Any, np.dtype[np.float32]], height: int, width: int
) -> Line:
    """The text in some colour, anywhere inside."""
    rows, columns = mask.shape[:2]
    colour = rng.choice([c for c in COLOURS if c != "yellow"])
    return Line(text, colour, mask, rng.randint(2, width - columns - 2), rng.randint(2, height - rows - 2))


def make_glyph(rng: random.Random, split: Split, level: int) -> Sample:
    """A few letters or digits on a picture of 28 to 112 px, read one by one: signs and their names, in few tokens."""
    if level not in (1, 2, 3):
        raise ValueError(f"glyphs have levels 1 to 3, got {level}")
    while True:
        signs = rng.choice((SIGNS, SIGNS[26:]))
        text = "".join(rng.choice(signs) for _ in range(rng.randint(1 if split != "heldout" else 2, 3)))
        if len(text) > 1 and not belongs(f"text|{text}", split):
            continue
        mask, height, width = _fitted(rng, text, level)
        if max(height, width) <= 112:
            break
    line = _placed(rng, text, mask, height, width)
    turn = Turn(rng.choice(PHRASES["glyph"]), spelled(text), "glyph", f"text|{text}")
    return Sample("glyph", (turn,), (Image(_paint(rng, height, width, [line], level)),), level=level, split=split)


def make_spelling(rng: random.Random, split: Split, level: int) -> Sample:
    """A word that nobody uses."""
    if level not in (1, 2, 3):
        raise ValueError(f"spelling has levels 1 to 3, got {level}")
    while True:
        text = invented(rng)
        mask, height, width = _fitted(rng, text, level)
        if text not in WORDS and belongs(f"text|{text}", split) and max(height, width) <= 196:
            break
    line = _placed(rng, text, mask, height, width)
    turn = Turn(rng.choice(PHRASES["spelling"]), text, "spelling", f"text|{text}", spelled(text))
    picture = Image(_paint(rng, height, width, [line], level))
    return Sample("spelling", (turn,), (picture,), level=level, split=split)


def make(rng: random.Random, split: Split, level: int) -> Sample:
    """One to four texts, and turns that read them."""
    if level not in (1, 2, 3):
        raise ValueError(f"reading has levels 1 to 3, got {level}")
    plan = None
    while plan is None:
        plan = _lines(rng, split, level)
    height, width, lines = plan
    questions: list[tuple[str, str, dict[str, str]]] = []
    if len(lines) == 1:
        kind = "number" if lines[0].text.isdigit() else "word"
        questions.append((kind, lines[0].text, {}))
    else:
        numbers = [line for line in lines if line.text.isdigit()]
        words = [line for line in lines if not line.text.isdigit()]
        questions += [("number", numbers[0].text, {})] if len(numbers) == 1 else []
        questions += [("word", words[0].text, {})] if len(words) == 1 else []
        questions += [("top", lines[0].text, {}), ("bottom", lines[-1].text, {})]
        pick = rng.choice(lines)
        questions.append(("coloured", pick.text, {"colour": pick.colour}))
        questions.append(("all", " ".join(line.text for line in lines), {}))
    turns = []
    for kind, answer, words_ in rng.sample(questions, min(4, len(questions))):
        key = f"text|{answer.split()[0]}"
        wording = rng.choice(PHRASES[kind])
        spell = not all(text.isdigit() for text in answer.split())
        thinking = ", ".join(map(spelled, answer.split())) if spell else ""
        if kind == "coloured":  # which line it is, from the top, and then what it says
            thinking = f"{', '.join(line.colour for line in lines)}. {thinking}".rstrip()
        turns.append(Turn(wording.format(**words_), answer, f"reading/{kind}", key, thinking))
    return Sample("reading", tuple(turns), (Image(_paint(rng, height, width, lines, level)),), level=level, split=split)


MAKERS: dict[str, Maker] = {"reading": make, "glyph": make_glyph, "spelling": make_spelling}
WEIGHTS: dict[str, float] = {"reading": 0.5, "glyph": 0.25, "spelling": 0.25}
