"""Small programs: from a description to a function, from a wrong function to a right one, from a program to its output.

    make_function   "write f(xs): the sum of the squares of the even numbers."  ->  def f(xs): ...   unit tests
    make_repair     the same with one mistake in it                             ->  the function     unit tests
    make_output     a program                                                    ->  what it prints
    make_drawing    a picture of one to three flat shapes                        ->  an SVG that draws it

Functions are compositions: numbers are kept (even, above 3, ...), changed (squared, doubled, ...) and gathered (sum,
largest, ...); words, dictionaries, digits and recursion have sets of their own. Held out are compositions,
"code|even|square|sum": training sees each part, but never these together.
"""

import copy
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from world.sample import Check, Image, Maker, Sample, Split, Turn, belongs
from world.scene import COLOURS
from world.svg import GRID, Shape, render, write


class Part(NamedTuple):
    """A primitive: its words, its code, what it does."""

    words: str
    code: str
    run: Callable[..., Any]


KEEP: dict[str, Part] = {
    "all": Part("the numbers", "", lambda x: True),
    "even": Part("the even numbers", "x % 2 == 0", lambda x: x % 2 == 0),
    "odd": Part("the odd numbers", "x % 2 == 1", lambda x: x % 2 == 1),
    "positive": Part("the positive numbers", "x > 0", lambda x: x > 0),
    "negative": Part("the negative numbers", "x < 0", lambda x: x < 0),
    "above3": Part("the numbers above 3", "x > 3", lambda x: x > 3),
    "below5": Part("the numbers below 5", "x < 5", lambda x: x < 5),
    "nonzero": Part("the numbers that are not 0", "x != 0", lambda x: x != 0),
    "third": Part("the multiples of 3", "x % 3 == 0", lambda x: x % 3 == 0),
}
CHANGE: dict[str, Part] = {
    "same": Part("", "x", lambda x: x),
    "square": Part("the squares of", "x * x", lambda x: x * x),
    "double": Part("the doubles of", "2 * x", lambda x: 2 * x),
    "negate": Part("the negatives of", "-x", lambda x: -x),
    "abs": Part("the sizes of", "abs(x)", abs),
    "next": Part("one more than", "x + 1", lambda x: x + 1),
    "less2": Part("two less than", "x - 2", lambda x: x - 2),
    "last": Part("the last digits of", "abs(x) % 10", lambda x: abs(x) % 10),
}
GATHER: dict[str, Part] = {
    "sum": Part("the sum of", "sum({})", sum),
    "list": Part("the list of", "[{}]", list),
    "max": Part("the largest of", "max(({}), default=0)", lambda v: max(v, default=0)),
    "min": Part("the smallest of", "min(({}), default=0)", lambda v: min(v, default=0)),
    "count": Part("the count of", "len([{}])", lambda v: len(list(v))),
    "sorted": Part("the sorted list of", "sorted({})", sorted),
    "back": Part("the reversed list of", "[{}][::-1]", lambda v: list(v)[::-1]),
    "unique": Part("how many different", "len(set({}))", lambda v: len(set(v))),
}

WORD_CHANGE: dict[str, Part] = {
    "upper": Part("in capitals", "w.upper()", lambda w: w.upper()),
    "reverse": Part("reversed", "w[::-1]", lambda w: w[::-1]),
    "first": Part("cut to the first letter", "w[0]", lambda w: w[0]),
    "twice": Part("said twice", "w + w", lambda w: w + w),
    "tail": Part("without the first letter", "w[1:]", lambda w: w[1:]),
}
WORD_KEEP: dict[str, Part] = {
    "all": Part("the words", "", lambda w: True),
    "long": Part("the words longer than 3", "len(w) > 3", lambda w: len(w) > 3),
    "short": Part("the words shorter than 4", "len(w) < 4", lambda w: len(w) < 4),
    "a": Part("the words with an a", "'a' in w", lambda w: "a" in w),
    "s": Part("the words that start with s", "w[0] == 's'", lambda w: w[0] == "s"),
}
WORD_GATHER: dict[str, Part] = {
    "list": Part("the list of", "[{}]", list),
    "join": Part("the joined", "''.join({})", "".join),
    "sorted": Part("the sorted list of", "sorted({})", sorted),
    "longest": Part("the longest of", "max(({}), key=len, default='')", lambda v: max(v, key=len, default="")),
}

DICT_TAKE: dict[str, Part] = {
    "keys": Part("the keys", "k", lambda k, v: k),
    "values": Part("the values", "v", lambda k, v: v),
}
DICT_KEEP: dict[str, Part] = {
    "all": Part("", "", lambda k, v: True),
    "big": Part(" whose value is above 3", "v > 3", lambda k, v: v > 3),
    "even": Part(" whose value is even", "v % 2 == 0", lambda k, v: v % 2 == 0),
    "short": Part(" whose key has one letter", "len(k) == 1", lambda k, v: len(k) == 1),
}
DICT_GATHER: dict[str, Part] = {
    "list": Part("the list of", "[{}]", list),
    "sorted": Part("the sorted list of", "sorted({})", sorted),
    "count": Part("the count of", "len([{}])", lambda v: len(list(v))),
}

# recursion over n: words, value at 0, step, python of the step
RECURSE: dict[str, tuple[str, int, str, Callable[[int, int], int]]] = {
    "sum": ("the sum of 1 to n", 0, "n + f(n - 1)", lambda n, rest: n + rest),
    "product": ("the product of 1 to n", 1, "n * f(n - 1)", lambda n, rest: n * rest),
    "squares": ("the sum of the squares of 1 to n", 0, "n * n + f(n - 1)", lambda n, rest: n * n + rest),
    "power": ("2 to the power n", 1, "2 * f(n - 1)", lambda n, rest: 2 * rest),
    "threes": ("3 to the power n", 1, "3 * f(n - 1)", lambda n, rest: 3 * rest),
    "doubles": ("the sum of the doubles of 1 to n", 0, "2 * n + f(n - 1)", lambda n, rest: 2 * n + rest),
}


class Program(NamedTuple):
    """A function: what it should do, its code, its unit tests [[arguments], expected], its composition."""

    words: str
    signature: str
    body: str
    tests: list[list[Any]]
    key: str
    kind: str

    @property
    def code(self) -> str:
        return f"def {self.signature}:\n    {self.body}"


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randint(-9, 12) for _ in range(rng.randint(0, 6))]


def _expression(change: Part, keep: Part, name: str, source: str, gather: Part) -> str:
    """The expression: a generator inside what gathers it."""
    condition = f" if {keep.code}" if keep.code else ""
    return gather.code.format(f"{change.code} for {name} in {source}{condition}")


def list_program(rng: random.Random, split: Split) -> Program:
    """Keep, change, gather over a list of whole numbers."""
    while True:
        k, c, g = rng.choice(list(KEEP)), rng.choice(list(CHANGE)), rng.choice(list(GATHER))
        key = f"code|{k}|{c}|{g}"
        if belongs(key, split):
            break
    keep, change, gather = KEEP[k], CHANGE[c], GATHER[g]
    words = " ".join(filter(None, (gather.words, change.words, keep.words)))
    inputs = [[], *(_numbers(rng) for _ in range(5))]
    tests = [[[xs], gather.run([change.run(x) for x in xs if keep.run(x)])] for xs in inputs]
    return Program(words, "f(xs)", f"return {_expression(change, keep, 'x', 'xs', gather)}", tests, key, "list")


LETTERS = ("sun", "star", "apple", "cat", "sea", "road", "map", "stone", "ink", "salad", "bus", "lamp", "s", "area")


def word_program(rng: random.Random, split: Split) -> Program:
    """The same over a list of words."""
    while True:
        k, c, g = rng.choice(list(WORD_KEEP)), rng.choice(list(WORD_CHANGE)), rng.choice(list(WORD_GATHER))
        key = f"code|words|{k}|{c}|{g}"
        if belongs(key, split):
            break
    keep, change, gather = WORD_KEEP[k], WORD_CHANGE[c], WORD_GATHER[g]
    words = f"{gather.words} {keep.words} {change.words}"
    inputs = [[], *(rng.sample(LETTERS, rng.randint(1, 5)) for _ in range(5))]
    tests = [[[ws], gather.run([change.run(w) for w in ws if keep.run(w)])] for ws in inputs]
    return Program(words, "f(ws)", f"return {_expression(change, keep, 'w', 'ws', gather)}", tests, key, "words")


def dict_program(rng: random.Random, split: Split) -> Program:
    """Keys or values of a dictionary."""
    while True:
        t, k, g = rng.choice(list(DICT_TAKE)), rng.choice(list(DICT_KEEP)), rng.choice(list(DICT_GATHER))
        key = f"code|dict|{t}|{k}|{g}"
        if belongs(key, split):
            break
    take, keep, gather = DICT_TAKE[t], DICT_KEEP[k], DICT_GATHER[g]
    condition = f" if {keep.code}" if keep.code else ""
    body = f"return {gather.code.format(f'{take.code} for k, v in d.items(){condition}')}"
    inputs: list[dict[str, int]] = [{}]
    for _ in range(5):
        keys = rng.sample(("a", "b", "c", "up", "in", "so", "x", "go"), rng.randint(1, 5))
        inputs.append({key_: rng.randint(0, 9) for key_ in keys})
    tests = [[[d], gather.run([take.run(k_, v) for k_, v in d.items() if keep.run(k_, v)])] for d in inputs]
    return Program(f"{gather.words} {take.words}{keep.words}", "f(d)", body, tests, key, "dict")


def recursive_program(rng: random.Random, split: Split) -> Program:
    """f(n) out of f(n - 1); the composition is the step with the value that is added at the end of the recursion."""
    while True:
        name = rng.choice(list(RECURSE))
        plus = rng.randint(0, 5)
        key = f"code|recurse|{name}|{plus}"
        if belongs(key, split):
            break
    words, start, step, run = RECURSE[name]
    grown = name in ("product", "power", "threes")
    words = f"{words}{f' times {plus + 1}' if grown else f' plus {plus}'}"
    start = start * (plus + 1) if grown else plus
    tests = []
    for n in range(6):
        value = start
        for i in range(1, n + 1):
            value = run(i, value)
        tests.append([[n], value])
    body = f"if n == 0:\n        return {start}\n    return {step}"
    return Program(f"{words}, by recursion", "f(n)", body, tests, key, "recursion")


PROGRAMS: tuple[tuple[Callable[[random.Random, Split], Program], int], ...] = (
    (list_program, 6),
    (word_program, 2),
    (dict_program, 1),
    (recursive_program, 1),
)


def _program(rng: random.Random, split: Split, level: int) -> Program:
    makers = PROGRAMS[:1] if level == 1 and rng.random() < 0.3 else PROGRAMS
    return rng.choices([m for m, _ in makers], [w for _, w in makers])[0](rng, split)


def make_function(rng: random.Random, split: Split, level: int) -> Sample:
    """A function from its description, graded by its unit tests. Two or three of them per sample."""
    turns: list[Turn] = []
    while len(turns) < 3:
        program = _program(rng, split, level)
        wording = rng.choice(("write {f}: {w}.", "{f} returns {w}. write it.", "code {f}: {w}."))
        question = wording.format(f=program.signature, w=program.words)
        check = Check("program", {"tests": program.tests, "name": "f"})
        turns.append(Turn(question, program.code, f"function/{program.kind}", program.key, "", check))
    return Sample("function", tuple(turns), level=level, split=split)


MISTAKES = (
    ("==", "!="),
    (">", "<"),
    ("<", ">"),
    ("sum(", "max("),
    ("max(", "min("),
    ("min(", "max("),
    ("x * x", "x + x"),
    ("2 * x", "3 * x"),
    ("x + 1", "x - 1"),
    ("x - 2", "x + 2"),
    ("sorted(", "list("),
    ("n - 1", "n - 2"),
    ("[::-1]", "[1:]"),
    ("% 2 == 0", "% 2 == 1"),
    ("% 2 == 1", "% 2 == 0"),
    ("upper", "lower"),
    ("w + w", "w"),
    ("w[0]", "w[-1]"),
)


def _passes(code: str, tests: list[list[Any]]) -> bool:
    """Whether a function of this module's making passes its tests; a mistake that does is none."""
    scope: dict[str, Any] = {}
    try:
        exec(code, scope)  # our own text, made above
        return all(scope["f"](*copy.deepcopy(given)) == expected for given, expected in tests)
    except Exception:  # noqa: BLE001 - whatever a broken function does, it fails
        return False


def make_repair(rng: random.Random, split: Split, level: int) -> Sample:
    """A function with one mistake, and what it should do."""
    while True:
        program = _program(rng, split, level)
        fits = [program.code.replace(*mistake, 1) for mistake in MISTAKES if mistake[0] in program.body]
        fits = [code for code in fits if not _passes(code, program.tests)]
        if fits:
            break
    broken = rng.choice(fits)
    question = f"fix f, it should return {program.words}:\n{broken}"
    check = Check("program", {"tests": program.tests, "name": "f"})
    turn = Turn(question, program.code, f"repair/{program.kind}", program.key, "", check)
    return Sample("repair", (turn,), level=level, split=split)


def make_output(rng: random.Random, split: Split, level: int) -> Sample:
    """What a short program prints, with the values worked out one by one."""
    while True:
        k, c, g = rng.choice(list(KEEP)), rng.choice(list(CHANGE)), rng.choice(("sum", "list", "max", "min", "count"))
        key = f"code|{k}|{c}|{g}"
        if belongs(key, split):
            break
    keep, change, gather = KEEP[k], CHANGE[c], GATHER[g]
    xs = [rng.randint(0, 9) for _ in range(rng.randint(2, 3 + level))]
    kept = [x for x in xs if keep.run(x)]
    values = [change.run(x) for x in kept]
    program = f"xs = {xs}\nprint({_expression(change, keep, 'x', 'xs', gather)})"
    thinking = f"{kept} {values}" if c != "same" else f"{kept}"
    turn = Turn(f"what does it print?\n{program}", str(gather.run(values)), "output", key, thinking, Check("output"))
    return Sample("output", (turn,), level=level, split=split)


def _shape(rng: random.Random) -> tuple[Shape, str]:
    """One shape inside the grid, and its composition: kind, colour and size."""
    kind, colour = rng.choice(("circle", "rect", "polygon", "line")), rng.choice(list(COLOURS))
    numbers: tuple[int, ...]
    if kind == "circle":
        r = rng.randint(1, 2)
        numbers, size = (rng.randint(r, GRID - r), rng.randint(r, GRID - r), r), f"{r}"
    elif kind == "line":  # within 1 to 9: half a unit of its width lies to each side
        direction, length = rng.choice(("flat", "upright", "falling", "rising")), rng.randint(3, 6)
        wide, high = length * (direction != "upright"), length * (direction != "flat")
        x, y = rng.randint(1, GRID - 1 - wide), rng.randint(1, GRID - 1 - high)
        ends = (y + high, y) if direction == "rising" else (y, y + high)
        numbers, size = (x, ends[0], x + wide, ends[1]), f"{direction}{length}"
    else:
        wide, high = rng.choice((2, 4) if kind == "polygon" else (2, 3, 4)), rng.randint(2, 4)
        x, y = rng.randint(0, GRID - wide), rng.randint(0, GRID - high)
        size = f"{wide}x{high}"
        if kind == "rect":
            numbers = (x, y, wide, high)
        else:  # a triangle that stands on its base
            numbers = (x, y + high, x + wide, y + high, x + wide // 2, y)
    return Shape(kind, colour, tuple(map(float, numbers))), f"svg|{kind}|{colour}|{size}"


def make_drawing(rng: random.Random, split: Split, level: int) -> Sample:
    """A picture to be drawn again: shapes on a grid of ten by ten that do not touch, written from top to bottom."""
    count = rng.randint(1, min(level, 3))
    drawn: list[tuple[Shape, str]] = []
    tries = 0
    while not drawn or (len(drawn) < count and tries < 60):  # two long shapes may leave no room for a third
        tries += 1
        shape, key = _shape(rng)
        if belongs(key, split) and all(shape.clear_of(other) for other, _ in drawn):
            drawn.append((shape, key))
    drawn.sort(key=lambda one: (one[0].box[1], one[0].box[0]))
    shapes = [shape for shape, _ in drawn]
    text, pixels = write(shapes), render(shapes, rng.choice((56, 70, 84, 98, 112)))
    question = rng.choice(("draw this as svg.", "write the svg of this picture.", "svg code for the picture?"))
    turn = Turn(question, text, "drawing", drawn[0][1], check=Check("svg", {"svg": text}))
    return Sample("drawing", (turn,), (Image(pixels),), level=level, split=split)


MAKERS: dict[str, Maker] = {
    "function": make_function,
    "repair": make_repair,
    "output": make_output,
    "drawing": make_drawing,
}
WEIGHTS: dict[str, float] = {"function": 0.55, "repair": 0.2, "output": 0.15, "drawing": 0.1}
