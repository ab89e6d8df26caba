"""Is an answer right? check(turn, reply) -> bool, exact where answers are exact.

    exact, number, output   compared as text or as numbers        box, point   four or two numbers, 0 to 99
    program                 run against its unit tests, in a child process with limits
    svg                     rendered and compared, pixel by pixel  caption      every fact is named, and no other
    constraint              every constraint holds

    run_program(source, stdin) -> what it prints, why it failed

The gold answer is right, silence is wrong, and nothing that a model writes raises.

The child process has limits on time, memory and files, and refuses to start processes, to signal them, to reach the
network and to change files outside its empty folder. That bounds mistakes. It is not a sandbox against an attacker:
the program shares the interpreter with what refuses, and it can read what its user can. Needs a POSIX system.
"""

import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from world.sample import Turn
from world.svg import similar

SECONDS = 5.0  # by the clock, for a whole answer, from when its interpreter has started
START = 60.0  # for the interpreter: a busy machine must not make a right answer wrong
LIMITS = {
    "RLIMIT_CPU": 2,  # seconds
    "RLIMIT_AS": 512 * 2**20,  # bytes
    "RLIMIT_FSIZE": 2**20,  # bytes of one file
    "RLIMIT_CORE": 0,
    "RLIMIT_NPROC": 0,  # no further process or thread; the kernel does not hold root to it
}
LONGEST = 200_000  # characters of a reply; a longer one is wrong unread
OUTPUT = 200_000  # bytes that are read of what a program prints, and of its results


def check(turn: Turn, reply: str) -> bool:
    """Whether `reply`, the visible answer without its thinking, answers the turn.

    Raises ValueError when the turn itself is broken: its own answer is not what its check wants. (A program's own
    answer is not run each time; tests of the generators do that.) RuntimeError when no program can be run at all.
    """
    if not isinstance(reply, str):
        raise ValueError(f"a reply is text, got {type(reply).__name__}")
    kind = turn.check.kind
    if kind not in CHECKS:
        raise ValueError(f"{turn.tests}: unknown check {kind!r}; known: {', '.join(CHECKS)}")
    if kind == "program":
        _unit_tests(turn)
    elif not turn.answer.strip() or not CHECKS[kind](turn, turn.answer.strip()):
        raise ValueError(f"{turn.tests}: the gold answer {turn.answer!r} fails its own check {turn.check}")
    return len(reply) <= LONGEST and bool(reply.strip()) and CHECKS[kind](turn, reply.strip())


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
    plain = text.strip().removesuffix(".")
    if not re.fullmatch(r"[+-]?(\d{1,40}|\d{1,3}(,\d{3}){1,12})(\.\d{1,40})?(/\d{1,40})?", plain, re.ASCII):
        return None
    try:
        return Fraction(plain.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _integers(text: str, count: int) -> list[int] | None:
    if not re.fullmatch(r"[\s,\[\]()\-\d]{1,200}", text, re.ASCII):
        return None
    found = re.findall(r"-?\d+", text)
    return [int(number) for number in found] if len(found) == count else None


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
    four = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
    if box is None or not four or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"{turn.tests}: the gold box {box!r} is not (left, top, right, bottom)")
    return list(box)


def _point(turn: Turn, reply: str) -> bool:
    left, top, right, bottom = _gold_box(turn)
    said = _integers(reply, 2)
    return said is not None and left <= said[0] <= right and top <= said[1] <= bottom


def _output(turn: Turn, reply: str) -> bool:
    return _tight(reply) == _tight(turn.answer)


def _tight(text: str) -> str:
    """White space aside, except where it keeps two words or numbers apart: [1, 2] is [1,2], but 1 2 is not 12."""
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split()))


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

# The child reads its task as JSON and writes one JSON line per call, or one for the whole run, to a pipe of its own:
# what the program prints goes elsewhere. It never sees an expected value, so forged results are only guesses.
_CHILD = r"""
import io, json, os, sys

results, given = os.fdopen(int(sys.argv[1]), "w"), json.load(sys.stdin)
sys.argv, sys.stdin = ["answer.py"], io.StringIO(given["stdin"])
import resource
for name, most in given["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), (most, most))
    except (ValueError, OSError):  # macOS knows the limit on address space but does not take it
        if sys.platform == "linux":
            raise

CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = {
    "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "os.kill", "os.killpg",
    "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "resource.setrlimit", "resource.prlimit",
}
HERE = os.path.realpath(os.getcwd()) + os.sep

def refuse(event, arguments):
    refused = event in REFUSED or event.startswith(("socket.", "ctypes.", "subprocess."))
    if event == "import":
        refused = arguments[0] in ("_posixsubprocess", "_ctypes", "_socket")
    elif event == "open" and not isinstance(arguments[0], int) and (arguments[2] or 0) & CHANGES:
        refused = not os.path.realpath(os.fsdecode(arguments[0])).startswith(HERE)
    if refused:
        raise PermissionError("refused: " + event)

def say(what):
    results.write(given["seal"] + json.dumps(what) + "\n")
    results.flush()

def reason(error):
    try:
        return (type(error).__name__ + ": " + str(error))[:500].removesuffix(": ")
    except BaseException:
        return "error"

sys.addaudithook(refuse)
say({})  # ready
space, failed = {"__name__": given["module"]}, ""
try:
    exec(compile(given["source"], "answer.py", "exec"), space)
    function = space[given["name"]] if given["calls"] else None
except BaseException as error:
    over = isinstance(error, SystemExit) and error.code in (None, 0) and not given["calls"]
    failed = "" if over else reason(error)
try:
    sys.stdout.flush()
except BaseException as error:
    failed = failed or reason(error)
if failed or not given["calls"]:
    say({"error": failed})
    os._exit(0)
for arguments in given["calls"]:
    try:
        said = {"value": function(*arguments)}
        json.dumps(said)
    except BaseException as error:
        said = {"error": reason(error)}
    say(said)
os._exit(0)
"""


class _Ran(NamedTuple):
    """What a child wrote: its result lines, what it printed, and why it was ended early ("" if it was not)."""

    results: list[dict[str, Any]]
    output: str
    stopped: str


def run_program(source: str, stdin: str = "") -> tuple[str, str]:
    """Run a whole program in a child process with limits: (what it printed, why it failed or "").

    Never raises for what the program does; RuntimeError when the interpreter itself does not start. What the program
    printed before it failed is kept, up to OUTPUT bytes.
    """
    ran = _run(source, stdin=stdin, listen=True)
    return ran.output, ran.stopped or str(ran.results[0].get("error"))


def code_of(reply: str) -> str:
    """The code of a reply: what its first fence holds, or all of it."""
    fence = re.search(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    return fence.group(1) if fence else reply


def _unit_tests(turn: Turn) -> tuple[list[list[Any]], list[Any]]:
    """Arguments of the calls, and what they should give as JSON has it. Raises ValueError for a broken turn."""
    tests = turn.check.data.get("tests")
    if not isinstance(tests, list | tuple) or not tests:
        raise ValueError(f"{turn.tests}: a program needs unit tests, got {tests!r}")
    for test in tests:
        if not isinstance(test, list | tuple) or len(test) != 2 or not isinstance(test[0], list | tuple):
            raise ValueError(f"{turn.tests}: a unit test is [[arguments], expected], got {test!r}")
    try:
        calls, expected = json.loads(json.dumps([[list(a) for a, _ in tests], [e for _, e in tests]]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{turn.tests}: unit tests are plain JSON, but {error}") from error
    return calls, expected


def _program(turn: Turn, reply: str) -> bool:
    calls, expected = _unit_tests(turn)
    ran = _run(code_of(reply), name=str(turn.check.data.get("name", "f")), calls=calls)
    if ran.stopped or len(ran.results) != len(expected):
        return False
    return all("value" in said and _equal(said["value"], e) for said, e in zip(ran.results, expected, strict=True))


def _run(source: str, name: str = "", calls: Sequence[Any] = (), stdin: str = "", listen: bool = False) -> _Ran:
    """One child process: the source, then the calls of its function `name`. listen: keep what it prints."""
    seal = os.urandom(8).hex()
    given = {
        "source": source,
        "module": "answer" if calls else "__main__",
        "name": name,
        "calls": calls,
        "stdin": stdin,
        "seal": seal,
        "limits": LIMITS,
    }
    read, write = os.pipe()
    # A file rather than a pipe: ten megabytes of source then never wait for a reader. Limits are set by the child, not
    # by preexec_fn, which is unsafe beside the threads of a model that is being evaluated.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as task,
        open(read, "rb", 0),
    ):
        try:
            task.write(json.dumps(given).encode())
            task.seek(0)
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _CHILD, str(write)],
                stdin=task,
                stdout=subprocess.PIPE if listen else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write,),
                cwd=folder,
                env={},
                start_new_session=True,
            )
        finally:
            os.close(write)
        with child:
            try:
                texts, stopped = _listen(child, [read] if child.stdout is None else [read, child.stdout.fileno()])
            finally:
                _end(child)
    if not texts[0]:
        raise RuntimeError(f"the interpreter that runs programs did not start: {stopped or child.returncode}")
    lines = texts[0].decode("utf-8", "replace").splitlines()[1:]  # the first says that it is ready
    results: list[dict[str, Any]] = []
    if all(line.startswith(seal) for line in lines):  # else the program wrote to the pipe of the results
        with contextlib.suppress(ValueError, RecursionError):
            results = [json.loads(line.removeprefix(seal)) for line in lines]
    if not all(isinstance(said, dict) for said in results):
        results = []
    if not results and not stopped:
        stopped = f"ended without a result, exit status {child.returncode}"
    return _Ran(results, texts[-1].decode("utf-8", "replace") if listen else "", stopped)


def _listen(child: "subprocess.Popen[bytes]", pipes: Sequence[int]) -> tuple[list[bytes], str]:
    """Read until the child has ended: (text of each pipe, why it has to be stopped)."""
    deadline, late = time.monotonic() + START, f"no sign after {START:g} s"
    texts = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                return list(texts.values()), late
            for key, _ in ready:
                part = os.read(key.fd, 65_536)
                if key.fd == pipes[0] and not texts[key.fd]:
                    deadline, late = time.monotonic() + SECONDS, f"no end after {SECONDS:g} s"
                texts[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
                if len(texts[key.fd]) > OUTPUT:
                    texts[key.fd] = texts[key.fd][:OUTPUT]
                    return list(texts.values()), f"more than {OUTPUT} bytes of output"
    try:
        status = child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return list(texts.values()), late
    return list(texts.values()), f"ended by signal {-status}" if status < 0 else ""


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Kill the child with whatever it started in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


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
    gold = turn.check.data.get("svg")
    if not isinstance(gold, str):
        raise ValueError(f"{turn.tests}: a drawing is compared with the text data['svg'], got {gold!r}")
    return similar(gold, reply)


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
