r"""Is it the same mathematics? Kind "math" of evals/graders.py.

    grade(Task("math", r"\frac{3}{2}"), r"... so it is $\boxed{1.5}$")   ->   score 1, by exact numbers
    grade(Task("math", r"\sqrt{8}"), r"The answer is $2\sqrt{2}$.")      ->   score 1, by math-verify

    reply -- the part that is the answer --+-- same text, or exact numbers on both sides? -- decided here, at once
                                           +-- anything else: a worker process runs math-verify (evals/worker.py)

gold: LaTeX or plain text, or several of which any is right. data: "tolerance", relative, for plain numbers (0).

Numbers here are integers, decimals, fractions, mixed numbers, per cent, powers of ten, with units or without; and
lists, sets, tuples and intervals of them. They are compared as rationals, without rounding: 0.333 is not 1/3. A list
is a set (1, 2 is 2, 1); a tuple or an interval is not, and (1, 2) is not [1, 2]. A per cent is right as it is said and
as its share (50 % for 50 and for 1/2), as math-verify has it. A unit may be left out; a wrong one is wrong.

A comparison that costs more than five seconds of processor time or 2 GB of memory is ended by the kernel, scores 0
and says so in the evidence (evals/workers.py).
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from evals.graders import UNITS, boxes
from evals.workers import Died, Workers

LONGEST = 2000  # characters of an answer that are read as mathematics
DEEPEST = 25  # brackets in brackets; what is deeper costs the parser seconds

# ---- the part of a reply that is its answer

_SAYS = re.compile(
    r"(?:final answer|answer|result|solution)s?\**\s{0,9}(?:is|are|:|=)[ :*=]{0,9}([^\n]+)|^####[ \t]*([^\n]+)",
    re.IGNORECASE | re.MULTILINE,
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\\$|[^$\n])+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_TAIL = r"(?:\s*(?:%|\\%|[A-Za-z°]{1,12}))?"
_PLAIN_NUMBER = re.compile(rf"[-−+]?\$?(?<![\d,])(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?{_TAIL}(?![\w^])")


def answer_of(reply: str) -> str:
    r"""Boxed; or after "answer is" or ####; or the last formula of the last line that has one; or its last number."""
    held = boxes(reply)
    if held:
        last = len(held) - 1
        while last and _together(reply[held[last - 1][2] + 1 : held[last][0]]):
            last -= 1
        return ", ".join(reply[start:end].strip() for _, start, end in held[last:])
    said = [found[1] or found[2] for found in _SAYS.finditer(reply)]
    line = said[-1] if said else next((one for one in reversed(reply.splitlines()) if one.strip()), "")
    line = line.strip()[-4 * LONGEST :]
    if value(line) is not None or _CHOICE.match(line) or _formula(line):
        return line
    formulas = list(_FORMULA.finditer(line if said else reply[-4 * LONGEST :]))
    if formulas:
        source = line if said else reply[-4 * LONGEST :]
        first = len(formulas) - 1
        while first and _together(source[formulas[first - 1].end() : formulas[first].start()]):
            first -= 1
        inner = ", ".join(next(group for group in found.groups() if group) for found in formulas[first:])
        after = re.match(r"\s*(%|\\%)", source[formulas[-1].end() :])
        return inner + (after[1] if after else "")
    if said:
        return line
    numbers = [found[0] for found in _PLAIN_NUMBER.finditer(line)]
    return numbers[-1] if numbers else line


_CHOICE = re.compile(r"\W{0,3}\(?[A-Z][).:](?!\w)")


def _formula(line: str) -> bool:
    """Whether a line is nothing but one formula: no words in it, and no dollars between them."""
    bare = re.sub(r"\\(?:text|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", line)
    found = re.findall(r"[^\W\d_]{2,}", bare)
    return "$" not in line and all(one.lower() in _NAMES for one in found) and any(one.isalnum() for one in line)


def _together(between: str) -> bool:
    """Whether what stands between two formulas makes them one answer: a comma, "and", "or"."""
    plain = re.sub(r"\$|\\[()\[\]]", " ", between[:100]).strip()
    return len(between) < 100 and plain in (",", ";", "and", "or", ", and", ", or")


# ---- exact values


class Number(NamedTuple):
    value: Fraction
    percent: bool = False
    unit: str = ""


class Group(NamedTuple):
    """Several: "list" as said, "set" in braces, or the brackets of a tuple or an interval, as "(]"."""

    kind: str
    parts: tuple[Any, ...]


INFINITE = {"\\infty": 1, "+\\infty": 1, "-\\infty": -1}
Value = Number | Group | Literal["+oo", "-oo"]

_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "％": "%", "，": ","})
_SYMBOLS = {
    "∞": r"\infty ",
    "π": r"\pi ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "°": r"^\circ ",
    "∅": r"\emptyset ",
    "θ": r"\theta ",
    "√": r"\sqrt ",
}
_POWERS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_PARTS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8"}


def _bared(found: "re.Match[str]") -> str:
    """Words that change what is said are no unit, which math-verify would leave out."""
    says = re.search(r"\d|\b(?:and|or|not|no|maybe|never|either)\b", found[1], re.IGNORECASE)
    return f" {found[1]} " if says else rf"\text{{{found[1]}}}"


def tidy(text: str) -> str:
    """One way to write it: LaTeX without dollars, spacing, \\left and \\right, and with words as \\text{...}."""
    text = text.strip().translate(_SIGNS)
    for sign, part in _PARTS.items():
        if sign in text:
            above, below = part.split("/")
            text = text.replace(sign, rf"\frac{{{above}}}{{{below}}}")
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^{" + "".join(_POWERS[one] for one in found[0]) + "}", text)
    text = re.sub(r"√\s*(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|infty|infinity)(?![A-Za-z])", lambda found: f"\\{found[0]} ", text)
    text = text.replace("\\infinity", "\\infty")
    for sign, name in _SYMBOLS.items():
        text = text.replace(sign, name)
    text = re.sub(r"^\s*(?:\*\*|__|`)+|(?:\*\*|__|`)+\s*$", "", text).strip()
    text = re.sub(r"\\(?:\(|\)|\[|\])|\$\$", "", text)
    if text.count("$") - text.count("\\$") > 1:
        text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub(r"\\(?:left|right|displaystyle|limits|bigl?|bigr?|Bigl?|Bigr?|!)(?![A-Za-z])", "", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\ |~)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[,;: ]|\\q?quad(?![A-Za-z])|~", " ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:mathrm|textbf|mathbf|mbox|textrm|textit|operatorname)\s*\{", r"\\text{", text)
    text = re.sub(r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le", text)
    text = re.sub(r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", r"^\\circ", text)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", _bared, text)
    text = re.sub(r"\s+", " ", text).strip()
    return text.rstrip(".;,: ") if not text.endswith("\\.") else text


_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_FRACTION = rf"\\frac\s*(?:\{{\s*(-?{_UNSIGNED})\s*\}}|(\d))\s*(?:\{{\s*(-?{_UNSIGNED})\s*\}}|(\d))"
_POWER = r"10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|([+-]?\d{1,3}))"
_SCALAR = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<currency>\\?\$|€|£|¥)\s*)?(?:"
    rf"(?P<whole>\d+)\s*(?P<mixed>{_FRACTION})"
    rf"|(?P<fraction>{_FRACTION})"
    rf"|(?P<entire>\d+)\s+(?P<over>\d+)\s*/\s*(?P<under>\d+)"
    rf"|(?P<above>{_UNSIGNED})\s*/\s*(?P<below>{_UNSIGNED})"
    rf"|(?P<mantissa>{_UNSIGNED})(?:[eE](?P<e>[+-]?\d{{1,3}})|\s*(?:\*|\\times|\\cdot|x)\s*(?P<ten>{_POWER}))"
    rf"|(?P<power>{_POWER})"
    rf"|(?P<repeats>\d*\.\d*)\\overline\{{(?P<period>\d+)\}}"
    rf"|(?P<plain>{_UNSIGNED}))"
)
_WORDS = re.compile(r"\s*(?:\\text\{\s*([^{}]*?)\s*\}|([A-Za-z][A-Za-z /]*))\s*((?:\^\s*\{?\s*[23]\s*\}?)?)\s*")
_NAMES = frozenset(
    "pi sin cos tan cot sec csc log ln exp sqrt mod inf infinity infty oo and or choose gcd lcm min max if for".split()
)
_NAME = r"(?:[A-Za-z](?:_\{?\w{1,3}\}?)?(?:\s*\(\s*\w\s*\))?|\\(?:theta|alpha|beta|lambda|mu))"
_ASSIGNED = re.compile(rf"\s*({_NAME})\s*=\s*([^=<>]+)")


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _of_fraction(found: "re.Match[str]", text: str) -> Fraction | None:
    parts = re.fullmatch(_FRACTION, text)
    assert parts is not None, "it matched before"
    above, below = _decimal(parts[1] or parts[2]), _decimal(parts[3] or parts[4])
    return above / below if below else None


def number(text: str) -> Number | None:
    """One number with what stands around it: sign, currency, per cent, degrees, a unit or words."""
    text = text.strip()
    for _ in range(DEEPEST):
        if not (text[:1] == "(" and text[-1:] == ")" and "," not in text and _closes(text) == len(text) - 1):
            break
        text = text[1:-1].strip()
    found = _SCALAR.match(text)
    if not found or len(text) > 400:
        return None
    if found["mixed"]:
        part = _of_fraction(found, found["mixed"])
        total = None if part is None else int(found["whole"]) + part
    elif found["fraction"]:
        total = _of_fraction(found, found["fraction"])
    elif found["entire"]:
        total = (
            int(found["entire"]) + Fraction(int(found["over"]), int(found["under"])) if int(found["under"]) else None
        )
    elif found["above"]:
        below = _decimal(found["below"])
        total = _decimal(found["above"]) / below if below else None
    elif found["mantissa"]:
        shown = found["e"] or (found["ten"] or "").split("^")[-1].strip(" {}")
        total = _decimal(found["mantissa"]) * Fraction(10) ** int(shown)
    elif found["power"]:
        total = Fraction(10) ** int(found["power"].split("^")[-1].strip(" {}"))
    elif found["period"]:
        start, period = found["repeats"], found["period"]
        places = len(start.split(".")[1])
        total = Fraction(start + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    else:
        total = _decimal(found["plain"])
    if total is None:
        return None
    rest = text[found.end() :].strip()
    unit, percent = ("$" if found["currency"] in ("$", "\\$") else ""), False
    if re.match(r"\\?%|percent\b|per cent\b|\\text\{\s*percent\s*\}", rest):
        percent, rest = True, re.sub(r"^(?:\\?%|percent|per cent|\\text\{\s*percent\s*\})\s*", "", rest)
    elif rest.startswith("^\\circ"):
        unit, rest = "degree", rest.removeprefix("^\\circ").strip()
    if rest:
        words = _WORDS.fullmatch(rest)
        if not words:
            return None
        named = (words[1] or words[2] or "").strip()
        raised = re.sub(r"[^23]", "", words[3])
        key = named.lower() + (f"^{raised}" if raised else "")
        key = key if key in UNITS else key.removesuffix("s")
        if key in UNITS:
            unit = key
        elif raised or (words[2] and len(named) < 3) or not _NAMES.isdisjoint(re.split(r"[^a-z]+", named.lower())):
            return None  # a variable or a function, not a unit
        elif re.search(r"\d", named):
            return None  # another number
    return Number(-total if found["sign"] == "-" else total, percent, unit)


def _closes(text: str) -> int:
    """Where the bracket that opens a text is closed; -1 if nowhere."""
    depth = 0
    for at, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return at
    return -1


def _depth(text: str) -> int:
    depth = most = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        most = max(most, depth)
    return most


def _split(text: str) -> list[str]:
    """At the commas, semicolons, "and" and "or" that stand in no brackets. A comma before three digits may be part of a
    number: the text as a whole is tried first."""
    parts, depth, last = [], 0, 0
    for found in re.finditer(r"[(\[{]|[)\]}]|[,;]\s*(?:and|or)\b|[,;]|\s(?:and|or)\s", text):
        if found[0] in "([{":
            depth += 1
        elif found[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[last : found.start()])
            last = found.end()
    return [*parts, text[last:]]


def value(text: str) -> Value | None:
    """The exact value of a text, or None where it takes algebra to know."""
    return _value(tidy(text)) if len(text) <= LONGEST else None


def _value(text: str, nested: int = 0) -> Value | None:
    text = text.strip()
    assigned = _ASSIGNED.fullmatch(text)
    if assigned and not nested and len(_split(text)) == 1:
        text = assigned[2].strip()
    if text in INFINITE:
        return "+oo" if INFINITE[text] > 0 else "-oo"
    plain = number(text)
    if plain is not None:
        return plain
    if nested > 3 or not text:
        return None
    both = re.fullmatch(r"\\pm\s*(.+)", text)
    if both:
        one = number(both[1])
        return None if one is None else Group("list", (one, one._replace(value=-one.value)))
    braces = re.fullmatch(r"\\\{(.*)\\\}", text)
    if braces and "\\{" not in braces[1]:
        return _group("set", braces[1], nested)
    if text[0] in "([" and text[-1] in ")]" and _closes(text) == len(text) - 1:
        group = _group(text[0] + text[-1], text[1:-1], nested)
        return group if group is not None and len(group.parts) > 1 else None
    parts = _split(text)
    if len(parts) < 2:
        return None
    if not nested:
        named = [_ASSIGNED.fullmatch(part) for part in parts]
        if all(named) and len({one[1] for one in named if one}) > 1:
            return None  # x = 1, y = 2: which is which matters
        parts = [one[2] if one else part for one, part in zip(named, parts, strict=True)]
    return _group("list", parts, nested)


def _group(kind: str, inside: str | Sequence[str], nested: int) -> Group | None:
    parts = [_value(part, nested + 1) for part in (_split(inside) if isinstance(inside, str) else inside)]
    return None if any(part is None for part in parts) else Group(kind, tuple(parts))


def same(gold: Value, said: Value, tolerance: Fraction = Fraction(0)) -> bool:
    """Whether two exact values are equal. The gold's form decides whether the order counts."""
    if isinstance(gold, Number) and isinstance(said, Number):
        return _same_number(gold, said, tolerance)
    if isinstance(gold, Group) and isinstance(said, Group):
        if gold.kind in ("list", "set"):
            if said.kind == "[]" or "]" in said.kind or "[" in said.kind:
                return False
            return _covered(gold, said, tolerance) and _covered(said, gold, tolerance)
        if said.kind not in (gold.kind, "list") or len(gold.parts) != len(said.parts):
            return False
        return all(same(a, b, tolerance) for a, b in zip(gold.parts, said.parts, strict=True))
    if isinstance(gold, Group) and gold.kind in ("list", "set") and isinstance(said, Number):
        return all(same(part, said, tolerance) for part in gold.parts)
    if isinstance(said, Group) and said.kind in ("list", "set") and isinstance(gold, Number):
        return all(same(gold, part, tolerance) for part in said.parts)
    return gold == said


def _covered(a: Group, b: Group, tolerance: Fraction) -> bool:
    return all(any(same(one, other, tolerance) for other in b.parts) for one in a.parts)


def _same_number(gold: Number, said: Number, tolerance: Fraction) -> bool:
    wanted, got = gold.value, said.value
    if gold.unit and said.unit and gold.unit != said.unit:
        if UNITS[gold.unit][0] != UNITS[said.unit][0]:
            return False
        got = got * UNITS[said.unit][1] / UNITS[gold.unit][1]
    pairs = [(wanted, got)]
    if said.percent and not gold.percent:
        pairs.append((wanted, got / 100))
    if gold.percent and not said.percent:
        pairs.append((wanted / 100, got))
    return any(abs(a - b) <= tolerance * abs(a) for a, b in pairs)


WORKERS = Workers("compare", memory_mb=2048, seconds=5)


# ---- the grader


def golds(gold: Any, data: Mapping[str, Any]) -> list[str]:
    """The golds of a task, each said as an answer. Raises ValueError for one that is no mathematics."""
    texts = [gold] if isinstance(gold, str | int | float) and not isinstance(gold, bool) else gold
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(f"math: the gold is a text or several, got {gold!r}")
    tolerance(data)
    for text in map(str, texts):
        if not text.strip() or len(text) > LONGEST:
            raise ValueError(f"math: a gold has 1 to {LONGEST} characters, got {text[:80]!r}")
        if value(text) is None and not words(tidy(text)):
            _must_parse(text)
    return [rf"\boxed{{{text}}}" for text in map(str, texts)]


def _must_parse(text: str) -> None:
    try:
        said = WORKERS.ask(gold=tidy(text))
    except Died as died:
        if died.costly:
            raise ValueError(f"math: the gold {text[:80]!r} cannot be compared: {died}") from None
        return  # the machinery fails, which grade() reports
    if not said.get("parsed"):
        raise ValueError(f"math: the gold {text[:80]!r} cannot be parsed, and it is no word or choice either")


def tolerance(data: Mapping[str, Any]) -> Fraction:
    """data["tolerance"], relative. Raises ValueError for what is none."""
    given = data.get("tolerance", 0)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < 1:
        raise ValueError(f"math: tolerance is relative, 0 to below 1, got {given!r}")
    return Fraction(given).limit_denominator(10**12)


def words(tidied: str) -> str | None:
    """What an answer that is words or a choice says, for comparison: "evelyn", "a". None for mathematics."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", tidied).strip()
    letter = re.fullmatch(r"\(?([A-Z])(?:[).:]+(?:\s.*)?)?", plain)
    if letter:
        return letter[1]
    if re.fullmatch(r"[^\W\d_](?:[^\W\d_]|['-])+(?:[ ,]+(?:[^\W\d_]|['-])+)*\.?", plain):
        return " ".join(plain.casefold().removesuffix(".").split())
    return None


def _product(tidied: str) -> bool:
    """Whether letters may be variables that are multiplied: xy, abc."""
    return re.fullmatch(r"[a-z]{2,3}", tidied) is not None


def math(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
    """The grader. evidence: "read", what was taken for the answer, and "by", what decided."""
    read = answer_of(said)
    evidence: dict[str, Any] = {"read": read[:200], "by": "text"}
    if not read.strip():
        return 0.0, evidence
    if len(read) > LONGEST:
        return 0.0, {**evidence, "why": f"{len(read)} characters; an answer has at most {LONGEST}"}
    slack = tolerance(data)
    texts = [str(one) for one in (gold if isinstance(gold, list | tuple) else [gold])]
    ours, exact = tidy(read), value(read)
    undecided: list[str] = []
    for text in texts:
        theirs = tidy(text)
        named = words(theirs)
        if ours == theirs or (named is not None and named == words(ours)):
            return 1.0, evidence
        wanted = value(text)
        if wanted is not None and exact is not None:
            evidence["by"] = "exact"
            if same(wanted, exact, slack):
                return 1.0, evidence
        elif (named is None or _product(theirs)) and (
            wanted is None or re.search(r"[\d\\]", ours)
        ):  # words alone are no number
            undecided.append(theirs)
    if undecided and _depth(ours) > DEEPEST:
        return 0.0, {**evidence, "why": f"more than {DEEPEST} brackets in brackets"}
    for theirs in undecided:
        evidence["by"] = "math-verify"
        try:
            reply = WORKERS.ask(gold=theirs, answer=ours)
        except Died as died:
            if died.costly or WORKERS.work(gold=theirs, answer=theirs):
                return 0.0, {**evidence, "why": str(died)}
            return None, {**evidence, "error": str(died)}
        if "error" in reply:
            evidence["why"] = reply["error"]
        if reply.get("equal"):
            return 1.0, evidence
    return 0.0, evidence
