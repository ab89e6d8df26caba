"""Arithmetic that a model asked for: exact where it can be, and never without an end.

    calculate("0.1 + 0.2")   ->  "0.3"          calculate("2 / 3")      ->  "0.666666666666667 (exactly 2/3)"
    calculate("20!/18!")     ->  "380"          calculate("sqrt(2)^3")  ->  "2.82842712474619 (rounded)"

    text ── tokens ── one pass, by precedence ──> Fraction, while it is exact ──> text
                                                  mpmath number of 40 digits, after sqrt(2), sin, ln, ...

    + - * / // % ** ^ !   comparisons   50%   | sqrt ln sin floor round gcd comb max ...: FUNCTIONS   pi e tau

Nothing is evaluated as Python. Every number stays below LARGEST_BITS bits and every power, factorial and argument is
measured before it is computed, so that 9**9**9**9 is a sentence and not a machine without memory.
"""

import math
import re
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

LONGEST = 1000  # characters
DEEPEST = 60  # brackets in brackets, signs before signs, powers of powers
LARGEST_BITS = 16_000  # of a numerator or a denominator: about 4,800 digits
LARGEST_EXPONENT = 50_000  # of 2, of a rounded number
LARGEST_ANGLE = 4_000  # bits of what sin and the like are taken of
DIGITS = 40  # of a rounded number, while it is worked with
SHOWN = 15  # digits of a rounded number
WHOLE = 200  # digits of a whole number that are written out
PLACES = 30  # after the point that are written out

Value = Any  # Fraction; mpmath's mpf once rounded; bool

_TOKEN = re.compile(
    r"\s*(?:(?P<based>0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+)"
    r"|(?P<number>(?:[0-9](?:_?[0-9])*)?\.?[0-9](?:_?[0-9])*\.?(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9.]*)"
    r"|(?P<sign>\*\*|//|==|!=|<=|>=|[-+*/%^!(),<>]))",
    re.ASCII,
)
_ALSO = str.maketrans(
    {"×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "−": "-", "–": "-", "π": " pi ", "τ": " tau ", "√": " sqrt "}
    | {"²": "^2", "³": "^3", "≤": "<=", "≥": ">=", "≠": "!=", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
)


_one_at_a_time = threading.Lock()  # mpmath's functions change the precision of their context while they work


class CannotCalculate(ValueError):
    """A sentence about what is wrong with an expression, or too large in it."""


def calculate(text: str) -> str:
    """The value of an expression, as text. Raises CannotCalculate."""
    if not isinstance(text, str):
        raise CannotCalculate(f"an expression is text, got {type(text).__name__}")
    if len(text) > LONGEST:
        raise CannotCalculate(f"an expression of {len(text)} characters; at most {LONGEST} are read")
    if not text.strip():
        raise CannotCalculate("the expression is empty")
    tokens = _tokens(text.translate(_ALSO))
    with _one_at_a_time:
        return written(_Reader(tokens).whole())


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise CannotCalculate(f"{text[at:].lstrip()[:1]!r} is nothing that can be calculated with")
        at = match.end()
        kind = str(match.lastgroup)
        if kind in ("number", "based") and re.match(r"[\w.]", text[at : at + 1]):
            raise CannotCalculate(f"{match[0].strip() + text[at]!r} is no number; write * between factors")
        found.append((kind, match[kind]))
    return [*found, ("end", "")]


# ---- reading


class _Reader:
    """One expression, from left to right; what is read is computed at once."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def whole(self) -> Value:
        value = self.sum()
        kind, sign = self.tokens[self.at]
        if sign in ("<", ">", "<=", ">=", "==", "!="):
            self.at += 1
            other = self.sum()
            value = _compared(sign, value, other)
        kind, sign = self.tokens[self.at]
        if kind != "end":
            hint = "; write * between factors" if kind in ("number", "name", "based") or sign == "(" else ""
            hint = "; write 1000, not 1,000" if sign == "," else hint
            raise CannotCalculate(f"{sign!r} was not expected there{hint}")
        return value

    def take(self, *signs: str) -> str:
        """The next sign, if it is one of these; else nothing."""
        kind, sign = self.tokens[self.at]
        if kind == "sign" and sign in signs:
            self.at += 1
            return sign
        return ""

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise CannotCalculate(f"more than {DEEPEST} brackets, signs or powers in one another")

    def sum(self) -> Value:
        value = self.product()
        while sign := self.take("+", "-"):
            value = _combined(sign, value, self.product())
        return value

    def product(self) -> Value:
        value = self.signed()
        while sign := self.take("*", "/", "//", "%"):
            if sign == "%" and not self.begins():
                if self.tokens[self.at][1] in ("+", "-"):
                    raise CannotCalculate("% before + or - may be a percentage or a remainder; write /100 or mod(a, b)")
                value = _combined("/", value, Fraction(100))
            else:
                value = _combined(sign, value, self.signed())
        return value

    def begins(self) -> bool:
        kind, sign = self.tokens[self.at]
        return kind in ("number", "based", "name") or sign == "("

    def signed(self) -> Value:
        sign = self.take("+", "-")
        if not sign:
            return self.power()
        self.deeper()
        value = self.signed()
        self.depth -= 1
        return _combined("-", Fraction(0), value) if sign == "-" else _number(value)

    def power(self) -> Value:
        base = self.atom()
        while self.take("!"):
            base = _factorial(base)
        if self.take("**", "^"):
            self.deeper()
            base = _power(base, self.signed())
            self.depth -= 1
        return base

    def atom(self) -> Value:
        kind, text = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            return _literal(text)
        if kind == "based":
            return _fits(Fraction(int(text, 0)))
        if kind == "name":
            return self.named(text.removeprefix("math.").lower())
        if text == "(":
            self.deeper()
            value = self.sum()
            self.close()
            return value
        raise CannotCalculate("the expression ends too early" if kind == "end" else f"{text!r} was not expected there")

    def close(self) -> None:
        self.depth -= 1
        if not self.take(")"):
            raise CannotCalculate("a ) is missing")

    def named(self, name: str) -> Value:
        if name in ("pi", "e", "tau"):
            context = _context()
            return {"pi": +context.pi, "e": +context.e, "tau": 2 * context.pi}[name]
        if name not in FUNCTIONS:
            raise CannotCalculate(f"no function {name[:40]!r}; there are {', '.join(sorted(FUNCTIONS))}, pi, e, tau")
        least, most, function = FUNCTIONS[name]
        if not self.take("("):
            if name == "sqrt":  # the sign √ needs no brackets
                self.deeper()
                value = self.power()
                self.depth -= 1
                return _checked(function(value))
            raise CannotCalculate(f"{name} needs its arguments in brackets")
        self.deeper()
        arguments: list[Value] = []
        while not self.take(")"):
            if arguments and not self.take(","):
                raise CannotCalculate(f"{name}: a ) is missing")
            arguments.append(_number(self.sum()))
        self.depth -= 1
        if not least <= len(arguments) <= most:
            wanted = f"{least}" if least == most else f"{least} or more" if most > 9 else f"{least} to {most}"
            raise CannotCalculate(f"{name} takes {wanted} arguments, got {len(arguments)}")
        return _checked(function(*arguments))


def _literal(text: str) -> Fraction:
    digits, _, exponent = text.lower().replace("_", "").partition("e")
    if exponent and (len(exponent) > 6 or abs(int(exponent)) > LARGEST_BITS // 4):
        raise CannotCalculate(f"the number {text[:40]} is too large or too small")
    # by hand: Fraction("1e4000") would go through a limit on digits that belongs to the interpreter
    whole, _, part = digits.partition(".")
    value = Fraction(int(whole + part), 10 ** len(part)) * Fraction(10) ** int(exponent or 0)
    return _fits(value)


# ---- computing


@lru_cache(maxsize=1)
def _context() -> Any:
    """mpmath, with numbers of our size; not the context that others in this process may set."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = DIGITS
    return context


def _fits(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise CannotCalculate(f"a number of more than {LARGEST_BITS * 3 // 10} digits; that is more than is calculated")
    return value


def _checked(value: Value) -> Value:
    if isinstance(value, bool):
        return value
    if isinstance(value, Fraction):
        return _fits(value)
    if not _context().isfinite(value):
        raise CannotCalculate("the result is not a finite number")
    if value and abs(_context().mag(value)) > LARGEST_EXPONENT:
        raise CannotCalculate("a number too large or too small")
    return value


def _number(value: Value) -> Value:
    if isinstance(value, bool):
        raise CannotCalculate("true and false are no numbers")
    return value


def _rounded(value: Value) -> Any:
    """As mpmath's number."""
    context = _context()
    if isinstance(value, Fraction):
        return context.mpf(value.numerator) / value.denominator
    return value


def _whole(value: Value, what: str) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1:
        raise CannotCalculate(f"{what} takes whole numbers")
    return value.numerator


def _combined(sign: str, a: Value, b: Value) -> Value:
    a, b = _number(a), _number(b)
    if sign in ("/", "//", "%") and b == 0:
        raise CannotCalculate("division by zero")
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        a, b = _rounded(a), _rounded(b)
        if sign in ("//", "%"):
            quotient = _floor(_checked(a / b))
            return _checked(quotient if sign == "//" else a - b * _rounded(quotient))
    if sign == "//":
        return Fraction(a // b)
    value = {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__, "%": a.__mod__}[sign](b)
    if sign in "+-" and not isinstance(value, Fraction) and abs(value) < max(abs(a), abs(b)) * _nothing():
        return Fraction(0)
    return _checked(value)


def _nothing() -> Any:
    """Of what rounded numbers are worth: what is left below this is rounding."""
    return _context().mpf(10) ** (5 - DIGITS)


def _compared(sign: str, a: Value, b: Value) -> bool:
    a, b = _number(a), _number(b)
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        a, b = _rounded(a), _rounded(b)
        if abs(a - b) <= max(abs(a), abs(b)) * _nothing():
            return sign in ("==", "<=", ">=")  # nearer than they were rounded
    return bool({"<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b, "==": a == b, "!=": a != b}[sign])


def _power(base: Value, exponent: Value) -> Value:
    base, exponent = _number(base), _number(exponent)
    if exponent == 0:
        return Fraction(1)
    if base == 0:
        if exponent < 0:
            raise CannotCalculate("division by zero")
        return Fraction(0)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if abs(base) == 1 and exponent.denominator == 1:
            return base if exponent.numerator % 2 else Fraction(1)
        size = max(abs(base.numerator).bit_length(), base.denominator.bit_length()) - 1
        if size * abs(exponent) > LARGEST_BITS:
            raise CannotCalculate("a power too large: more digits than are calculated")
        if exponent.denominator == 1:
            return _fits(base**exponent.numerator)
        root = _exact_root(base, exponent.denominator)
        if root is not None:
            return _power(root, Fraction(exponent.numerator))
    if base < 0 and not (isinstance(exponent, Fraction) and exponent.denominator == 1):
        raise CannotCalculate("a negative number to a power that is not whole has no real value")
    context, negative = _context(), base < 0
    base = abs(_rounded(base))
    magnitude = context.log(base) * _rounded(exponent)
    if abs(magnitude) > LARGEST_EXPONENT * 0.69:
        raise CannotCalculate("a power too large or too small")
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        value = context.power(base, exponent.numerator)
        return _checked(-value if negative and exponent.numerator % 2 else value)
    return _checked(context.power(base, _rounded(exponent)))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The root of a fraction whose parts are both whole powers; None if they are not, or it is negative."""
    if value < 0 or degree > 200:
        return None
    over, under = _whole_root(value.numerator, degree), _whole_root(value.denominator, degree)
    return None if over is None or under is None else Fraction(over, under)


def _whole_root(value: int, degree: int) -> int | None:
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    if degree == 2:
        low = high = math.isqrt(value)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low if low**degree == value else None


def _factorial(value: Value) -> Fraction:
    number = _whole(_number(value), "a factorial")
    if not 0 <= number <= 1500:
        raise CannotCalculate(f"a factorial of whole numbers from 0 to 1500, not of {_short(number)}")
    return Fraction(math.factorial(number))


def _chosen(name: str, n: Value, k: Value) -> Fraction:
    total, some = _whole(n, name), _whole(k, name)
    if min(some, total) < 0:
        raise CannotCalculate(f"{name} takes whole numbers from 0 on")
    if some > total:
        return Fraction(0)
    if name == "comb":
        some = min(some, total - some)
    if some * total.bit_length() > 2 * LARGEST_BITS:
        raise CannotCalculate(f"{name}: more digits than are calculated")
    return Fraction(math.comb(total, some) if name == "comb" else math.perm(total, some))


def _root(value: Value, degree: Value) -> Value:
    number = _whole(degree, "root")
    if not 1 <= number <= 200:
        raise CannotCalculate("root(x, n) takes n from 1 to 200")
    if value < 0:
        if number % 2 == 0:
            raise CannotCalculate("an even root of a negative number has no real value")
        return _combined("-", Fraction(0), _root(_combined("-", Fraction(0), value), degree))
    return _power(value, Fraction(1, number)) if value else Fraction(0)


def _log(value: Value, base: Value | None = None) -> Value:
    if value <= 0 or (base is not None and (base <= 0 or base == 1)):
        raise CannotCalculate("a logarithm of positive numbers, to a positive base that is not 1")
    context = _context()
    if base is None:
        return Fraction(0) if value == 1 else context.log(_rounded(value))
    result = context.log(_rounded(value)) / context.log(_rounded(base))
    near = Fraction(int(context.nint(result)))
    if isinstance(value, Fraction) and isinstance(base, Fraction) and abs(near) <= LARGEST_BITS:
        size = max(abs(base.numerator).bit_length(), base.denominator.bit_length()) - 1
        if size * abs(near) <= LARGEST_BITS and base**near.numerator == value:
            return near
    return result


def _floor(value: Value) -> Fraction:
    if isinstance(value, Fraction):
        return Fraction(math.floor(value))
    if value and _context().mag(value) > DIGITS * 3:
        raise CannotCalculate("a rounded number too large to be made whole")
    return Fraction(int(_context().floor(value)))


def _ceil(value: Value) -> Fraction:
    return -_floor(-value)


def _round(value: Value, places: Value = Fraction(0)) -> Value:
    """Halves away from zero, as taught; Python's go to the even neighbour."""
    number = _whole(places, "round(x, n)")
    if abs(number) > 1000:
        raise CannotCalculate("round(x, n) takes n from -1000 to 1000")
    scale = Fraction(10) ** number
    size = _combined("*", abs(value), scale)
    result = _floor(_combined("+", size, Fraction(1, 2))) / scale
    return -result if value < 0 else result


def _of_angle(name: str) -> Callable[[Value], Value]:
    def function(value: Value) -> Value:
        if value and abs(_context().mag(_rounded(value))) > LARGEST_ANGLE:
            raise CannotCalculate(f"{name} of a number too large")
        if value == 0:
            return Fraction(1 if name == "cos" else 0)
        result = getattr(_context(), name)(_rounded(value))
        if abs(result) * _nothing() > 1:
            raise CannotCalculate(f"{name} has no value there")
        if isinstance(value, Fraction) or abs(result) > _nothing() * abs(value) or abs(value) < 1:
            return result
        return Fraction(0)  # sin(pi): what is left of the rounding of pi

    return function


def _of_real(name: str, low: float = -math.inf, high: float = math.inf) -> Callable[[Value], Value]:
    """A function of mpmath's for arguments between low and high."""

    def function(value: Value) -> Value:
        if not low <= value <= high:
            raise CannotCalculate(f"{name} of {_short(value)} has no real value, or is too large")
        return getattr(_context(), name)(_rounded(value))

    return function


def _many(function: Callable[[list[Value]], Value]) -> Callable[..., Value]:
    return lambda *values: function(list(values))


def _mean(values: list[Value]) -> Value:
    return _combined("/", _total(values), Fraction(len(values)))


def _total(values: list[Value]) -> Value:
    total: Value = Fraction(0)
    for value in values:
        total = _combined("+", total, value)
    return total


def _divisors(name: str) -> Callable[..., Value]:
    def function(*values: Value) -> Fraction:
        result = 0 if name == "gcd" else 1
        for value in values:
            result = int(getattr(math, name)(result, _whole(value, name)))
            _fits(Fraction(result))
        return Fraction(result)

    return function


def _log10(value: Value) -> Value:
    return _log(value, Fraction(10))


def _hypotenuse(*values: Value) -> Value:
    return _power(_total([_combined("*", value, value) for value in values]), Fraction(1, 2))


def _turned(over: Fraction) -> Callable[[Value], Value]:
    """From degrees to radians, or back."""
    return lambda value: _combined("*" if over < 1 else "/", _combined("*", value, over), +_context().pi)


EXPONENTIAL = LARGEST_EXPONENT * 0.69
FUNCTIONS: dict[str, tuple[int, int, Callable[..., Value]]] = {
    "abs": (1, 1, abs),
    "sqrt": (1, 1, lambda value: _root(value, Fraction(2))),
    "cbrt": (1, 1, lambda value: _root(value, Fraction(3))),
    "root": (2, 2, _root),
    "pow": (2, 2, _power),
    "exp": (1, 1, lambda value: Fraction(1) if value == 0 else _of_real("exp", -EXPONENTIAL, EXPONENTIAL)(value)),
    "ln": (1, 1, _log),
    "log": (1, 2, _log),
    "log2": (1, 1, lambda value: _log(value, Fraction(2))),
    "log10": (1, 1, _log10),
    "lg": (1, 1, _log10),
    "sin": (1, 1, _of_angle("sin")),
    "cos": (1, 1, _of_angle("cos")),
    "tan": (1, 1, _of_angle("tan")),
    "asin": (1, 1, _of_real("asin", -1, 1)),
    "acos": (1, 1, _of_real("acos", -1, 1)),
    "atan": (1, 1, _of_real("atan")),
    "atan2": (2, 2, lambda y, x: _context().atan2(_rounded(y), _rounded(x))),
    "sinh": (1, 1, _of_real("sinh", -EXPONENTIAL, EXPONENTIAL)),
    "cosh": (1, 1, _of_real("cosh", -EXPONENTIAL, EXPONENTIAL)),
    "tanh": (1, 1, _of_real("tanh", -EXPONENTIAL, EXPONENTIAL)),
    "degrees": (1, 1, _turned(Fraction(180))),
    "radians": (1, 1, _turned(Fraction(1, 180))),
    "floor": (1, 1, _floor),
    "ceil": (1, 1, _ceil),
    "trunc": (1, 1, lambda value: _floor(value) if value >= 0 else _ceil(value)),
    "round": (1, 2, _round),
    "min": (1, 99, _many(lambda values: min(values, key=_rounded))),
    "max": (1, 99, _many(lambda values: max(values, key=_rounded))),
    "sum": (1, 99, _many(_total)),
    "mean": (1, 99, _many(_mean)),
    "hypot": (2, 9, _hypotenuse),
    "mod": (2, 2, lambda a, b: _combined("%", a, b)),
    "gcd": (1, 99, _divisors("gcd")),
    "lcm": (1, 99, _divisors("lcm")),
    "factorial": (1, 1, _factorial),
    "comb": (2, 2, lambda n, k: _chosen("comb", n, k)),
    "perm": (2, 2, lambda n, k: _chosen("perm", n, k)),
}


# ---- writing


def _short(value: Value) -> str:
    """For a sentence about it."""
    text = written(Fraction(value) if isinstance(value, int) else value)
    return text if len(text) <= 40 else text[:30] + "..."


def written(value: Value) -> str:
    """A number as text: whole numbers and short decimals in full, what was rounded with SHOWN digits and a word."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, Fraction):
        text = _context().nstr(value, SHOWN, min_fixed=-8, max_fixed=SHOWN + 1)
        return f"{text.removesuffix('.0')} (rounded)"
    over, under = value.numerator, value.denominator
    places = _places(under)
    if places is not None:
        digits = _digits(abs(over) * 10**places // under)
        if len(digits) <= WHOLE + places:
            digits = digits.rjust(places + 1, "0")
            point = len(digits) - places
            return ("-" if over < 0 else "") + digits[:point] + ("." + digits[point:] if places else "")
        return f"{_scientific(value)} (rounded; a number of {len(digits) - places} digits)"
    exact = f"{'-' if over < 0 else ''}{_digits(abs(over))}/{_digits(under)}"
    return f"{_context().nstr(_rounded(value), SHOWN, min_fixed=-8, max_fixed=SHOWN + 1)} " + (
        f"(exactly {exact})" if len(exact) <= 60 else "(rounded)"
    )


def _places(under: int) -> int | None:
    """How many digits after the point say a fraction exactly; None if more than PLACES."""
    return next((places for places in range(PLACES + 1) if 10**places % under == 0), None)


def _digits(number: int) -> str:
    """Of a whole number; str() has a limit on its length that others in this process may have set."""
    return "".join(map(str, Decimal(number).as_tuple().digits))


def _scientific(value: Fraction) -> str:
    return str(_context().nstr(_rounded(value), SHOWN))
