"""Drawings in a small, safe part of SVG, on a grid of ten by ten with white behind.

    <svg><circle cx="3" cy="4" r="2" fill="red"/><rect x="6" y="1" width="3" height="3" fill="blue"/></svg>
    <svg><polygon points="1,8 5,8 3,4" fill="green"/><line x1="6" y1="2" x2="9" y2="2" stroke="red"/></svg>

    write(shapes) -> text        read(text) -> shapes        render(shapes, side) -> pixels        similar(gold, said)

Read by a pattern, not by an XML parser: no entities, no references, nothing to expand. What would change a drawing in
a browser but is not drawn here (a transform, an opacity, a viewBox) is refused rather than ignored.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from world.sample import Pixels
from world.scene import COLOURS

GRID, MOST, LONGEST = 10, 20, 8000  # units of a side; shapes, and characters, of a drawing
NUMBERS: dict[str, tuple[str, ...]] = {
    "circle": ("cx", "cy", "r"),
    "rect": ("x", "y", "width", "height"),
    "line": ("x1", "y1", "x2", "y2"),
    "polygon": ("points",),
}
_TAG = re.compile(r'\s*<(\w{1,10})((?:\s+[\w-]{1,20}="[^"<>]*")*)\s*/>')
_NUMBER = r"-?\d{1,4}(?:\.\d{1,4})?"


class Shape(NamedTuple):
    """numbers: those that NUMBERS names, in that order; of a polygon x and y of each corner. In units of the grid."""

    kind: str
    colour: str
    numbers: tuple[float, ...]

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Of everything but a circle. A line is one unit wide (SVG's own default) and ends squarely at its ends."""
        n = self.numbers
        if self.kind == "rect":
            return [(n[0], n[1]), (n[0] + n[2], n[1]), (n[0] + n[2], n[1] + n[3]), (n[0], n[1] + n[3])]
        if self.kind == "line":
            length = float(np.hypot(n[2] - n[0], n[3] - n[1]))
            x, y = (n[1] - n[3]) / length / 2, (n[2] - n[0]) / length / 2  # half a unit to the side
            return [(n[0] + x, n[1] + y), (n[2] + x, n[3] + y), (n[2] - x, n[3] - y), (n[0] - x, n[1] - y)]
        return list(zip(n[::2], n[1::2], strict=True))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        if self.kind == "circle":
            x, y, r = self.numbers
            return x - r, y - r, x + r, y + r
        xs, ys = zip(*self.corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def clear_of(self, other: "Shape") -> bool:
        """Whether the boxes of the two do not touch."""
        a, b = self.box, other.box
        return a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def _paint(kind: str) -> str:
    return "stroke" if kind == "line" else "fill"


def write(shapes: Sequence[Shape]) -> str:
    """The canonical text of a drawing."""
    parts = []
    for s in shapes:
        texts = [f"{number:g}" for number in s.numbers]
        if s.kind == "polygon":
            texts = [" ".join(f"{x},{y}" for x, y in zip(texts[::2], texts[1::2], strict=True))]
        given = " ".join(f'{name}="{text}"' for name, text in zip(NUMBERS[s.kind], texts, strict=True))
        parts.append(f'<{s.kind} {given} {_paint(s.kind)}="{s.colour}"/>')
    return f"<svg>{''.join(parts)}</svg>"


def read(text: str) -> list[Shape]:
    """The shapes of a drawing. Raises ValueError for anything but circle, rect, polygon and line inside <svg>."""
    plain = text.strip()
    if len(plain) > LONGEST:
        raise ValueError(f"{len(plain)} characters; a drawing has at most {LONGEST}")
    if not (plain.startswith("<svg>") and plain.endswith("</svg>")):
        raise ValueError("a drawing is <svg> ... </svg>, without attributes")
    inside = plain.removeprefix("<svg>").removesuffix("</svg>").rstrip()
    shapes: list[Shape] = []
    at = 0
    while at < len(inside):
        tag = _TAG.match(inside, at)
        if tag is None:
            raise ValueError(f'wanted a tag such as <circle cx="3" ... />, got {inside[at : at + 40]!r}')
        if len(shapes) == MOST:
            raise ValueError(f"more than {MOST} shapes")
        shapes.append(_shape(tag.group(1), re.findall(r'([\w-]+)="([^"]*)"', tag.group(2))))
        at = tag.end()
    return shapes


def _shape(kind: str, pairs: list[tuple[str, str]]) -> Shape:
    if kind not in NUMBERS:
        raise ValueError(f"<{kind}> is not drawn; known: {', '.join(NUMBERS)}")
    given, wanted = dict(pairs), {*NUMBERS[kind], _paint(kind)}
    if len(given) != len(pairs) or given.keys() != wanted:
        raise ValueError(f"<{kind}> wants {', '.join(sorted(wanted))}, each once, got {[name for name, _ in pairs]}")
    colour = given[_paint(kind)]
    if colour not in COLOURS:
        raise ValueError(f"<{kind}> has the colour {colour!r}; known: {', '.join(COLOURS)}")
    texts = [given[name] for name in NUMBERS[kind]]
    if kind == "polygon":
        texts = re.split(r"[\s,]+", texts[0].strip())
        if len(texts) % 2 or not 6 <= len(texts) <= 24:
            raise ValueError(f"<polygon> wants x,y of 3 to 12 corners, got {len(texts)} numbers")
    if not all(re.fullmatch(_NUMBER, text, re.ASCII) for text in texts):
        raise ValueError(f"<{kind}> wants plain numbers, got {texts}")
    numbers = tuple(map(float, texts))
    if kind in ("circle", "rect") and min(numbers[2:]) <= 0:
        raise ValueError(f"<{kind}> has no area: {texts}")
    if kind == "line" and numbers[:2] == numbers[2:]:
        raise ValueError(f"<line> ends where it starts: {texts}")
    return Shape(kind, colour, numbers)


def render(shapes: Sequence[Shape], side: int) -> Pixels:
    """uint8 (side, side, 3). A pixel has the colour of the last shape that holds its centre: no smoothing."""
    return _PALETTE[_plane(shapes, side)]


_PALETTE = np.array([(255, 255, 255), *COLOURS.values()], np.uint8)
_INK = {colour: number for number, colour in enumerate(COLOURS, 1)}


def _plane(shapes: Sequence[Shape], side: int) -> Pixels:
    """uint8 (side, side): 0 where nothing is drawn, else the number of a colour."""
    picture = np.zeros((side, side), np.uint8)
    middle = (np.arange(side) + 0.5) * (GRID / side)
    x, y = middle[None, :], middle[:, None]
    for s in shapes:
        if s.kind == "circle":
            inside = (x - s.numbers[0]) ** 2 + (y - s.numbers[1]) ** 2 <= s.numbers[2] ** 2
        else:
            inside = np.zeros((side, side), bool)
            ends = s.corners
            for (x1, y1), (x2, y2) in zip(ends, [*ends[1:], ends[0]], strict=True):
                if y1 != y2:  # even-odd: a ray to the left crosses this edge
                    inside ^= ((y1 <= y) != (y2 <= y)) & (x1 + (y - y1) * ((x2 - x1) / (y2 - y1)) <= x)
        picture[inside] = _INK[s.colour]
    return picture


def similar(gold: str, said: str, least: float = 0.95) -> bool:
    """Whether two drawings look the same: of every colour in either, intersection over union is at least `least`.

    0.95, since a wrong number of the grid costs more (a square for a circle leaves 0.79, the smallest of three shapes
    left out 0.94), while the same area drawn with other tags loses nothing. Raises ValueError when the gold drawing
    cannot be read or is empty; an answer that cannot be read is not similar.
    """
    first = _plane(read(gold), 60)
    if not first.any():
        raise ValueError(f"nothing is drawn by the gold drawing {gold!r}")
    try:
        second = _plane(read(said), 60)
    except ValueError:
        return False
    a, b, both = (
        np.bincount(plane, minlength=len(_PALETTE))[1:]
        for plane in (first.ravel(), second.ravel(), first[first == second])
    )  # pixels of each colour
    return bool((both >= least * (a + b - both)).all())
