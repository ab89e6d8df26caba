"""Does the code of a chat answer do what was asked? The tests are those in the question, or a question's hidden ones.

    tests = tests_of("Write f(n), the n-th prime. assert f(1) == 2, >>> f(4) gives 7 ...")
    run_tests(answer, tests)       ->  Outcome(passed=2, total=2, tests=(Tried("f(1) == 2", True, "passed", 0.1), ...))

    question ── assert lines, doctests, test_ functions, "f(1) -> 2" ──┐
    "world/function/7/heldout", "HumanEval/32", "MBPP/11" ── hidden ───┤
                                                                 each test: judge │ pipe │ candidate (evals/code.py)
    answer ── the block of Python that defines what is tested ─────────┘

Each test runs in two sandboxes of its own: the answer's code is called through a pipe and knows no test, so that code
which compares equal to everything, ends the process or reads its caller's frames passes nothing. A question without
tests: the program is run, and what it prints is shown. Where no sandbox works the outcome is a sentence.
"""

import ast
import doctest
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from agent.sandbox import Limits, SandboxError
from agent.tools import started
from evals import code

LONGEST_PROMPT = 100_000  # characters that are looked at for tests
LONGEST_STATEMENT = 2_000  # characters; the interpreter's parser bears such a text, however it is nested
LONGEST_BLOCK = 20_000
LONGEST_ANSWER = 200_000
MOST_TESTS = 40
SHOWN = 4_000  # characters of a program's output
SECONDS = 30.0  # for all tests of an answer; those that it leaves no time for are not run
CPU_S = 2.0  # of one test
MOST_TIMEOUTS = 2  # after which the rest is not run
WHOLE = "all its tests"
SLOW = "ran out of time"
DEEPEST = 60  # of a syntax tree of somebody else's
PYTHON = ("python", "py", "python3")  # behind a fence
RUN = Limits(wall_s=10.0, cpu_s=5.0, memory_mb=512, pids=16, output_kb=64)

_GAVE = "'gave ' + shown_as(got_) + ', wanted ' + shown_as(wanted_)"

# what the judge compares examples with: types that print alike are alike, and floats may differ in the last digits
AGREES = """
def agrees(value, wanted):
    if isinstance(value, float) and isinstance(wanted, (int, float)) and not isinstance(wanted, bool):
        close = abs(value - wanted) <= 1e-9 * max(1.0, abs(wanted))
        return value == wanted or close or (value != value and wanted != wanted)
    if type(value) is not type(wanted):
        return False
    if isinstance(wanted, (list, tuple)):
        return len(value) == len(wanted) and all(agrees(a, b) for a, b in zip(value, wanted))
    if isinstance(wanted, dict):
        return value.keys() == wanted.keys() and all(agrees(value[key], wanted[key]) for key in wanted)
    return value == wanted
"""
SHOW = """
def shown_as(value):
    try:
        text = repr(value)
    except ValueError:
        return "a very large number"
    return text if len(text) <= 120 else text[:117] + "..."
"""


@dataclass(frozen=True)
class Test:
    """One test. source: as people read it; data: as the grader of functions takes it (evals/code.py)."""

    __test__ = False  # no test of pytest's

    source: str
    data: Mapping[str, Any] = field(repr=False)
    gold: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Tests:
    """Tests of one question. origin: "question", "world", "HumanEval", "MBPP", or "" where there are none."""

    __test__ = False

    tests: tuple[Test, ...] = ()
    entry: str | None = None  # the function that they are about
    origin: str = ""
    note: str = ""  # what was left out

    def __len__(self) -> int:
        return len(self.tests)


@dataclass(frozen=True)
class Tried:
    """One test and what happened. ok None: it was not run."""

    source: str
    ok: bool | None
    what: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What came of an answer. passed of total; tests: each of them. output: of a program without tests. isolation: the
    sandbox that it ran in, empty where nothing ran. note: one sentence about all of it."""

    passed: int
    total: int
    tests: tuple[Tried, ...] = ()
    isolation: str = ""
    note: str = ""
    output: str = ""
    program: str = ""

    @property
    def right(self) -> bool:
        """Whether there were tests and all passed."""
        return self.total > 0 and self.passed == self.total


# ---- the code of an answer

# a line that begins a program, in an answer without fences
_BARE = re.compile(
    r"^(async )?def \w+\(|^class \w+[:(]|^import \w+$|^from [\w.]+ import |^print\(|^\w+ = ", re.MULTILINE
)


def programs(answer: str) -> list[str]:
    """The parts of an answer that may be its program, best first; nothing if it holds no Python."""
    said = answer.rpartition("</think>")[2][:LONGEST_ANSWER]
    fenced = _fenced(said)
    if fenced and not any(language in ("", *PYTHON) for language, _ in fenced):
        return []
    if not fenced and not _BARE.search(said):
        return []
    return [block for block in code.blocks(said) if block.strip()]


def _fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks, in order; one that is not closed ends with the text."""
    found: list[tuple[str, str]] = []
    opened, language, kept = "", "", list[str]()
    for line in text.split("\n"):
        bare = line.strip()
        mark = re.match(r"`{3,}|~{3,}", bare)
        if not opened and mark:
            opened, kept = mark[0], []
            language = bare[len(opened) :].strip().split(" ")[0].lower()
        elif opened and bare.startswith(opened) and not bare.strip(opened[0]):
            found.append((language, "\n".join(kept)))
            opened = ""
        elif opened:
            kept.append(line)
    return [*found, (language, "\n".join(kept))] if opened else found


def program_of(answer: str, entry: str | None = None) -> str | None:
    """The block of an answer that defines `entry`, or its last block; None if it holds no Python. For showing: which
    part is graded is decided in the sandbox."""
    found = programs(answer)
    if entry:
        for block in found:
            if re.search(rf"^(async )?(def|class) {re.escape(entry)}\b|^{re.escape(entry)} *=", block, re.MULTILINE):
                return block
    return found[0] if found else None


# ---- the tests of a question


def tests_of(prompt: str, question: str | None = None, folder: Path | None = None) -> Tests:
    """The tests that a question holds; with an id those that belong to it, which the text need not show.

    prompt: the user's text. question: "world/FAMILY/INDEX/SPLIT[/SEED[/LEVEL[/TURN]]]", "HumanEval/32" or "MBPP/11".
    folder: of HumanEval's or MBPP's files; left out: where evals.rows.find_data looks. Raises ValueError for an id that
    names nothing here.
    """
    if question is not None:
        return _hidden(question, folder)
    if not isinstance(prompt, str):
        raise ValueError(f"a question is text, got {type(prompt).__name__}")
    text = prompt[:LONGEST_PROMPT].replace("\r\n", "\n").expandtabs(4)
    found: list[_Found] = []
    notes: list[str] = []
    context, prose = "", text
    for block in [block for _, block in _fenced(text)] or [text]:
        tree = _parsed(block, LONGEST_BLOCK) or _parsed(block + "\n    pass\n", LONGEST_BLOCK)
        if tree is not None:
            found += _of_block(tree)
            context += _stub(tree)
            prose = prose.replace(block, "")
    found += _asserts(prose)
    try:
        found += _doctests(text, notes)
    except ValueError as error:
        notes.append(f"its doctests cannot be read: {error}")
    found += _arrows(text)
    tests: list[Test] = []
    seen: set[str] = set()
    entry = _entry(found)
    for each in found:
        key = re.sub(r"\s", "", each.shown)
        if key in seen or entry is None:
            continue
        seen.add(key)
        called = each.calls if entry not in each.calls else [entry]
        data = {
            "unchecked": True,
            "prompt": _without(context, called[0]),
            "entry_point": called[0],
            "prelude": AGREES + SHOW,
            "setup": each.setup,
            "tests": [each.source],
            "cpu_s": CPU_S,
            "memory_mb": 512,
        }
        tests.append(Test(each.shown, data))
    if len(tests) > MOST_TESTS:
        notes.append(f"{len(tests) - MOST_TESTS} of its {len(tests)} tests are left out")
    return Tests(tuple(tests[:MOST_TESTS]), entry, "question" if tests else "", "; ".join(notes))


@dataclass(frozen=True)
class _Found:
    """shown: as it stands in the question; source: as the judge runs it; setup: what it runs before."""

    shown: str
    source: str
    calls: list[str]
    setup: str = ""


def _parsed(source: str, most: int = LONGEST_STATEMENT) -> ast.Module | None:
    """None for what is no Python, or is too long to be read here: a hostile text can break the parser."""
    if len(source) > most or not source.strip() or "\0" in source:
        return None
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    level: list[ast.AST] = [tree]
    for _ in range(DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return tree
    return None  # what walks through it does so by recursion


def _calls(tree: ast.AST, known: Set[str] = frozenset()) -> list[str]:
    """Names that are called, and are neither Python's nor made beside the call, outermost first; Python's if there is
    no other."""
    import builtins

    named = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    own = [name for name in named if not hasattr(builtins, name) and name not in known]
    return list(dict.fromkeys(own)) or [name for name in dict.fromkeys(named) if name not in known]


def _entry(found: list[_Found]) -> str | None:
    """The function that most tests call."""
    names = [each.calls[0] for each in found if each.calls]
    return max(names, key=names.count) if names else None


def _stub(tree: ast.Module) -> str:
    """What of a question's code the answer goes on from: imports, constants, classes and functions, without tests."""
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (node.name.startswith("test_") or node.name == "check"):
            continue
        constant = isinstance(node, ast.Assign | ast.AnnAssign)
        if constant and not any(isinstance(each, ast.Call) for each in ast.walk(node)):
            kept.append(node)
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            kept.append(node)
    return "".join(ast.unparse(node) + "\n" for node in kept)


def _without(context: str, entry: str) -> str:
    """A question's code without a body for the function under test: else an answer without code would pass by the
    question's. A stub of it stays last, where an answer may go on."""
    tree = _parsed(context, LONGEST_BLOCK)
    if tree is None:
        return ""
    kept: list[ast.stmt] = []
    last: list[ast.stmt] = []
    for node in tree.body:
        if getattr(node, "name", None) != entry:
            kept.append(node)
        elif isinstance(node, ast.FunctionDef) and all(_empty(each) for each in node.body):
            words = ast.get_docstring(node, clean=False)
            node.body = [ast.Expr(ast.Constant(words or ""))]
            last = [node]
    return "".join(ast.unparse(node) + "\n" for node in [*kept, *last])


def _empty(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return "NotImplementedError" in ast.unparse(node)
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _of_block(tree: ast.Module) -> Iterator[_Found]:
    """Asserts and test functions of a whole block; what stands between them is run before."""
    before: list[str] = []
    known: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assert):
            yield _assertion(node, "".join(before), known)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test") and not node.args.args:
            source = ast.unparse(node)
            calls = _calls(node, known | {node.name})
            if calls:
                yield _Found(f"{node.name}()", f"{source}\n{node.name}()", calls, "".join(before))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            before.append(ast.unparse(node) + "\n")
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            before.append(ast.unparse(node) + "\n")
            known |= _stored(node)


def _stored(tree: ast.AST) -> set[str]:
    """Names that it gives a value."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _assertion(node: ast.Assert, setup: str = "", known: set[str] | None = None) -> _Found:
    calls = _calls(node, known or set()) or _calls(_parsed(setup) or ast.Module([], []), set())
    return _Found(ast.unparse(node).removeprefix("assert "), _telling(node), calls, setup)


def _telling(node: ast.Assert) -> str:
    """The same assert, which says what it got. Names that stand beside the call are handed on as copies: a program that
    empties its argument must not make `f(xs) == sorted(xs)` true."""
    test = _Copies(node.test).visit(node.test)
    both = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)
    if not both:
        return f"assert {ast.unparse(test)}"
    left, right = ast.unparse(test.left), ast.unparse(test.comparators[0])
    return f"got_ = ({left})\nwanted_ = ({right})\nassert got_ == wanted_, {_GAVE}"


class _Copies(ast.NodeTransformer):
    """Puts copy.deepcopy around names that are arguments of a call and stand outside of it too."""

    def __init__(self, whole: ast.AST) -> None:
        names = [node.id for node in ast.walk(whole) if isinstance(node, ast.Name)]
        calls = [node.func for node in ast.walk(whole) if isinstance(node, ast.Call)]
        called = {each.id for each in calls if isinstance(each, ast.Name)}
        self.twice = {name for name in names if names.count(name) > 1} - called

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        node.args = [self.copied(each) for each in node.args]
        return node

    def copied(self, node: ast.expr) -> ast.expr:
        if not isinstance(node, ast.Name) or node.id not in self.twice:
            return node
        return ast.Call(ast.Attribute(ast.Name("copy", ast.Load()), "deepcopy", ast.Load()), [node], [])


def _asserts(text: str) -> Iterator[_Found]:
    """`assert ...` lines in prose or code, some over several lines."""
    lines = text.split("\n")
    for at, line in enumerate(lines):
        start = re.match(r"[\s>*\-•`\d.)]*(assert\b.*)", line)
        if not start or line.lstrip().startswith(">>>"):
            continue
        whole = start[1].rstrip("` ")
        for more in range(12):
            tree = _parsed(whole)
            if tree is not None and len(tree.body) == 1 and isinstance(tree.body[0], ast.Assert):
                if _calls(tree):
                    yield _assertion(tree.body[0], known=set())
                break
            if at + more + 1 >= len(lines) or not lines[at + more + 1].strip():
                break
            whole += "\n" + lines[at + more + 1]


def _doctests(text: str, notes: list[str]) -> Iterator[_Found]:
    """Examples after >>>. Those before it in the same block are run first."""
    # the end of a docstring or of a fence is not what an example prints
    plain = re.sub(r"(\"\"\"|'''|```|~~~)[^\n]*$", "", text, flags=re.MULTILINE)
    plain = re.sub(r"^([ ]*>>>)(?=\S)", r"\1 ", plain, flags=re.MULTILINE)
    before, known, left_out = "", set[str](), 0
    for each in doctest.DocTestParser().get_examples(plain):
        source, want = each.source.strip(), _until_prose(each.want)
        tree = _parsed(source)
        if tree is None or not tree.body:
            left_out += 1
            continue
        calls = _calls(tree, known) or _calls(_parsed(before) or ast.Module([], []), set())
        shown = source + (f"  ->  {want}" if want else "")
        node = tree.body[-1]
        if not want:
            before += source + "\n"
            known |= _stored(tree)
            continue
        body = _example(source, node, each, want)
        if body is None or not calls or len(tree.body) != 1:
            left_out += 1
        else:
            yield _Found(shown, body, calls, before)
        # what changes something that was made before; others may fail, and would take the rest with them
        method = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if each.exc_msg is None and method and any(isinstance(n, ast.Name) and n.id in known for n in ast.walk(tree)):
            before += source + "\n"
    if left_out:
        notes.append(f"{left_out} of its examples cannot be checked by what they print")


def _until_prose(want: str) -> str:
    """What an example prints, without further tests that stand right below it."""
    kept: list[str] = []
    for line in want.strip().split("\n"):
        if kept and (_ARROW.search(line) or re.match(r"[\s>*\-•`]*assert\b", line)):
            break
        kept.append(line)
    return "\n".join(kept).strip()


def _example(source: str, node: ast.stmt, each: doctest.Example, want: str) -> str | None:
    if each.exc_msg is not None:
        name = each.exc_msg.strip().partition(":")[0].rpartition(".")[2]
        if not name.isidentifier():
            return None
        body = "\n".join("    " + line for line in source.split("\n"))
        return (
            f"raised_ = 'nothing'\ntry:\n{body}\nexcept Exception as error_:\n"
            f"    raised_ = [kind.__name__ for kind in type(error_).__mro__]\n"
            f"assert {name!r} in raised_, 'raised ' + (raised_ if raised_ == 'nothing' else raised_[0])"
        )
    if isinstance(node, ast.Assert):
        return None
    if not isinstance(node, ast.Expr):
        return None
    if isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "print":
        return (
            f"import io\nout_ = io.StringIO()\nimport contextlib\nwith contextlib.redirect_stdout(out_):\n"
            f"    {ast.unparse(node)}\n"
            f"assert out_.getvalue().split() == {want.split()!r}, 'printed ' + shown_as(out_.getvalue())"
        )
    return _equal(ast.unparse(node), want)


def _equal(call: str, want: str) -> str | None:
    """The test that a call gives a value that is written down; None where that is no plain value."""
    try:
        value = ast.literal_eval(want) if _parsed(want) is not None else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if value is None and want != "None":
        return None
    wanted = ast.unparse(ast.parse(want, mode="eval"))
    return f"got_ = ({call})\nwanted_ = ({wanted})\nassert agrees(got_, wanted_), {_GAVE}"


_ARROW = re.compile(r"(?P<call>[A-Za-z_]\w*\(.*\))\s*(?:->|=>|→|⇒|==|should return|returns|gives)\s*(?P<want>\S.*)$")


def _arrows(text: str) -> Iterator[_Found]:
    """Lines like "f(1, 2) -> 3": a call with plain arguments, and one plain value."""
    for line in text.split("\n"):
        if ">>>" in line or "assert" in line or len(line) > LONGEST_STATEMENT:
            continue
        match = _ARROW.search(re.sub(r"`", "", line).strip())
        if match is None:
            continue
        want = re.sub(r"\s+#.*$", "", match["want"]).rstrip(" .;,")
        tree = _parsed(match["call"])
        node = tree.body[0] if tree is not None and len(tree.body) == 1 else None
        call = node.value if isinstance(node, ast.Expr) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        if not all(_plain(each) for each in [*call.args, *(word.value for word in call.keywords)]):
            continue
        body = _equal(ast.unparse(call), want)
        if body is not None:
            yield _Found(f"{ast.unparse(call)}  ->  {want}", body, [call.func.id])


def _plain(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


# ---- hidden tests


def _hidden(question: str, folder: Path | None) -> Tests:
    kind, _, rest = question.partition("/")
    if kind == "world":
        parts = rest.split("/")
        numbers = [*parts[1:2], *parts[3:]]
        if not 3 <= len(parts) <= 6 or not all(part.isascii() and part.isdigit() for part in numbers):
            raise ValueError(f"wanted world/FAMILY/INDEX/SPLIT[/SEED[/LEVEL[/TURN]]], got {question[:80]!r}")
        more = [int(part) for part in parts[3:]]
        return world_tests(parts[0], int(parts[1]), parts[2], *more)
    if kind in ("HumanEval", "MBPP"):
        return _published(kind, question, folder)
    raise ValueError(f"no question {question[:80]!r}; known: world/..., HumanEval/..., MBPP/...")


def world_tests(family: str, index: int, split: str = "heldout", seed: int = 0, level: int = 1, turn: int = 0) -> Tests:
    """Unit tests of a question of the world that asks for a function. Raises ValueError for one that asks for none."""
    from world import sample

    made = sample(family, index, split, seed, level)  # type: ignore[arg-type]
    if not 0 <= turn < len(made.turns):
        raise ValueError(f"{family}/{index} has {len(made.turns)} questions, there is no number {turn}")
    asked = made.turns[turn]
    if asked.check.kind != "program":
        raise ValueError(f"{family}/{index} asks for no function, but is checked as {asked.check.kind!r}")
    name = str(asked.check.data["name"])
    tests = []
    for given, wanted in asked.check.data["tests"]:
        call = f"{name}({', '.join(map(repr, given))})"
        source = f"got_ = {call}\nwanted_ = {wanted!r}\nassert same(got_, wanted_), {_GAVE}"
        data = {"tests": [source], "entry_point": name, "prelude": code.SAME + SHOW}
        tests.append(Test(f"{call}  ->  {wanted!r}", data, asked.answer))
    return Tests(tuple(tests), name, "world")


def _published(kind: str, question: str, folder: Path | None) -> Tests:
    from evals.rows import find_data

    folder = folder or find_data(kind.lower())
    if folder is None:
        raise ValueError(f"{question}: the data of {kind} is not on this machine; see `moonkit eval list`")
    items = _items(kind.lower(), folder)
    if question not in items:
        raise ValueError(f"{folder} has no question {question!r}")
    task = items[question].task
    entry = str(task.data["entry_point"])
    tests = []
    for shown, data in _apart(task.data, entry):
        tests.append(Test(shown, data, task.gold))
    return Tests(tuple(tests), entry, kind)


@lru_cache(maxsize=4)
def _items(suite: str, folder: Path) -> dict[str, Any]:
    from evals.loaders import LOADERS
    from evals.rows import Source

    return {item.id: item for item in LOADERS[suite](Source(suite, folder))}


def _apart(data: Mapping[str, Any], entry: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The asserts of a benchmark's tests one by one, each with what is run before it; all in one where they are many,
    or their form is another."""
    if "tests" in data:
        for each in data["tests"]:
            step = ast.parse(each).body
            told = _telling(step[0]) if len(step) == 1 and isinstance(step[0], ast.Assert) else each
            yield each.removeprefix("assert ").strip(), {**data, "tests": [told], "prelude": SHOW}
        return
    tree = ast.parse(data["test"])
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    steps = checks[0].body if len(checks) == 1 else []
    testing = [step for step in steps if any(isinstance(node, ast.Assert) for node in ast.walk(step))]
    # a test that calls nothing, as `assert True` in some of HumanEval, would be one that cannot fail
    testing = [step for step in testing if any(isinstance(node, ast.Call) for node in ast.walk(step))]
    if not 1 < len(testing) <= MOST_TESTS:
        yield WHOLE, dict(data)
        return
    for step in testing:
        before = [each for each in steps[: steps.index(step)] if each not in testing]
        before = [each for each in before if not isinstance(each, ast.Assert)]
        shown = ast.unparse(step).removeprefix("assert ").replace("candidate(", f"{entry}(")
        told = ast.parse(_telling(step)).body if isinstance(step, ast.Assert) else [step]
        checks[0].body = [*before, *told]
        yield shown, {**data, "test": ast.unparse(tree), "prelude": SHOW}


# ---- running


def run_tests(
    answer: str, tests: Tests, *, seconds: float = SECONDS, progress: Callable[[Tried], None] | None = None
) -> Outcome:
    """The answer's code against the tests, each in sandboxes of its own; without tests the program is run.

    seconds: for all of them; a test that has begun is ended by its own limits. progress: called after each test.
    Never raises for what the answer or the question holds.
    """
    if not isinstance(answer, str):
        raise ValueError(f"an answer is text, got {type(answer).__name__}")
    options = programs(answer)
    if not options:
        nothing = tuple(Tried(test.source, None, "not run") for test in tests.tests)
        return Outcome(0, len(tests), nothing, note="The answer holds no Python code.")
    said = answer.rpartition("</think>")[2][:LONGEST_ANSWER]
    program = program_of(answer, tests.entry) or options[0]
    try:
        isolation = code.sandboxes().backend.name
        if not tests.tests:
            return _run(said, isolation)
    except SandboxError as error:
        nothing = tuple(Tried(test.source, None, "not run") for test in tests.tests)
        return Outcome(0, len(tests), nothing, note=f"Nothing was run: {error}", program=program)
    began = time.monotonic()
    tried: list[Tried] = []
    for test in tests.tests:
        if sum(each.what == SLOW for each in tried) >= MOST_TIMEOUTS:
            tried.append(Tried(test.source, None, f"not run: {MOST_TIMEOUTS} tests before it {SLOW}"))
        elif time.monotonic() - began > seconds:
            tried.append(Tried(test.source, None, f"not run: the tests have used their {seconds:g} seconds"))
        else:
            tried.append(_tried(test, said))
        if progress is not None:
            progress(tried[-1])
    passed = sum(each.ok is True for each in tried)
    left = sum(each.ok is None for each in tried)
    note = f"{passed} of {len(tried)} tests passed" + (f", {left} were not run" if left else "") + "."
    note += f" {tests.note[0].upper()}{tests.note[1:]}." if tests.note else ""
    return Outcome(passed, len(tried), tuple(tried), isolation, note, program=program)


def _tried(test: Test, said: str) -> Tried:
    began = time.monotonic()
    try:
        score, evidence = code.function(test.gold, test.data, said)
    except ValueError as error:  # the test itself is broken: a question may hold anything
        what = str(error).removeprefix("function: ")
        return Tried(test.source, None, f"not run: {what}", time.monotonic() - began)
    except SandboxError as error:
        return Tried(test.source, None, f"not run: {error}", time.monotonic() - began)
    took = time.monotonic() - began
    if score is None:
        return Tried(test.source, None, f"not run: {evidence.get('error')}", took)
    if score == 1:
        return Tried(test.source, True, "passed", took)
    return Tried(test.source, False, _what(evidence, test.source), took)


def _what(evidence: Mapping[str, Any], source: str) -> str:
    """What happened, in few words; the line that failed where a test has several."""
    status, error = str(evidence.get("status")), str(evidence.get("error") or "")
    how = {
        "timeout": SLOW,
        "memory": "ran out of memory",
        "output_limit": "printed too much",
        "exited": "ended its process",
        "killed": "was ended",
    }
    if status in how:
        return how[status]
    error, _, where = error.partition(" in: ")
    if error.startswith("AssertionError"):
        told = error.partition(": ")[2]
        line = where.removeprefix("assert ")
        return told or (f"is not so: {line[:200]}" if source == WHOLE else "is not so")
    return error[:300] or "failed"


def _run(said: str, isolation: str) -> Outcome:
    """A program without tests: what it prints, and how it ended."""
    fenced = _fenced(said)
    parts = [block for language, block in fenced if language in PYTHON] or [block for _, block in fenced] or [said]
    program = "\n".join(textwrap.dedent(part) for part in parts)  # one program, perhaps told in several parts
    own = code.sandboxes()

    async def once() -> Any:
        async with await own.backend.open() as box:
            return await box.python(started(program), limits=RUN)

    result = own.run(once())
    if result.status == "infra_error":
        why = result.stderr[-300:].decode("utf-8", "replace")
        return Outcome(0, 0, note=f"Nothing was run: {why}", program=program)
    printed = [stream.decode("utf-8", "replace").rstrip("\n") for stream in (result.stdout, result.stderr)]
    text = "\n".join(part for part in printed if part.strip())
    if len(text) > SHOWN:
        text = text[:SHOWN] + f"\n... [{len(text) - SHOWN} more characters]"
    how = {
        "ok": "It ran" + ("." if text else " and printed nothing."),
        "nonzero": f"It ended with exit code {result.returncode}.",
        "timeout": f"It was ended after {RUN.wall_s:g} seconds, or {RUN.cpu_s:g} of processor time.",
        "memory": f"It was ended: more than {RUN.memory_mb} MB of memory.",
        "output_limit": "It was ended: it printed too much.",
    }
    note = f"The question holds no tests. {how.get(result.status, f'It ended: {result.status}.')}"
    return Outcome(0, 0, (), isolation, note, text, program)
