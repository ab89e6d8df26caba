"""Plain values between two processes, one of which believes nothing.

    candidate ── write ──> text ── read ──> judge          exact types only: what is read is what it looks like
              <── read ──       <── write ──

    [1, (2.5, "a"), {3}]      <->      ["l",1,["t",2.5,"a"],["s",3]]

The text is JSON, a list being its tag and its parts: l list, t tuple, s set, z frozenset, d dict (keys and values in
turn), b bytes, B bytearray, i an int in base 16, c complex, r range, e deque, q Fraction, D Decimal, T a date or time,
v a view of a dict, y a built-in type, n a name of the standard library. A subclass of int, float, str, list, tuple,
dict or set is written as the plain value inside it: an object whose == says yes to everything arrives as a number.

What is none of these is given to `other`, which writes or reads a tag of its own.

This file is sent into sandboxes and runs there under Python 3.9 or newer. It reads with the C parser that json stands
on: json itself imports re, which would take longer than everything else that a process of the grader does.
"""

from __future__ import annotations

import builtins
import sys
from _json import encode_basestring_ascii, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in typing, which takes long to import
    from collections.abc import Callable
    from typing import Any

DEEPEST = 150  # lists in lists
SMALL = 1 << 53
TYPES: dict[str, Any] = {
    name: getattr(builtins, name)
    for name in "bool int float complex str bytes bytearray list tuple set frozenset dict range type object".split()
}
TYPES["NoneType"] = type(None)
MODULES = ("math", "cmath", "operator", "itertools", "functools", "builtins", "string", "statistics")
SEQUENCES: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}
VIEWS: dict[type, str] = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}


class Unreadable(ValueError):
    """A text that is no value, or a value that cannot be written."""


class Writer:
    """most: characters. other(value) -> its text, or None if it cannot be written."""

    def __init__(self, most: int, other: Callable[[Any], str | None] | None = None) -> None:
        self.room = most
        self.other = other

    def write(self, value: Any, depth: int = 0) -> str:
        """Raises Unreadable for what is too deep, too long, or no plain value."""
        if depth > DEEPEST:
            raise Unreadable(f"a value of more than {DEEPEST} lists in lists")
        text = self._write(value, depth)
        if depth == 0 and len(text) > self.room:
            raise Unreadable("a value that is too long")
        return text

    def _write(self, value: Any, depth: int) -> str:
        kind = type(value)
        if value is None:
            return "null"
        if kind is bool:
            return "true" if value else "false"
        if kind is int:
            text = repr(value) if -SMALL < value < SMALL else f'["i","{value:x}"]'
        elif kind is float:
            text = repr(value)
            if text in ("nan", "inf", "-inf"):
                text = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[text]
        elif kind is str:
            text = encode_basestring_ascii(value)
        elif kind in SEQUENCES:
            return self._list(SEQUENCES[kind], value, depth)
        elif kind is dict:
            return self._list("d", [part for pair in value.items() for part in pair], depth)
        else:
            return self._rare(value, kind, depth)
        self.room -= len(text)
        if self.room < 0:
            raise Unreadable("a value that is too long")
        return text

    def _list(self, tag: str, parts: Any, depth: int) -> str:
        self.room -= 6 + len(parts)
        if self.room < 0:
            raise Unreadable("a value that is too long")
        return ",".join([f'["{tag}"', *[self.write(part, depth + 1) for part in parts]]) + "]"

    def _rare(self, value: Any, kind: type, depth: int) -> str:
        if kind is complex:
            return self._list("c", (value.real, value.imag), depth)
        if kind in (bytes, bytearray):
            return self._list("b" if kind is bytes else "B", (value.hex(),), depth)
        if kind is range:
            return self._list("r", (value.start, value.stop, value.step), depth)
        if kind in VIEWS:
            return self._list("v", (VIEWS[kind], list(value)), depth)
        if value is Ellipsis:
            return '["y","Ellipsis"]'
        if issubclass(kind, type):
            word = str(type.__getattribute__(value, "__name__"))
            if TYPES.get(word) is value:
                return f'["y","{word}"]'
        home, name = kind.__module__, kind.__name__
        if (home, name) == ("collections", "deque"):
            return self._list("e", (list(value), value.maxlen), depth)
        if (home, name) == ("fractions", "Fraction"):
            return self._list("q", (value.numerator, value.denominator), depth)
        if (home, name) == ("decimal", "Decimal"):
            return self._list("D", (str(value),), depth)
        if home == "datetime" and name in TIMES and getattr(value, "tzinfo", None) is None:
            return self._list("T", (name, *[getattr(value, part) for part in TIMES[name]]), depth)
        for plain, copy in FLAT:
            if isinstance(value, plain):
                return self._write(copy(value), depth)
        text = self.other(value) if self.other is not None else None
        if text is None:
            raise Unreadable(f"a value of type {name}, which is no plain value")
        self.room -= len(text)
        return text


FLAT: list[tuple[type, Callable[[Any], Any]]] = [
    (int, int.__pos__),
    (float, float.__pos__),
    (str, str.__str__),
    (bytes, lambda value: bytes.__getitem__(value, slice(None))),
    (list, lambda value: [*list.__iter__(value)]),
    (tuple, lambda value: (*tuple.__iter__(value),)),
    (dict, lambda value: dict(dict.items(value))),
    (set, lambda value: {*set.__iter__(value)}),
    (frozenset, lambda value: frozenset(frozenset.__iter__(value))),
]
TIMES = {
    "datetime": ("year", "month", "day", "hour", "minute", "second", "microsecond"),
    "date": ("year", "month", "day"),
    "time": ("hour", "minute", "second", "microsecond"),
    "timedelta": ("days", "seconds", "microseconds"),
}


class _Context:
    """What the C parser reads its settings from."""

    strict = False
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": -float("inf")}.__getitem__
    memo: dict[str, str] = {}


_scan = make_scanner(_Context())  # type: ignore[arg-type]


def parse(text: str) -> Any:
    """JSON as it stands, tags and all. Raises Unreadable."""
    try:
        found, end = _scan(text, 0)
    except (StopIteration, ValueError, RecursionError) as error:
        raise Unreadable(f"no value: {str(error)[:100]}") from None
    if end != len(text):
        raise Unreadable("something stands behind the value")
    return found


def revive(found: Any, other: Callable[[str, list[Any]], Any] | None = None, depth: int = 0) -> Any:
    """The value of parsed JSON. other(tag, parts) makes what is no plain value. Raises Unreadable."""
    kind = type(found)
    if kind is not list:
        if kind is dict:
            raise Unreadable("a JSON object, which no value is written as")
        return found
    if depth > DEEPEST + 1:
        raise Unreadable("too many lists in lists")
    if not found or type(found[0]) is not str:
        raise Unreadable("a list without a tag")
    tag = found[0]
    try:
        if tag in "ltszdecrv":
            parts = [revive(part, other, depth + 1) for part in found[1:]]
            return _MAKE[tag](parts)
        if tag in _BARE:
            return _BARE[tag](*found[1:])
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, ArithmeticError) as error:
        raise Unreadable(f"{tag}: {str(error)[:100]}") from None
    if other is None:
        raise Unreadable(f"the tag {tag[:20]!r}")
    return other(tag, found[1:])


def read(text: str, other: Callable[[str, list[Any]], Any] | None = None) -> Any:
    """The value of a text. Raises Unreadable."""
    return revive(parse(text), other)


def _dict(parts: list[Any]) -> dict[Any, Any]:
    if len(parts) % 2:
        raise ValueError("a key without a value")
    return dict(zip(parts[::2], parts[1::2]))


def _deque(parts: list[Any]) -> Any:
    from collections import deque

    items, most = parts
    if type(items) is not list:
        raise ValueError("no list of items")
    return deque(items, most)


def _view(parts: list[Any]) -> Any:
    which, items = parts
    if which == "keys":
        return dict.fromkeys(items).keys()
    if which == "items":
        return dict(items).items()
    return dict(enumerate(items)).values()


def _exactly(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{kind.__name__} wanted, got {type(value).__name__}")
    return value


def _range(parts: list[Any]) -> range:
    return range(*[_exactly(part, int) for part in parts])


def _complex(parts: list[Any]) -> complex:
    real, imaginary = parts
    return complex(_exactly(real, float), _exactly(imaginary, float))


def _fraction(over: Any, under: Any) -> Any:
    from fractions import Fraction

    return Fraction(*[_exactly(revive(part), int) for part in (over, under)])


def _decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(_exactly(text, str))


def _time(name: str, *parts: int) -> Any:
    import datetime

    if name not in TIMES:
        raise ValueError(f"no kind of time {name!r}")
    return getattr(datetime, name)(*[_exactly(part, int) for part in parts])


def _type(name: str) -> Any:
    return Ellipsis if name == "Ellipsis" else TYPES[name]


_MAKE: dict[str, Callable[[list[Any]], Any]] = {
    "l": lambda parts: parts,
    "t": tuple,
    "s": set,
    "z": frozenset,
    "d": _dict,
    "e": _deque,
    "c": _complex,
    "r": _range,
    "v": _view,
}
_BARE: dict[str, Callable[..., Any]] = {
    "i": lambda text: int(_exactly(text, str), 16),
    "b": lambda text: bytes.fromhex(text),
    "B": lambda text: bytearray.fromhex(text),
    "q": _fraction,
    "D": _decimal,
    "T": _time,
    "y": _type,
}


def named(value: Any) -> str | None:
    """The name under which the standard library has a function: math.sqrt. None if it has not."""
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if home == "_operator":
        home = "operator"
    if home in MODULES and type(name) is str and getattr(sys.modules.get(home), name, None) is value:
        return f"{home}.{name}"
    return None


def found_by_name(name: str) -> Any:
    home, _, name = name.rpartition(".")
    if home not in MODULES:
        raise Unreadable(f"no function is taken from {home!r}")
    return getattr(__import__(home), name)


class Pipe:
    """Frames of text over two file descriptors: 4 bytes of length, then so many bytes."""

    def __init__(self, read_fd: int, write_fd: int, most: int) -> None:
        import os

        self._read, self._write = os.read, os.write  # before anybody else can change them
        self.read_fd, self.write_fd, self.most = read_fd, write_fd, most

    def receive(self) -> str | None:
        """None at the end of the input."""
        head = self._exactly(4)
        if head is None:
            return None
        size = int.from_bytes(head, "big")
        if size > self.most:
            raise Unreadable(f"a frame of {size} bytes")
        body = self._exactly(size)
        return None if body is None else body.decode("utf-8", "replace")

    def _exactly(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            more = self._read(self.read_fd, min(1 << 20, size - len(data)))
            if not more:
                return None
            data += more
        return bytes(data)

    def send(self, text: str, mark: str = "") -> None:
        data = (mark + text).encode("ascii")
        rest = memoryview(len(data).to_bytes(4, "big") + data)
        while rest:
            rest = rest[self._write(self.write_fd, rest) :]


def private_pipe(most: int) -> Pipe:
    """This process's standard input and output as a pipe of ours; what prints or reads afterwards finds nothing."""
    import os

    pipe = Pipe(os.dup(0), os.dup(1), most)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    return pipe
