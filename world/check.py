"""Is an answer right? check(turn, reply) -> bool, exact where answers are exact.

    exact, number, output   compared as text or as numbers        box, point   four or two numbers, 0 to 99
    program                 run against its unit tests, in a child process with limits
    svg                     rendered and compared, pixel by pixel  caption      every fact is named, and no other
    constraint              every constraint holds

The gold answer is right, silence is wrong, and nothing that a model writes raises. The child process of `program` has
limits on time, memory and files; it is not a sandbox against an attacker, since it can still read what its user can.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from world.sample import Turn
from world.svg import similar

SECONDS, CPU_SECONDS, MEMORY, FILE = 5.0, 2, 512 * 2**20, 2**20  # wall, processor, address space, largest file
OUTPUT = 200_000  # characters of a program's output that are read


def check(turn: Turn, reply: str) -> bool:
    """Whether `reply`, the visible answer without its thinking, answers the turn.

    Raises ValueError when the turn itself is broken: its own answer cannot be read as its check wants it.
    """
    if not isinstance(reply, str):
        raise ValueError(f"a reply is text, got {type(reply).__name__}")
    return bool(reply.strip()) and CHECKS[turn.check.kind](turn, reply.strip())


def _exact(turn: Turn, reply: str) -> bool:
    return _plain(reply) == _plain(turn.answer)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _number(turn: Turn, reply: str) -> bool:
    gold, said = _read_number(turn.answer), _read_number(reply)
    if gold is None:
        raise ValueError(f"{turn.tests}: the gold answer {turn.answer!r} is no number")
    return said is not None and abs(said - gold) <= Fraction(turn.check.data.get("tolerance", 0))


def _read_number(text: str) -> Fraction | None:
    """One number and nothing else: 12, -3.5, 1,200, 2/3."""
    plain = text.strip().rstrip(".").replace(",", "")
    if not re.fullmatch(r"[+-]?\d{1,40}(\.\d{1,40})?(/\d{1,40})?", plain, re.ASCII):
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def _integers(text: str, count: int) -> list[int] | None:
    if not re.fullmatch(r"[\s,\[\]()\-\d]{1,200}", text, re.ASCII):
        return None
    found = [int(number) for number in re.findall(r"-?\d{1,9}", text)]
    return found if len(found) == count else None


def _box(turn: Turn, reply: str) -> bool:
    gold = _gold_box(turn)
    said = _integers(reply, 4)
    return said is not None and overlap(said, gold) >= 0.5


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 for a box without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b) if c[2] > c[0] and c[3] > c[1]]
    if width <= 0 or height <= 0 or len(areas) < 2:
        return 0.0
    return width * height / (sum(areas) - width * height)


def _gold_box(turn: Turn) -> list[float]:
    box = turn.check.data.get("box")
    if not isinstance(box, list | tuple) or len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"{turn.tests}: the gold box {box!r} is not (left, top, right, bottom)")
    return list(box)


def _point(turn: Turn, reply: str) -> bool:
    left, top, right, bottom = _gold_box(turn)
    said = _integers(reply, 2)
    return said is not None and left <= said[0] <= right and top <= said[1] <= bottom


def _output(turn: Turn, reply: str) -> bool:
    return "".join(reply.split()) == "".join(turn.answer.split())


def _caption(turn: Turn, reply: str) -> bool:
    facts = turn.check.data.get("facts")
    if not facts:
        raise ValueError(f"{turn.tests}: a caption needs facts")
    said = sorted(_plain(part) for part in reply.split(","))
    return said == sorted(_plain(" ".join(fact)) for fact in facts)


# ---- constraints -----------------------------------------------------------------------------------------------------


def _constraint(turn: Turn, reply: str) -> bool:
    constraints = turn.check.data.get("constraints")
    if not constraints:
        raise ValueError(f"{turn.tests}: nothing to hold to")
    return all(holds(constraint, reply) for constraint in constraints)


def holds(constraint: Mapping[str, Any], text: str) -> bool:
    """One constraint {"kind", "value"}. Raises ValueError for an unknown kind."""
    kind, value = constraint.get("kind"), constraint.get("value")
    words = re.findall(r"[^\W_]+", text)
    rules: dict[str, Callable[[], bool]] = {
        "equals": lambda: text.strip() == value,
        "contains": lambda: str(value) in words,
        "excludes": lambda: str(value).lower() not in text.lower(),
        "words": lambda: len(words) == value,
        "upper": lambda: text.isupper(),
        "lower": lambda: text.islower(),
        "startswith": lambda: text.strip().startswith(str(value)),
        "endswith": lambda: text.strip().endswith(str(value)),
        "repeat": lambda: value is not None and words.count(value[0]) == value[1],
        "lines": lambda: len(text.strip().splitlines()) == value,
    }
    if kind not in rules:
        raise ValueError(f"unknown constraint {kind!r}; known: {', '.join(rules)}")
    return rules[kind]()


# ---- programs --------------------------------------------------------------------------------------------------------

# The child reads source and calls, and writes one JSON line per call to a pipe of its own: what the program prints goes
# elsewhere. It never sees an expected value.
_CHILD = r"""
import json, os, sys
results, given = os.fdopen(int(sys.argv[1]), "w"), json.load(sys.stdin)
space = {"__name__": "answer"}
try:
    exec(compile(given["source"], "answer.py", "exec"), space)
    function = space[given["name"]]
except BaseException as error:
    results.write(json.dumps({"error": type(error).__name__}) + "\n")
    results.flush()
    os._exit(0)
for arguments in given["calls"]:
    try:
        line = json.dumps({"value": function(*arguments)})
    except BaseException as error:
        line = json.dumps({"error": type(error).__name__})
    results.write(given["seal"] + line + "\n")
    results.flush()
os._exit(0)
"""


def code_of(reply: str) -> str:
    """The code of a reply: what its first fence holds, or all of it."""
    fence = re.search(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    return fence.group(1) if fence else reply


def _program(turn: Turn, reply: str) -> bool:
    tests = turn.check.data.get("tests")
    if not tests:
        raise ValueError(f"{turn.tests}: a program needs unit tests")
    return _results(code_of(reply), str(turn.check.data.get("name", "f")), [t[0] for t in tests], [t[1] for t in tests])


def _results(source: str, name: str, calls: list[Any], expected: list[Any]) -> bool:
    if "\x00" in source:
        return False
    seal = os.urandom(8).hex()
    read, write = os.pipe()
    given = json.dumps({"source": source, "name": name, "calls": calls, "seal": seal}).encode("utf-8", "replace")
    text = b""
    with tempfile.TemporaryDirectory() as folder:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD, str(write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write,),
                cwd=folder,
                env={},
                preexec_fn=_limit if sys.platform != "win32" else None,
                start_new_session=True,
            )
        finally:
            os.close(write)
        try:
            text = _exchange(child, given, read)
        finally:
            _end(child)
            os.close(read)
    lines = text.decode("utf-8", "replace").splitlines()
    said = []
    for line in lines:
        if not line.startswith(seal):
            return False
        try:
            said.append(json.loads(line.removeprefix(seal)))
        except (ValueError, RecursionError):
            return False
    if len(said) != len(expected):
        return False
    return all("value" in one and _equal(one["value"], json.loads(json.dumps(e))) for one, e in zip(said, expected))  # noqa: B905


def _exchange(child: "subprocess.Popen[bytes]", given: bytes, read: int) -> bytes:
    """Give the child its task and read its results until it closes them, floods us or runs out of time."""
    import select
    import time

    deadline = time.monotonic() + SECONDS
    assert child.stdin is not None
    try:
        child.stdin.write(given)
        child.stdin.close()
    except BrokenPipeError:
        return b""
    text = b""
    while len(text) < OUTPUT:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([read], [], [], left)[0]:
            return b""
        part = os.read(read, 65_536)
        if not part:
            return text
        text += part
    return b""


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Kill the child with whatever it started in its session."""
    import contextlib
    import signal

    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _equal(a: Any, b: Any) -> bool:
    """Equal values of equal kinds: True is not 1; floats to twelve digits."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float) or isinstance(b, float):
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        return numbers and math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def _svg(turn: Turn, reply: str) -> bool:
    return similar(turn.answer, reply)


CHECKS: dict[str, Callable[[Turn, str], bool]] = {
    "exact": _exact,
    "number": _number,
    "box": _box,
    "point": _point,
    "program": _program,
    "output": _output,
    "svg": _svg,
    "constraint": _constraint,
    "caption": _caption,
}
