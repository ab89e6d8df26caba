"""Charts, clocks, gauges, boards, tables and printed programs: pictures that mean something exact.

    make_chart     bars or a line                values, highest, comparisons, up or down
    make_clock     two hands                     the time in quarters of an hour, one hour later or before
    make_gauge     dial, half dial or bar        a whole number from 0 to 10; at level 3 two of them
    make_grid      a board of noughts and        who won, what is where, how many
                   crosses
    make_table     2 x 2 to 3 x 3 numbers        a cell, the largest, a row, a row's sum
    make_printout  a program of 1 to 4 lines     what it prints, what a line says

    level 1   large and upright on plain ground       level 3   small, turned by up to 4 degrees, noisy

Held out is what a picture shows as a whole, never a phrasing: "chart|3,5,2", "clock|4:30", "gauge|half|red|7",
"grid|x-o-x-o--", "table|4,7;1,2", "printout|print(3 + 4)". Several digits or a word are drawn here only where
world/reading.py, too, shows them to training: what that module holds out is never seen in another's picture.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PIL
from PIL import ImageDraw

from world.reading import _font, _written
from world.sample import Check, Image, Maker, Pixels, Sample, Split, Turn, belongs, held_out
from world.scene import COLOURS, ground_of
from world.words import WORDS

Mask = np.ndarray[Any, np.dtype[np.float32]]
Rgb = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

PEN = ("red", "green", "blue", "purple", "orange")  # what stays legible as a thin line on white, gray and black
YES_NO = ("yes", "no")
LETTERS = "abcde"

PHRASES = {
    "value": ("how high is {it}?", "what is the value of {it}?", "read the value of {it}."),
    "highest": ("which {kind} is highest?", "what is the highest {kind}?", "the highest {kind}?"),
    "lowest": ("which {kind} is lowest?", "what is the lowest {kind}?", "the lowest {kind}?"),
    "higher": ("is {a} higher than {b}?", "{a} is higher than {b}, yes or no?"),
    "difference": ("how much higher is {a} than {b}?", "how many more has {a} than {b}?"),
    "count": ("how many {kind}s are there?", "count the {kind}s.", "number of {kind}s?"),
    "has": ("which {kind} has the value {value}?", "what {kind} is at {value}?"),
    "trend": ("from {a} to {b}, up or down?", "does the line go up or down from {a} to {b}?"),
    "time": ("what time is it?", "read the clock.", "what time does the clock show?"),
    "is": ("is it {time}?", "does the clock show {time}?", "the clock shows {time}, yes or no?"),
    "long": ("where is the long hand?", "which number is at the long hand?", "the long hand is at which number?"),
    "later": ("what time is it in one hour?", "what is the time one hour later?"),
    "before": ("what time was it one hour before?", "what was the time one hour before?"),
    "shows": ("what does {it} show?", "read {it}.", "what is the value of {it}?"),
    "above": ("is {it} above {value}?", "{it} is above {value}, yes or no?"),
    "full": ("how much is missing to 10 on {it}?", "how far is {it} from 10?"),
    "won": ("who won?", "which side won?", "who has three in a row?"),
    "at": ("what is at the {place}?", "which sign is at the {place}?", "the sign at the {place}?"),
    "signs": ("how many {sign} are there?", "count the {sign}.", "number of {sign}?"),
    "empty": ("how many cells are empty?", "count the empty cells.", "number of empty cells?"),
    "line": ("where is the line of three?", "which line won?", "where are three in a row?"),
    "cell": ("what is in row {row}, column {column}?", "row {row}, column {column}?"),
    "named": ("what is the value of {it}?", "which number is at {it}?", "{it} has what value?"),
    "largest": ("what is the largest number?", "which number is largest?", "the largest number?"),
    "smallest": ("what is the smallest number?", "which number is smallest?", "the smallest number?"),
    "most": ("which word has the largest number?", "what word has the largest number?"),
    "least": ("which word has the smallest number?", "what word has the smallest number?"),
    "row": ("read row {row}.", "what is in row {row}?"),
    "sum": ("what is the sum of row {row}?", "add the numbers of row {row}."),
    "output": ("what does this print?", "what is the output?", "what does the program print?"),
    "says": ("read line {row}.", "what does line {row} say?"),
    "lines": ("how many lines are there?", "count the lines.", "number of lines?"),
}


class _Ask(NamedTuple):
    """A question before its phrasing is chosen."""

    kind: str
    answer: str
    words: dict[str, str] = {}  # noqa: RUF012
    thinking: str = ""
    choices: tuple[str, ...] = ()
    check: Check = Check()


def _sample(
    rng: random.Random, split: Split, level: int, family: str, key: str, asks: list[_Ask], pixels: Pixels, most: int = 6
) -> Sample:
    """Questions in random order and phrasing. All share one composition: what is new is what the picture shows."""
    turns = []
    for ask in rng.sample(asks, min(most, len(asks))):
        question = rng.choice(PHRASES[ask.kind]).format(**ask.words)
        tests = f"{family}/{ask.kind}"
        turns.append(Turn(question, ask.answer, tests, key, ask.thinking, check=ask.check, choices=ask.choices))
    return Sample(family, tuple(turns), (Image(pixels),), level=level, split=split)


def _must_be_level(family: str, level: int) -> None:
    if level not in (1, 2, 3):
        raise ValueError(f"{family} has levels 1 to 3, got {level}")


def _until(split: Split, draw: Callable[[], Any], key: Callable[[Any], str]) -> Any:
    """Draw until the composition belongs to the split."""
    for _ in range(100_000):
        drawn = draw()
        if belongs(key(drawn), split):
            return drawn
    raise ValueError(f"nothing that can be drawn belongs to split {split!r}")


def _shown(text: str) -> bool:
    """Whether a text may be seen by all: reading holds out numbers of several digits, and words."""
    return len(text) == 1 or not held_out(f"text|{text}")


NUMBERS = tuple(n for n in range(100) if _shown(str(n)))
SHORT_WORDS = tuple(word for word in WORDS if len(word) in (3, 4) and _shown(word))


# ---- drawing


class Sheet:
    """A ground to draw on: float32 (height, width, 3). Coordinates are pixels, x to the right, y down."""

    def __init__(self, rng: random.Random, height: int, width: int, level: int) -> None:
        self.pixels = ground_of(rng, height, width, level).astype(np.float32)
        mean = float(self.pixels.mean())
        self.dark = mean < 100
        self.ink: Rgb = (235, 235, 235) if self.dark else (20, 20, 20)
        self.faint: Rgb = (90, 90, 90) if self.dark else (95, 95, 95) if mean < 180 else (190, 190, 190)
        self.darken = 0.55 if mean < 180 else 0.75
        self.turned = rng.uniform(-4, 4) if level == 3 else 0.0

    def pen(self, name: str) -> Rgb:
        """The colour as it is drawn in thin lines: darker or lighter than usual, away from the ground."""
        r, g, b = COLOURS[name]
        if self.dark:
            return min(255, r + 50), min(255, g + 50), min(255, b + 50)
        return int(r * self.darken), int(g * self.darken), int(b * self.darken)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
        """Fill a rectangle; right and bottom are not part of it."""
        self.pixels[max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)] = colour

    def blend(self, mask: Mask, x: int, y: int, colour: Rgb) -> None:
        """Lay colour where the mask (height, width, 1) is 1. What reaches over the edge is cut off."""
        height, width = self.pixels.shape[:2]
        up, left = max(0, -y), max(0, -x)
        mask = mask[up : max(up, height - y), left : max(left, width - x)]
        under = self.pixels[y + up : y + up + mask.shape[0], x + left : x + left + mask.shape[1]]
        under += (np.array(colour, np.float32) - under) * mask

    def text(self, text: str, size: int, x: float, y: float, colour: Rgb, align: str = "centre") -> None:
        """A text around (x, y); align: centre, left (x is its left end) or right (x is its right end)."""
        mask = _written(text, size, 0)
        height, width = mask.shape[:2]
        left = {"centre": x - width / 2, "left": x, "right": x - width}[align]
        self.blend(mask, round(left), round(y - height / 2), colour)

    def draw(self, colour: Rgb, lines: Sequence[tuple[Points, float]] = (), discs: Sequence[Points] = ()) -> None:
        """Smooth lines (points, thickness) and filled polygons, at twice the size, made smaller after."""
        height, width = self.pixels.shape[:2]
        picture = PIL.new("L", (2 * width, 2 * height))
        brush = ImageDraw.Draw(picture)
        for points, thickness in lines:
            brush.line([(2 * x, 2 * y) for x, y in points], 255, round(2 * thickness), "curve")
        for points in discs:
            brush.polygon([(2 * x, 2 * y) for x, y in points], 255)
        small = picture.reduce(2)
        left, top, right, bottom = small.getbbox() or (0, 0, 1, 1)
        mask = np.asarray(small.crop((left, top, right, bottom)), np.float32)[:, :, None] / np.float32(255)
        self.blend(mask, left, top, colour)

    def done(self) -> Pixels:
        """uint8 (height, width, 3), turned where the level says so."""
        pixels = np.clip(self.pixels, 0, 255).astype(np.uint8)
        if not self.turned:
            return pixels
        corner = tuple(int(v) for v in pixels[0, 0])
        turned = PIL.fromarray(pixels).rotate(self.turned, PIL.Resampling.BILINEAR, fillcolor=corner)
        return np.array(turned)


@lru_cache(maxsize=64)
def _ring(radius: float, start: float, stop: float) -> tuple[tuple[float, float], ...]:
    """Points of an arc around (0, 0); angles in turns, clockwise from the top."""
    angles = np.linspace(start, stop, max(12, round(radius * (stop - start) * 2))) * 2 * math.pi
    return tuple((radius * math.sin(a), -radius * math.cos(a)) for a in angles)


def _arc(x: float, y: float, radius: float, start: float = 0.0, stop: float = 1.0) -> list[tuple[float, float]]:
    return [(x + dx, y + dy) for dx, dy in _ring(radius, start, stop)]


def _toward(x: float, y: float, turn: float, near: float, far: float) -> list[tuple[float, float]]:
    """The piece of a ray from (x, y): `turn` in turns, clockwise from the top."""
    dx, dy = math.sin(2 * math.pi * turn), -math.cos(2 * math.pi * turn)
    return [(x + near * dx, y + near * dy), (x + far * dx, y + far * dy)]


# ---- charts


def make_chart(rng: random.Random, split: Split, level: int) -> Sample:
    """Bars named by colour or letter, or a line through lettered points."""
    _must_be_level("chart", level)
    top = 5 if level == 1 else 9
    least, most = {1: (2, 3), 2: (3, 4), 3: (3, 5)}[level]
    count = rng.randint(least, most)
    values = _until(split, lambda: [rng.randint(1, top) for _ in range(count)], chart_key)
    if rng.random() < 0.4 and count > 2:
        kind, names = "point", list(LETTERS[:count])
    else:
        kind, names = "bar", rng.sample(list(COLOURS), count) if rng.random() < 0.5 else list(LETTERS[:count])
    pixels = paint_chart(rng, level, kind, names, values)
    return _sample(rng, split, level, "chart", chart_key(values), list(_chart_asks(rng, kind, names, values)), pixels)


def chart_key(values: Sequence[int]) -> str:
    return "chart|" + ",".join(map(str, values))


def _chart_asks(rng: random.Random, kind: str, names: list[str], values: list[int]) -> Iterator[_Ask]:
    coloured = names[0] in COLOURS
    choices = tuple(names)

    def call(i: int) -> str:
        return f"the {names[i]} bar" if coloured else f"{kind} {names[i]}"

    count = len(names)
    for i in rng.sample(range(count), 2):
        yield _Ask("value", str(values[i]), {"it": call(i)})
    for ask, extreme in (("highest", max(values)), ("lowest", min(values))):
        if values.count(extreme) == 1:
            yield _Ask(ask, names[values.index(extreme)], {"kind": kind}, choices=choices)
    single = [i for i in range(count) if values.count(values[i]) == 1]
    if single:
        i = rng.choice(single)
        yield _Ask("has", names[i], {"kind": kind, "value": str(values[i])}, choices=choices)
    pairs = [(i, j) for i in range(count) for j in range(count) if values[i] > values[j]]
    if pairs:
        i, j = rng.choice(pairs)
        yes = rng.random() < 0.5
        a, b = (i, j) if yes else (j, i)
        yield _Ask("higher", "yes" if yes else "no", {"a": call(a), "b": call(b)}, choices=YES_NO)
        i, j = rng.choice(pairs)
        difference = values[i] - values[j]
        thinking = f"{values[i]} - {values[j]} = {difference}."
        yield _Ask("difference", str(difference), {"a": call(i), "b": call(j)}, thinking)
    yield _Ask("count", str(count), {"kind": kind}, choices=("2", "3", "4", "5"))
    steps = [i for i in range(count - 1) if values[i] != values[i + 1]]
    if kind == "point" and steps:
        i = rng.choice(steps)
        answer = "up" if values[i + 1] > values[i] else "down"
        yield _Ask("trend", answer, {"a": names[i], "b": names[i + 1]}, choices=("up", "down"))


def paint_chart(rng: random.Random, level: int, kind: str, names: list[str], values: list[int]) -> Pixels:
    """Bars or a line over a scale: a faint line at every unit, numbers at every unit or at every fifth."""
    top = 5 if level == 1 else 10
    unit = rng.randint(14, 16) if level == 1 else rng.randint(9, 11)
    bar, gap = (rng.randint(14, 18), rng.randint(7, 12)) if level > 1 else (rng.randint(16, 22), rng.randint(8, 14))
    coloured = names[0] in COLOURS
    # a turned picture loses its corners
    left, above, below = (20, 8, 6 if coloured else 20) if level < 3 else (26, 14, 10 if coloured else 24)
    height, width = above + top * unit + below, left + len(names) * (bar + gap) + gap + rng.randint(0, 10)
    sheet = Sheet(rng, max(56, height), max(56, width), level)
    base = above + top * unit
    for value in range(top + 1):
        y = base - value * unit
        strong = level > 1 and value % 5 == 0
        sheet.box(left, y, width - 2, y + 1, sheet.ink if value == 0 else sheet.faint)
        if level == 1 or strong:
            sheet.box(left - 4, y, left, y + 1, sheet.ink)
            if value or level > 1:
                sheet.text(str(value), 14, left - 5, y, sheet.ink, "right")
    sheet.box(left, above - 2, left + 1, base + 1, sheet.ink)
    middles = [left + gap + i * (bar + gap) + bar / 2 for i in range(len(names))]
    if kind == "point":
        pen = sheet.pen(rng.choice(PEN))
        points = [(x, base - v * unit + 0.5) for x, v in zip(middles, values, strict=True)]
        sheet.draw(pen, [(points, 2)], [_arc(x, y, 3.2) for x, y in points])
    else:
        shared = COLOURS[rng.choice(PEN)]
        for name, value, x in zip(names, values, middles, strict=True):
            sheet.box(x - bar / 2, base - value * unit, x + bar / 2, base, COLOURS[name] if coloured else shared)
    if not coloured:
        for name, x in zip(names, middles, strict=True):
            sheet.text(name, 15, x, base + 11, sheet.ink)
    return sheet.done()


# ---- clock


def make_clock(rng: random.Random, split: Split, level: int) -> Sample:
    """A clock at a quarter of an hour; level 1 has whole and half hours only."""
    _must_be_level("clock", level)
    minutes = (0, 30) if level == 1 else (0, 15, 30, 45)
    hour, minute = _until(split, lambda: (rng.randint(1, 12), rng.choice(minutes)), lambda t: f"clock|{_time(*t)}")
    radius = {1: rng.uniform(34, 48), 2: rng.uniform(30, 50), 3: rng.uniform(26, 46)}[level]
    side = math.ceil(2 * radius) + 8
    height, width = (side + rng.randint(0, {1: 10, 2: 24, 3: 40}[level]) for _ in range(2))
    x = rng.uniform(radius + 3, width - radius - 3)
    y = rng.uniform(radius + 3, height - radius - 3)
    pixels = paint_clock(rng, height, width, (x, y), radius, hour, minute, level)
    asks = list(_clock_asks(rng, split, hour, minute, minutes))
    return _sample(rng, split, level, "clock", f"clock|{_time(hour, minute)}", asks, pixels, 4)


def _time(hour: int, minute: int) -> str:
    return f"{(hour - 1) % 12 + 1}:{minute:02d}"


def _clock_asks(rng: random.Random, split: Split, hour: int, minute: int, minutes: tuple[int, ...]) -> Iterator[_Ask]:
    time = _time(hour, minute)
    yield _Ask("time", time)
    yield _Ask("long", {0: "12", 15: "3", 30: "6", 45: "9"}[minute], choices=("12", "3", "6", "9"))
    now = f"it is {time}."
    if rng.random() < 0.5:
        yield _Ask("later", _time(hour + 1, minute), {}, now)
    else:
        yield _Ask("before", _time(hour - 1, minute), {}, now)
    if rng.random() < 0.5:
        yield _Ask("is", "yes", {"time": time}, choices=YES_NO)
    else:
        # a wrong time is one that is right elsewhere in the split: else its name alone would say no
        times = [_time(h, m) for h in range(1, 13) for m in minutes]
        wrong = [t for t in times if t != time and belongs(f"clock|{t}", split)]
        yield _Ask("is", "no", {"time": rng.choice(wrong)}, choices=YES_NO)


def paint_clock(
    rng: random.Random,
    height: int,
    width: int,
    centre: tuple[float, float],
    radius: float,
    hour: int,
    minute: int,
    level: int,
) -> Pixels:
    """The short hand is half as long as the radius, the long hand reaches to three quarters of it."""
    x, y = centre
    sheet = Sheet(rng, height, width, level)
    sheet.turned = 0.0  # a turned clock shows another time
    rim = sheet.pen(rng.choice(PEN)) if rng.random() < 0.5 else sheet.ink
    lines: list[tuple[Points, float]] = [(_arc(x, y, radius), 1.5)]
    for tick in range(12):
        inner = 0.86 if tick % 3 == 0 else 0.92
        lines.append((_toward(x, y, tick / 12, radius * inner, radius), 2 if tick % 3 == 0 else 1.2))
    sheet.draw(rim, lines)
    if radius >= 38 and rng.random() < 0.6:
        for number in (12, 3, 6, 9):
            (_, (a, b)) = _toward(x, y, number / 12, 0, radius * 0.86 - 7)
            if number == 12 and not _shown("12"):
                continue
            sheet.text(str(number), 14, a, b, sheet.ink)
    colours = (sheet.ink, sheet.ink) if level > 1 or rng.random() < 0.5 else (sheet.pen("red"), sheet.pen("blue"))
    long, short = _toward(x, y, minute / 60, -3, radius * 0.75), _toward(x, y, hour / 12 + minute / 720, -3, radius / 2)
    sheet.draw(colours[0], [(long, 2.0)])
    sheet.draw(colours[1], [(short, 3.5)], [_arc(x, y, 3)])
    return sheet.done()


# ---- gauge


def make_gauge(rng: random.Random, split: Split, level: int) -> Sample:
    """One gauge, at level 3 sometimes two of one style."""
    _must_be_level("gauge", level)
    style = rng.choice(("round", "half", "bar"))
    count = rng.choice((1, 2)) if level == 3 else 1
    colours = rng.sample(PEN, count)

    def value(colour: str) -> int:
        drawn: tuple[str, int] = _until(
            split, lambda: (colour, rng.randint(0, 10)), lambda c: f"gauge|{style}|{c[0]}|{c[1]}"
        )
        return drawn[1]

    colours = [c for c in colours if any(belongs(f"gauge|{style}|{c}|{v}", split) for v in range(11))]
    if not colours:  # nothing of this colour is held out
        return make_gauge(rng, split, level)
    values = [value(colour) for colour in colours]
    pixels = paint_gauge(rng, level, style, colours, values)
    asks: list[_Ask] = []
    for colour, shown in zip(colours, values, strict=True):
        it = "the gauge" if len(values) == 1 else f"the {colour} gauge"
        asks.append(_Ask("shows", str(shown), {"it": it}))
        yes = rng.random() < 0.5
        bound = rng.randint(shown - 3, shown - 1) if yes else rng.randint(shown, shown + 3)
        if 2 <= bound <= 8:
            asks.append(_Ask("above", "yes" if yes else "no", {"it": it, "value": str(bound)}, choices=YES_NO))
        asks.append(_Ask("full", str(10 - shown), {"it": it}, f"10 - {shown} = {10 - shown}."))
    if len(values) == 2 and values[0] != values[1]:
        higher = colours[values.index(max(values))]
        a, b = (f"the {c} gauge" for c in rng.sample(colours, 2))
        asks.append(_Ask("highest", higher, {"kind": "gauge"}, choices=tuple(colours)))
        asks.append(_Ask("higher", "yes" if higher in a else "no", {"a": a, "b": b}, choices=YES_NO))
    return _sample(rng, split, level, "gauge", f"gauge|{style}|{colours[0]}|{values[0]}", asks, pixels, 5)


def paint_gauge(rng: random.Random, level: int, style: str, colours: list[str], values: list[int]) -> Pixels:
    """From 0 to 10 in ten steps: three quarters of a turn, half a turn, or upwards."""
    radius = {1: rng.randint(32, 40), 2: rng.randint(28, 40), 3: rng.randint(26, 34)}[level]
    tall, wide = {"round": (2 * radius + 22, 2 * radius + 30), "half": (radius + 24, 2 * radius + 44)}.get(
        style, (2 * radius + 20, 50)
    )
    margin = rng.randint(4, 10) if level == 1 else rng.randint(4, 20)
    side_by_side = style != "half"
    height = margin + tall * (1 if side_by_side else len(values))
    width = margin + wide * (len(values) if side_by_side else 1)
    sheet = Sheet(rng, max(56, height), max(56, width), level)
    x0, y0 = rng.randint(0, margin), rng.randint(0, margin)
    for number, (colour, value) in enumerate(zip(colours, values, strict=True)):
        x, y = (x0 + number * wide, y0) if side_by_side else (x0, y0 + number * tall)
        if style == "bar":
            _bar_gauge(sheet, x + 26, y + 10, radius * 2, colour, value)
        else:
            sweep, start = (0.75, -0.375) if style == "round" else (0.5, -0.25)
            centre = (x + wide / 2, y + tall - (radius + 4 if style == "round" else 8))
            _dial(sheet, centre, radius, sweep, start, colour, value)
    return sheet.done()


def _bar_gauge(sheet: Sheet, x: int, y: int, length: int, colour: str, value: int) -> None:
    sheet.box(x, y - 1, x + 16, y + length + 1, sheet.ink)
    sheet.box(x + 1, y, x + 15, y + length, (250, 250, 250) if not sheet.dark else (40, 40, 40))
    sheet.box(x + 1, y + length * (10 - value) / 10, x + 15, y + length, COLOURS[colour])
    sheet.box(x + 1, y + length, x + 15, y + length + 3, COLOURS[colour])  # an empty gauge still shows its colour
    for tick in range(11):
        at = y + length * (10 - tick) / 10
        sheet.box(x - (6 if tick % 5 == 0 else 3), at, x, at + 1, sheet.ink)
        if tick % 5 == 0:
            sheet.text(str(tick), 14, x - 8, at, sheet.ink, "right")


def _dial(
    sheet: Sheet, centre: tuple[float, float], radius: float, sweep: float, start: float, colour: str, value: int
) -> None:
    x, y = centre
    lines: list[tuple[Points, float]] = [(_arc(x, y, radius, start, start + sweep), 1.5)]
    for tick in range(11):
        turn = start + sweep * tick / 10
        lines.append((_toward(x, y, turn, radius * (0.82 if tick % 5 == 0 else 0.9), radius), 1.5))
        if tick % 5 == 0:
            (_, (a, b)) = _toward(x, y, turn, 0, radius + 8)
            sheet.text(str(tick), 14, a + (4 if tick == 10 else 0), b, sheet.ink)  # 10 is wide
    sheet.draw(sheet.ink, lines)
    sheet.draw(
        COLOURS[colour], [(_toward(x, y, start + sweep * value / 10, -3, radius * 0.78), 2.6)], [_arc(x, y, 3.5)]
    )


# ---- noughts and crosses

PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
LINES = {
    "top row": (0, 1, 2),
    "middle row": (3, 4, 5),
    "bottom row": (6, 7, 8),
    "left column": (0, 3, 6),
    "middle column": (1, 4, 7),
    "right column": (2, 5, 8),
    "diagonal down": (0, 4, 8),
    "diagonal up": (2, 4, 6),
}
SIGNS = {"x": "x", "o": "o", "-": "empty"}


def make_grid(rng: random.Random, split: Split, level: int) -> Sample:
    """A board as a game leaves it, won by x, by o or by nobody equally often."""
    _must_be_level("grid", level)
    winner = rng.choice(("x", "o", "nobody"))

    def draw() -> str:
        while True:
            board = _play(rng)
            lines = winning(board)
            if len(lines) <= 1 and (board[LINES[lines[0]][0]] if lines else "nobody") == winner:
                return board

    board: str = _until(split, draw, lambda b: f"grid|{b}")
    lines = winning(board)
    if level == 1:
        thinking = ""
    else:
        thinking = f"{lines[0]}." if lines else "no line."
    asks = [_Ask("won", winner, {}, thinking, ("x", "o", "nobody"))]
    for sign in rng.sample(sorted(set(board)), min(2, len(set(board)))):
        place = rng.choice([i for i in range(9) if board[i] == sign])
        asks.append(_Ask("at", SIGNS[sign], {"place": PLACES[place]}, choices=("x", "o", "empty")))
    sign = rng.choice("xo")
    asks.append(_Ask("signs", str(board.count(sign)), {"sign": sign}, choices=tuple("12345")))
    if "-" in board:
        asks.append(_Ask("empty", str(board.count("-")), choices=tuple("123456")))
    if lines:
        asks.append(_Ask("line", lines[0], choices=tuple(LINES)))
    return _sample(rng, split, level, "grid", f"grid|{board}", asks, paint_grid(rng, level, board), 6)


def winning(board: str) -> list[str]:
    """Names of the lines that hold one sign three times."""
    return [name for name, (a, b, c) in LINES.items() if board[a] == board[b] == board[c] != "-"]


def _play(rng: random.Random) -> str:
    """A random game, stopped when it is won or after 3 to 9 moves."""
    board, signs = ["-"] * 9, rng.choice(("xo", "ox"))
    moves = rng.sample(range(9), 9)
    for number in range(rng.choice((3, 4, 5, 6, 7, 8, 9, 9, 9))):
        board[moves[number]] = signs[number % 2]
        if number >= 4 and any(board[a] == board[b] == board[c] != "-" for a, b, c in LINES.values()):
            break
    return "".join(board)


def paint_grid(rng: random.Random, level: int, board: str) -> Pixels:
    """Three by three cells, lines between them."""
    cell = {1: rng.randint(26, 32), 2: rng.randint(20, 36), 3: rng.randint(18, 40)}[level]
    extra = {1: 8, 2: 24, 3: 44}[level]
    height, width = max(56, 3 * cell + rng.randint(4, extra)), max(56, 3 * cell + rng.randint(4, extra))
    sheet = Sheet(rng, height, width, level)
    left, top = rng.randint(2, width - 3 * cell - 2), rng.randint(2, height - 3 * cell - 2)
    for i in (1, 2):
        sheet.box(left + i * cell - 1, top, left + i * cell + 1, top + 3 * cell, sheet.ink)
        sheet.box(left, top + i * cell - 1, left + 3 * cell, top + i * cell + 1, sheet.ink)
    pens = {sign: sheet.ink if rng.random() < 0.4 else sheet.pen(rng.choice(PEN)) for sign in "xo"}
    thick = max(2.0, cell / 12)
    for sign in sorted(set(board) - {"-"}):
        lines: list[tuple[Points, float]] = []
        for i in range(9):
            if board[i] != sign:
                continue
            x, y, reach = left + (i % 3 + 0.5) * cell, top + (i // 3 + 0.5) * cell, cell * 0.28
            if sign == "o":
                lines.append((_arc(x, y, reach * 1.1), thick))
            else:
                lines.append(([(x - reach, y - reach), (x + reach, y + reach)], thick))
                lines.append(([(x - reach, y + reach), (x + reach, y - reach)], thick))
        sheet.draw(pens[sign], lines)
    return sheet.done()


# ---- tables


def make_table(rng: random.Random, split: Split, level: int) -> Sample:
    """Numbers in rows and columns: plain, or with a word before every row and, where columns are two, letters above."""
    _must_be_level("table", level)
    named = rng.random() < 0.5
    rows = rng.randint(2, 2 if level == 1 else 3)
    columns = rng.randint(1, 2) if named else rng.randint(2, 2 if level == 1 else 3)
    pool = NUMBERS[:10] if level == 1 else NUMBERS[:60] if level == 2 else NUMBERS

    def draw() -> list[list[int]]:
        # all different: the largest is one, and a number stands in one place
        drawn = rng.sample(pool, rows * columns)
        return [drawn[r * columns : (r + 1) * columns] for r in range(rows)]

    cells = _until(split, draw, table_key)
    words = rng.sample(SHORT_WORDS, rows) if named else []
    pixels = paint_table(rng, level, cells, words)
    return _sample(rng, split, level, "table", table_key(cells), list(_table_asks(rng, cells, words, level)), pixels)


def table_key(cells: Sequence[Sequence[int]]) -> str:
    return "table|" + ";".join(",".join(map(str, row)) for row in cells)


def _table_asks(rng: random.Random, cells: list[list[int]], words: list[str], level: int) -> Iterator[_Ask]:
    rows, columns = len(cells), len(cells[0])
    every = [(r, c) for r in range(rows) for c in range(columns)]
    for r, c in rng.sample(every, 2):
        if words:
            it = words[r] if columns == 1 else f"{words[r]} {LETTERS[c]}"
            yield _Ask("named", str(cells[r][c]), {"it": it})
        else:
            yield _Ask("cell", str(cells[r][c]), {"row": str(r + 1), "column": str(c + 1)})
    flat = [value for row in cells for value in row]
    if rng.random() < 0.5:
        yield _Ask("largest", str(max(flat)))
    else:
        yield _Ask("smallest", str(min(flat)))
    if columns > 1 and not words:
        r = rng.randrange(rows)
        yield _Ask("row", " ".join(map(str, cells[r])), {"row": str(r + 1)})
        if level < 3 and max(flat) < 60:
            r = rng.randrange(rows)
            total = sum(cells[r])
            yield _Ask("sum", str(total), {"row": str(r + 1)}, f"{' + '.join(map(str, cells[r]))} = {total}.")
    if columns == 1:
        r = rng.choice([cells.index([max(flat)]), cells.index([min(flat)])])
        kind = "most" if cells[r][0] == max(flat) else "least"
        yield _Ask(kind, words[r], choices=tuple(words))


def paint_table(rng: random.Random, level: int, cells: list[list[int]], words: list[str]) -> Pixels:
    """Lines around every cell; words and letters stand in cells of their own."""
    rows, columns = len(cells), len(cells[0])
    size = {1: rng.randint(18, 22), 2: rng.randint(15, 20), 3: rng.randint(14, 17)}[level]
    tall, wide = size + rng.randint(6, 10), round(size * 1.3) + rng.randint(6, 12)
    first = max((_written(word, size, 0).shape[1] for word in words), default=0) + (10 if words else 0)
    header = tall if words and columns > 1 else 0
    full_height, full_width = header + rows * tall + 1, first + columns * wide + 1
    spare = {1: 6, 2: 12, 3: 24}[level]
    height, width = max(56, full_height + rng.randint(4, spare)), max(56, full_width + rng.randint(4, spare))
    sheet = Sheet(rng, height, width, level)
    left, top = rng.randint(1, width - full_width - 1), rng.randint(1, height - full_height - 1)
    line = sheet.faint if rng.random() < 0.5 else sheet.ink
    for r in range(rows + 1 + (header > 0)):
        sheet.box(left, top + r * tall, left + full_width, top + r * tall + 1, line)
    for x in [0] * bool(words) + [first + c * wide for c in range(columns + 1)]:
        sheet.box(left + x, top, left + x + 1, top + full_height, line)
    pen = sheet.ink if rng.random() < 0.6 else sheet.pen(rng.choice(PEN))
    for c in range(columns):
        x = left + first + (c + 0.5) * wide
        if header:
            sheet.text(LETTERS[c], size, x, top + tall / 2, sheet.ink)
        for r in range(rows):
            sheet.text(str(cells[r][c]), size, x, top + header + (r + 0.5) * tall, pen)
    for r, word in enumerate(words):
        sheet.text(word, size, left + first / 2, top + header + (r + 0.5) * tall, sheet.ink)
    return sheet.done()


# ---- programs on a screen


class Program(NamedTuple):
    """Lines of Python, what they print (white space aside), and the thought that leads there."""

    source: str
    output: str
    thinking: str = ""


def make_printout(rng: random.Random, split: Split, level: int) -> Sample:
    """A drawn program. Level 1: one or two lines, 2: words and two numbers, 3: lists, loops and choices."""
    _must_be_level("printout", level)
    program: Program = _until(split, lambda: write_program(rng, level), lambda p: f"printout|{p.source}")
    lines = program.source.split("\n")
    asks = [_Ask("output", program.output, {}, program.thinking, check=Check("output"))]
    row = rng.randrange(len(lines))
    asks.append(_Ask("says", lines[row].strip(), {"row": str(row + 1)}, check=Check("output")))
    asks.append(_Ask("lines", str(len(lines)), choices=("1", "2", "3", "4")))
    pixels = paint_program(rng, level, lines)
    return _sample(rng, split, level, "printout", f"printout|{program.source}", asks, pixels, 3)


def write_program(rng: random.Random, level: int) -> Program:
    """One program of a level; its numbers have one digit, its words are those that training may read."""
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    n = rng.randint(2, 4)
    word, other = rng.sample(SHORT_WORDS, 2)
    if level == 1:
        return rng.choice(
            (
                Program(f"print({a} + {b})", str(a + b), f"{a} + {b} = {a + b}."),
                Program(f"a = {a}\nprint(a)", str(a)),
                Program(f"a = {a}\nprint(a + {b})", str(a + b), f"{a} + {b} = {a + b}."),
                Program(f"a = {a + b}\nprint(a - {b})", str(a), f"{a + b} - {b} = {a}.")
                if a + b < 10
                else Program(f"print({a} * {n})", str(a * n), f"{a} * {n} = {a * n}."),
                Program(f'print("{word}")', word),
            )
        )
    if level == 2:
        return rng.choice(
            (
                Program(f"a = {a}\nb = {b}\nprint(a + b)", str(a + b), f"{a} + {b} = {a + b}."),
                Program(f"a = {a}\nb = {b}\nprint(a * b)", str(a * b), f"{a} * {b} = {a * b}."),
                Program(f"a = {a}\nb = {b}\nprint(b)", str(b)),
                Program(f"a = {a}\na = a + {b}\nprint(a)", str(a + b), f"{a} + {b} = {a + b}."),
                Program(f"print(max({a}, {b}))", str(max(a, b))),
                Program(f'print(len("{word}"))', str(len(word)), f"{' '.join(word)}."),
                Program(f'a = "{word}"\nprint(a * {n})', word * n, f"{word} {n} times."),
                Program(f'a = "{word}"\nprint(a[0])', word[0]),
            )
        )
    bound = rng.randint(2, 8)
    yes = a > bound
    return rng.choice(
        (
            Program(f"a = [{a}, {b}, {c}]\nprint(a[{n - 2}])", str((a, b, c)[n - 2])),
            Program(f"a = [{a}, {b}, {c}]\nprint(max(a))", str(max(a, b, c))),
            Program(f"a = [{a}, {b}]\nprint(a[0] + a[1])", str(a + b), f"{a} + {b} = {a + b}."),
            Program(f"for i in range({n}):\n    print(i + {a})", " ".join(str(i + a) for i in range(n))),
            Program(
                f"n = {a}\nfor i in range({n}):\n    n = n + {b}\nprint(n)",
                str(a + n * b),
                ", ".join(str(a + i * b) for i in range(n + 1)) + ".",
            ),
            Program(
                f'if {a} > {bound}:\n    print("{word}")\nelse:\n    print("{other}")',
                word if yes else other,
                f"{a} > {bound} is {'true' if yes else 'false'}.",
            ),
        )
    )


def paint_program(rng: random.Random, level: int, lines: list[str]) -> Pixels:
    """The lines below each other, four spaces as an indent of 18 pixels."""
    size = {1: rng.randint(16, 20), 2: rng.randint(14, 17), 3: rng.randint(14, 15)}[level]
    pitch = size + rng.randint(4, 7)
    indents = [18 if line.startswith(" ") else 0 for line in lines]
    masks = [_line(line.strip(), size) for line in lines]
    widest = max(mask.shape[1] + indent for mask, indent in zip(masks, indents, strict=True))
    spare = {1: 10, 2: 16, 3: 20}[level]
    height = max(56, pitch * len(lines) + rng.randint(6, 6 + spare))
    width = max(56, widest + rng.randint(8, 8 + spare))
    sheet = Sheet(rng, height, width, level)
    pen = sheet.ink if rng.random() < 0.6 else sheet.pen(rng.choice(PEN))
    left, top = rng.randint(3, width - widest - 3), rng.randint(2, height - pitch * len(lines) - 2)
    for number, (mask, indent) in enumerate(zip(masks, indents, strict=True)):
        sheet.blend(mask, left + indent, top + number * pitch, pen)
    return sheet.done()


@lru_cache(maxsize=4096)
def _line(text: str, size: int) -> Mask:
    """Like reading's texts, but lines keep a common height, so that they stand on one base."""
    font = _font(size)
    picture = PIL.new("L", (int(font.getlength(text)) + 3, size + 5))
    ImageDraw.Draw(picture).text((1, 0), text, 255, font)
    mask: Mask = np.asarray(picture, np.float32)[:, :, None] / np.float32(255)
    return mask


MAKERS: dict[str, Maker] = {
    "chart": make_chart,
    "clock": make_clock,
    "gauge": make_gauge,
    "grid": make_grid,
    "table": make_table,
    "printout": make_printout,
}
WEIGHTS: dict[str, float] = {
    "chart": 0.3,
    "clock": 0.15,
    "gauge": 0.1,
    "grid": 0.15,
    "table": 0.15,
    "printout": 0.15,
}
