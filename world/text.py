"""Text with exact answers: sums with worked thinking, word problems, sorting, dates, logic, instructions, tools.

    make_sum("347+586=?")   thinking  7+6+0=13 3 c1. 4+8+1=13 3 c1. 3+5+1=9 9 c0.   answer  933
    make_tool               a call of calculator, python or crop in OpenAI-style messages, its result, the answer
    make_proxy              questions about an image that is never shown: python counts and measures its pixels

Sums are worked from the right with explicit carries, so that every step needs three digits and no look-ahead.
Held out: operands ("sum|347+586"), names and numbers of a problem, the task and its words.

Level 3 asks for more: three operands, longer instructions, a choice of tools, an image cropped and then measured.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from types import CodeType
from typing import Any

import numpy as np

from world.sample import Check, Maker, Pixels, Sample, Split, Turn, belongs, held_out
from world.scene import COLOURS, SHAPES
from world.words import WORDS, invented, spelled

# Levels 1 and 2 train the shipped weights, all levels its tokenizer. From here on the harder material comes in.
FURTHER = 3

NAMES = ("ann", "bob", "eve", "tom", "sam", "mia", "leo", "zoe", "max", "amy")
THINGS = ("apples", "books", "coins", "eggs", "pens", "cards", "keys", "cups")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = tuple("january february march april may june july august september october november december".split())


def _one(family: str, turn: Turn, split: Split, level: int, tools: tuple[Mapping[str, Any], ...] = ()) -> Sample:
    return Sample(family, (turn,), tools=tools, level=level, split=split)


# ---- sums


def _digits(number: int) -> list[int]:
    """From the right."""
    return [int(digit) for digit in reversed(str(number))]


def worked_addition(a: int, b: int) -> str:
    """Digit by digit from the right, each step with the carry that comes in and the digit and carry that go out."""
    x, y = _digits(a), _digits(b)
    steps, carry = [], 0
    for place in range(max(len(x), len(y))):
        p, q = (x[place] if place < len(x) else 0), (y[place] if place < len(y) else 0)
        total = p + q + carry
        steps.append(f"{p}+{q}+{carry}={total} {total % 10} c{total // 10}.")
        carry = total // 10
    return " ".join(steps)


def worked_subtraction(a: int, b: int) -> str:
    """a - b for a >= b: a digit that is too small is raised by ten and lends (b1)."""
    x, y = _digits(a), _digits(b)
    steps, lent = [], 0
    for place, p in enumerate(x):
        q = y[place] if place < len(y) else 0
        low = p < q + lent
        top = p + 10 if low else p
        steps.append(f"{top}-{q}-{lent}={top - q - lent} b{int(low)}.")
        lent = int(low)
    return " ".join(steps)


def worked_product(a: int, b: int) -> str:
    """Any number times one digit."""
    steps, carry = [], 0
    for p in _digits(a):
        total = p * b + carry
        steps.append(f"{p}*{b}+{carry}={total} {total % 10} c{total // 10}.")
        carry = total // 10
    return " ".join(steps)


SUMS = {
    "+": ("{a}+{b}=?", "what is {a} plus {b}?", "add {a} and {b}."),
    "-": ("{a}-{b}=?", "what is {a} minus {b}?", "take {b} from {a}."),
    "*": ("{a}*{b}=?", "what is {a} times {b}?", "multiply {a} by {b}."),
}


THREE = ("{a}+{b}+{c}=?", "what is {a} plus {b} plus {c}?", "add {a}, {b} and {c}.")


def _sum_key(a: int, sign: str, b: int) -> str:
    """The composition of a sum: where the order does not matter, 3+8 and 8+3 are one."""
    return f"sum|{a}-{b}" if sign == "-" else f"sum|{min(a, b)}{sign}{max(a, b)}"


def _three(rng: random.Random, split: Split) -> Sample:
    """Three operands: the first two are added, then the third. In training their first step is not held out either."""
    while True:
        a, b, c = (rng.randint(0, 10 ** rng.randint(1, 4) - 1) for _ in range(3))
        key = f"sum|{a}+{b}+{c}"
        if belongs(key, split) and (split == "heldout" or not held_out(_sum_key(a, "+", b))):
            break
    thinking = f"{worked_addition(a, b)} {a + b}. {worked_addition(a + b, c)}"
    question = rng.choice(THREE).format(a=a, b=b, c=c)
    return _one("sum", Turn(question, str(a + b + c), "sum/three", key, thinking, Check("number", {})), split, FURTHER)


def make_sum(rng: random.Random, split: Split, level: int) -> Sample:
    """One sum. Level 1: two digits, 2: three, 3: four, also three operands; products with one digit."""
    if level >= FURTHER and rng.random() < 0.3:
        return _three(rng, split)
    most = 10 ** {1: 2, 2: 3}.get(level, 4) - 1
    while True:
        sign = rng.choice("++--*")
        a, b = rng.randint(0, most), rng.randint(0, most)
        if rng.random() < 0.3:
            a = rng.randint(0, most // 10)
        if sign == "*":
            a, b = rng.randint(0, most), rng.randint(2, 9)
        if sign == "-" and b > a:
            a, b = b, a
        key = _sum_key(a, sign, b)
        if belongs(key, split):
            break
    worked, value = {
        "+": (worked_addition, a + b),
        "-": (worked_subtraction, a - b),
        "*": (worked_product, a * b),
    }[sign]
    question = rng.choice(SUMS[sign]).format(a=a, b=b)
    name = {"+": "add", "-": "subtract", "*": "multiply"}[sign]
    turn = Turn(question, str(value), f"sum/{name}", key, worked(a, b), Check("number", {}))
    return _one("sum", turn, split, level)


# ---- words, order, days


WORD = (
    ("{n} has {a} {t} and gets {b} more. how many {t} now?", "+"),
    ("{n} has {a} {t}. {m} has {b} {t}. how many {t} together?", "+"),
    ("{n} has {a} {t} and loses {b}. how many {t} are left?", "-"),
    ("{n} has {a} {t} and gives {m} {b}. how many has {n} now?", "-"),
    ("{b} boxes hold {a} {t} each. how many {t} in all?", "*"),
)


TWO = (
    ("{n} has {a} {t}, gets {b} more and loses {c}. how many {t} are left?", "a+b", "-c"),
    ("{n} has {a} {t} and {m} has {b} more than {n}. how many {t} together?", "a+b", "+a"),
    ("{n} buys {a} boxes of {b} {t} and loses {c}. how many {t} are left?", "a*b", "-c"),
    ("{n} has {a} {t} and gives {b} to {m}. {m} had {c}. how many {t} has {m} now?", "b+c", ""),
    ("{a} bags hold {b} {t} each and {c} {t} lie beside them. how many {t} in all?", "a*b", "+c"),
)


def _two_steps(rng: random.Random, split: Split) -> Sample:
    """Two steps, the second with the first one's result; in one kind of problem a number is there to be left alone."""
    while True:
        text, first, second = rng.choice(TWO)
        n, m = rng.sample(NAMES, 2)
        t = rng.choice(THINGS)
        low, high = (2, 9) if "*" in first else (1, 20)
        numbers = {"a": rng.randint(low, high), "b": rng.randint(low, high), "c": rng.randint(1, 9)}
        left, right = numbers[first[0]], numbers[first[2]]
        value = left * right if "*" in first else left + right
        if (second == "-c" and numbers["c"] > value) or (not second and numbers["b"] > numbers["a"]):
            continue
        key = f"word|{left}{first[1]}{right}{second}|{t}"
        if belongs(key, split):
            break
    thinking = f"{left}{first[1]}{right}={value}."
    if second:
        by = numbers[second[1]]
        total = value + by if second[0] == "+" else value - by
        thinking, value = f"{thinking} {value}{second[0]}{by}={total}.", total
    question = text.format(n=n, m=m, t=t, **numbers)
    kind = "two" if second else "spare"
    return _one("word", Turn(question, str(value), f"word/{kind}", key, thinking), split, FURTHER)


def make_word(rng: random.Random, split: Split, level: int) -> Sample:
    """One step at level 1; from level 2 on a second one may follow, at level 3 in more kinds of problems."""
    if level >= FURTHER and rng.random() < 0.5:
        return _two_steps(rng, split)
    while True:
        text, sign = rng.choice(WORD)
        n, m = rng.sample(NAMES, 2)
        t = rng.choice(THINGS)
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        if sign == "*":
            a, b = rng.randint(2, 9), rng.randint(2, 9)
        if sign == "-" and b > a:
            a, b = b, a
        key = f"word|{a}{sign}{b}|{t}"
        if belongs(key, split):
            break
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    thinking = f"{a}{sign}{b}={value}."
    question = text.format(n=n, m=m, t=t, a=a, b=b)
    if level > 1 and rng.random() < 0.5:
        more = rng.randint(1, 9)
        place = question.rindex(". how")
        question = f"{question[:place]}, then finds {more}. how many {t} in all?"
        thinking += f" {value}+{more}={value + more}."
        value += more
    turn = Turn(question, str(value), "word/two" if thinking.count("=") > 1 else "word/one", key, thinking)
    return _one("word", turn, split, level)


def make_sort(rng: random.Random, split: Split, level: int) -> Sample:
    """Numbers or words in order."""
    while True:
        count = rng.randint(3, 4 + (level > 1) + (level > 2))
        if rng.random() < 0.6:
            values = rng.sample(range(100 if level > 1 else 10), count)
            given, right, kind = [str(v) for v in values], [str(v) for v in sorted(values)], "numbers"
        else:
            given = rng.sample(WORDS, count)
            right, kind = sorted(given), "words"
        back = rng.random() < 0.3
        key = f"sort|{' '.join(given[:2])}|{back}"
        if belongs(key, split):
            break
    if back:
        right.reverse()
    question = f"sort{' backwards' if back else ''}: {' '.join(given)}"
    return _one("sort", Turn(question, " ".join(right), f"sort/{kind}", key), split, level)


BETWEEN = ("how many {w}s from {x} to the next {y}?", "it is {x}. in how many {w}s is it {y}?")
LATER = ("it is {x}. what {w} is it in {s} {w}{p}?", "what {w} comes {s} {w}{p} after {x}?")


def _date_other_way(rng: random.Random, split: Split) -> Sample:
    """Days or months counted between two, or counted on in other words. Each is thought with its number."""
    while True:
        names, word = (DAYS, "day") if rng.random() < 0.6 else (MONTHS, "month")
        start, steps, between = rng.randrange(len(names)), rng.randint(1, len(names) - 1), rng.random() < 0.6
        key = f"date|{names[start]}|{steps}|{'between' if between else 'later'}"
        if belongs(key, split):
            break
    passed = [names[(start + k) % len(names)] for k in range(1, steps + 1)]
    words = {"x": names[start], "y": passed[-1], "w": word, "s": steps, "p": "s" if steps > 1 else ""}
    question = rng.choice(BETWEEN if between else LATER).format(**words)
    thinking = " ".join(f"{name} {k}." for k, name in enumerate(passed, 1))
    if between:
        turn = Turn(question, str(steps), f"date/{word}s between", key, thinking, Check("number", {}))
    else:
        turn = Turn(question, passed[-1], f"date/{word} later", key, thinking)
    return _one("date", turn, split, FURTHER)


def make_date(rng: random.Random, split: Split, level: int) -> Sample:
    """Days of the week and months, counted on; at level 3 also between two of them."""
    if level >= FURTHER and rng.random() < 0.5:
        return _date_other_way(rng, split)
    while True:
        names, word = (DAYS, "day") if rng.random() < 0.6 else (MONTHS, "month")
        start, steps = rng.randrange(len(names)), rng.randint(1, 3 + 2 * level)
        after = rng.random() < 0.6
        key = f"date|{names[start]}|{steps}|{after}"
        if belongs(key, split):
            break
    way = 1 if after else -1
    passed = [names[(start + way * k) % len(names)] for k in range(1, steps + 1)]
    plural = "s" if steps > 1 else ""
    where = f"{steps} {word}{plural} {'after' if after else 'before'} {names[start]}"
    question = rng.choice((f"what {word} is {where}?", f"which {word} is {where}?", f"name the {word} {where}."))
    turn = Turn(question, passed[-1], f"date/{word}", key, f"{', '.join(passed)}.")
    return _one("date", turn, split, level)


def _negated(rng: random.Random, split: Split) -> Sample:
    """Truth with a not in it, which binds closer than and, or."""
    wanted = rng.random() < 0.5  # evenly true and false: half of all and, or are not
    while True:
        a, b, c, d = (rng.randint(0, 9) for _ in range(4))
        join, turned = rng.choice(("and", "or")), rng.choice(("left", "right", "both"))
        left, right = (a > b) != (turned != "right"), (c > d) != (turned != "left")
        value = (left and right) if join == "and" else (left or right)
        key = f"logic|not {turned}|{a}{b}{join}{c}{d}"
        if value == wanted and belongs(key, split):
            break
    parts = [f"{'not ' if turned != other else ''}{x}>{y}" for other, x, y in (("right", a, b), ("left", c, d))]
    question = f"true or false: {parts[0]} {join} {parts[1]}?"
    claims = [
        f"{'not ' if turned != other else ''}{str(claim).lower()}"
        for other, claim in (("right", a > b), ("left", c > d))
    ]
    thinking = f"{claims[0]} {join} {claims[1]}. {str(left).lower()} {join} {str(right).lower()}."
    turn = Turn(question, str(value).lower(), "logic/not", key, thinking, choices=("true", "false"))
    return _one("logic", turn, split, FURTHER)


def make_logic(rng: random.Random, split: Split, level: int) -> Sample:
    """Who is tallest; truth of and, or, at level 3 also not; the odd one out."""
    if level >= FURTHER and rng.random() < 0.3:
        return _negated(rng, split)
    while True:
        kind = rng.choice(("order", "truth", "odd"))
        if kind == "order":
            people = rng.sample(NAMES, 3 if level == 1 else 4)
            pairs = [f"{a} is taller than {b}." for a, b in pairwise(people)]
            rng.shuffle(pairs)
            top = rng.random() < 0.5
            question = f"{' '.join(pairs)} who is the {'tallest' if top else 'shortest'}?"
            answer, thinking = people[0] if top else people[-1], f"{', '.join(people)}."
            key, choices = f"logic|{'|'.join(people[:2])}|{top}", tuple(people)
        elif kind == "truth":
            a, b = rng.randint(0, 9), rng.randint(0, 9)
            c, d = rng.randint(0, 9), rng.randint(0, 9)
            join = rng.choice(("and", "or"))
            left, right = a > b, c > d
            question = f"true or false: {a}>{b} {join} {c}>{d}?"
            value = (left and right) if join == "and" else (left or right)
            answer, thinking = str(value).lower(), f"{str(left).lower()} {join} {str(right).lower()}."
            key, choices = f"logic|{a}{b}{join}{c}{d}", ("true", "false")
        else:
            colours, things = rng.sample(list(COLOURS), 3), rng.sample(THINGS, 3)
            odd_colour = rng.random() < 0.5
            words = [*colours[:1], *things] if odd_colour else [*colours, *things[:1]]
            answer = words[0] if odd_colour else words[-1]
            rng.shuffle(words)
            question, thinking = f"which is the odd one out: {', '.join(words)}?", ""
            key, choices = f"logic|{'|'.join(sorted(words)[:2])}", tuple(words)
        if belongs(key, split):
            break
    return _one("logic", Turn(question, answer, f"logic/{kind}", key, thinking, choices=choices), split, level)


def _follow_more(rng: random.Random, split: Split) -> Sample:
    """Instructions that leave the words to the writer, and those with several conditions at once."""
    while True:
        kind = rng.choice(("any", "without", "capitals", "small", "frame"))
        times, word, last = rng.randint(2, 6), *rng.sample(WORDS, 2)
        letter = rng.choice("aeiorst")
        key = f"follow|{kind}|" + {"without": f"{letter}{times}", "any": f"{word[0]}{times}"}.get(
            kind, f"{word}{times}"
        )
        if belongs(key, split):
            break
    constraints: list[dict[str, Any]] = [{"kind": "words", "value": times}]
    if kind == "any":
        first = word[0]
        words = [word, *rng.sample(WORDS, times - 1)]
        question, answer = f"write {times} words. start with the letter {first}.", " ".join(words)
        constraints.append({"kind": "startswith", "value": first})
    elif kind == "without":
        words = rng.sample([w for w in WORDS if letter not in w], times)
        question, answer = f"write {times} words without the letter {letter}.", " ".join(words)
        constraints.append({"kind": "excludes", "value": letter})
    elif kind == "capitals":
        question, answer = f"write {word} {times} times in capital letters.", " ".join([word.upper()] * times)
        constraints += [{"kind": "upper"}, {"kind": "repeat", "value": [word.upper(), times]}]
    elif kind == "small":
        question, answer = f"write {word.upper()} {times} times in small letters.", " ".join([word] * times)
        constraints += [{"kind": "lower"}, {"kind": "repeat", "value": [word, times]}]
    else:
        middle = rng.sample([w for w in WORDS if w not in (word, last)], times - 2)
        question = f"write {times} words. start with {word} and end with {last}."
        answer = " ".join([word, *middle, last])
        constraints += [{"kind": "startswith", "value": word}, {"kind": "endswith", "value": last}]
    check = Check("constraint", {"constraints": constraints})
    return _one("follow", Turn(question, answer, f"follow/{kind}", key, check=check), split, FURTHER)


def make_follow(rng: random.Random, split: Split, level: int) -> Sample:
    """Instructions whose keeping a program can check. Constraints: equals, repeat (word, times), words (count),
    upper, lower, startswith, endswith, contains, excludes, lines (count)."""
    if level >= FURTHER and rng.random() < 0.5:
        return _follow_more(rng, split)
    while True:
        word, other = rng.sample(WORDS, 2)
        kind = rng.choice(("repeat", "upper", "dot", "two", "lines", "first", "last"))
        times = rng.randint(2, 5)
        key = f"follow|{kind}|{word}"
        if belongs(key, split):
            break
    constraints: list[dict[str, Any]]
    if kind == "repeat":
        question, answer = f"write {word} {times} times.", " ".join([word] * times)
        constraints = [{"kind": "repeat", "value": [word, times]}, {"kind": "words", "value": times}]
    elif kind == "upper":
        question, answer = f"write {word} in capital letters.", word.upper()
        constraints = [{"kind": "equals", "value": word.upper()}]
    elif kind == "dot":
        question, answer = f"write {word} and end with a dot.", f"{word}."
        constraints = [{"kind": "contains", "value": word}, {"kind": "endswith", "value": "."}]
    elif kind == "two":
        question, answer = f"write {word} but not {other}.", word
        constraints = [{"kind": "contains", "value": word}, {"kind": "excludes", "value": other}]
    elif kind == "lines":
        question, answer = f"write {word} on {times} lines.", "\n".join([word] * times)
        constraints = [{"kind": "repeat", "value": [word, times]}, {"kind": "lines", "value": times}]
    elif kind == "first":
        question, answer = f"write {other}, but start with {word}.", f"{word} {other}"
        constraints = [{"kind": "startswith", "value": word}, {"kind": "contains", "value": other}]
    else:
        question, answer = f"write {other}, but end with {word}.", f"{other} {word}"
        constraints = [{"kind": "endswith", "value": word}, {"kind": "contains", "value": other}]
    check = Check("constraint", {"constraints": constraints})
    return _one("follow", Turn(question, answer, f"follow/{kind}", key, check=check), split, level)


# ---- tools


def _declare(name: str, *arguments: str, kind: str = "string") -> dict[str, Any]:
    schema = {"type": "object", "properties": {a: {"type": kind} for a in arguments}, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}


CALCULATOR, PYTHON = _declare("calculator", "expression"), _declare("python", "code")
CROP = _declare("crop", "x1", "y1", "x2", "y2", kind="integer")


def _round(
    name: str, arguments: Mapping[str, str | int], result: str, thinking: str, number: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An assistant's call, and the tool's answer. number: how many calls the conversation had before."""
    call_id = f"functions.{name}:{number}"
    function = {"name": name, "arguments": json.dumps(arguments)}
    return (
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": thinking,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": result},
    )


def run_python(code: str, im: Pixels | None = None) -> str:
    """What a call of the python tool prints: `im` is the image at hand, RED, BLUE, ... are colours, np is numpy.

    Runs in this process: for code that this module wrote, never for a model's.
    """
    printed: list[str] = []
    names: dict[str, Any] = {name.upper(): np.array(rgb, np.uint8) for name, rgb in COLOURS.items()}
    names |= {"im": im, "np": np, "print": lambda *values: printed.append(" ".join(map(str, values)))}
    exec(_compiled(code), names)
    return "\n".join(printed)


@lru_cache(maxsize=1000)
def _compiled(code: str) -> CodeType:
    return compile(code, "<python>", "exec")


def crop(im: Pixels, x1: int, y1: int, x2: int, y2: int) -> tuple[Pixels, str]:
    """The part of the image that lies in the box, right and bottom edge not included, and what the tool says."""
    part = im[y1:y2, x1:x2]
    return part, f"crop.png {part.shape[1]}x{part.shape[0]}"


def make_tool(rng: random.Random, split: Split, level: int) -> Sample:
    """A sum too large for the head, done by the calculator; at level 3 one of three tools is to be chosen."""
    if level >= FURTHER:
        return rng.choice((_with_calculator, _with_python, _with_crop))(rng, split, level)
    return _with_calculator(rng, split, level)


def _tools(level: int, needed: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Declarations cost tokens: before level 3 there is only the one that is needed."""
    return (CALCULATOR, PYTHON, CROP) if level >= FURTHER else (needed,)


def _with_calculator(rng: random.Random, split: Split, level: int) -> Sample:
    while True:
        sign = rng.choice("+-*")
        a, b = rng.randint(100, 9999), rng.randint(100, 9999)
        key = f"tool|{a}{sign}{b}"
        if belongs(key, split):
            break
    expression = f"{a}{sign}{b}"
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    steps = _round("calculator", {"expression": expression}, str(value), "")
    question = rng.choice(("use the calculator: {e}", "calculate {e} with the tool.")).format(e=expression)
    turn = Turn(question, str(value), "tool/calculator", key, "", Check("number", {}), steps=steps)
    return _one("tool", turn, split, level, _tools(level, CALCULATOR))


# question and code; {w} a word, {a} < {b} numbers
PROGRAMS = (
    ("add all numbers from {a} to {b}.", "print(sum(range({a},{b}+1)))"),
    ("how many numbers from {a} to {b} can be divided by 7?", "print(sum(n%7==0 for n in range({a},{b}+1)))"),
    ("write {w} backwards with python.", "print('{w}'[::-1])"),
    ("sort the letters of {w}.", "print(''.join(sorted('{w}')))"),
    ("how many different letters has {w}?", "print(len(set('{w}')))"),
)


def _with_python(rng: random.Random, split: Split, level: int) -> Sample:
    while True:
        text, code = rng.choice(PROGRAMS)
        a, word = rng.randint(1, 50), rng.choice(WORDS) + rng.choice(WORDS)
        b = a + rng.randint(10, 150)
        key = f"tool|{text}|" + (word if "{w}" in text else f"{a}|{b}")
        if belongs(key, split):
            break
    code = code.format(a=a, b=b, w=word)
    result = run_python(code)
    turn = Turn(
        text.format(a=a, b=b, w=word), result, "tool/python", key, steps=_round("python", {"code": code}, result, "")
    )
    return _one("tool", turn, split, level, _tools(level, PYTHON))


CROPPED: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "wide": ("img.png: crop {x1} {y1} {x2} {y2}. how wide is it?", lambda width, height: width),
    "high": ("img.png: crop {x1} {y1} {x2} {y2}. how high is it?", lambda width, height: height),
    "pixels": ("img.png: crop {x1} {y1} {x2} {y2}. how many pixels has it?", lambda width, height: width * height),
}


def _with_crop(rng: random.Random, split: Split, level: int) -> Sample:
    """The box may reach past the image, whose size only the tool knows: the answer is in the result alone."""
    while True:
        width, height = rng.randint(20, 60), rng.randint(20, 60)
        x1, y1 = rng.randint(0, 15), rng.randint(0, 15)
        box = {"x1": x1, "y1": y1, "x2": x1 + rng.randint(5, 60), "y2": y1 + rng.randint(5, 60)}
        kind = rng.choice(list(CROPPED))
        key = f"tool|crop {kind}|{' '.join(map(str, box.values()))}"
        if belongs(key, split):
            break
    text, measure = CROPPED[kind]
    part, result = crop(np.zeros((height, width, 3), np.uint8), **box)
    answer = measure(part.shape[1], part.shape[0])
    thinking = f"{part.shape[1]}*{part.shape[0]}={answer}." if kind == "pixels" else ""
    steps = _round("crop", box, result, "")
    turn = Turn(text.format(**box), str(answer), "tool/crop", key, thinking, Check("number", {}), steps=steps)
    return _one("tool", turn, split, level, _tools(level, CROP))


# ---- an image that is never shown


def make_proxy(rng: random.Random, split: Split, level: int) -> Sample:
    """An image is a file that only python can look into: its operations stand for seeing.

    Zero-vision fine-tuning of the Kimi K2.5 report, section 2.2: binarise, count pixels, find a box. The array is made
    here and the call is run on it, so the tool's result is true.
    """
    if level >= FURTHER and rng.random() < 0.6:
        return _proxy_scene(rng, split)
    side, fill = 8, rng.randint(3, 12)
    while True:
        colour = rng.choice(list(COLOURS))
        kind = rng.choice(("area", "box", "has"))
        key = f"proxy|{kind}|{colour}|{fill}"
        if belongs(key, split):
            break
        fill = rng.randint(3, 12)
    width = max(1, min(side, fill // 3 + 1))
    height = max(1, fill // width)
    y, x = rng.randint(0, side - height), rng.randint(0, side - width)
    im = np.full((side, side, 3), 255, np.uint8)
    if not (kind == "has" and rng.random() < 0.5):
        im[y : y + height, x : x + width] = COLOURS[colour]
    mask = f"m=(im=={colour.upper()}).all(2)"
    if kind == "area":
        question, code = f"img.png: how many pixels are {colour}?", f"{mask}\nprint(m.sum())"
    elif kind == "has":
        question, code = f"img.png: is anything {colour}?", f"{mask}\nprint(m.any())"
    else:
        question = f"img.png: give the box of what is {colour}."
        code = f"{mask}\ny,x=m.nonzero()\nprint(x.min(),y.min(),x.max(),y.max())"
    result = run_python(code, im)
    answer = {"True": "yes", "False": "no"}.get(result, result)
    steps = _round("python", {"code": code}, result, "")
    turn = Turn(question, answer, f"proxy/{kind}", key, "", steps=steps)
    return _one("proxy", turn, split, level, (PYTHON,))


_MASK = "m=(im=={C}).all(2)\n"
# kind -> question and code; {c} and {d} two colours, {C} and {D} their names in code
SCENES = {
    "dark": ("img.png: how many pixels are dark?", "m=im.mean(2)<128\nprint(m.sum())"),
    "colours": ("img.png: how many colours are there?", "print(len(np.unique(im.reshape(-1,3),axis=0)))"),
    "wide": ("img.png: how wide is what is {c}?", _MASK + "x=m.nonzero()[1]\nprint(x.max()-x.min()+1)"),
    "high": ("img.png: how high is what is {c}?", _MASK + "y=m.nonzero()[0]\nprint(y.max()-y.min()+1)"),
    "more": ("img.png: is more {c} or {d}?", "print((im=={C}).all(2).sum(),(im=={D}).all(2).sum())"),
    "left": (
        "img.png: is {c} left or right of {d}?",
        "a,b=[(im==v).all(2).nonzero()[1].min() for v in ({C},{D})]\nprint(a,b)",
    ),
    "within": ("img.png: how many pixels are {c} in the box {box}?", _MASK + "print(m.sum())"),
}


def _scene(rng: random.Random, colours: Sequence[str]) -> Pixels:
    """White, with one rectangle of each colour; they do not touch: each has a band of columns to itself."""
    bands = len(colours)
    room, height = rng.randint(7, 9), rng.randint(8, 14)
    width = room * bands
    im = np.full((height, width, 3), 255, np.uint8)
    for band, colour in enumerate(colours):
        wide, high = rng.randint(1, room - 1), rng.randint(1, height)  # size before place: all sizes equally often
        x, y = room * band + rng.randint(0, room - 1 - wide), rng.randint(0, height - high)
        im[y : y + high, x : x + wide] = COLOURS[colour]
    return im


def _proxy_scene(rng: random.Random, split: Split) -> Sample:
    """Rectangles of two colours in one image. A question about a part of it takes two calls: crop, then python."""
    while True:
        kind = rng.choice(list(SCENES))
        c, d = rng.sample(list(COLOURS), 2)
        seen = [c, d]
        if kind == "colours":
            seen = [c, d, *rng.sample([other for other in COLOURS if other not in (c, d)], 2)][: rng.randint(1, 4)]
        im = _scene(rng, rng.sample(seen, len(seen)))
        x1, y1 = rng.randint(0, im.shape[1] // 2), rng.randint(0, im.shape[0] // 2)
        box = {"x1": x1, "y1": y1, "x2": rng.randint(x1 + 2, im.shape[1]), "y2": rng.randint(y1 + 2, im.shape[0])}
        key = f"proxy|{kind}|{c}|{d}"
        if not belongs(key, split):
            continue
        text, code = SCENES[kind]
        code = code.format(C=c.upper(), D=d.upper())
        question = text.format(c=c, d=d, box=" ".join(map(str, box.values())))
        steps: tuple[dict[str, Any], ...] = ()
        tools: tuple[Mapping[str, Any], ...] = (PYTHON,)
        if kind == "within":
            im, said = crop(im, **box)
            steps, tools = _round("crop", box, said, ""), (PYTHON, CROP)
        result = run_python(code, im)
        answer, first, second = result, *(result.split() * 2)[:2]
        if kind == "within" and result == "0" and rng.random() < 0.8:
            continue
        if kind in ("more", "left"):
            if first == second:
                continue
            pair = (c, d) if kind == "more" else ("right", "left")
            answer = pair[0] if float(first) > float(second) else pair[1]
        break
    steps += _round("python", {"code": code}, result, "", len(steps) // 2)
    choices = {"more": (c, d), "left": ("left", "right")}.get(kind, ())
    turn = Turn(question, answer, f"proxy/{kind}", key, "", choices=choices, steps=steps)
    return _one("proxy", turn, split, FURTHER, tools)


# ---- words of letters, scenes in words: what reading and looking need besides eyes


def make_join(rng: random.Random, split: Split, level: int) -> Sample:
    """Letters to words, one at level 1, up to three from level 2 on. Held out: a word that no picture shows either."""
    while True:
        words = [invented(rng) if rng.random() < 0.8 else rng.choice(WORDS) for _ in range(1 if level == 1 else 3)]
        words = words[: rng.randint(1, len(words))]
        keys = [f"text|{word}" for word in words]
        fitting = [key for key in keys if belongs(key, split)]
        if len(set(words)) == len(words) and fitting and (split == "heldout" or len(fitting) == len(keys)):
            break
    listed = "; ".join(", ".join(word) for word in words)
    question = rng.choice((f"join {listed}.", f"what do {listed} spell?", f"write {listed} as words."))
    turn = Turn(question, " ".join(words), "join", fitting[0], ", ".join(map(spelled, words)))
    return _one("join", turn, split, level)


LOOKS = (
    "old new wet dry hot cold big tiny soft hard clean dirty empty full loud quiet fast slow tall wide thin flat deep "
    "dark pale bent open shut cheap dear rare lost spare main rich poor kind mad sad calm fresh raw ripe sweet sour "
    "rough smooth sharp blunt heavy light weak strong young fine grand plain safe wild tame lazy busy odd even"
).split()
OBJECTS = (
    "cup key fox box hat pen bag jar fan map nut pot rug toy van web bed bell boat book bus cake cap car card cat "
    "chair clock coat coin cow desk dog door drum duck egg fish flag fork frog goat gun hen horn jug kite lamp leaf "
    "lid lock mug nail net owl pan pig pin pipe plate rope sack shoe sock spoon tent tie tray tree"
).split()


def make_told(rng: random.Random, split: Split, level: int) -> Sample:
    """Things with a look and a place, told in words, and asked about as pictures are, with the same thoughts.

    So many names that none is known by heart: each is found by its two words. Colours and shapes are among the words,
    a coloured shape is not among the names. Held out: a name that is asked for.
    """
    kind = rng.choice(("relation", "relation", "side", "exists", "count", "look"))
    yes, wanted = rng.random() < 0.5, rng.randint(0, 3)
    while True:
        # counted are few names, so that several things share one
        count, kinds = (rng.randint(2, 5), 2) if kind == "count" else (rng.randint(2, 2 + level), 3)
        looks = rng.sample((*LOOKS, *COLOURS), kinds)
        objects = rng.sample((*OBJECTS, *SHAPES), kinds)
        things = [(rng.choice(looks), rng.choice(objects), rng.randint(0, 9)) for _ in range(count)]
        names = [(look, thing) for look, thing, _ in things]
        turn = None if any(look in COLOURS and thing in SHAPES for look, thing in names) else _told(rng, things, kind)
        if turn is None:
            continue
        question, answer, thinking, asked, choices = turn
        # drawn beforehand, so that a rejection favours no answer
        if (kind == "exists" and (answer == "yes") != yes) or (kind == "count" and answer != str(wanted)):
            continue
        keys = [f"told|{look}|{thing}" for look, thing in asked]
        fitting = [key for key in keys if belongs(key, split)]
        # what is only told must not be held out in training either
        clean = all(belongs(f"told|{look}|{thing}", "train") for look, thing in names)
        if fitting if split == "heldout" else clean and len(fitting) == len(keys):
            break
    told = ", ".join(f"{look} {thing} {place}" for look, thing, place in things)
    made = Turn(f"{told}. {question}", answer, f"told/{kind}", fitting[0], thinking, choices=choices)
    return _one("told", made, split, level)


_Told = tuple[str, str, str, list[tuple[str, str]], tuple[str, ...]]


def _told(rng: random.Random, things: list[tuple[str, str, int]], kind: str) -> _Told | None:
    """Question, answer, thought, names asked for, choices; None where these things cannot be asked so."""
    names = [(look, thing) for look, thing, _ in things]
    single = [one for one in things if names.count((one[0], one[1])) == 1]
    if kind in ("relation", "side"):
        if len(single) < 2:
            return None
        a, b = rng.sample(single, 2)
        if a[2] == b[2]:
            return None
        parts = []
        for look in dict.fromkeys((a[0], b[0])):
            parts.append(f"{look}: {', '.join(f'{thing} {place}' for its, thing, place in things if its == look)}.")
        parts.append(f"{a[1]} {a[2]}, {b[1]} {b[2]}.")
        first, second = f"{a[0]} {a[1]}", f"{b[0]} {b[1]}"
        asked = [(a[0], a[1]), (b[0], b[1])]
        if kind == "side":
            one, two = rng.sample(("left", "right"), 2)
            question = rng.choice(
                (
                    f"is the {first} {one} or {two} of the {second}?",
                    f"where is the {first}, {one} or {two} of the {second}?",
                )
            )
            return question, "left" if a[2] < b[2] else "right", " ".join(parts), asked, ("left", "right")
        where = rng.choice(("left of", "above", "right of", "below"))
        true = (a[2] < b[2]) == (where in ("left of", "above"))
        question = rng.choice(
            (f"is the {first} {where} the {second}?", f"the {first} is {where} the {second}, yes or no?")
        )
        return question, "yes" if true else "no", " ".join(parts), asked, ("yes", "no")
    looks, objects = [look for look, _ in names], [thing for _, thing in names]
    if kind == "look":
        once = [one for one in things if objects.count(one[1]) == 1]
        if not once:
            return None
        look, thing, _ = rng.choice(once)
        return rng.choice((f"what is the {thing}?", f"how is the {thing}?")), look, "", [(look, thing)], ()
    pair = rng.choice(names) if rng.random() < 0.5 else (rng.choice(looks), rng.choice(objects))
    if kind == "exists":
        listed = [thing for look, thing in names if look == pair[0]]
        question = rng.choice((f"is there a {pair[0]} {pair[1]}?", f"a {pair[0]} {pair[1]}, yes or no?"))
        thought = f"{', '.join(listed) or 'none'}. {pair[1]}?"
        return question, "yes" if pair in names else "no", thought, [pair], ("yes", "no")
    listed = [look for look, thing in names if thing == pair[1]]
    question = rng.choice((f"how many {pair[0]} ones are a {pair[1]}?", f"count each {pair[0]} {pair[1]}."))
    return question, str(names.count(pair)), f"{', '.join(listed) or 'none'}.", [pair], tuple(map(str, range(4)))


MAKERS: dict[str, Maker] = {
    "sum": make_sum,
    "word": make_word,
    "sort": make_sort,
    "date": make_date,
    "logic": make_logic,
    "follow": make_follow,
    "tool": make_tool,
    "proxy": make_proxy,
    "join": make_join,
    "told": make_told,
}
WEIGHTS: dict[str, float] = {
    "sum": 0.35,
    "word": 0.15,
    "sort": 0.1,
    "date": 0.08,
    "logic": 0.12,
    "follow": 0.06,
    "tool": 0.08,
    "proxy": 0.06,
    "join": 0.04,
    "told": 0.06,
}
