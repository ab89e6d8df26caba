"""Text with exact answers: sums with worked thinking, word problems, sorting, dates, logic, instructions, tools.

    make_sum("347+586=?")   thinking  7+6+0=13 3 c1. 4+8+1=13 3 c1. 3+5+1=9 9 c0.   answer  933
    make_tool               a call of calculator or python in OpenAI-style messages, its result, the answer
    make_proxy              questions about an image that is never shown: python counts and measures its pixels

Sums are worked from the right with explicit carries, so that every step needs three digits and no look-ahead.
Held out: operands ("sum|347+586"), names and numbers of a problem, the task and its words.
"""

import json
import random
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from world.clip import COLOURS
from world.reading import WORDS
from world.sample import Check, Maker, Sample, Split, Turn, belongs

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


def make_sum(rng: random.Random, split: Split, level: int) -> Sample:
    """One sum. Level 1: two digits, 2: three, 3: four; products with one digit."""
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
        key = f"sum|{a}{sign}{b}"
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


def make_word(rng: random.Random, split: Split, level: int) -> Sample:
    """One step at level 1; at levels 2 and 3 a second one follows."""
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


def make_date(rng: random.Random, split: Split, level: int) -> Sample:
    """Days of the week and months, counted on."""
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
    question = f"what {word} is {steps} {word}{plural} {'after' if after else 'before'} {names[start]}?"
    turn = Turn(question, passed[-1], f"date/{word}", key, f"{', '.join(passed)}.")
    return _one("date", turn, split, level)


def make_logic(rng: random.Random, split: Split, level: int) -> Sample:
    """Who is tallest; truth of and, or, not; the odd one out."""
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


def make_follow(rng: random.Random, split: Split, level: int) -> Sample:
    """Instructions whose keeping a program can check. Constraints: equals, repeat (word, times), words (count),
    upper, lower, startswith, endswith, contains, excludes, lines (count)."""
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


def _declare(name: str, argument: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}


CALCULATOR, PYTHON = _declare("calculator", "expression"), _declare("python", "code")


def _round(name: str, arguments: dict[str, str], result: str, thinking: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An assistant's call, and the tool's answer."""
    call_id = f"functions.{name}:0"
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


def make_tool(rng: random.Random, split: Split, level: int) -> Sample:
    """A sum too large for the head, done by the calculator."""
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
    return _one("tool", turn, split, level, (CALCULATOR,))


def make_proxy(rng: random.Random, split: Split, level: int) -> Sample:
    """An image is a file that only python can look into: its operations stand for seeing.

    Zero-vision fine-tuning of the Kimi K2.5 report, section 2.2: binarise, count pixels, find a box. The array is made
    and measured here, so the tool's result is true.
    """
    side, fill = 8, rng.randint(3, 12)
    while True:
        colour = rng.choice(list(COLOURS))
        kind = rng.choice(("area", "box", "has"))
        key = f"proxy|{kind}|{colour}|{fill}"
        if belongs(key, split):
            break
        fill = rng.randint(3, 12)
    pixels = np.zeros((side, side), bool)
    width = max(1, min(side, fill // 3 + 1))
    height = max(1, fill // width)
    y, x = rng.randint(0, side - height), rng.randint(0, side - width)
    pixels[y : y + height, x : x + width] = not (kind == "has" and rng.random() < 0.5)
    mask = f"m=(im=={colour.upper()}).all(2)"
    if kind == "area":
        question, code = f"img.png: how many pixels are {colour}?", f"{mask}\nprint(m.sum())"
        answer = result = str(int(pixels.sum()))
    elif kind == "has":
        question, code = f"img.png: is anything {colour}?", f"{mask}\nprint(m.any())"
        result = str(bool(pixels.any()))
        answer = "yes" if pixels.any() else "no"
    else:
        question = f"img.png: give the box of what is {colour}."
        code = f"{mask}\ny,x=m.nonzero()\nprint(x.min(),y.min(),x.max(),y.max())"
        rows, columns = pixels.nonzero()
        answer = result = f"{columns.min()} {rows.min()} {columns.max()} {rows.max()}"
    steps = _round("python", {"code": code}, result, "")
    turn = Turn(question, answer, f"proxy/{kind}", key, "", steps=steps)
    return _one("proxy", turn, split, level, (PYTHON,))


MAKERS: dict[str, Maker] = {
    "sum": make_sum,
    "word": make_word,
    "sort": make_sort,
    "date": make_date,
    "logic": make_logic,
    "follow": make_follow,
    "tool": make_tool,
    "proxy": make_proxy,
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
}
