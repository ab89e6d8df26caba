"""The process that runs a task's tests. It knows what is expected, and calls the candidate through a pipe.

    tests ── candidate(2, 3) ──> a stand-in ── call, arguments ──> the other process
          <── 5, or an error ──       "      <── plain values ──
      │
      └── passed, or the first test that failed  ──> the grader

Tests and golds are trusted; every byte that comes from the candidate is not. A value of it is of an exact plain type,
or a stand-in for an object that stays over there: its attributes, methods, items, length and text can be asked for.
What is compared is never sent: a stand-in equals itself and nothing else, and has no arithmetic.

An order: {prelude, imports, prompt, entry, defined, setup, tests or test, changes}
    prelude     source that is run first                 imports   import lines of the reference solution
    prompt      source with helpers that tests may use   entry     the name (or Class.method) under test
    defined     names that the candidate defines; None: those that nothing else here defines
    tests       lines, each a test; or test: one source, whose check(candidate) is called where it defines one
    changes     whether changes that the candidate makes to its arguments are seen, as in one process

Sent into a sandbox with evals/values.py; it runs under Python 3.9 or newer.
"""

from __future__ import annotations

import builtins
import sys

from evals.values import Unreadable, Writer, named, parse, private_pipe, read, revive

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in typing, which takes long to import
    from collections.abc import Iterator
    from typing import Any

    from evals.values import Pipe

LONGEST_SENT, LONGEST_READ = 32 * 2**20, 64 * 2**20  # bytes
MOST_ITEMS = 1_000_000  # of one iterator
KNOWN = """math cmath sys re collections itertools random string functools heapq operator copy datetime decimal
    fractions typing bisect statistics json time""".split()


def close_to(a: Any, b: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> bool:
    """numpy.allclose of numbers, and of lists of lists of them."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(close_to(x, y, rtol, atol, equal_nan) for x, y in zip(a, b))
    if isinstance(b, (list, tuple)):
        return all(close_to(a, y, rtol, atol, equal_nan) for y in b)
    if isinstance(a, (list, tuple)):
        return all(close_to(x, b, rtol, atol, equal_nan) for x in a)
    if a != a or b != b:
        return equal_nan and a != a and b != b
    if a == b or abs(a) == float("inf") or abs(b) == float("inf"):
        return bool(a == b)
    return bool(abs(a - b) <= atol + rtol * abs(b))


def assert_close(a: Any, b: Any, rtol: float = 1e-07, atol: float = 0.0, **rest: Any) -> None:
    if not close_to(a, b, rtol, atol, equal_nan=True):  # an assert is gone where this is compiled without them
        raise AssertionError("not close enough")


def stand_in_for_numpy() -> None:
    """What the tests of HumanEval+ and MBPP+ use of numpy, for an interpreter without it."""
    numpy, testing = type(sys)("numpy"), type(sys)("numpy.testing")
    testing.__dict__["assert_allclose"] = assert_close
    numpy.__dict__.update(allclose=close_to, isclose=close_to, testing=testing, ndarray=type("ndarray", (), {}))
    numpy.__dict__.update(float64=float, float32=float, inf=float("inf"), nan=float("nan"))
    sys.modules.update({"numpy": numpy, "numpy.testing": testing})


class Gone(BaseException):
    """The candidate cannot answer any more."""


class Line:
    """The pipe to the candidate, by way of the grader."""

    def __init__(self, pipe: Pipe, changes: bool) -> None:
        self.pipe = pipe
        self.changes = changes
        self.changed = False
        self.calls = 0
        self.trouble: str | None = None
        self.objects: dict[int, Standin] = {}
        self.given: list[Any] = []

    def ask(self, what: str, *parts: str, arguments: tuple[Any, ...] = ()) -> Any:
        if self.trouble is not None:
            raise Gone(self.trouble)
        import os

        token = os.urandom(9).hex()
        self.pipe.send(",".join([f'["{token}","{what}"', *parts]) + "]", "c")
        while True:
            text = self.pipe.receive()
            if text is None:
                raise self.gone("the candidate is gone")
            try:
                answer = parse(text)
                if type(answer) is not list or len(answer) < 3 or answer[0] != token:
                    raise Unreadable("an answer to no question")
                if answer[1] == "value":
                    value = revive(answer[2], self.theirs)
                    self.take_changes(answer[3], arguments)
                    return value
                if answer[1] == "raised":
                    raised = self.error(revive(answer[2]), read_text(answer[3]), answer[4])
                elif answer[1] == "broken":
                    raise self.gone(read_text(answer[2]))
                elif answer[1] == "calls":
                    self.serve(token, *answer[2:])
                    continue
                else:
                    raise Unreadable("an answer of no known kind")
            except (Unreadable, IndexError, TypeError, ValueError, RecursionError) as error:
                raise self.gone(f"an answer that cannot be read: {error}") from None
            raise raised

    def gone(self, why: str) -> Gone:
        self.trouble = self.trouble or why
        return Gone(why)

    def take_changes(self, changes: Any, arguments: tuple[Any, ...]) -> None:
        for at, found in changes:
            new = revive(found, self.theirs)
            if type(at) is not int or not 0 <= at < len(arguments):
                raise Unreadable("a change of no argument")
            self.changed = True
            if self.changes:
                become(arguments[at], new)

    def error(self, names: Any, text: str, arguments: Any) -> Exception:
        """The nearest built-in exception, under the candidate's own name for it."""
        kind: Any = Exception
        names = [name for name in names if type(name) is str and name.isidentifier()]
        for name in names:
            found = getattr(builtins, name, None)
            if isinstance(found, type) and issubclass(found, Exception):
                kind = found
                break
        if names and names[0] != kind.__name__:
            kind = type(names[0], (kind,), {})
        try:
            error: Exception = kind(*revive(arguments, self.theirs))
        except (TypeError, ValueError):
            error = Exception(text)
        error.from_candidate = True  # type: ignore[attr-defined]
        return error

    def serve(self, token: str, number: Any, texts: Any, pairs: Any) -> None:
        """A function of the tests that the candidate calls."""
        function = self.given[number]
        values = [read(text, self.theirs) for text in texts]
        keywords = {read_text(name): read(text, self.theirs) for name, text in pairs}
        try:
            answer = f'"value",{self.quoted(function(*values, **keywords))}'
        except Exception as error:
            name = Writer(200).write(type(error).__name__)
            answer = f'"raised",{name},{Writer(10_000).write(str(error)[:1000])}'
        self.pipe.send(f'["{token}",{answer}]', "c")

    # ---- values

    def theirs(self, tag: str, parts: list[Any]) -> Any:
        if tag == "g":
            return items(self, number_of(parts))
        if tag == "o":
            number = number_of(parts)
            if number not in self.objects:
                self.objects[number] = Standin(self, ["object", number], read_text(parts[1]))
            return self.objects[number]
        if tag == "k":
            return self.given[number_of(parts)]
        raise Unreadable(f"the tag {tag[:20]!r}")

    def mine(self, value: Any) -> str | None:
        if isinstance(value, Standin):
            kind, which = object.__getattribute__(value, "_target")
            return f'["o",{which}]' if kind == "object" else f'["o",{number_by_name(self, which)}]'
        if hasattr(type(value), "__next__"):
            return Writer(LONGEST_SENT, self.mine).write(["g", *value]).replace('["l","g"', '["g"', 1)
        if callable(value) and not isinstance(value, type):
            known = named(value)
            if known is not None:
                return f'["n","{known}"]'
            for number, given in enumerate(self.given):
                if given is value:
                    return f'["k",{number}]'
            self.given.append(value)
            return f'["k",{len(self.given) - 1}]'
        return None

    def quoted(self, value: Any) -> str:
        """A value's text, as a text in a text: the other side compares it after the call."""
        text = Writer(LONGEST_SENT, self.mine).write(value)
        return Writer(2 * LONGEST_SENT).write(text)


def number_of(parts: list[Any]) -> int:
    if not parts or type(parts[0]) is not int:
        raise Unreadable("an object without a number")
    return parts[0]


def number_by_name(line: Line, name: str) -> int:
    found = line.ask("get", quote(name))
    if not isinstance(found, Standin):
        raise Unreadable(f"{name} is no object of the candidate's")
    number: int = object.__getattribute__(found, "_target")[1]
    return number


def read_text(found: Any) -> str:
    if type(found) is not str:
        raise Unreadable("no text where one belongs")
    return found


def quote(name: str) -> str:
    return Writer(10_000).write(name)


def become(old: Any, new: Any) -> None:
    """Change a container to what it has become over there, and what is in it where it stays in place."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, tuple)):
        both = list(zip(old, new))
        kept = [a if type(a) is type(b) and isinstance(a, (list, dict, set, tuple)) else b for a, b in both]
        if isinstance(old, list):
            for a, b in both:
                become(a, b)
            old[:] = [*(a if a == b else b for a, b in zip(kept, new)), *new[len(old) :]]
        else:
            for a, b in both:
                become(a, b)
    elif isinstance(old, dict):
        for key in old.keys() & new.keys():
            become(old[key], new[key])
        merged = {key: old[key] if key in old and old[key] == new[key] else new[key] for key in new}
        old.clear()
        old.update(merged)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new


def items(line: Line, number: int) -> Iterator[Any]:
    """What an iterator of the candidate gives; asked for a few at a time, more and more."""
    count, seen = 1, 0
    while True:
        found = line.ask("more", str(number), str(count))
        if type(found) is not list or len(found) != 2 or type(found[0]) is not list:
            raise line.gone("an iterator that gives no items")
        yield from found[0]
        seen += len(found[0])
        if found[1] is True:
            return
        if type(found[1]) is list:
            raise line.error(found[1][0], read_text(found[1][1]), ["l", found[1][1]])
        if not found[0] or seen > MOST_ITEMS:
            raise line.gone(f"an iterator of more than {MOST_ITEMS} items, or of none without an end")
        count *= 2


class Standin:
    """An object of the candidate's, or a name of it."""

    def __init__(self, line: Line, target: list[Any], name: str) -> None:
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "__name__", name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        line, (kind, which) = _of(self)
        line.calls += 1
        where = f'["name",{quote(which)}]' if kind == "name" else f'["object",{which}]'
        texts = ",".join(line.quoted(argument) for argument in arguments)
        pairs = ",".join(f"[{quote(name)},{line.quoted(value)}]" for name, value in keywords.items())
        return line.ask("call", where, f"[{texts}]", f"[{pairs}]", arguments=arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _asked(self, "attribute", quote(name))

    def __setattr__(self, name: str, value: Any) -> None:
        _asked(self, "set", quote(name), _of(self)[0].quoted(value))

    def __getitem__(self, key: Any) -> Any:
        return _asked(self, "item", _of(self)[0].quoted(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        _asked(self, "put", _of(self)[0].quoted(key), _of(self)[0].quoted(value))

    def __len__(self) -> int:
        return int(_asked(self, "length"))

    def __str__(self) -> str:
        return str(_asked(self, "text"))

    def __repr__(self) -> str:
        return f"<{object.__getattribute__(self, '__name__')} of the candidate>"

    def __bool__(self) -> bool:
        _, (kind, _) = _of(self)
        return True if kind == "name" else _asked(self, "truth") is True

    def __iter__(self) -> Any:
        return iter(_asked(self, "iterate"))

    def __instancecheck__(self, value: Any) -> bool:
        line, (kind, which) = _of(self)
        if not isinstance(value, Standin) or kind != "name":
            return False
        return line.ask("instance", str(_of(value)[1][1]), quote(which)) is True


def _of(standin: Standin) -> tuple[Line, list[Any]]:
    return object.__getattribute__(standin, "_line"), object.__getattribute__(standin, "_target")


def _asked(standin: Standin, what: str, *parts: str) -> Any:
    line, (kind, which) = _of(standin)
    number = which if kind == "object" else number_by_name(line, which)
    return line.ask(what, str(number), *parts)


# ---- the tests


class Court:
    """One task's tests."""

    def __init__(self, pipe: Pipe, order: dict[str, Any]) -> None:
        self.line = Line(pipe, order["changes"])
        self.order = order
        self.module = type(sys)("tests")
        sys.modules["tests"] = self.module
        self.names = self.module.__dict__
        self.passed = 0
        self.of = len(order["tests"]) if order.get("tests") is not None else 1

    def run(self) -> dict[str, Any]:
        """{passed, of, error, broken, changed, calls}. broken: the tests themselves do not run."""
        order, error, broken, step = self.order, None, None, ""
        if "numpy" in str([order.get(part) for part in ("test", "tests", "setup", "prelude")]):
            stand_in_for_numpy()
        try:
            step = "prelude"
            for source in (order.get("prelude"), order.get("prompt"), order.get("imports")):
                if source:
                    exec(compile(source, "<prelude>", "exec", dont_inherit=True), self.names)
            step = "tests"
            setup = order.get("setup") or ""
            parts = order["tests"] if order.get("tests") is not None else [order["test"]]
            codes = [compile(part, "<tests>", "exec", dont_inherit=True) for part in parts]
            before = compile(setup, "<setup>", "exec", dont_inherit=True)
            self.stand_in([before, *codes])
        except Exception as trouble:
            return self.verdict(None, f"{step}: {type(trouble).__name__}: {str(trouble)[:500]}")
        try:
            step = setup
            exec(before, self.names)
            for part, code in zip(parts, codes):
                step = part
                exec(code, self.names)
                if order.get("tests") is None and order.get("entry") and callable(self.names.get("check")):
                    self.names["check"](self.names[order["entry"]])
                if self.line.trouble is not None:
                    raise Gone(self.line.trouble)
                self.passed += 1
        except Gone as gone:
            error = str(gone) or "gone"
        except BaseException as trouble:
            where = self.line.trouble or f"{type(trouble).__name__}: {str(trouble)[:300]}"
            if not getattr(trouble, "from_candidate", False):
                where += f" in: {self.failing(trouble, step)}"
            error = where
        if self.passed == self.of and self.line.calls == 0:
            broken = "the tests never call the candidate"
        return self.verdict(error, broken)

    def verdict(self, error: str | None, broken: str | None) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "of": self.of,
            "error": error,
            "broken": broken,
            "changed": self.line.changed,
            "calls": self.line.calls,
        }

    def failing(self, trouble: BaseException, source: str) -> str:
        """The line of the tests that failed."""
        number, trace = 0, trouble.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "<tests>":
                number = trace.tb_lineno
            trace = trace.tb_next
        lines = source.splitlines()
        return lines[number - 1].strip()[:300] if 0 < number <= len(lines) else source.strip()[:300]

    def stand_in(self, codes: list[Any]) -> None:
        """A stand-in for each name that the tests take from the candidate."""
        entry, defined = self.order.get("entry"), self.order.get("defined")
        used: list[str] = []
        for code in codes:
            _names(code, used)
        theirs = [] if entry is None else [entry]
        for name in used:
            if defined is not None and name in defined and name not in self.names:
                theirs.append(name)
            elif name in self.names or name in vars(builtins) or name == entry:
                continue
            elif name in KNOWN:
                self.names[name] = __import__(name)
            else:
                theirs.append(name)
        if not theirs and used:
            theirs.append(used[0])  # a function called like a built-in one: sum
        for name in theirs:
            self.names[name] = Standin(self.line, ["name", name], name.rpartition(".")[2])


def _names(code: Any, found: list[str]) -> None:
    """Names and attributes that a program uses, in order."""
    for name in code.co_names:
        if name not in found:
            found.append(name)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            _names(constant, found)


def main() -> None:
    pipe = private_pipe(LONGEST_READ)
    order = pipe.receive()
    assert order is not None, "an order comes first"
    verdict = Court(pipe, read(order)).run()
    pipe.send(Writer(1_000_000).write(verdict), "v")
