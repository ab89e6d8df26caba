"""Kinds of graders that benchmarks bring with them; evals.graders names them and imports this on first use.

contains    the gold, anywhere in the reply (OCRBench)          relaxed     a number within 5 %, or the text (ChartQA)
literal     a Python value, equal to the gold's (CRUXEval)      arguments   any arguments that give the output
world       what world.check finds right
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from evals.graders import _golds, final, plain

Data = Mapping[str, Any]
Graded = tuple[float | None, dict[str, Any]]
LONGEST = 20_000  # characters of a reply that are parsed as Python


def contains(gold: Any, data: Data, said: str) -> Graded:
    """OCRBench: lower case, containment; with data["spaces"] False (handwritten formulas) white space aside instead."""
    golds = _golds(gold)
    if data.get("spaces", True):
        text = said.lower().strip().replace("\n", " ")
        hit = any(one.lower().strip().replace("\n", " ") in text for one in golds)
    else:
        text = re.sub(r"\s", "", said)
        hit = any(re.sub(r"\s", "", one) in text for one in golds)
    return float(hit), {"read": text[-200:]}


def relaxed(gold: Any, data: Data, said: str) -> Graded:
    """ChartQA (Masry et al. 2022): within data["tolerance"] (0.05) of a number, % read as hundredths; else the text."""
    read = plain(final(said)).strip("*$ ")
    share = float(data.get("tolerance", 0.05))
    for one in _golds(gold):
        wanted, got = _float(plain(one)), _float(read)
        if wanted and got is not None:
            if abs(got - wanted) <= share * abs(wanted):
                return 1.0, {"read": read[:200]}
        elif plain(one) == read:
            return 1.0, {"read": read[:200]}
    return 0.0, {"read": read[:200]}


def _float(text: str) -> float | None:
    percent = text.endswith("%")
    digits = text.rstrip("%").strip().lstrip("$").replace(",", "")
    if not re.fullmatch(r"[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[-+]?\d{1,2})?", digits):
        return None
    return float(digits) / 100 if percent else float(digits)


# ---- values


def _value(text: str) -> tuple[bool, Any]:
    """Whether a text is one Python literal, and its value."""
    try:
        return True, ast.literal_eval(text[:LONGEST].strip().strip("`$ "))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False, None


def literal(gold: Any, data: Data, said: str) -> Graded:
    """The final answer is a Python literal, equal to the gold's as Python compares: lists of numbers, mostly."""
    right, wanted = _value(str(gold))
    if not right:
        raise ValueError(f"literal: the gold {str(gold)[:80]!r} is no Python literal")
    readable, got = _value(final(said))
    try:
        equal = readable and bool(got == wanted)
    except RecursionError:
        equal = False
    return float(equal), {"read": repr(got)[:200] if readable else None}


# ---- the world


def world(gold: Any, data: Data, said: str) -> Graded:
    """What world.check finds right; data: check (its kind), data (the check's), tests."""
    from world.check import check
    from world.sample import Check, Turn

    turn = Turn("?", str(gold), str(data.get("tests", "world")), "", check=Check(data["check"], data.get("data", {})))
    return float(check(turn, said)), {"read": said.strip()[:200]}
