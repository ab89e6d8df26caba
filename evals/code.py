"""Does the program do what the tests want? Two processes that meet only on a pipe.

    grade(Task("function", gold=" return a + b", data={"prompt": "def add(a, b):\\n", "entry_point": "add",
               "test": "def check(candidate):\\n    assert candidate(2, 3) == 5"}), reply)        ->   score 1.0

    sandbox 1: judge                    grader                     sandbox 2: candidate
    the tests, what is expected  ──  relays frames  ──  the model's code: answers calls, knows no test
                │
                └── passed, or what failed: the only verdict there is

data of a task, by its form:
    tests of a function   test: source, with check(candidate) or plain asserts. Or tests: a list of asserts, and
                          setup: source that is run before them. entry_point: the function, or Class.method.
                          prompt: source that the answer continues, or repeats; its helpers are the tests' helpers
    input and output      io: [{"input", "output"}, ...]: programs that read standard input and print; or, with an
                          entry_point, functions: each line of input is an argument as JSON, output is the value as
                          JSON. tolerance: of numbers. prelude: imports before the program (LIVE_PRELUDE is usual)
    what does it print    predict: "output" or "input", code: a source with a function f, input: the arguments as
                          text, output: the value as text. The gold is data[predict]
    all forms             cpu_s, memory_mb: limits of the candidate, where there is no reference to measure

gold: a reference solution, as an answer would be. It is run first, in the same kind of sandbox: it must pass, or the
task is broken (ValueError); the candidate may use FACTOR times its processor time, or FLOOR seconds. Without a
reference gold is None and data["unchecked"] is True.

An answer that names numpy is run with this program's numpy, where the sandbox's Python is of the same version: bound
read-only into a sandbox of its own. Tests see plain values; numpy's own functions in them are played by evals/judge.py,
so that no array of a candidate's is ever made beside what is expected.

Of a reply the last block of Python counts that defines the function, or continues the prompt; without a block, the
text. It is taken apart in the sandbox: hostile text can break the compiler. Score 1 if every test passes, else 0.
Evidence: passed, of, error, status ("passed", "failed", "timeout", "memory", "exited", "output_limit", ...), cpu_s.
"""

import asyncio
import atexit
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from agent.sandbox import (
    Backend,
    Channel,
    ExecResult,
    Limits,
    Sandbox,
    SandboxError,
    Spec,
    backend,
    find_python,
    running,
)
from evals.values import Writer, read

T = TypeVar("T")
FACTOR = 10.0  # times the reference's processor time
FLOOR = 3.0  # seconds of processor time that every candidate has
ASLEEP = 5.0  # seconds on the clock beyond that
UNMEASURED = 10.0  # seconds, where there is no reference
MEMORY_MB = 1024
OUTPUT_KB = 64 * 1024
LARGEST_FRAME = 64 * 2**20  # bytes
LARGEST_ANSWER = 16 * 2**20
REFERENCE = Limits(wall_s=90.0, cpu_s=30.0, memory_mb=MEMORY_MB, output_kb=OUTPUT_KB)
LIVE_PRELUDE = "\n".join(
    [
        "import sys, math, re, collections, itertools, functools, heapq, bisect, string, random, operator, copy, json",
        "from typing import *",
        "from collections import *",
        "from itertools import *",
        "from functools import *",
        "from heapq import *",
        "from bisect import *",
        "from math import *",
        "inf = float('inf')",
        "sys.setrecursionlimit(50000)",
        "",
    ]
)


# ---- sandboxes of this process


class Sandboxes:
    """An event loop in a thread, a backend that keeps some sandboxes started, and judges to use again."""

    def __init__(self, name: str, allow_unsafe: bool, pool: int) -> None:
        self.backend: Backend = backend(name, pool=pool, allow_unsafe=allow_unsafe)
        self.stack = contextlib.ExitStack()
        self.loop = self.stack.enter_context(running())
        self.judges: list[Sandbox] = []  # no program of a model ever runs in these
        self.size = pool

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    async def take_judge(self) -> Sandbox:
        return self.judges.pop() if self.judges else await self.backend.open()

    async def give_back(self, judge: Sandbox, sound: bool) -> None:
        if sound and len(self.judges) < self.size:
            self.judges.append(judge)
        else:
            await judge.close()

    async def _end(self) -> None:
        while self.judges:
            await self.judges.pop().close()
        await self.backend.close()

    def close(self) -> None:
        self.loop.run(self._end())
        self.stack.close()


_lock = threading.RLock()
_settings: dict[str, Any] = {"name": "auto", "allow_unsafe": False, "pool": 2 * min(4, os.cpu_count() or 1)}
_held: dict[str, Any] = {}


def use(name: str = "auto", *, allow_unsafe: bool = False, pool: int | None = None) -> None:
    """Which sandboxes programs are graded in from now on, and how many are kept started. Raises as
    agent.sandbox.backend does."""
    with _lock:
        close()
        _settings.update(name=name, allow_unsafe=allow_unsafe, pool=_settings["pool"] if pool is None else pool)
        sandboxes()


def sandboxes() -> Sandboxes:
    """The ones in use; started when first asked for. Raises SandboxError where none works."""
    with _lock:
        if _held.get("pid") != os.getpid():  # none yet, or a fork's copy of the parent's
            _held.clear()
            _held.update(pid=os.getpid(), sandboxes=Sandboxes(**_settings))
        held: Sandboxes = _held["sandboxes"]
        return held


@atexit.register
def close() -> None:
    """End them; the next grade starts new ones."""
    with _lock:
        if _held.get("pid") == os.getpid():
            _held["sandboxes"].close()
        _held.clear()


# ---- programs that run inside


BOOT = """import sys, marshal
def module(name, code):
    made = type(sys)(name)
    sys.modules[name] = made
    exec(code, made.__dict__)
    return made
sys.modules['evals'] = type(sys)('evals')
"""


@lru_cache(maxsize=8)
def _program(name: str, local: bool, ending: str) -> str:
    """Source that runs one of our modules in a sandbox; compiled beforehand where its interpreter is known."""
    text = BOOT
    python = find_python() if local else None
    for each in ("values", name):
        source = (Path(__file__).parent / f"{each}.py").read_text(encoding="utf-8")
        code = f"compile({source!r}, {each!r}, 'exec')"
        if python is not None:
            compiling = f"import marshal; print(repr(marshal.dumps(compile({source!r}, {each!r}, 'exec', optimize=2))))"
            done = subprocess.run([python.path, "-I", "-S", "-c", compiling], capture_output=True, text=True)
            if done.returncode:
                raise SandboxError(f"{python.path} cannot compile the grader's program: {done.stderr[-300:]}")
            code = f"marshal.loads({done.stdout.strip()})"
        text += f"{each} = module('evals.{each}', {code})\n"
    return text + ending.replace("main()", f"{name}.main()")


def _inside(name: str, ending: str = "main()") -> str:
    return _program(name, sandboxes().backend.name in ("bwrap", "landlock", "none"), ending)


# an answer may import numpy: this program's own, from its folder alone, after everything that Python itself finds
OFFER = """
class Numpy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            from importlib.util import spec_from_file_location as found
            return found(name, {place!r} + "/__init__.py", submodule_search_locations=[{place!r}])
sys.meta_path.append(Numpy)
"""
NUMPY = "/opt/numpy"


@lru_cache(maxsize=1)
def _numpy() -> Path | None:
    """The folder of numpy where the sandbox's Python can load it: it is compiled for one version of Python."""
    from importlib.util import find_spec

    spec, python = find_spec("numpy"), find_python()
    if spec is None or spec.origin is None or python is None:
        return None
    asked = [python.path, "-I", "-S", "-c", "import sys; print(sys.implementation.cache_tag)"]
    said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return Path(spec.origin).resolve().parent if said == sys.implementation.cache_tag else None


def _offered(own: Sandboxes, texts: Iterable[str]) -> tuple[Spec | None, str]:
    """A sandbox with numpy in it, read-only, and the program that lets it be imported, for answers that name it.

    Others get what is kept started, without: an open sandbox cannot be given another folder.
    """
    folder = _numpy() if own.backend.name in ("bwrap", "landlock", "none") else None
    if folder is None or not any("numpy" in text for text in texts):
        return None, ""
    binds = {f"{NUMPY}/numpy": str(folder)}
    libraries = folder.with_name("numpy.libs")  # where a wheel has them
    if libraries.is_dir():
        binds[f"{NUMPY}/numpy.libs"] = str(libraries)
    place = f"{NUMPY}/numpy" if own.backend.name == "bwrap" else str(folder)
    return Spec(binds=binds, env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}), OFFER.format(place=place)


def blocks(said: str) -> list[str]:
    """The parts of a reply that may be the program, best first: fenced Python from the last to the first, then
    what stands before a fence that was opened in the prompt, then other fenced text, or all of it without fences."""
    python: list[str] = []
    other: list[str] = []
    before: list[str] = []
    lines = said.splitlines(keepends=True)
    opened, language, kept = "", "", list[str]()
    for line in lines:
        bare = line.strip()
        mark = next((sign for sign in ("```", "~~~") if bare.startswith(sign)), "")
        if not opened and mark:
            ticks = len(bare) - len(bare.lstrip(mark[0]))
            opened, language, kept = mark[0] * ticks, bare.strip(mark[0]).strip().split(" ")[0].lower(), []
        elif opened and bare.startswith(opened) and not bare.strip(opened[0]):
            (python if language in ("", "python", "py", "python3") else other).append("".join(kept))
            opened = ""
        elif opened:
            kept.append(line)
        elif not python and not other:
            before.append(line)
    if opened and language in ("", "python", "py", "python3"):
        python.append("".join(kept))  # cut off before its end
    first = "".join(before)
    found = [textwrap.dedent(block) if block[:1].isspace() else block for block in reversed(python) if block.strip()]
    raw = [block for block in reversed(python) if block.strip() and block[:1].isspace()]
    if not python and not other:
        return [said]
    if first[:1].isspace() and first.strip():  # the prompt has opened the block
        return [first, *raw, *found]
    return [*raw, *found, *reversed(other), first]


# ---- one trial


@dataclass(frozen=True)
class Outcome:
    """passed None: the machinery failed."""

    passed: bool | None
    evidence: dict[str, Any] = field(default_factory=dict)
    cpu_s: float = 0.0
    wall_s: float = 0.0
    changed: bool = False
    broken: str | None = None


async def _frame(channel: Channel, most: int) -> bytes | None:
    """None: it has ended, or what it sends is no frame."""
    head = await channel.receive(4)
    size = int.from_bytes(head, "big")
    if len(head) < 4 or size > most:
        return None
    body = await channel.receive(size)
    return body if len(body) == size else None


async def _send(channel: Channel, body: bytes) -> None:
    await channel.send(len(body).to_bytes(4, "big") + body)


def _ended(result: ExecResult) -> dict[str, Any]:
    status = "exited" if result.status in ("ok", "nonzero") else result.status
    return {"status": status, "error": f"the candidate's process has ended: {result.status}, {result.returncode}"}


async def _trial(own: Sandboxes, order: Mapping[str, Any], program: Mapping[str, Any], limits: Limits) -> Outcome:
    """One candidate against one task's tests. Raises SandboxError where a sandbox fails."""
    judge_box = await own.take_judge()
    sound = False
    try:
        spec, offer = _offered(own, [*(program.get("options") or [program["program"]]), str(program.get("prompt", ""))])
        async with await own.backend.open(spec) as box:
            judging = replace(limits, wall_s=limits.wall_s + 20, cpu_s=limits.cpu_s + 20, memory_mb=2048)
            judge = await judge_box.spawn(source=_inside("judge"), limits=judging)
            candidate = await box.spawn(source=_inside("candidate", offer + "main()"), limits=limits)
            await _send(judge, Writer(LARGEST_FRAME // 2).write(dict(order)).encode("ascii"))
            await _send(candidate, Writer(LARGEST_FRAME // 2).write(dict(program)).encode("ascii"))
            verdict = await _relay(judge, candidate)
            if isinstance(verdict, dict) and not verdict["error"]:
                await candidate.finish_input()  # a process that has nothing left to do ends by itself
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(candidate.wait(), 0.5)
            used = candidate.result or await candidate.kill()
            if isinstance(verdict, ExecResult) and verdict is not used:  # the judge did not live to the end
                if verdict.status not in ("timeout", "memory", "output_limit"):
                    raise SandboxError(f"the judge ended with {verdict.status}: {verdict.stderr[-300:]!r}")
                evidence = {"status": verdict.status, "error": "the tests did not end on what the candidate gave them"}
                return Outcome(False, evidence, used.cpu_s, used.wall_s)
            if isinstance(verdict, ExecResult):
                if used.status == "infra_error":
                    raise SandboxError(used.stderr[-300:].decode(errors="replace"))
                return Outcome(False, _ended(used), used.cpu_s, used.wall_s)
            if verdict is None:
                evidence = {"status": "failed", "error": "an answer that is no answer, or is too long"}
                return Outcome(False, evidence, used.cpu_s, used.wall_s)
            await judge.wait()
            sound = True
            return _outcome(verdict, used)
    finally:
        await own.give_back(judge_box, sound)


async def _relay(judge: Channel, candidate: Channel) -> dict[str, Any] | ExecResult | None:
    """Carry questions and answers until the judge has decided; the end of the one that ended before; None for a
    candidate that sends no frames."""
    while True:
        body = await _frame(judge, LARGEST_FRAME)
        if body is None:
            return await judge.wait()
        if body[:1] == b"v":
            verdict: dict[str, Any] = read(body[1:].decode("ascii"))
            return verdict
        await _send(candidate, body[1:])
        answer = await _frame(candidate, LARGEST_ANSWER)
        if answer is None:
            if not candidate.ended:
                await candidate.kill()
                return None
            return candidate.result
        await _send(judge, answer)


def _printable(text: str | None) -> str | None:
    """Some of it is the candidate's: nothing that a terminal would obey."""
    return None if text is None else "".join(sign if sign.isprintable() else " " for sign in text[:700])


def _outcome(verdict: Mapping[str, Any], used: ExecResult) -> Outcome:
    error = verdict["error"]
    passed = error is None and not verdict["broken"] and verdict["passed"] == verdict["of"]
    status = "passed" if passed else "failed"
    if error and "MemoryError" in str(error).partition(" in: ")[0]:
        status = "memory"
    evidence = {"status": status, "passed": verdict["passed"], "of": verdict["of"], "error": _printable(error)}
    broken = verdict["broken"] if verdict["broken"] else None
    return Outcome(passed, evidence, used.cpu_s, used.wall_s, verdict["changed"], broken)


def _try(trial: Callable[[Limits], Coroutine[Any, Any, Outcome]], limits: Limits) -> Outcome:
    """Again where the machinery fails, and where the clock ran out on a machine that is busy with something else."""
    own = sandboxes()
    failure = ""
    for _ in range(2):
        try:
            outcome = own.run(trial(limits))
        except SandboxError as error:
            failure = str(error)
            continue
        starved = outcome.evidence.get("status") == "timeout" and outcome.cpu_s < limits.cpu_s
        if starved and os.getloadavg()[0] > (os.cpu_count() or 1):
            outcome = own.run(trial(replace(limits, wall_s=5 * limits.wall_s)))
        return replace(outcome, evidence={**outcome.evidence, "cpu_s": round(outcome.cpu_s, 3)})
    return Outcome(None, {"error": failure})


# ---- programs that read and print


async def _run_all(
    own: Sandboxes, io: list[Mapping[str, Any]], order: Mapping[str, Any], limits: Limits, tolerance: float
) -> Outcome:
    text = Writer(LARGEST_FRAME // 2).write(dict(order))
    spec, offer = _offered(own, order["options"])
    source = _inside("candidate", offer + "pass") + f"\ncandidate.run_program(values.read({text!r}))\n"
    cpu = wall = 0.0
    async with await own.backend.open(spec) as box:
        for at, each in enumerate(io):
            result = await box.python(source, stdin=str(each["input"]).encode(), limits=limits)
            if result.status == "infra_error":
                raise SandboxError(result.stderr[-300:].decode(errors="replace"))
            cpu, wall = max(cpu, result.cpu_s), max(wall, result.wall_s)
            evidence: dict[str, Any] = {"passed": at, "of": len(io), "error": None}
            if not result.ok:
                said = result.stderr.decode(errors="replace").strip().splitlines()[-1:]
                status: str = "memory" if said and said[0].startswith("MemoryError") else result.status
                status = "exited" if status == "nonzero" else status
                return Outcome(False, {**evidence, "status": status, "error": _printable("".join(said))}, cpu, wall)
            printed = result.stdout.decode(errors="replace")
            if not same_output(printed, str(each["output"]), tolerance):
                error = f"printed {printed[:200]!r}, wanted {str(each['output'])[:200]!r}"
                return Outcome(False, {**evidence, "status": "failed", "error": error}, cpu, wall)
    return Outcome(True, {"status": "passed", "passed": len(io), "of": len(io), "error": None}, cpu, wall)


def same_output(printed: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Line by line, spaces at the ends aside; numbers by their value."""
    ours, theirs = ([line.strip() for line in text.strip().splitlines()] for text in (printed, wanted))
    if ours == theirs:
        return True
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            both = a.split(), b.split()
            if len(both[0]) != len(both[1]):
                return False
            if not all(x == y or _same_number(x, y, tolerance) for x, y in zip(*both, strict=True)):
                return False
    return True


def _same_number(a: str, b: str, tolerance: float) -> bool:
    if max(len(a), len(b)) > 400:
        return False
    try:
        x, y = Decimal(a), Decimal(b)
    except InvalidOperation:
        return False
    if not (x.is_finite() and y.is_finite()) or max(abs(x.adjusted()), abs(y.adjusted())) > 400:
        return False
    return x == y or abs(x - y) <= Decimal(tolerance) * max(Decimal(1), abs(y))


# ---- the forms


def _orders(gold: Any, data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """For the judge, and for the candidate but for the options. Raises ValueError for a task of no form."""
    entry = data.get("entry_point")
    if entry is not None and not (isinstance(entry, str) and all(part.isidentifier() for part in entry.split("."))):
        raise ValueError(f"function: entry_point must be a name, got {entry!r}")
    prompt = data.get("prompt") or ""
    judge: dict[str, Any] = {"entry": entry, "changes": True, "prelude": data.get("prelude")}
    program: dict[str, Any] = {"entry": entry.partition(".")[0] if entry else None, "prompt": prompt}
    if "predict" in data:
        return _prediction(data)
    if "io" in data:
        tests = [_functional(entry or "", each, data) for each in data["io"]]
        return {**judge, "tests": tests, "prelude": SAME}, {**program, "prelude": data.get("prelude") or ""}
    if isinstance(prompt, str) and prompt.strip():
        closed = (text for text in (prompt, prompt + "    pass\n") if _parsed(text) is not None)
        judge["prompt"] = next(closed, None)  # without its helpers the tests would use the candidate's
    if "tests" in data:
        tests = data["tests"]
        if not isinstance(tests, list | tuple) or not tests or not all(isinstance(test, str) for test in tests):
            raise ValueError(f"function: tests must be a list of asserts, got {str(tests)[:80]!r}")
        judge.update(tests=list(tests), setup=data.get("setup") or "")
    elif isinstance(data.get("test"), str) and data["test"].strip():
        judge.update(test=data["test"], setup=data.get("setup") or "")
    else:
        raise ValueError("function: a task needs test, tests, io or predict; see evals/code.py")
    if gold is not None:
        judge["imports"], judge["defined"] = _known(str(gold), prompt)
        if entry is None and judge["defined"]:
            used = "\n".join(judge.get("tests") or [judge["test"]])
            named = [name for name in judge["defined"] if name in used]
            program["entry"] = named[-1] if named else None
    return judge, program


def _parsed(source: str) -> Any:
    """Of trusted source only: hostile text can break the parser."""
    import ast

    try:
        with warnings.catch_warnings():  # about escapes in other people's data
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _known(gold: str, prompt: str) -> tuple[str, list[str]]:
    """The reference's import lines, and the names that it defines."""
    import ast

    best = next((block for block in blocks(gold) if _parsed(block) is not None), None)
    tree = _parsed(prompt + gold) or (_parsed(best) if best is not None else None)
    if tree is None:
        return "", []
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = [f"try:\n    {line}\nexcept ImportError:\n    pass" for line in imports if "__future__" not in line]
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return "\n".join(lines), defined


SAME = """
def same(value, wanted):
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(same(a, b) for a, b in zip(value, wanted))
    if isinstance(value, float) and isinstance(wanted, (int, float)):
        return value == wanted or abs(value - wanted) <= 1e-9 * max(1.0, abs(wanted))
    return value == wanted and (isinstance(value, bool) == isinstance(wanted, bool))
"""


def _functional(entry: str, each: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """A test of a function whose arguments and value are JSON. entry: f, or Solution.f."""
    try:
        given = each["input"]
        arguments = (
            [json.loads(line) for line in given.splitlines() if line.strip()] if isinstance(given, str) else given
        )
        wanted = json.loads(each["output"]) if isinstance(each["output"], str) else each["output"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"function: a test's input is a line of JSON for each argument: {error}") from None
    called = f"globals()[{entry!r}]"
    return f"assert same({called}(*{arguments!r}), {wanted!r})"


ANSWER = "answer"


def _prediction(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The candidate only says a value. The judge runs the function, on the input that is given or was said."""
    code, which = data["code"], data["predict"]
    if which not in ("output", "input"):
        raise ValueError(f"function: predict is output or input, got {which!r}")
    call = f"f({data['input']})" if which == "output" else f"f(*{ANSWER}()[0], **{ANSWER}()[1])"
    wanted = f"{ANSWER}()" if which == "output" else data["output"]
    tests = [f"assert {call} == ({wanted})"]
    judge = {"entry": ANSWER, "changes": False, "prelude": code, "tests": tests}
    return judge, {"entry": ANSWER, "prompt": ""}


def _said(said: str, data: Mapping[str, Any]) -> list[str]:
    """Programs that an answer may mean, best first."""
    if "predict" not in data:
        return blocks(said)
    from evals.graders import final

    text = said
    if "[/ANSWER]" in text or "[ANSWER]" in text:
        text = text.rpartition("[ANSWER]")[2].partition("[/ANSWER]")[0]
    text = blocks(text)[0].strip() if "```" in text else final(text)
    text = text.removeprefix("assert ").strip()
    if data["predict"] == "output":
        if text.startswith("f(") and "==" in text:
            text = text.partition("==")[2]
        return [f"def {ANSWER}():\n    return (\n{text}\n)\n"]
    call = "f = lambda *a, **k: (a, k)\n"
    called = [text] if text.startswith("f(") else [f"f({text})"]
    if text.startswith("f(") and "==" in text:
        called.insert(0, text.rpartition("==")[0])
    return [f"{call}def {ANSWER}():\n    return (\n{each}\n)\n" for each in called]


# ---- the grader


def limits_of(data: Mapping[str, Any], reference: Outcome | None) -> Limits:
    """Of a candidate: its processor time follows the reference's, so that a slow machine changes no score. The clock
    on the wall only ends what sleeps."""
    memory = int(data.get("memory_mb", MEMORY_MB))
    if reference is None:
        cpu = float(data.get("cpu_s", UNMEASURED))
        return Limits(wall_s=cpu + ASLEEP, cpu_s=cpu, memory_mb=memory, output_kb=OUTPUT_KB)
    cpu = max(FLOOR, FACTOR * reference.cpu_s)
    wall = max(cpu + ASLEEP, FACTOR * reference.wall_s)
    return Limits(wall_s=wall, cpu_s=cpu, memory_mb=memory, output_kb=OUTPUT_KB)


def _attempt(gold: Any, data: Mapping[str, Any], said: str, limits: Limits, changes: bool = True) -> Outcome:
    options = _said(said, data)
    if "io" in data and not data.get("entry_point"):
        order = {"entry": None, "prompt": "", "options": [(data.get("prelude") or "") + each for each in options]}
        io = list(data["io"])
        if not io or not all(isinstance(each, Mapping) and "input" in each and "output" in each for each in io):
            raise ValueError("function: io is a list of {input, output}")
        tolerance = float(data.get("tolerance", 0))
        return _try(lambda limits: _run_all(sandboxes(), io, order, limits, tolerance), limits)
    judge, program = _orders(gold, data)
    judge["changes"] = judge["changes"] and changes
    if program.pop("prelude", ""):
        options = [data["prelude"] + each for each in options]
    candidate = {**program, "options": options}
    return _try(lambda limits: _trial(sandboxes(), judge, candidate, limits), limits)


def run_tests(
    program: str, test: str, limits: Limits | None = None, entry_point: str | None = None, setup: str = ""
) -> Outcome:
    """One program, as it is, against one source of tests. entry_point: the name that the tests are about."""
    judge: dict[str, Any] = {"entry": entry_point, "changes": True, "test": test, "setup": setup}
    if entry_point is not None:
        judge.update(test=None, tests=[test])  # it calls check itself
    limits = limits or limits_of({}, None)
    return _try(lambda limits: _trial(sandboxes(), judge, {"program": program}, limits), limits)


_measured: dict[str, Outcome] = {}
_measuring: dict[str, threading.Lock] = {}


def reference(gold: Any, data: Mapping[str, Any]) -> Outcome | None:
    """The reference solution's own run, once for each task; None for a task without one.

    Raises ValueError for a task whose reference fails, or without a reference that is not said to be unchecked.
    """
    if gold is None:
        if not data.get("unchecked"):
            raise ValueError("function: gold is a reference solution; without one, data['unchecked'] must be True")
        return None
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError(f"function: gold must be a reference solution, got {gold!r}")
    key = hashlib.sha256(repr((gold, sorted(data.items()), _settings)).encode("utf-8", "surrogatepass")).hexdigest()
    with _lock:
        lock = _measuring.setdefault(key, threading.Lock())
    with lock:
        if key not in _measured:
            outcome = _attempt(gold, data, gold, REFERENCE)
            if outcome.broken or outcome.passed is False:
                why = outcome.broken or outcome.evidence.get("error")
                raise ValueError(f"function: the reference solution does not pass its own tests: {why}")
            if outcome.passed is None:
                return outcome
            _measured[key] = outcome
        return _measured[key]


def function(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
    """The grader of the kind "function". Raises ValueError for a broken task."""
    known = reference(gold, data)
    if known is not None and known.passed is None:
        return None, dict(known.evidence)
    if known is not None and said == gold:
        return 1.0, dict(known.evidence)
    limits = limits_of(data, known)
    # where the reference leaves its arguments alone, a candidate that empties them must not make a test come true
    outcome = _attempt(gold, data, said, limits, changes=known is None or known.changed)
    evidence = {**outcome.evidence, "limit_cpu_s": round(limits.cpu_s, 2)}
    name = sandboxes().backend.name
    if name != "bwrap":
        evidence["isolation"] = name
    if outcome.broken and outcome.passed is not None and known is None and not outcome.evidence.get("error"):
        raise ValueError(f"function: the tests do not run: {outcome.broken}")
    return (None if outcome.passed is None else float(outcome.passed)), evidence
