"""Is it right? grade(task, answer) -> Verdict, for evaluation and for rewards alike.

    grade(Task("number", gold="12.5 cm", data={"tolerance": 0.05}), "it is **125 mm**.")     ->   score 1.0

    exact     one of the golds, case and white space aside           count    the one whole number that is said
    choice    a letter, an option's text, \\boxed{B}                  number   a value, its unit, a tolerance
    anls      edit distance of the best gold, 0 under a half          edit     the same without the threshold
    boxes     soft F1 of boxes matched by their overlap               points   points in their regions, F1
    math      the same mathematics (evals/mathematics.py)
    svg, plot        rendered and compared (evals/drawing.py)
    constraints      IFEval's instructions (evals/constraints.py)
    function         a program does what its tests want (evals/code.py)
    repository       an edit makes a repository's tests pass, by being right (evals/repository.py)
    contains, relaxed, literal, world      as benchmarks have them (evals/matching.py)

A score is between 0 and 1. Thoughts are taken off first: what stands after the last </think> is the answer, and an
answer that never ends its thought is truncated, which scores 0 and is counted apart. An empty answer scores 0 and is
silent. No answer raises. A broken task does: a gold that its own grader does not give 1 is a ValueError, before
anything is scored. Where the machinery fails, as a worker that dies, the score is None and the status infra_error:
retry it or leave it out, but it is no zero.
"""

import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from rapidfuzz.distance import Levenshtein

from world.check import overlap

Status = Literal["graded", "silent", "truncated", "infra_error"]
LONGEST = 400_000  # characters of an answer that are read


@dataclass(frozen=True)
class Task:
    """What is asked for. gold: the right answer, or several; data: what the kind reads besides. See KINDS."""

    kind: str
    gold: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no grader {self.kind!r}; known: {', '.join(KINDS)}")


@dataclass(frozen=True)
class Verdict:
    """score: 0 to 1, None for infra_error. evidence: what was read from the answer and what it was held against."""

    score: float | None
    status: Status = "graded"
    evidence: Mapping[str, Any] = field(default_factory=dict)


def grade(task: Task, answer: str, truncated: bool = False) -> Verdict:
    """Grade a whole reply, thoughts included. truncated: it ended at the token limit.

    Raises ValueError for a task whose gold is not right by its own grader, and for an answer that is no text.
    """
    if not isinstance(answer, str):
        raise ValueError(f"an answer is text, got {type(answer).__name__}")
    _sound(task.kind, _frozen(task.gold), _frozen(task.data))
    said, unfinished = visible(answer)
    if unfinished or (truncated and not said.strip()):
        return Verdict(0.0, "truncated", {"characters": len(answer)})
    if not said.strip():
        return Verdict(0.0, "silent")
    score, evidence = KINDS[task.kind](task.gold, task.data, said[:LONGEST])
    if score is None:
        return Verdict(None, "infra_error", evidence)
    assert 0 <= score <= 1, f"{task.kind} scored {score}"
    return Verdict(float(score), "truncated" if truncated and not score else "graded", evidence)


def grade_all(
    pairs: Iterable[tuple[Task, str]],
    workers: int | None = None,
    progress: Callable[[int, Verdict], None] | None = None,
) -> list[Verdict]:
    """Grade many, in the order given; workers at a time, by default one for each processor.

    progress(how many are done, the verdict) is called after each. Raises as `grade` does, for the first broken task.
    """
    pairs = list(pairs)
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    with ThreadPoolExecutor(workers) as pool:  # programs run in processes of their own; a thread waits for them
        waiting = [pool.submit(grade, task, answer) for task, answer in pairs]
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                verdict = future.result()
                if progress is not None:
                    progress(done, verdict)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in waiting]


def visible(answer: str) -> tuple[str, bool]:
    """The answer without its thoughts, and whether a thought was never ended."""
    _, found, tail = answer.rpartition("</think>")
    if found:
        return tail, False
    if "<think>" in answer:
        return "", True
    return answer, False


Grader = Callable[[Any, Mapping[str, Any], str], tuple[float | None, dict[str, Any]]]


def _frozen(value: Any) -> Any:
    """Hashable, for the cache of tasks that have been checked."""
    if isinstance(value, Mapping):
        return ("map", *sorted((str(k), _frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return ("list", *map(_frozen, value))
    return value if isinstance(value, str | int | float | bool | Fraction | type(None) | bytes) else repr(value)


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple):
        if value[:1] == ("map",):
            return {k: _thawed(v) for k, v in value[1:]}
        return [_thawed(v) for v in value[1:]]
    return value


@lru_cache(maxsize=100_000)
def _sound(kind: str, gold: Any, data: Any) -> None:
    """Raises ValueError unless the gold answer is right by its own grader, or the task well formed without a gold."""
    gold, data = _thawed(gold), _thawed(data)
    if gold is None and data.get("unchecked") is True:
        return
    try:
        texts = GOLDS[kind](gold, data)
        if texts is None:
            return
        best = [KINDS[kind](gold, data, text)[0] for text in texts]
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{kind}: broken task, gold {str(gold)[:80]!r}: {type(error).__name__}: {error}") from None
    if not best or any(score is not None and score < 1 for score in best):
        raise ValueError(f"{kind}: the gold {str(gold)[:80]!r} is not right by its own grader ({best})")


# ---- text


def plain(text: str) -> str:
    """For comparison: one width of letters, lower case, single spaces, no quotes or full stop around it."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\s+", " ", text).strip()
    return text.strip("\"'`*").removesuffix(".").strip("\"'`* ")


def _golds(gold: Any) -> list[str]:
    golds = list(gold) if isinstance(gold, list | tuple) else [gold]
    if not golds or not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in golds):
        raise ValueError(f"gold must be one text or several, got {gold!r}")
    if any(not str(one).strip() for one in golds):
        raise ValueError("a gold is empty")
    return [str(one) for one in golds]


BOXED = re.compile(r"\\boxed\s*\{")
SAYS = re.compile(r"(?:final answer|answer|result|solution)\**\s{0,9}(?:is|:|=)[ :*=]{0,9}([^\n]+)", re.IGNORECASE)


def boxes(text: str) -> list[tuple[int, int, int]]:
    """Every \\boxed{...}, braces matched: where it starts, and from where to where is what it holds."""
    starts = {found.end() - 1: found.start() for found in BOXED.finditer(text)}
    opened: list[int] = []
    ends: dict[int, int] = {}
    for at, sign in enumerate(text if starts else ""):
        if sign == "{":
            opened.append(at)
        elif sign == "}" and opened:
            ends[opened.pop()] = at
    return [(start, at + 1, ends[at]) for at, start in starts.items() if at in ends]


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds."""
    found = boxes(text)
    return text[found[-1][1] : found[-1][2]].strip() if found else None


def final(text: str) -> str:
    """The part of a reply that is its answer: boxed, or after "answer:", or all of it."""
    inside = boxed(text)
    if inside is not None:
        return inside
    said = SAYS.findall(text)
    return said[-1].strip() if said else text.strip()


def _exact(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    read = plain(final(said) if data.get("final", True) else said)
    whole = plain(said)
    return float(any(plain(one) in (read, whole) for one in _golds(gold))), {"read": read[:200]}


def _likeness(gold: Any, said: str) -> tuple[float, str]:
    read = plain(final(said))
    best = 0.0
    for one in _golds(gold):
        best = max(best, Levenshtein.normalized_similarity(plain(one), read[:20_000]))
    return best, read


def _anls(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    """DocVQA's: average normalised Levenshtein similarity, 0 below the threshold of a half."""
    likeness, read = _likeness(gold, said)
    return likeness if likeness >= data.get("threshold", 0.5) else 0.0, {"read": read[:200], "likeness": likeness}


def _edit(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    likeness, read = _likeness(gold, said)
    return likeness, {"read": read[:200]}


# ---- choices

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choice_of(said: str, options: Sequence[str]) -> str | None:
    """The letter that a reply chooses; None if it chooses none, or two."""
    allowed = LETTERS[: len(options)]
    text = final(said)[-4000:]
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text).replace("$", "")
    alone = re.fullmatch(rf"\W*([{allowed}{allowed.lower()}])\W*", text)
    if alone:
        return alone[1].upper()
    opened = re.match(rf"\W{{0,9}}([{allowed}])\s{{0,9}}[).:\]]\s*\S", text) or re.match(rf"\s*\(([{allowed}])\)", text)
    if opened and set(re.findall(rf"\(([{allowed}])\)", text)) <= {opened[1]}:
        return opened[1]
    wanted = plain(text)
    named = [letter for letter, option in zip(allowed, options, strict=True) if plain(option) == wanted]
    if len(named) == 1:
        return named[0]
    marked = set(re.findall(rf"\(([{allowed}])\)|\boption\s+([{allowed}])\b|\*\*([{allowed}])\b", text))
    letters = {letter for found in marked for letter in found if letter}
    if len(letters) == 1:
        return letters.pop()
    inside = [
        letter
        for letter, option in zip(allowed, options, strict=True)
        if re.search(rf"(?<!\w){re.escape(plain(option))}(?!\w)", wanted)
    ]
    return inside[0] if len(inside) == 1 else None


def _choice(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    options = [str(option) for option in data["options"]]
    if not 2 <= len(options) <= 26 or not all(option.strip() for option in options):
        raise ValueError(f"choice: 2 to 26 options with text, got {options!r}")
    if str(gold) not in LETTERS[: len(options)] or len(str(gold)) != 1:
        raise ValueError(f"choice: gold {gold!r} is none of the letters {LETTERS[: len(options)]}")
    chosen = choice_of(said, options)
    return float(chosen == gold), {"read": chosen}


# ---- numbers

UNITS: dict[str, tuple[str, Fraction]] = {}
_KNOWN: dict[str, dict[str, str | int]] = {
    "length": {"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": 1, "km": 1000, "in": "127/5000", "ft": "381/1250"},
    "mass": {"mg": "1/1000000", "g": "1/1000", "kg": 1, "t": 1000, "lb": "45359237/100000000"},
    "time": {"ms": "1/1000", "s": 1, "sec": 1, "min": 60, "h": 3600, "hour": 3600, "day": 86400, "week": 604800},
    "area": {"mm^2": "1/1000000", "cm^2": "1/10000", "m^2": 1, "km^2": 1000000},
    "volume": {"ml": "1/1000000", "l": "1/1000", "cm^3": "1/1000000", "m^3": 1},
    "angle": {"degree": 1, "degrees": 1, "deg": 1, "°": 1},
    "share": {"%": "1/100", "percent": "1/100"},
    "speed": {"m/s": 1, "km/h": "5/18"},
    "power": {"w": 1, "kw": 1000},
    "money": {"$": 1, "usd": 1, "dollar": 1, "dollars": 1},
}
for _dimension, _members in _KNOWN.items():
    for _unit, _factor in _members.items():
        UNITS[_unit] = (_dimension, Fraction(_factor))

NUMBER = re.compile(
    r"(?<![\w^])(?<!\^\{)[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}|\s*(?:×|\\times|x|\*)\s*10\s*\^\s*\{?[-+−]?\d{1,3}\}?)?"
    r"(?:\s*/\s*\d+(?:\.\d+)?)?|[-+−]?\.\d+"
)
FRACTION = re.compile(r"([-+−]?)\\[dt]?frac\s*\{([-+−]?\d+)\}\s*\{(\d+)\}")
MOST_DIGITS = 60


def read_number(text: str) -> Fraction | None:
    """One number: 12, -3.5, 1,200, 2/3, 1.5e3, 2 × 10^5, .5."""
    text = text.replace("−", "-").replace("\\times", "×").replace(" ", "")
    exponent_ = r"(?:[eE]([-+]?\d{1,3})|[×x*]10\^\{?([-+]?\d{1,3})\}?)?"
    pattern = rf"([-+]?)(\d{{1,3}}(?:,\d{{3}})+|\d*)(\.\d+)?{exponent_}(?:/(\d+(?:\.\d+)?))?"
    found = re.fullmatch(pattern, text)
    if not found or not (found[2] or found[3]) or len(text) > MOST_DIGITS:
        return None
    value = Fraction((found[2] or "0").replace(",", "") + (found[3] or ""))
    exponent = int(found[4] or found[5] or 0)
    value *= Fraction(10) ** exponent
    if found[6]:
        below = Fraction(found[6])
        if not below:
            return None
        value /= below
    return -value if found[1] == "-" else value


def quantity(text: str) -> tuple[Fraction, str] | None:
    """The last number of a text, with the unit that follows it (or a currency before it): (value, "cm")."""
    text = text[-4000:]
    if text.count("$") % 2 == 0 and "\\$" not in text:
        text = text.replace("$", " ")  # around a formula
    text = FRACTION.sub(lambda found: f"{found[1]}{found[2]}/{found[3]}", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1", text)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("^\\circ", "°").replace("^{\\circ}", "°")
    text = re.sub(r"\\[,;! ]|\\(?:left|right|displaystyle)|[*`]{1,3}", " ", text).replace("²", "^2").replace("³", "^3")
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    value = read_number(last[0])
    if value is None:
        return None
    before = text[: last.start()].rstrip()
    after = re.match(r"\s*(°|%|[A-Za-z]+(?:/[a-z]+)?(?:\^\{?[23]\}?)?)", text[last.end() :])
    unit = after[1].replace("{", "").replace("}", "") if after else "$" if before.endswith("$") else ""
    known = unit.lower() if unit.lower() in UNITS else unit.lower().removesuffix("s")
    return value, known if known in UNITS else ""


def _number(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    wanted, got = quantity(str(gold)), quantity(final(said))
    if wanted is None:
        raise ValueError(f"number: the gold {gold!r} is no number")
    evidence = {"read": None if got is None else f"{str(got[0])[:MOST_DIGITS]} {got[1]}".strip()}
    if got is None:
        return 0.0, evidence
    (value, unit), (other, its) = wanted, got
    if unit and its and unit != its:
        if UNITS[unit][0] != UNITS[its][0]:
            return 0.0, evidence
        other = other * UNITS[its][1] / UNITS[unit][1]
    elif its == "%" and not unit and data.get("percent_is_share"):
        other /= 100
    slack = Fraction(data.get("tolerance", 0)).limit_denominator(10**12) * abs(value)
    slack = max(slack, Fraction(data.get("absolute", 0)).limit_denominator(10**12))
    return float(abs(other - value) <= slack), evidence


def _count(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    wanted = int(gold)
    words = "zero one two three four five six seven eight nine ten eleven twelve".split()
    text = final(said)[-4000:].casefold()
    found = [int(number) for number in re.findall(r"(?<![\w.,])\d{1,9}(?![\w]|[.,]\d)", text)]
    found += [words.index(word) for word in re.findall(r"[a-z]+", text) if word in words]
    read = found[0] if len(set(found)) == 1 else None
    return float(read == wanted), {"read": read}


# ---- places


def _groups(text: str, size: int) -> list[list[float]]:
    """Brackets of so many numbers; or, without brackets, all numbers in groups of so many."""
    number = r"[-+]?\d+(?:\.\d+)?"
    found = re.findall(rf"[\[(<{{]\s*({number}(?:\s*,\s*{number}){{{size - 1}}})\s*[\])>}}]", text)
    groups = [[float(n) for n in re.findall(number, each)] for each in found]
    if not groups:
        numbers = [float(n) for n in re.findall(number, text)]
        groups = [numbers[at : at + size] for at in range(0, len(numbers), size)] if len(numbers) % size == 0 else []
    return [group for group in groups if all(math.isfinite(n) for n in group)][:1000]


def _matched(scores: list[list[float]]) -> float:
    """The largest sum of scores that pairs each row with at most one column."""
    if not scores or not scores[0]:
        return 0.0
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    matrix = np.array(scores)
    rows, columns = linear_sum_assignment(-matrix)
    return float(matrix[rows, columns].sum())


def _boxes(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    """Soft F1: twice the summed overlaps of the best pairing over the number of boxes on both sides."""
    golds = [list(map(float, box)) for box in gold]
    if not golds or any(len(box) != 4 or box[0] >= box[2] or box[1] >= box[3] for box in golds):
        raise ValueError(f"boxes: gold must be (left, top, right, bottom), one or more, got {gold!r}")
    read = _groups(final(said) if boxed(said) else said, 4)
    total = _matched([[overlap(a, b) for b in read] for a in golds])
    return min(1.0, 2 * total / (len(golds) + len(read))), {"read": read[:20]}


def _points(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    """F1 of points that lie in a region of their own. gold: regions (left, top, right, bottom)."""
    regions = [list(map(float, box)) for box in gold]
    if not regions or any(len(box) != 4 or box[0] > box[2] or box[1] > box[3] for box in regions):
        raise ValueError(f"points: gold must be regions (left, top, right, bottom), got {gold!r}")
    read = _groups(final(said) if boxed(said) else said, 2)
    inside = [[float(r[0] <= x <= r[2] and r[1] <= y <= r[3]) for x, y in read] for r in regions]
    return min(1.0, 2 * _matched(inside) / (len(regions) + len(read))), {"read": read[:20]}


def _math(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
    from evals.mathematics import math as grader

    return grader(gold, data, said)


def _math_golds(gold: Any, data: Mapping[str, Any]) -> list[str]:
    from evals.mathematics import golds

    return golds(gold, data)


def _constraints(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    from evals.constraints import constraints

    return constraints(gold, data, said)


def _constraints_golds(gold: Any, data: Mapping[str, Any]) -> Sequence[str] | None:
    from evals.constraints import golds

    return golds(gold, data)


def _drawing(kind: str) -> Grader:
    def grader(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
        from evals import drawing

        return (drawing.svg if kind == "svg" else drawing.plot)(gold, data, said)

    return grader


def _drawing_golds(kind: str) -> Callable[[Any, Mapping[str, Any]], list[str]]:
    def golds(gold: Any, data: Mapping[str, Any]) -> list[str]:
        from evals import drawing

        return (drawing.svg_golds if kind == "svg" else drawing.plot_golds)(gold, data)

    return golds


def _matching(name: str) -> Grader:
    """A grader of evals.matching, imported when it is used."""

    def grader(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
        from evals import matching

        return getattr(matching, name)(gold, data, said)

    return grader


def _function(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
    from evals.code import function

    return function(gold, data, said)


def _repository(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
    from evals.repository import kind

    return kind(gold, data, said)


def _repository_golds(gold: Any, data: Mapping[str, Any]) -> list[str]:
    from evals.repository import gold_answers

    return gold_answers(gold, data)


KINDS: dict[str, Grader] = {
    "function": _function,
    "repository": _repository,
    "exact": _exact,
    "choice": _choice,
    "number": _number,
    "count": _count,
    "anls": _anls,
    "edit": _edit,
    "boxes": _boxes,
    "points": _points,
    "contains": _matching("contains"),
    "relaxed": _matching("relaxed"),
    "literal": _matching("literal"),
    "world": _matching("world"),
    "math": _math,
    "constraints": _constraints,
    "svg": _drawing("svg"),
    "plot": _drawing("plot"),
}

# what a task's gold is, said as an answer: each must score 1; None where there is none, after a look at the task
GOLDS: dict[str, Callable[[Any, Mapping[str, Any]], Sequence[str] | None]] = {
    "function": lambda gold, data: [gold],
    "repository": _repository_golds,
    "exact": lambda gold, data: _golds(gold),
    "choice": lambda gold, data: [str(gold)],
    "number": lambda gold, data: [str(gold)],
    "count": lambda gold, data: [str(gold)],
    "anls": lambda gold, data: _golds(gold),
    "edit": lambda gold, data: _golds(gold),
    "boxes": lambda gold, data: [str([list(box) for box in gold])],
    "points": lambda gold, data: [str([[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] for box in gold])],
    "contains": lambda gold, data: _golds(gold),
    "relaxed": lambda gold, data: _golds(gold),
    "literal": lambda gold, data: [str(gold)],
    "world": lambda gold, data: [str(gold)],
    "math": _math_golds,
    "constraints": _constraints_golds,
    "svg": _drawing_golds("svg"),
    "plot": _drawing_golds("plot"),
}
