"""Pictures of coloured shapes: counting, naming, relations, comparisons, captions and pointing.

    make(rng, split, level)           ->   Sample "picture": one scene, up to 7 turns of mixed kinds
    make_thing(rng, split, level)     ->   Sample "thing": one shape on a small picture, named
    make_caption(rng, split, level)   ->   Sample "caption": the whole scene in a fixed order
    make_point(rng, split, level)     ->   Sample "point": boxes and centres, 0 to 99 from the upper left corner

    objects   non-overlapping shapes at least 14 px wide (a ring may hold another shape inside)
    order     captions go from top to bottom in three rows, each from left to right

Compositions, tried for every visible shape and every turn:

    red|star                                   colour and shape
    picture/count#2|3|blue|star+red|star       phrasing, answer and all that the scene shows: never a phrasing with its
                                               answer alone, from which the words would give the answer away

Counts are worked: the thought lists what is counted, in the order of a caption, and the answer is how many. So are
relations: it says where things of both colours are, in tenths of the picture from the left or from the top.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from world.sample import Check, Image, Maker, Pixels, Sample, Split, Turn, belongs, held_out
from world.scene import COLOURS, SHAPES, Ask, ground_of, mask_of, phrase

NUMBERS = tuple(map(str, range(10)))  # eight things at most, and one inside or over another
YES_NO = ("yes", "no")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")

# One word for one idea, few words in all: the reader is small.
PHRASES = {
    "count": ("how many shapes are there?", "count the shapes.", "number of shapes?"),
    "count_colour": ("how many {colour} shapes are there?", "count the {colour} shapes.", "how many are {colour}?"),
    "count_shape": ("how many {shape}s are there?", "count the {shape}s.", "number of {shape}s?"),
    "count_both": (
        "how many {colour} {shape}s are there?",
        "count the {colour} {shape}s.",
        "number of {colour} {shape}s?",
    ),
    "colour": ("what colour is the {shape}?", "which colour is the {shape}?", "the colour of the {shape}?"),
    "shape": ("what shape is {colour}?", "which shape is {colour}?", "the shape of what is {colour}?"),
    "exists": ("is there a {colour} {shape}?", "is a {colour} {shape} there?", "a {colour} {shape}, yes or no?"),
    "relation": (
        "is the {a} {where} the {b}?",
        "the {a} is {where} the {b}, yes or no?",
    ),
    "side": (
        "where is the {a}, {way} or {other} of the {b}?",
        "is the {a} {way} or {other} of the {b}?",
    ),
    "beside": ("what colour is {where} the {b}?", "which colour is {where} the {b}?"),
    "inside": ("what shape is inside the ring?", "which shape is inside the ring?", "what is inside the ring?"),
    "overlap": ("do two shapes overlap?", "does a shape overlap another?", "shapes overlap, yes or no?"),
    "largest": (
        "what colour is the largest shape?",
        "which colour is the largest?",
        "the colour of the largest shape?",
    ),
    "smallest": (
        "what colour is the smallest shape?",
        "which colour is the smallest?",
        "the colour of the smallest shape?",
    ),
    "nearest": ("what colour is nearest to the {b}?", "which colour is nearest to the {b}?"),
    "more": ("more {x} or {y}?", "which are more, {x} or {y}?", "are there more {x} or {y}?"),
    "thing": ("what is this?", "name it."),
    "caption": ("describe the picture.", "what is in the picture?", "say what you see."),
    "box": ("where is the {a}? give a box.", "box of the {a}?", "give the box of the {a}."),
    "centre": ("point at the {a}.", "where is the center of the {a}?", "give the point of the {a}."),
}


@dataclass(frozen=True)
class Thing:
    """One shape: `x`, `y` of its upper left corner and its width, in pixels."""

    colour: str
    shape: str
    x: int
    y: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. inside: the thing in the ring. overlap: the last two things overlap."""

    height: int
    width: int
    things: tuple[Thing, ...]
    inside: Thing | None = None
    overlap: bool = False

    @property
    def all(self) -> tuple[Thing, ...]:
        return self.things if self.inside is None else (*self.things, self.inside)


# ---- scenes


def draw_scene(rng: random.Random, level: int, kind: str = "plain") -> Scene | None:
    """Things that keep clear of each other; None where chance left no room. kind: plain, ring or overlap."""
    if level < 3:
        # whole tokens (28 px) at level 1, a little less at level 2: hardly any of a picture is padding
        cells = (3, 3, 4) if level == 1 else (3, 4, 5)
        height, width = (28 * rng.choice(cells) - (rng.randint(0, 10) if level > 1 else 0) for _ in "hw")
    else:
        height, width = rng.randint(98, 196), rng.randint(98, 196)
    area = height * width
    # A form of two or three patches is learned many times sooner than one of one or two; small ones come with level 2.
    sizes = {1: (26, 40), 2: (18, 34), 3: (14, 36)}[level]
    most = min({1: 4, 2: 6, 3: 8}[level], max(2, area // (2 * sizes[1] ** 2)))
    count = 1 if rng.random() < 0.16 else rng.randint(2, most)
    # few colours and shapes in a scene: so that several things share them and counts reach beyond one
    palette = rng.sample(list(COLOURS), rng.randint(1, 3))
    forms = rng.sample(SHAPES, rng.randint(1, 3))
    things: list[Thing] = []
    inside = None
    if kind == "ring":
        size = rng.randint(46, 54)
        if size + 6 > min(height, width):
            return None
        ring = Thing(
            rng.choice(palette), "ring", rng.randint(2, width - size - 2), rng.randint(2, height - size - 2), size
        )
        small = 14
        centre = ring.centre
        colour = rng.choice([c for c in COLOURS if c != ring.colour])
        shape = rng.choice([s for s in SHAPES if s != "ring"])
        inside = Thing(colour, shape, round(centre[0] - small / 2), round(centre[1] - small / 2), small)
        things.append(ring)
    for _ in range(count - len(things)):
        thing = _place(rng, things, rng.choice(palette), rng.choice(forms), rng.randint(*sizes), height, width)
        if thing is None:
            break
        things.append(thing)
    if not things:
        return None
    overlap = False
    if kind == "overlap" and len(things) > 1:
        last = things[-1]
        shift = max(5, last.size // 2)
        x, y = last.x + rng.choice((-shift, shift)), last.y + rng.randint(-shift // 2, shift // 2)
        other = Thing(
            rng.choice([c for c in COLOURS if c != last.colour]), rng.choice(("circle", "square")), x, y, last.size
        )
        rest = things[:-1]
        fits = 0 <= x <= width - other.size and 0 <= y <= height - other.size and all(_clear(other, t) for t in rest)
        if last.shape not in ("circle", "square") or not fits:
            return None
        things.append(other)
        overlap = True
    return Scene(height, width, tuple(things), inside, overlap)


def _place(
    rng: random.Random, things: list[Thing], colour: str, shape: str, size: int, height: int, width: int
) -> Thing | None:
    for _ in range(12):
        thing = Thing(colour, shape, rng.randint(1, width - size - 1), rng.randint(1, height - size - 1), size)
        if all(_clear(thing, other) for other in things):
            return thing
    return None


def _clear(a: Thing, b: Thing, gap: int = 3) -> bool:
    return (
        a.x + a.size + gap <= b.x or b.x + b.size + gap <= a.x or a.y + a.size + gap <= b.y or b.y + b.size + gap <= a.y
    )


def paint(rng: random.Random, scene: Scene, level: int) -> Pixels:
    """uint8 (height, width, 3)."""
    pixels = ground_of(rng, scene.height, scene.width, level).copy()
    for thing in scene.all:
        mask = mask_of(thing.shape, thing.size)
        colour = np.array([v + rng.randint(-9, 9) for v in COLOURS[thing.colour]], np.float32)
        under = pixels[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        under[:] = under + (colour - under) * mask
    return pixels


# ---- questions


def asks(rng: random.Random, scene: Scene) -> Iterator[Ask]:
    """Every kind of question that this scene can answer, once."""
    things = scene.all
    colours = [t.colour for t in things]
    shapes = [t.shape for t in things]
    pairs = [(t.colour, t.shape) for t in things]
    look = "+".join(sorted(f"{c}|{s}" for c, s in set(pairs)))
    ordered = in_order(scene)
    yield Ask("count", str(len(things)), choices=NUMBERS, detail=look, thinking=_listed(t.name for _, _, t in ordered))
    colour = rng.choice(colours) if rng.random() < 0.8 else rng.choice(list(COLOURS))
    yield Ask(
        "count_colour",
        str(colours.count(colour)),
        words={"colour": colour},
        choices=NUMBERS,
        detail=f"{colour}|{look}",
        thinking=_listed(t.shape for _, _, t in ordered if t.colour == colour),
    )
    shape = rng.choice(shapes) if rng.random() < 0.8 else rng.choice(SHAPES)
    plural = "crosse" if shape == "cross" else shape
    yield Ask(
        "count_shape",
        str(shapes.count(shape)),
        words={"shape": plural},
        choices=NUMBERS,
        detail=f"{shape}|{look}",
        thinking=_listed(t.colour for _, _, t in ordered if t.shape == shape),
    )
    pair = _pair(rng, pairs)
    plural = "crosse" if pair[1] == "cross" else pair[1]
    yield Ask(
        "count_both",
        str(pairs.count(pair)),
        words={"colour": pair[0], "shape": plural},
        choices=NUMBERS,
        about=("|".join(pair),),
        detail=f"{'|'.join(pair)}|{look}",
        # by one of the two words, then by the other: what it has never met together is found all the same
        thinking=_listed(t.colour for _, _, t in ordered if t.shape == pair[1]),
    )
    # half of the answers are no: a pair that is not there, made of parts that are
    there = rng.random() < 0.5
    absent = [(c, s) for c in set(colours) for s in set(shapes) if (c, s) not in pairs]
    pair = rng.choice(pairs) if there else rng.choice(sorted(absent)) if absent else _pair(rng, [])
    if (pair in pairs) == there:
        yield Ask(
            "exists",
            "yes" if there else "no",
            words={"colour": pair[0], "shape": pair[1]},
            choices=YES_NO,
            about=("|".join(pair),),
            detail=f"{'|'.join(pair)}|{look}",
            thinking=f"{_listed(t.shape for _, _, t in ordered if t.colour == pair[0])} {pair[1]}?",
        )
    single = [t for t in things if shapes.count(t.shape) == 1]
    if single:
        t = rng.choice(single)
        yield Ask(
            "colour",
            t.colour,
            words={"shape": t.shape},
            choices=tuple(COLOURS),
            about=(f"{t.colour}|{t.shape}",),
            detail=f"{t.shape}|{look}",
        )
    single = [t for t in things if colours.count(t.colour) == 1]
    if single:
        t = rng.choice(single)
        yield Ask(
            "shape",
            t.shape,
            words={"colour": t.colour},
            choices=SHAPES,
            about=(f"{t.colour}|{t.shape}",),
            detail=f"{t.colour}|{look}",
        )
    if len(things) > 1:
        yield from _relations(rng, scene, pairs)
        yield from _extremes(rng, scene)
        yield from _more(rng, colours, shapes, look)
    if scene.inside is not None:
        pair = (scene.inside.colour, scene.inside.shape)
        if shapes.count("ring") == 1:
            yield Ask(
                "inside",
                pair[1],
                words={},
                choices=tuple(s for s in SHAPES if s != "ring"),
                about=("|".join(pair),),
                detail="|".join(pair),
            )
    elif len(things) > 1 and (scene.overlap or rng.random() < 0.06):  # as often as scenes that overlap
        yield Ask("overlap", "yes" if scene.overlap else "no", words={}, choices=YES_NO, detail=look)


def _pair(rng: random.Random, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    if pairs and rng.random() < 0.75:
        return rng.choice(pairs)
    return rng.choice(list(COLOURS)), rng.choice(SHAPES)


def _relations(rng: random.Random, scene: Scene, pairs: list[tuple[str, str]]) -> Iterator[Ask]:
    """Between things whose names are theirs alone, and whose distance leaves no doubt."""
    named = [t for t in scene.things if pairs.count((t.colour, t.shape)) == 1]
    if len(named) < 2:
        return
    options = []
    for a in named:
        for b in named:
            if a is b:
                continue
            dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
            if abs(dx) >= 14:
                options.append((a, b, "left of" if dx < 0 else "right of", "right of" if dx < 0 else "left of"))
            if abs(dy) >= 14:
                options.append((a, b, "above" if dy < 0 else "below", "below" if dy < 0 else "above"))
    if not options:
        return
    for a, b, true, false in rng.sample(options, min(2, len(options))):
        both = (f"{a.colour}|{a.shape}", f"{b.colour}|{b.shape}")
        yes = rng.random() < 0.5
        yield Ask(
            "relation",
            "yes" if yes else "no",
            words={"a": a.name, "b": b.name, "where": true if yes else false},
            choices=YES_NO,
            about=both,
            detail="|".join((*both, true)),
            thinking=_compared(scene, a, b, " of" in true),
        )
    across: list[tuple[Thing, Thing, str, str] | None] = [o for o in options if " of" in o[2]]
    chosen = rng.choice(across or [None])  # drawn from even where there is none: what follows stays what it was
    if chosen is not None:
        a, b, true, false = chosen
        first, second = (true, false) if rng.random() < 0.5 else (false, true)
        both = (f"{a.colour}|{a.shape}", f"{b.colour}|{b.shape}")
        yield Ask(
            "side",
            true.split()[0],
            words={"a": a.name, "b": b.name, "way": first.split()[0], "other": second.split()[0]},
            choices=("left", "right"),
            about=both,
            detail="|".join(both),
            thinking=_compared(scene, a, b, True),
        )
    if len(scene.all) == 2:  # only one can be meant
        a, b, true, _ = rng.choice(options)
        yield Ask(
            "beside",
            a.colour,
            words={"b": b.name, "where": true},
            choices=tuple(COLOURS),
            about=(f"{a.colour}|{a.shape}",),
            detail=f"{b.colour}|{b.shape}|{true}",
            thinking=_listed((b.colour, a.colour)),
        )


def _compared(scene: Scene, a: Thing, b: Thing, across: bool) -> str:
    """Where the centres are, in tenths of the picture from the left edge, or from the top: all things of both colours,
    then the two that are asked for, in the order of the question.

    Found by colour and told apart by shape: a model that is to find a purple ring at once, and has never met one, takes
    what else is there.
    """
    axis, side = (0, scene.width) if across else (1, scene.height)
    ordered = [thing for _, _, thing in in_order(scene)]
    said = {id(t): f"{t.shape} {int(10 * t.centre[axis] / side)}" for t in ordered}
    parts = []
    for colour in dict.fromkeys((a.colour, b.colour)):
        parts.append(f"{colour}: {_listed(said[id(t)] for t in ordered if t.colour == colour)}")
    return " ".join((*parts, _listed((said[id(a)], said[id(b)]))))


def _extremes(rng: random.Random, scene: Scene) -> Iterator[Ask]:
    by_size = sorted(scene.all, key=lambda t: t.size)
    for kind, best, next_ in (("largest", by_size[-1], by_size[-2]), ("smallest", by_size[0], by_size[1])):
        if abs(best.size - next_.size) >= 4:
            yield Ask(
                kind,
                best.colour,
                words={},
                choices=tuple(COLOURS),
                about=(f"{best.colour}|{best.shape}",),
                detail=next_.name,
            )
    named = [t for t in scene.things if sum(o.name == t.name for o in scene.all) == 1]
    if len(scene.all) > 2 and named and scene.inside is None:
        b = rng.choice(named)
        others = sorted((t for t in scene.all if t is not b), key=lambda t: _distance(t, b))
        if _distance(others[1], b) - _distance(others[0], b) >= 10:
            a = others[0]
            yield Ask(
                "nearest",
                a.colour,
                words={"b": b.name},
                choices=tuple(COLOURS),
                about=(f"{a.colour}|{a.shape}",),
                detail=b.name,
            )


def _distance(a: Thing, b: Thing) -> float:
    return float(np.hypot(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]))


def _more(rng: random.Random, colours: list[str], shapes: list[str], look: str) -> Iterator[Ask]:
    if rng.random() < 0.5:
        names, values = sorted(set(colours)), colours
    else:
        names, values = sorted(set(shapes)), shapes
    if len(names) < 2:
        return
    x, y = rng.sample(names, 2)
    n, m = values.count(x), values.count(y)
    if n == m:
        return

    def many(name: str) -> str:
        return name if name in COLOURS else {"cross": "crosses"}.get(name, name + "s")

    yield Ask(
        "more",
        many(x if n > m else y),
        words={"x": many(x), "y": many(y)},
        choices=(many(x), many(y)),
        detail=f"{x}|{y}|{look}",
        thinking=f"{n} {many(x)}, {m} {many(y)}.",
    )


def in_order(scene: Scene) -> list[tuple[int, int, Thing]]:
    """All things with their row and column (0 to 2), from top to bottom in three rows, each from left to right."""
    placed = []
    for thing in scene.all:
        x, y = thing.centre
        row, column = min(2, int(3 * y / scene.height)), min(2, int(3 * x / scene.width))
        placed.append((row, column, y, x, thing))
    placed.sort(key=lambda place: place[:4])
    return [(row, column, thing) for row, column, _, _, thing in placed]


def caption(scene: Scene) -> tuple[str, list[list[str]]]:
    """The scene from top to bottom and left to right, and its facts: (colour, shape, place) of every thing."""
    listed = [[t.colour, t.shape, f"{ROWS[row]} {COLUMNS[column]}"] for row, column, t in in_order(scene)]
    return ", ".join(" ".join(fact) for fact in listed), listed


def _listed(words: Iterable[str]) -> str:
    return f"{', '.join(words) or 'none'}."


def _clear_places(scene: Scene) -> bool:
    """Whether every thing's centre is at least 3 px inside its third of the picture: no doubt about its place."""
    return all(
        abs(at - cut * side / 3) >= 3
        for t in scene.all
        for at, side in zip(t.centre, (scene.width, scene.height), strict=True)
        for cut in (1, 2)
    )


# ---- makers


def _scene(rng: random.Random, split: Split, level: int) -> Scene:
    """A scene that shows nothing held out to training, and something held out otherwise (when chance allows)."""
    if level not in (1, 2, 3):
        raise ValueError(f"pictures have levels 1 to 3, got {level}")
    kind = rng.choices(("plain", "ring", "overlap"), (8, 1, 1))[0]
    for attempt in range(10_000):
        scene = draw_scene(rng, level, kind if attempt < 200 else "plain")
        if scene is None:
            continue
        held = [held_out(f"{t.colour}|{t.shape}") for t in scene.all]
        if any(held) if split == "heldout" else not any(held):
            return scene
    raise ValueError("no scene fits this split")


def make(rng: random.Random, split: Split, level: int) -> Sample:
    """One scene with up to 7 turns of mixed kinds."""
    while True:
        scene = _scene(rng, split, level)
        turns = list(phrase(rng, split, "picture", list(asks(rng, scene)), PHRASES))
        if len(turns) >= (1 if split == "heldout" else 3):
            break
    pixels = paint(rng, scene, level)
    return Sample("picture", tuple(turns[:7]), (Image(pixels),), level=level, split=split)


def make_thing(rng: random.Random, split: Split, level: int) -> Sample:
    """One shape on a picture of 28 to 84 px: what forms and colours are called, in few tokens."""
    low, high = {1: (28, 44), 2: (20, 40), 3: (14, 40)}[level]
    while True:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if belongs(f"{colour}|{shape}", split):
            break
    height, width = (28 * rng.choice((2, 2, 2, 3)) for _ in "hw")
    thing = _place(rng, [], colour, shape, rng.randint(low, high), height, width)
    assert thing is not None, "every size fits into 56 px"
    turn = Turn(rng.choice(PHRASES["thing"]), thing.name, "thing", f"{colour}|{shape}")
    return Sample(
        "thing", (turn,), (Image(paint(rng, Scene(height, width, (thing,)), level)),), level=level, split=split
    )


def make_caption(rng: random.Random, split: Split, level: int) -> Sample:
    """The whole scene in words; held out: a scene with a pair of colour and shape that training never shows."""
    scene = _scene(rng, split, level)
    while not _clear_places(scene):
        scene = _scene(rng, split, level)
    text, facts = caption(scene)
    about = [f"{t.colour}|{t.shape}" for t in scene.all]
    key = next(k for k in about if belongs(k, split))
    turn = Turn(rng.choice(PHRASES["caption"]), text, "caption", key, check=Check("caption", {"facts": facts}))
    return Sample("caption", (turn,), (Image(paint(rng, scene, level)),), level=level, split=split)


def make_point(rng: random.Random, split: Split, level: int) -> Sample:
    """Boxes and centres of named things, in hundredths of the picture's sides."""
    while True:
        scene = _scene(rng, split, level)
        pairs = [(t.colour, t.shape) for t in scene.all]
        questions = []
        for t in scene.all:
            if pairs.count((t.colour, t.shape)) > 1:
                continue
            box = [
                int(100 * t.x / scene.width),
                int(100 * t.y / scene.height),
                min(99, int(100 * (t.x + t.size) / scene.width)),
                min(99, int(100 * (t.y + t.size) / scene.height)),
            ]
            pair = f"{t.colour}|{t.shape}"
            middle = f"{(box[0] + box[2]) // 2} {(box[1] + box[3]) // 2}"
            questions.append(
                Ask(
                    "box", " ".join(map(str, box)), words={"a": t.name}, about=(pair,), check=Check("box", {"box": box})
                )
            )
            questions.append(
                Ask("centre", middle, words={"a": t.name}, about=(pair,), check=Check("point", {"box": box}))
            )
        turns = list(phrase(rng, split, "point", questions, PHRASES))
        if turns:
            break
    return Sample("point", tuple(turns[:5]), (Image(paint(rng, scene, level)),), level=level, split=split)


MAKERS: dict[str, Maker] = {"picture": make, "thing": make_thing, "caption": make_caption, "point": make_point}
WEIGHTS: dict[str, float] = {"picture": 0.6, "thing": 0.1, "caption": 0.2, "point": 0.1}
