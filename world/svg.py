"""Drawings in a small, safe part of SVG: circles and rectangles on a grid of ten by ten.

    <svg><circle cx="3" cy="4" r="2" fill="red"/><rect x="6" y="1" width="3" height="3" fill="blue"/></svg>

    write(shapes) -> text        read(text) -> shapes        render(shapes, side) -> pixels        similar(gold, said)

Read by a pattern, not by an XML parser: no entities, no references, nothing to expand.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PIL
from PIL import ImageDraw

from world.clip import COLOURS
from world.sample import Pixels

GRID, MOST = 10, 20  # units of a side; shapes in a drawing


class Shape(NamedTuple):
    """circle: x, y its centre and width its radius. rect: x, y its upper left corner. In units of the grid."""

    kind: str
    colour: str
    x: float
    y: float
    width: float
    height: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        if self.kind == "circle":
            return self.x - self.width, self.y - self.width, self.x + self.width, self.y + self.width
        return self.x, self.y, self.x + self.width, self.y + self.height

    def clear_of(self, other: "Shape") -> bool:
        """Whether the boxes of the two do not touch."""
        a, b = self.box, other.box
        return a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def write(shapes: Sequence[Shape]) -> str:
    """The canonical text of a drawing."""
    parts = []
    for s in shapes:
        if s.kind == "circle":
            parts.append(f'<circle cx="{s.x:g}" cy="{s.y:g}" r="{s.width:g}" fill="{s.colour}"/>')
        else:
            parts.append(f'<rect x="{s.x:g}" y="{s.y:g}" width="{s.width:g}" height="{s.height:g}" fill="{s.colour}"/>')
    return f"<svg>{''.join(parts)}</svg>"


def read(text: str) -> list[Shape]:
    """The shapes of a drawing. Raises ValueError for anything but circles and rectangles inside <svg>."""
    whole = re.fullmatch(r"\s*<svg[^<>]{0,200}>(.{0,8000})</svg>\s*", text, re.DOTALL)
    if whole is None:
        raise ValueError("a drawing is <svg> ... </svg>")
    tags = re.findall(r"<(\w+)\s([^<>]*?)/?>(?:</\1>)?", whole.group(1))
    if re.sub(r"<(\w+)\s([^<>]*?)/?>(?:</\1>)?", "", whole.group(1)).strip():
        raise ValueError("something other than tags between <svg> and </svg>")
    if len(tags) > MOST:
        raise ValueError(f"{len(tags)} shapes; at most {MOST} are drawn")
    shapes = []
    for name, inside in tags:
        given = dict(re.findall(r'([\w-]+)="([^"]*)"', inside))
        wanted = {"circle": ("cx", "cy", "r", "r"), "rect": ("x", "y", "width", "height")}.get(name)
        if wanted is None:
            raise ValueError(f"<{name}> is not drawn; known: circle, rect")
        if given.get("fill") not in COLOURS:
            raise ValueError(f"<{name}> has fill {given.get('fill')!r}; known: {', '.join(COLOURS)}")
        numbers = [given.get(key, "") for key in wanted]
        if not all(re.fullmatch(r"-?\d{1,4}(\.\d{1,4})?", number, re.ASCII) for number in numbers):
            raise ValueError(f"<{name}> needs numbers for {', '.join(sorted(set(wanted)))}, got {numbers}")
        x, y, width, height = map(float, numbers)
        if width <= 0 or height <= 0:
            raise ValueError(f"<{name}> has no area")
        shapes.append(Shape(name, given["fill"], x, y, width, height))
    return shapes


def render(shapes: Sequence[Shape], side: int, palette: Mapping[str, Any] = COLOURS) -> Pixels:
    """uint8 (side, side, 3), on white."""
    picture = PIL.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    unit = side / GRID
    for s in shapes:
        box = [value * unit for value in s.box]
        corners = (box[0], box[1], box[2] - 1, box[3] - 1)
        if s.kind == "circle":
            pen.ellipse(corners, fill=palette[s.colour])
        else:
            pen.rectangle(corners, fill=palette[s.colour])
    return np.asarray(picture)


def similar(gold: str, said: str, least: float = 0.7) -> bool:
    """Whether the ink of both drawings agrees: pixels inked alike over pixels inked in either is at least `least`.

    Raises ValueError when the gold drawing cannot be read; an answer that cannot be read is not similar.
    """
    first = render(read(gold), 60)
    try:
        second = render(read(said), 60)
    except ValueError:
        return False
    inked = (first != 255).any(2) | (second != 255).any(2)
    alike = (first == second).all(2) & inked
    return bool(inked.any()) and float(alike.sum() / inked.sum()) >= least
