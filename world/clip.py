"""Clips of 4 to 16 frames whose questions need more than one frame.

    make(rng, split, level)         ->   Sample "clip": moving, blinking, changing shapes and up to 5 turns
    make_story(rng, split, level)   ->   Sample "story": the same scenes, told in a line
    make_motion(rng, split, level)  ->   Sample "motion": what one shape does, in few words
    make_moments(rng, split, level) ->   Sample "moments": one shape that is another in every frame, told frame by frame

    travel    shapes cross the picture                direction, moves, speed, faster, mover, same
    turn      a shape turns, or not                   first_way, last_way, turns
    order     shapes appear, vanish or take turns     first, last, earlier, next
    blink     shapes go off for single frames         blinks, more, blinker
    bounce    a shape runs from wall to wall          bounces, first_way, last_way
    change    another colour, shape or size           becomes, was, changes, changer, grows, colours
    collide   two shapes on one line                  hits, mover_of_two, end

One frame says little, by construction. What travels wraps around the edges: its place is uniform over the picture in
every frame, whatever its direction, so no frame's place tells the direction (a path that stays inside cannot have
this: what moves right would start at the left). Sizes start from one range whether they grow or shrink, shapes on one
line start alike whether they will touch or not.

Compositions, tried for every visible shape and every turn:

    red|star                        colour and shape, shared with pictures
    red|star|left                   a shape and what happens to it
    clip/direction#2|left|red|star  phrasing, answer and a detail; phrasing and answer alone would, once held out,
                                    teach that this phrasing never has this answer, which text alone could learn
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from world.sample import Clip, Maker, Pixels, Sample, Split, Turn, held_out
from world.scene import COLOURS, SHAPES, Ask, ground_of, mask_of, phrase

STRAIGHT = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
DIAGONAL = {"up left": (-1, -1), "up right": (-1, 1), "down left": (1, -1), "down right": (1, 1)}
WAYS = STRAIGHT | DIAGONAL
SLOW, MIDDLE, FAST = (4, 6), (7, 10), (11, 14)  # px per frame
SIZES = (18, 26)  # px, of what keeps its size
SMALL, LARGE = 11, 36  # px: what shrinks or grows ends there, from 21 to 25

# One word for one idea, few words in all: the reader is small. {it} names a shape, {a} and {b} are two to choose from.
PHRASES = {
    "direction": (
        "which way does the {it} move?",
        "where does the {it} go?",
        "the {it} moves which way?",
        "what direction does the {it} take?",
    ),
    "moves": ("does the {it} move {way}?", "is the {it} moving {way}?", "the {it} goes {way}, yes or no?"),
    "speed": ("is the {it} fast or slow?", "does the {it} move fast or slow?", "how fast is the {it}, fast or slow?"),
    "faster": ("which is faster, {a} or {b}?", "{a} or {b}, which is faster?", "what moves faster, {a} or {b}?"),
    "mover": ("which colour moves {way}?", "what colour goes {way}?", "what is the colour of what moves {way}?"),
    "same": ("do they move the same way?", "is their direction the same?", "same direction, yes or no?"),
    "first_way": ("which way does the {it} move first?", "where does the {it} go first?", "first way of the {it}?"),
    "last_way": ("which way does the {it} move last?", "where does the {it} go last?", "last way of the {it}?"),
    "turns": ("does the {it} turn?", "does the {it} change direction?", "the {it} turns, yes or no?"),
    "first": ("which {what} {comes} first?", "what {what} {comes} first?", "the first {what} that {comes}?"),
    "last": ("which {what} {comes} last?", "what {what} {comes} last?", "the last {what} that {comes}?"),
    "earlier": (
        "which {comes} first, {a} or {b}?",
        "{a} or {b}, which {comes} first?",
        "what {comes} first, {a} or {b}?",
    ),
    "next": ("what {what} {comes} after {a}?", "which {what} {comes} after {a}?", "after {a}, which {what} {comes}?"),
    "blinks": (
        "how many times does the {it} blink?",
        "how often does the {it} blink?",
        "count the blinks of the {it}.",
        "number of blinks of the {it}?",
    ),
    "more": ("which blinks more, {a} or {b}?", "{a} or {b}, which blinks more?", "what blinks more, {a} or {b}?"),
    "blinker": ("does the {it} blink?", "is the {it} blinking?", "the {it} blinks, yes or no?"),
    "bounces": (
        "how many times does the {it} bounce?",
        "how often does the {it} bounce?",
        "count the bounces of the {it}.",
        "number of bounces of the {it}?",
    ),
    "becomes": ("what {what} does the {it} become?", "the {it} becomes what {what}?", "which {what} is the {it} last?"),
    "was": ("what {what} was the {it} first?", "which {what} is the {it} first?", "first {what} of the {it}?"),
    "changes": (
        "what changes, colour, shape, size or nothing?",
        "which changes, colour, shape, size or nothing?",
        "colour, shape, size or nothing, what changes?",
    ),
    "changer": ("which changes, {a} or {b}?", "{a} or {b}, which changes?", "what changes, {a} or {b}?"),
    "grows": (
        "does the {it} grow, shrink or stay?",
        "the {it}, does it grow, shrink or stay?",
        "grow, shrink or stay, what does the {it}?",
    ),
    "colours": (
        "how many times does the {it} change colour?",
        "how often does the {it} change colour?",
        "count the colour changes of the {it}.",
    ),
    "hits": (
        "do they touch?",
        "do the {a} and the {b} touch?",
        "does the {a} touch the {b}?",
        "they touch, yes or no?",
    ),
    "mover_of_two": (
        "which moves, {a}, {b} or both?",
        "{a}, {b} or both, which moves?",
        "what moves, {a}, {b} or both?",
    ),
    "story": ("what happens?", "tell what happens."),
    "motion": ("what does it do?", "say what it does."),
    "moments": ("say it frame by frame.", "what does each frame show?"),
    "end": ("stop or back at the end?", "at the end, stop or back?", "what comes at the end, stop or back?"),
}


class _Dot(NamedTuple):
    """A shape in one frame: `x` and `y` are its upper left corner; past the edge it comes back on the other side."""

    shape: str
    colour: str
    size: int
    y: int
    x: int


@dataclass(frozen=True)
class _Plan:
    """A clip before it is drawn."""

    height: int
    width: int
    frames: list[list[_Dot]]
    asks: list[Ask]
    story: str  # all that happens, in few words

    def visible(self) -> set[str]:
        """Every composition that can be seen in it, asked about or not."""
        looks = {f"{dot.colour}|{dot.shape}" for dots in self.frames for dot in dots}
        return looks.union(*(ask.about for ask in self.asks))


def make(rng: random.Random, split: Split, level: int) -> Sample:
    """One clip with 2 to 5 turns, held out 1 to 5.

    Level 1 has 4 or 8 frames and four ways to move; level 2 has 8 or 12, diagonals, turns and bounces; level 3 has up
    to 16 and larger pictures with more shapes.
    """
    scene = _kind(rng, level)
    while True:
        plan = scene(rng, level)
        if plan is None or (split != "heldout" and any(map(held_out, plan.visible()))):
            continue
        turns = list(phrase(rng, split, "clip", plan.asks, PHRASES))
        # one held-out turn is enough: to want two would favour scenes and answers with many questions
        if len(turns) >= (1 if split == "heldout" else 2):
            break
    frames = _draw(rng, plan, level)
    return Sample("clip", tuple(turns[:5]), (Clip(frames, fps=2.0),), level=level, split=split)


def make_story(rng: random.Random, split: Split, level: int) -> Sample:
    """One clip, told: who is in it and what it does. Held out: something that happens in it is."""
    scene = _kind(rng, level)
    plan, key = _of_split(split, lambda: scene(rng, level))
    turn = Turn(rng.choice(PHRASES["story"]), plan.story, "story", key)
    return Sample("story", (turn,), (Clip(_draw(rng, plan, level), fps=2.0),), level=level, split=split)


def make_motion(rng: random.Random, split: Split, level: int) -> Sample:
    """One shape, and what it does. Held out: its looks, or what it does with such looks."""
    if level not in (1, 2, 3):
        raise ValueError(f"clips have levels 1 to 3, got {level}")
    scene = rng.choices((_travel, _blink, _change), (0.6, 0.15, 0.25))[0]
    plan, key = _of_split(split, lambda: scene(rng, level, 1))
    does = plan.story.split(" ", 2)[2]  # without colour and shape
    turn = Turn(rng.choice(PHRASES["motion"]), does, "motion", key)
    return Sample("motion", (turn,), (Clip(_draw(rng, plan, level), fps=2.0),), level=level, split=split)


def make_moments(rng: random.Random, split: Split, level: int) -> Sample:
    """A shape of another colour, form or place in every frame, or off: all frames told in order, nothing to be guessed.

    What comes after what is seen nowhere else so plainly. Held out: a look, or the order.
    """
    if level not in (1, 2, 3):
        raise ValueError(f"clips have levels 1 to 3, got {level}")
    what = rng.choice(("colour", "shape", "place", "on"))
    plan, key = _of_split(split, lambda: _moments(rng, level, what))
    turn = Turn(rng.choice(PHRASES["moments"]), plan.story, "moments", key)
    return Sample("moments", (turn,), (Clip(_draw(rng, plan, level), fps=2.0),), level=level, split=split)


def _moments(rng: random.Random, level: int, what: str) -> _Plan:
    # as small as the shape allows: many are read in one step, and only a place needs room
    height, width = (28 * (2 if what == "place" else rng.choice((1, 1, 2))) for _ in "hw")
    length = rng.choice({1: (4,), 2: (4, 8), 3: (8, 12)}[level])
    colour, shape = _things(rng, 1)[0]
    size = rng.randint(*SIZES)
    y, x = rng.randint(0, height - size), rng.randint(0, width - size)
    frames: list[list[_Dot]] = []
    told = []
    for _ in range(length):
        dot = _Dot(shape, colour, size, y, x)
        if what == "colour":
            state = rng.choice(list(COLOURS))
            dot = dot._replace(colour=state)
        elif what == "shape":
            state = rng.choice(SHAPES)
            dot = dot._replace(shape=state)
        elif what == "place":
            below, right = rng.random() < 0.5, rng.random() < 0.5
            state = f"{'bottom' if below else 'top'} {'right' if right else 'left'}"
            # in that quarter's corner, a few pixels from it at most
            off_y, off_x = rng.randint(0, min(6, (height - size) // 3)), rng.randint(0, min(6, (width - size) // 3))
            dot = dot._replace(y=height - size - off_y if below else off_y, x=width - size - off_x if right else off_x)
        else:
            state = rng.choice(("on", "off"))
        told.append(state)
        frames.append([] if state == "off" else [dot])
    story = ", ".join(told)
    return _Plan(height, width, frames, [Ask("moments", story, about=(f"moments|{story}",))], story)


def _of_split(split: Split, draw: Callable[[], _Plan | None]) -> tuple[_Plan, str]:
    """The first drawn clip of this split, and its composition: something held out that it shows, if anything is."""
    while True:
        plan = draw()
        if plan is None:
            continue
        held = sorted(filter(held_out, plan.visible()))
        if bool(held) == (split == "heldout"):
            return plan, held[0] if held else min(plan.visible())


def _kind(rng: random.Random, level: int) -> "_Scene":
    """Which scene it is to be: chosen once, not again after a rejection, so every split has the same share of each."""
    if level not in (1, 2, 3):
        raise ValueError(f"clips have levels 1 to 3, got {level}")
    scenes = [name for name in SCENES if level > 1 or name not in ("turn", "bounce")]
    return SCENES[rng.choices(scenes, [SCENES[name][1] for name in scenes])[0]][0]


def single_frame(sample: Sample, which: int = 0) -> Sample:
    """The same questions about one frame, repeated to the clip's length: what can be known without motion."""
    media = tuple(
        Clip(np.repeat(medium.frames[which][None], len(medium.frames), axis=0), medium.fps)
        if isinstance(medium, Clip)
        else medium
        for medium in sample.media
    )
    return replace(sample, media=media)


# ---- pictures


def _draw(rng: random.Random, plan: _Plan, level: int) -> Pixels:
    ground = ground_of(rng, plan.height, plan.width, level)
    # the same colour all through a clip, a little different in every clip
    colours = {name: np.array([v + rng.randint(-9, 9) for v in rgb], np.float32) for name, rgb in COLOURS.items()}
    frames = np.repeat(ground[None], len(plan.frames), axis=0)
    for frame, dots in zip(frames, plan.frames, strict=True):
        for dot in dots:
            mask = mask_of(dot.shape, dot.size)
            y, x = dot.y % plan.height, dot.x % plan.width
            if y + dot.size <= plan.height and x + dot.size <= plan.width:
                under = frame[y : y + dot.size, x : x + dot.size]
                under[:] = under + (colours[dot.colour] - under) * mask
            else:  # over an edge and back in on the other side
                rows, columns = np.arange(y, y + dot.size) % plan.height, np.arange(x, x + dot.size) % plan.width
                place = np.ix_(rows, columns)
                frame[place] = frame[place] + (colours[dot.colour] - frame[place]) * mask
    return frames


# ---- scenes: each returns None where chance left no room, and is asked again


def _travel(rng: random.Random, level: int, count: int = 0) -> _Plan | None:
    length = _length(rng, level)
    count = count or rng.choice({1: (1, 1, 2), 2: (1, 2, 2), 3: (2, 2, 3)}[level])
    things = _things(rng, count)
    ways: list[str] = []
    paces: list[int] = []
    for _ in things:
        way = rng.choice(list(STRAIGHT if level == 1 or rng.random() < 0.4 else DIAGONAL))
        # the first one's way again, or "same" would nearly always be no
        ways.append(ways[0] if ways and rng.random() < 0.36 else way)
        paces.append(rng.randint(*rng.choice((SLOW, SLOW, MIDDLE, FAST, FAST))))
    for _ in range(40):
        # only places and sizes are drawn again, so that ways and paces stay as even as they were drawn
        height, width = _sides(rng, level)
        paths: list[list[_Dot]] = []
        for thing, way, pace in zip(things, ways, paces, strict=True):
            for _ in range(20):
                path = _line(rng, thing, way, pace, length, height, width)
                if all(_apart(a, b, height, width) for other in paths for a, b in zip(path, other, strict=True)):
                    paths.append(path)
                    break
        if len(paths) == count:
            break
    else:
        return None
    choices = tuple(STRAIGHT if level == 1 else WAYS)
    asks = []
    story = ", ".join(
        f"{_name(thing)} {way}{_pace(pace)}" for thing, way, pace in zip(things, ways, paces, strict=True)
    )
    told = f"{', '.join(f'{colour} {way}' for (colour, _), way in zip(things, ways, strict=True))}."
    for thing, way, pace in zip(things, ways, paces, strict=True):
        colour, shape = thing
        about = (_pair(thing), f"{_pair(thing)}|{way}")
        asks.append(Ask("direction", way, choices, about, _pair(thing), _it(rng, thing, count)))
        claim = way if rng.random() < 0.5 else rng.choice([other for other in choices if other != way])
        words = _it(rng, thing, count) | {"way": claim}
        asks.append(Ask("moves", _yes(claim == way), ("yes", "no"), about, f"{_pair(thing)}|{claim}", words, f"{way}."))
        if pace <= SLOW[1] or pace >= FAST[0]:
            word = "slow" if pace <= SLOW[1] else "fast"
            about = (_pair(thing), f"{_pair(thing)}|is {word}")
            asks.append(Ask("speed", word, ("fast", "slow"), about, _pair(thing), _it(rng, thing, count)))
        if count > 1 and ways.count(way) == 1:
            colours = tuple(colour for colour, _ in things)
            asks.append(Ask("mover", colour, colours, (_pair(thing),), f"{shape}|{way}", {"way": way}, told))
    if count == 2:
        about = (_pair(things[0]), _pair(things[1]))
        if max(paces) >= 1.6 * min(paces):
            words, answer, other = _two(rng, things, paces.index(max(paces)))
            asks.append(Ask("faster", answer, (answer, other), about, other, words))
        detail = "|".join(sorted(colour for colour, _ in things))
        asks.append(Ask("same", _yes(ways[0] == ways[1]), ("yes", "no"), about, detail, {}, told))
    return _Plan(height, width, _by_time(paths), asks, story)


def _turn(rng: random.Random, level: int) -> _Plan | None:
    height, width = _sides(rng, level)
    length = _length(rng, level)
    thing = _things(rng, 1)[0]
    first = rng.choice(list(STRAIGHT))
    last = first if rng.random() < 0.5 else rng.choice([way for way in STRAIGHT if way != first])
    at = rng.randint(3, length - 4)  # at least three steps each way
    step, size = rng.randint(6, 12), rng.randint(*SIZES)
    y, x = rng.randrange(height), rng.randrange(width)
    path = []
    for t in range(length):
        path.append(_Dot(thing[1], thing[0], size, y, x))
        dy, dx = WAYS[first if t < at else last]
        y, x = y + dy * step, x + dx * step
    words, ways = _it(rng, thing, 1), f"{first}, {last}."
    asks = [Ask("turns", _yes(first != last), ("yes", "no"), (_pair(thing),), _pair(thing), words, ways)]
    for kind, way in (("first_way", first), ("last_way", last)):
        about = (_pair(thing), f"{_pair(thing)}|{way}")
        asks.append(Ask(kind, way, tuple(STRAIGHT), about, _pair(thing), _it(rng, thing, 1)))
    story = f"{_name(thing)} {first}" + (f", then {last}" if last != first else "")
    return _Plan(height, width, _by_time([path]), asks, story)


def _order(rng: random.Random, level: int) -> _Plan | None:
    height, width = _sides(rng, level)
    length = _length(rng, level)
    count = rng.choice({1: (2, 3), 2: (2, 3, 3), 3: (3, 4)}[level])
    things = _things(rng, count)  # in order of time
    sizes = [rng.randint(*SIZES) for _ in things]
    places = _places(rng, sizes, height, width)
    if places is None:
        return None
    times = [*sorted(rng.sample(range(1, length), count)), length]
    comes = rng.choice(("appears", "vanishes", "comes"))  # "comes": each one goes when the next one comes
    frames: list[list[_Dot]] = [[] for _ in range(length)]
    for number, ((colour, shape), size, (y, x)) in enumerate(zip(things, sizes, places, strict=True)):
        start = 0 if comes == "vanishes" else times[number]
        end = {"appears": length, "vanishes": times[number], "comes": times[number + 1]}[comes]
        for t in range(start, end):
            frames[t].append(_Dot(shape, colour, size, y, x))
    asks = []
    in_time = [f"{', '.join(thing[by] for thing in things)}." for by in (0, 1)]
    for kind, thing in (("first", things[0]), ("last", things[-1])):
        by = rng.randint(0, 1)
        about = (_pair(thing), f"{_pair(thing)}|{comes} {kind}")
        words = {"what": ("colour", "shape")[by], "comes": comes}
        choices = tuple(each[by] for each in things)
        asks.append(Ask(kind, thing[by], choices, about, f"{thing[1 - by]}|{comes}", words, in_time[by]))
    one, two = sorted(rng.sample(range(count), 2))
    words, answer, other = _two(rng, [things[one], things[two]], 0)
    about = (_pair(things[one]), _pair(things[two]))
    thinking = in_time[0 if answer in COLOURS else 1]
    words |= {"comes": comes}
    asks.append(Ask("earlier", answer, (answer, other), about, f"{other}|{comes}", words, thinking))
    if count > 2:
        number, by = rng.randrange(count - 1), rng.randint(0, 1)
        before, after = things[number], things[number + 1]
        words = {"a": before[by], "what": ("colour", "shape")[by], "comes": comes}
        choices = tuple(each[by] for each in things if each is not before)
        about = (_pair(before), _pair(after))
        asks.append(Ask("next", after[by], choices, about, f"{before[by]}|{comes}", words, in_time[by]))
    story = ", then ".join(f"{_name(thing)} {comes}" for thing in things)
    return _Plan(height, width, frames, asks, story)


def _blink(rng: random.Random, level: int, count: int = 0) -> _Plan | None:
    height, width = _sides(rng, level)
    length = 8 if level == 1 else rng.choice((8, 12))  # the length must not tell the count: four fit in 8
    count = count or rng.choice((1, 2) if level == 1 else (2, 2, 3))
    things = _things(rng, count)
    sizes = [rng.randint(*SIZES) for _ in things]
    places = _places(rng, sizes, height, width)
    if places is None:
        return None
    counts = [rng.randint(1, 4), *(0 if rng.random() < 0.4 else rng.randint(1, 4) for _ in things[1:])]
    frames: list[list[_Dot]] = [[] for _ in range(length)]
    sums: list[str] = []
    for (colour, shape), size, (y, x), blinks in zip(things, sizes, places, counts, strict=True):
        # off for single frames that never touch: drawn from a shorter line, then one frame is put after each
        off = {1 + spot + k for k, spot in enumerate(sorted(rng.sample(range(length - blinks), blinks)))}
        for t in range(length):
            if t not in off:
                frames[t].append(_Dot(shape, colour, size, y, x))
        sums.append(_summed(off, length))
    asks = []
    choices = ("1", "2", "3", "4")
    for thing, blinks, worked in zip(things, counts, sums, strict=True):
        if blinks:
            about = (_pair(thing), f"{_pair(thing)}|blinks {blinks}")
            words = _it(rng, thing, count)
            asks.append(Ask("blinks", str(blinks), choices, about, _pair(thing), words, f"{worked}."))
    if 0 in counts:
        # as many yes as no: asked of one that blinks and of one that does not
        for which in (0, counts.index(0)):
            thing, worked = things[which], f"{sums[which]}."
            words, answer = _it(rng, thing, count), _yes(counts[which] > 0)
            asks.append(Ask("blinker", answer, ("yes", "no"), (_pair(thing),), _pair(thing), words, worked))
    if count > 1 and counts[0] != counts[1]:
        words, answer, other = _two(rng, things[:2], 0 if counts[0] > counts[1] else 1)
        number = dict.fromkeys(things[0], sums[0]) | dict.fromkeys(things[1], sums[1])
        thinking = ", ".join(f"{word} {number[word]}" for word in words.values()) + "."
        about = (_pair(things[0]), _pair(things[1]))
        asks.append(Ask("more", answer, (answer, other), about, other, words, thinking))
    story = ", ".join(f"{_name(thing)} blinks {blinks}" for thing, blinks in zip(things, counts, strict=True))
    return _Plan(height, width, frames, asks, story)


def _walls(at: int, step: int, room: int, length: int) -> tuple[list[int], list[int]] | None:
    """Places from wall to wall and the frames after a bounce; None where a step too small to see hides one."""
    places: list[int] = [at]
    bounces: list[int] = []
    for t in range(1, length):
        at += step
        if not 0 <= at <= room:
            at = -at if at < 0 else 2 * room - at
            step = -step
            bounces.append(t)
        places.append(at)
    moves = [b - a for a, b in pairwise(places)]
    turned = sum((a > 0) != (b > 0) for a, b in pairwise(move for move in moves if abs(move) >= 3))
    # where the ends are hidden, the way at first or last would be too
    return (places, bounces) if turned == len(bounces) and min(abs(moves[0]), abs(moves[-1])) >= 3 else None


def _bounce(rng: random.Random, level: int) -> _Plan | None:
    length = rng.choice((8, 12))
    thing = _things(rng, 1)[0]
    want = rng.randint(1, 3)
    for _ in range(400):
        height, width = _sides(rng, min(level, 2))  # three bounces need a near wall
        size, step = rng.randint(18, 26), rng.randint(7, 16)
        down = rng.random() < 0.5
        room, wide = (height, width) if down else (width, height)
        at, aside = rng.randint(0, room - size), rng.randint(0, wide - size)
        # the other way from the same place must bounce as often: then the first frame does not tell the way
        runs = [_walls(at, way * step, room - size, length) for way in (1, -1)]
        if all(run is not None and len(run[1]) == want for run in runs):
            break
    else:
        return None
    positive = rng.random() < 0.5
    chosen = runs[0] if positive else runs[1]
    assert chosen is not None, "both runs were just checked"
    path = [_Dot(thing[1], thing[0], size, *((y, aside) if down else (aside, y))) for y in chosen[0]]
    ways = ("up", "down") if down else ("left", "right")
    about = (_pair(thing), f"{_pair(thing)}|bounces {want}")
    worked = f"{_summed(chosen[1], length)}."
    asks = [Ask("bounces", str(want), ("1", "2", "3"), about, _pair(thing), _it(rng, thing, 1), worked)]
    for kind, forward in (("first_way", positive), ("last_way", positive == (want % 2 == 0))):
        about = (_pair(thing), f"{_pair(thing)}|{ways[forward]}")
        asks.append(Ask(kind, ways[forward], tuple(STRAIGHT), about, _pair(thing), _it(rng, thing, 1)))
    story = f"{_name(thing)} {ways[positive]}, bounces {want}"
    return _Plan(height, width, _by_time([path]), asks, story)


def _change(rng: random.Random, level: int, count: int = 0) -> _Plan | None:
    height, width = _sides(rng, level)
    length = _length(rng, level)
    count = count or rng.choice((1, 2) if level < 3 else (2, 3))
    things = _things(rng, count)
    what = rng.choice(("colour", "shape", "size", "size", "nothing"))
    (colour, shape), size = things[0], rng.randint(21, 25)
    sizes = [size, *(rng.randint(21, 25) for _ in things[1:])]
    # room for the largest it can become, whatever happens: the place must not tell
    places = _places(rng, [LARGE, *sizes[1:]], height, width)
    if places is None:
        return None
    y, x = (at + (LARGE - size) // 2 for at in places[0])
    path = [_Dot(shape, colour, size, y, x)] * length
    asks = []
    if what in ("size", "nothing"):
        word = "stay" if what == "nothing" else rng.choice(("grow", "shrink"))
        end = {"grow": LARGE, "shrink": SMALL, "stay": size}[word]
        for t in range(length):
            now = round(size + (end - size) * t / (length - 1))
            path[t] = _Dot(shape, colour, now, y + (size - now) // 2, x + (size - now) // 2)
        about = (_pair(things[0]), f"{_pair(things[0])}|{word}")
        story = (
            f"{_name(things[0])} {word}{'' if word == 'stay' else 's'}" if count == 1 or word != "stay" else "nothing"
        )
        asks.append(Ask("grows", word, ("grow", "shrink", "stay"), about, _pair(things[0]), _it(rng, things[0], count)))
    else:
        by = 0 if what == "colour" else 1
        most = min(3, length // 4) if what == "colour" else 1
        steps = rng.randint(1, most)
        free = [word for word in (COLOURS, SHAPES)[by] if all(word != thing[by] for thing in things)]
        states = [things[0][by], *rng.sample(free, steps)]
        times = _spread(rng, length, steps)
        for t in range(length):
            state = states[sum(t >= time for time in times)]
            path[t] = path[t]._replace(colour=state) if by == 0 else path[t]._replace(shape=state)
        story = " becomes ".join([_name(things[0]), *states[1:]])
        looks = [(state, shape) if by == 0 else (colour, state) for state in states]
        becomes = [f"{_pair(one)}|becomes {other[by]}" for one, other in pairwise(looks)]
        # by what stays: a colour that changes is no name
        words = {"it": shape if by == 0 else f"{colour} one", "what": what}
        choices = tuple((COLOURS, SHAPES)[by])
        seen = (_pair(looks[-1]), *becomes)
        told = f"{', '.join(states)}."
        asks.append(Ask("becomes", states[-1], choices, seen, looks[-1][1 - by], words, told))
        if rng.random() < 0.3:  # rare: the first frame tells
            asks.append(Ask("was", states[0], choices, (_pair(looks[0]), *becomes), looks[0][1 - by], words, told))
        if steps > 1:
            words = {"a": states[-2], "what": what, "comes": "comes"}
            asks.append(Ask("next", states[-1], choices, seen, states[-2], words, told))
        if most > 1:
            numbers = tuple(str(number) for number in range(1, most + 1))
            words = {"it": shape}
            asks.append(Ask("colours", str(steps), numbers, (_pair(looks[0]),), shape, words, told))
    if what != "size" or rng.random() < 0.5:  # size was drawn twice as often, for grow and for shrink
        choices = ("colour", "shape", "size", "nothing")
        asks.append(Ask("changes", what, choices, (_pair(things[0]),), _pair(things[0]), {}))
    if count > 1 and what != "nothing":
        words, answer, other = _two(rng, things[:2], 0, by={"colour": 1, "shape": 0}.get(what))
        asks.append(Ask("changer", answer, (answer, other), (_pair(things[0]),), other, words))
    others = [
        [_Dot(shape, colour, size, y, x)] * length
        for (colour, shape), size, (y, x) in zip(things[1:], sizes[1:], places[1:], strict=True)
    ]
    return _Plan(height, width, _by_time([path, *others]), asks, story)


def _collide(rng: random.Random, level: int) -> _Plan | None:
    """Two shapes on one line come nearer, or one of them does; at touch or before it they stop or go back."""
    length = _length(rng, level)
    things = _things(rng, 2)  # the upper or left one first
    movers = rng.choice(((1, 0), (0, 1), (1, 1)))
    touch, back = rng.random() < 0.5, rng.random() < 0.5
    for _ in range(200):
        height, width = _sides(rng, level)
        down = rng.random() < 0.5
        room, wide = (height, width) if down else (width, height)
        size, at = rng.randint(16, 22), rng.randint(2, min(length - 2, 4))
        # the gap at the start is drawn in one way for both answers; what ends before it is a little slower
        gap = rng.randint(18, 48)
        if gap + 2 * size <= room and 6 <= gap / (sum(movers) * at) <= 13:
            break
    else:
        return None
    low, aside = rng.randint(0, room - gap - 2 * size), rng.randint(0, wide - size)
    near = -2 if touch else rng.randint(9, 12)  # two pixels of overlap: a touch that shows for every shape
    paths: list[list[_Dot]] = [[], []]
    for t in range(length):
        done = t / at if t <= at else max(0.0, 2 - t / at) if back else 1.0
        way = (gap - near) * done / sum(movers)
        ends = (low + round(movers[0] * way), low + size + gap - round(movers[1] * way))
        for path, (colour, shape), end in zip(paths, things, ends, strict=True):
            path.append(_Dot(shape, colour, size, *((end, aside) if down else (aside, end))))
    about = (_pair(things[0]), _pair(things[1]))
    detail = "|".join(sorted(colour for colour, _ in things))
    words, one, two = _two(rng, things, 0)
    moving = {(1, 0): one, (0, 1): two, (1, 1): "both"}[movers]
    by, (first, last) = int(one in SHAPES), movers
    ending = f"{'touch' if touch else 'no touch'}, {'back' if back else 'stop'}"
    told = f"{things[0][by]}{' moves' * first}, {things[1][by]}{' moves' * last}, {ending}."
    asks = [
        Ask("hits", _yes(touch), ("yes", "no"), about, detail, words, told),
        Ask("mover_of_two", moving, (one, two, "both"), about, detail, words, told),
        Ask("end", "back" if back else "stop", ("stop", "back"), about, detail, {}, told),
    ]
    story = f"{_name(things[0])}{' moves' * first}, {_name(things[1])}{' moves' * last}, {ending}"
    return _Plan(height, width, _by_time(paths), asks, story)


# ---- what the scenes share


def _sides(rng: random.Random, level: int) -> tuple[int, int]:
    """Two to three tokens (28 px) high and wide, level 3 up to four; past level 1 a few pixels less."""
    cells = (2, 2, 3) if level == 1 else (2, 3) if level == 2 else (3, 3, 4)
    height, width = (28 * rng.choice(cells) - (rng.randint(0, 8) if level > 1 else 0) for _ in "hw")
    return height, width


def _length(rng: random.Random, level: int) -> int:
    return rng.choice({1: (4, 8), 2: (8, 12), 3: (8, 12, 16)}[level])


def _things(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(colour, shape) of so many things; no two share a colour or a shape, so either names them."""
    return list(zip(rng.sample(list(COLOURS), count), rng.sample(SHAPES, count), strict=True))


def _name(thing: tuple[str, str]) -> str:
    return " ".join(thing)


def _pace(pace: int) -> str:
    return " slow" if pace <= SLOW[1] else " fast" if pace >= FAST[0] else ""


def _it(rng: random.Random, thing: tuple[str, str], count: int) -> dict[str, str]:
    """A name of this thing among `count`."""
    colour, shape = thing
    return {"it": rng.choice((shape, f"{colour} {shape}", f"{colour} shape", *["shape"] * (count == 1)))}


def _two(
    rng: random.Random, things: list[tuple[str, str]], right: int, by: int | None = None
) -> tuple[dict[str, str], str, str]:
    """Two things to choose from, by colour (0) or shape (1), in either order; the right one's word, the other's."""
    by = rng.randint(0, 1) if by is None else by
    answer, other = things[right][by], things[1 - right][by]
    a, b = rng.sample((answer, other), 2)
    return {"a": a, "b": b}, answer, other


def _pair(thing: tuple[str, str]) -> str:
    return "|".join(thing)


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _summed(times: Iterable[int], length: int) -> str:
    """How often something happens, counted by four frames, which a reader sees at once: "1+0+2=3"."""
    counts = [sum(begin <= t < begin + 4 for t in times) for begin in range(0, length, 4)]
    return f"{'+'.join(map(str, counts))}={sum(counts)}"


def _by_time(paths: list[list[_Dot]]) -> list[list[_Dot]]:
    return [list(dots) for dots in zip(*paths, strict=True)]


def _line(
    rng: random.Random, thing: tuple[str, str], way: str, pace: int, length: int, height: int, width: int
) -> list[_Dot]:
    """A straight path from anywhere in the picture, edges included: it wraps around."""
    step = pace if way in STRAIGHT else max(3, round(0.75 * pace))
    y, x, size = rng.randrange(height), rng.randrange(width), rng.randint(*SIZES)
    dy, dx = WAYS[way]
    return [_Dot(thing[1], thing[0], size, y + dy * step * t, x + dx * step * t) for t in range(length)]


def _apart(a: _Dot, b: _Dot, height: int, width: int) -> bool:
    """Whether two dots leave at least 2 px between them, around the edges too."""
    return _clear(a.y, a.size, b.y, b.size, height) or _clear(a.x, a.size, b.x, b.size, width)


def _clear(a: int, size: int, b: int, other: int, room: int) -> bool:
    return size + 2 <= (b - a) % room <= room - other - 2


def _places(rng: random.Random, sizes: list[int], height: int, width: int) -> list[tuple[int, int]] | None:
    """Upper left corners inside the picture, apart from each other; None if there was no room."""
    dots: list[_Dot] = []
    for size in sizes:
        for _ in range(30):
            dot = _Dot("", "", size, rng.randint(0, height - size), rng.randint(0, width - size))
            if all(_apart(dot, other, height, width) for other in dots):
                dots.append(dot)
                break
        else:
            return None
    return [(dot.y, dot.x) for dot in dots]


def _spread(rng: random.Random, length: int, count: int) -> list[int]:
    """So many times in 1..length - 1, at least two frames apart."""
    while True:
        times = sorted(rng.sample(range(1, length), count))
        if all(b - a >= 2 for a, b in pairwise(times)):
            return times


_Scene = Callable[[random.Random, int], _Plan | None]
SCENES: dict[str, tuple[_Scene, float]] = {
    "travel": (_travel, 0.36),
    "turn": (_turn, 0.1),
    "order": (_order, 0.16),
    "blink": (_blink, 0.14),
    "bounce": (_bounce, 0.06),
    "change": (_change, 0.16),
    "collide": (_collide, 0.1),
}

MAKERS: dict[str, Maker] = {"clip": make, "story": make_story, "motion": make_motion, "moments": make_moments}
WEIGHTS: dict[str, float] = {"clip": 0.6, "story": 0.2, "motion": 0.1, "moments": 0.1}
