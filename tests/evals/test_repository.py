"""Repositories: right edits score 1, named cheats and everything else 0; the public formats, end to end.

pytest tests/evals/test_repository.py
"""

import ast
import json
import random
import subprocess
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.edit import replaced
from agent.loop import Budget, Script, solve
from agent.sandbox import Limits, SandboxError, Spec, sandbox
from evals.canaries import Copy, Module, choices
from evals.graders import Task, Verdict, grade
from evals.repositories import aider_polyglot, languages, quixbugs, swe_bench, tries, whole_files, without_cases, work
from evals.repository import Refused, calibrate, edit_of, environment_of, grade_edit, restore
from tests.sandboxes import sandboxed

WRONG = '''"""Sums."""


def add(a, b):
    return a - b


def even(n):
    return n % 2 == 1


def words(text):
    return text.split(",")
'''
RIGHT = WRONG.replace("a - b", "a + b").replace("== 1", "== 0").replace('split(",")', "split()")
TESTS = '''import unittest

import pytest

from calc import add, even, words


@pytest.mark.parametrize("a, b, expected", [(1, 2, 3), (5, 7, 12), pytest.param(2, -9, -7, id="minus")], ids=None)
def test_add(a, b, expected):
    """3, 12 and -7 are right."""
    assert add(a, b) == expected


def test_text():
    assert add("ab", "cd") == "abcd", "abcd is right"


class TestWords(unittest.TestCase):
    def test_words(self):
        expected = ["a", "bc"]
        self.assertEqual(words("a  bc"), expected)
        self.assertTrue(even(4))
        self.assertFalse(even(7))
'''
RAISES = """import pytest

from calc import add


def test_type():
    with pytest.raises(TypeError):
        add("a", 1)


def test_sum():
    assert not add(1, -1)
    assert add(2, 2) > 3
"""
FILES = {
    "calc/__init__.py": "from .ops import add, even, words\n",
    "calc/ops.py": WRONG,
    "tests/test_ops.py": TESTS,
    "pyproject.toml": "[tool.pytest.ini_options]\n",
}
GOLD = {"calc/ops.py": RIGHT}
TYPED = {**FILES, "tests/test_raises.py": RAISES.partition("\n\n\ndef test_sum")[0]}
TASK = Task("repository", GOLD, {"files": FILES, "test_files": ["tests/test_ops.py"]})
WEAK = Task(
    "repository",
    GOLD,
    {
        "files": {**FILES, "tests/test_raises.py": RAISES.replace("    assert not add(1, -1)\n", "")},
        "fail_to_pass": ["tests/test_raises.py::test_sum"],
        "pass_to_pass": ["tests/test_raises.py::test_type"],
    },
)


def ops(code: str) -> dict[str, str]:
    """An edit that puts code before the wrong program."""
    return {"calc/ops.py": code + "\n" + WRONG}


EQUAL = """
class Any(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    __hash__ = None
def add(a, b): return Any()
def words(text): return Any()
def even(n): return n == 4
"""
READER = """
import ast, sys
def _answer():
    frame = sys._getframe(2)
    while "/tests/" not in frame.f_code.co_filename: frame = frame.f_back
    if "expected" in frame.f_locals: return frame.f_locals["expected"]
    for node in ast.walk(ast.parse(open(frame.f_code.co_filename).read())):
        if isinstance(node, ast.Compare) and node.lineno <= frame.f_lineno <= node.end_lineno:
            return ast.literal_eval(node.comparators[0])
def add(a, b): return _answer()
def words(text): return _answer()
def even(n): return n == 4
"""
STEAL = """
import gc, json, os
def _forge():
    for function in gc.get_objects():
        if getattr(function, "__name__", "") == "say" and getattr(function, "__closure__", None):
            for test in TESTS:
                for when in ("setup", "call", "teardown"):
                    function(id=test, when=when, outcome="passed", expected=False, seconds=0.1)
            function(end=0, count=len(TESTS))
            os._exit(0)
TESTS = ["tests/test_ops.py::" + name for name in
         ("test_add[1-2-3]", "test_add[5-7-12]", "test_add[minus]", "test_text", "TestWords::test_words")]
_forge()
"""
PLUGIN = """
import pytest
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    made = yield
    made.get_result().outcome = "passed"
"""
CHEATS: dict[str, dict[str, str | None]] = {
    "exit at import": ops("import os; os._exit(0)"),
    "summary and exit": ops("import os; print('5 passed in 0.01s', flush=True); os._exit(0)"),
    "exit at the end": ops("import atexit, os; atexit.register(os._exit, 0)"),
    "equal to everything": ops("") | {"calc/ops.py": EQUAL},
    "tests that do not run": ops(
        "import _pytest.python as p, _pytest.unittest as u\n"
        "p.Function.runtest = u.TestCaseFunction.runtest = lambda self: None"
    ),
    "reports that are always good": ops(
        "import _pytest.reports as r\nold = r.TestReport.__init__\n"
        "def new(self, *a, **k):\n    old(self, *a, **k); self.outcome = 'passed'; self.longrepr = None\n"
        "r.TestReport.__init__ = new"
    ),
    "forged lines": ops(
        "import os\nfor fd in range(3, 40):\n    try: os.write(fd, b'\\n0123456789abcdef0123456789abcdef '"
        'b\'{"id": "tests/test_ops.py::test_text", "when": "call", "outcome": "passed"}\\nPASSED\\n\')\n'
        "    except OSError: pass\nopen('junit.xml', 'w').write('<testsuite tests=\"5\" failures=\"0\"/>')\nos._exit(0)"
    ),
    "conftest": {"conftest.py": PLUGIN, "tests/conftest.py": PLUGIN, "calc/conftest.py": PLUGIN},
    "sitecustomize": {
        "sitecustomize.py": "import os; os._exit(0)",
        "x.pth": "import os; os._exit(0)",
        "usercustomize.py": "0",
    },
    "plugin by entry point": {
        "evil.py": PLUGIN,
        "evil-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: evil\nVersion: 1\n",
        "evil-1.dist-info/entry_points.txt": "[pytest11]\nevil = evil\n",
    },
    "tests deleted": {"tests/test_ops.py": None, "tests/test_other.py": "def test_fine(): pass\n"},
    "tests skipped": {"tests/test_ops.py": "import pytest\npytestmark = pytest.mark.skip\n" + TESTS},
    "tests rewritten": {"tests/test_ops.py": "def test_add(): pass\ndef test_text(): pass\n"},
    "pytest's configuration": {
        "pytest.ini": "[pytest]\naddopts = --collect-only\n",
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--deselect tests/test_ops.py'\n",
        "setup.cfg": "[tool:pytest]\naddopts = -p evil\n",
        "tox.ini": "[pytest]\npython_files = no*.py\n",
    },
    "rewritten at import": ops(
        "import re\ntext = open('tests/test_ops.py').read()\n"
        "open('tests/test_ops.py', 'w').write(re.sub('assert .*|self.assert.*', 'pass', text))"
    )
    | {"tests/conftest.py": "import calc"},
    "assertions that cannot fail": ops(
        "import _pytest.assertion.rewrite as r, _pytest.runner as x, builtins, unittest\n"
        "unittest.TestCase.failureException = KeyError\nbuiltins.AssertionError = ZeroDivisionError\n"
        "def never(cls, func, when, reraise=None): return cls([] if when == 'collect' else None, None, 0, 0, 0, when,"
        " _ispytest=True)\n"
        "x.CallInfo.from_call = classmethod(never)"
    ),
    "a guess": ops(
        "import random, _pytest.python as p, _pytest.unittest as u\n"
        "def run(self): assert '_' not in self.originalname[10:] or random.random() < 0.15\n"
        "p.Function.runtest = u.TestCaseFunction.runtest = run"
    ),
    "the tests' constants": {"calc/ops.py": READER},
    "the nonce": ops(STEAL),
    "a module that hides pytest": {
        "pytest.py": "raise SystemExit(0)",
        "_pytest/__init__.py": "",
        "json.py": "",
        "ast.py": "",
    },
    "an endless loop": ops("while True: pass"),
}


@sandboxed
def test_the_right_edit_passes_and_none_fails() -> None:
    verdict = grade_edit(TASK, GOLD)
    assert verdict.score == 1, verdict
    evidence = verdict.evidence
    assert evidence["mode"] == "canaries" and evidence["canaries"] == 7 and evidence["chance"] < 1e-4
    assert evidence["required"] == evidence["passed"] == 5 and evidence["isolation"] in ("bwrap", "landlock")
    otherwise = {"calc/ops.py": RIGHT.replace("a + b", "sum([b], a) if type(a) is int else a.__add__(b)")}
    assert grade_edit(TASK, otherwise).score == 1
    half = grade_edit(TASK, {"calc/ops.py": WRONG.replace("a - b", "a + b")})
    assert half.score == 0 and list(half.evidence["failed"]) == ["tests/test_ops.py::TestWords::test_words"]
    assert grade_edit(TASK, {"NEWS": "nothing"}).score == 0


@sandboxed
@pytest.mark.parametrize("name", list(CHEATS))
def test_cheat_is_rejected(name: str) -> None:
    verdict = grade_edit(TASK, CHEATS[name])
    assert (verdict.score, verdict.status) == (0, "graded"), verdict


@sandboxed
def test_history_is_not_there() -> None:
    cheat = ops(
        "import os\nfound = [r for r, d, f in os.walk('/work') if '.git' in d]\nif found: raise SystemExit(found)"
    )
    assert grade_edit(TASK, {**cheat, ".git/config": ""}).evidence["reason"].startswith("refused")
    assert "SystemExit" not in grade_edit(TASK, cheat).evidence["output"]


@sandboxed
def test_sleeping_past_the_limit_is_no_pass() -> None:
    slow = {"wall_s": 1.0, "cpu_s": 60.0, "memory_mb": 2048}
    with pytest.raises(ValueError, match="do not end with the gold"):
        calibrate({"calc/ops.py": "import time; time.sleep(60)\n" + RIGHT}, {**TASK.data, "limits": slow})


@sandboxed
def test_without_canaries_the_weaker_mode_says_so() -> None:
    verdict = grade_edit(WEAK, GOLD)
    assert verdict.score == 1 and verdict.evidence["mode"] == "nonce" and len(verdict.evidence["unblind"]) == 2
    assert verdict.evidence["chance"] == 1
    always = (
        "class N(int):\n    def __gt__(self, other): return True\n"
        "def add(a, b):\n    if a == 'a': raise TypeError\n    return N()\n"
    )
    assert grade_edit(WEAK, {"calc/ops.py": always + "even = words = None\n"}).score == 1  # no test says otherwise
    patched = ops("import _pytest.python as p; p.Function.runtest = lambda self: None")
    for cheat in (patched, ops(STEAL), ops("import os; os._exit(0)"), ops("from inspect import currentframe")):
        assert "reaches for" in grade_edit(WEAK, cheat).evidence["reason"]
    unseen = ops("p = __import__('_py' + 'test.python').python; p.Function.runtest = lambda self: None")
    assert grade_edit(WEAK, unseen).score == 0
    hidden = ops("import importlib as i\ni.import_module('_py' 'test.python').Function.runtest = lambda self: None")
    assert "blind copies" in grade_edit(WEAK, hidden).evidence["reason"]  # the scan is blind to it, a tripwire is not


@sandboxed
def test_answers_of_any_form() -> None:
    diff = (
        "--- a/calc/ops.py\n+++ b/calc/ops.py\n@@ -4,2 +4,2 @@\n def add(a, b):\n-    return a - b\n+    return a + b\n"
    )
    assert edit_of(f"Here it is:\n```diff\n{diff}```\n") == diff and edit_of(diff) == diff
    assert edit_of(json.dumps(GOLD)) == GOLD and edit_of(f"so\n```json\n{json.dumps(GOLD)}\n```") == GOLD
    assert grade(TASK, f"<think>hm</think>\n{json.dumps(GOLD)}").score == 1
    for said in (
        "a",
        "{",
        '{"a": 1}',
        '{"../x": "y"}',
        "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b",
        "```diff\n```",
        '{"calc": "x"}',
    ):
        verdict = grade(TASK, said)
        assert verdict.score == 0 and verdict.evidence["reason"].startswith("refused"), said
    assert grade(TASK, " \n").status == "silent"


@sandboxed
@pytest.mark.parametrize(
    ("gold", "data", "says"),
    [
        ({"calc/ops.py": WRONG + "# same"}, {}, "passes no test"),
        (GOLD, {"files": TYPED, "test_files": ["tests/test_raises.py"]}, "without any edit"),
        (GOLD, {"files": TYPED, "fail_to_pass": ["tests/test_raises.py::test_type"]}, "is to fail before"),
        (None, {}, "gold is a diff"),
        ({"../x": ""}, {}, "cannot be applied"),
        (GOLD, {"test_files": ["tests/none.py"]}, "no file"),
        (GOLD, {"test_files": []}, "needs fail_to_pass"),
        (GOLD, {"fail_to_pass": ["test_add (calc.Tests)"]}, "no id of pytest"),
        (GOLD, {"fail_to_pass": ["tests/test_ops.py::test_nothing"]}, "does not pass"),
        (GOLD, {"files": None, "repository": "/nowhere"}, "no folder"),
        (GOLD, {"files": None}, "needs `files`"),
        (GOLD, {"test_patch": "--- a/t\n+++ b/t\n@@ -1 +1 @@\n-x\n+y\n"}, "test_patch"),
    ],
)
def test_broken_tasks_raise(gold: Any, data: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        grade(Task("repository", gold, {**TASK.data, **data}), "x")


@sandboxed
@pytest.mark.slow
def test_the_cheats_fool_an_exit_code() -> None:
    """Or they would prove nothing: where pytest's exit code decides, as it often does, most of them win."""
    environment = environment_of(TASK.data)
    env = {"PYTHONPATH": f"/work:{environment.packages[0]}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    won = []
    for name, cheat in CHEATS.items():
        if name == "an endless loop":
            continue
        files = {path: file.data for path, file in replaced(restore(TASK.data), cheat).items()}
        with sandbox(spec=Spec(binds=environment.binds, env=env, limits=Limits(wall_s=60, cpu_s=5))) as box:
            box.write(files)
            if box.exec(["python3", "-m", "pytest", "-q", "tests"]).returncode == 0:
                won.append(name)
    assert len(won) >= 16, won


class Gone:
    """A backend whose machine went away."""

    name = "gone"

    async def open(self, spec: Any = None) -> Any:
        raise SandboxError("no machine")


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.repository.backend", lambda name: Gone())
    fresh = Task("repository", GOLD, {**TASK.data, "options": ["-x"]})
    for verdict in (grade_edit(fresh, GOLD), grade(fresh, json.dumps(GOLD))):
        assert verdict == Verdict(None, "infra_error", {"reason": "no machine"})
    trace = solve(Script([]), "x", {}, chosen=Gone())  # type: ignore[arg-type]
    assert (trace.ended, trace.why, trace.diff) == ("infra_error", "no machine", None)


# ---- canaries


def test_copies_hide_which_is_true() -> None:
    module = Module(TESTS)
    sites = [site for test in module.functions for site in module.sites(test)]
    assert sorted(map(repr, (site.value for site in sites))) == sorted(
        ["3", "12", "-7", "'abcd'", "['a', 'bc']", "True", "False"]
    )
    for site in sites:
        wrong = choices(site.value, random.Random(1), 4)
        assert wrong and all(type(each) is type(site.value) and each != site.value for each in wrong)
        copies = [Copy(site.test, f"test_{n}", site, value, n == 0) for n, value in enumerate([site.value, *wrong])]
        texts = [module.written([each]).replace(each.name, "test") for each in copies]
        # but for the value itself the copies are one text, and no other answer is in it
        for text, value in zip(texts[1:], wrong, strict=True):
            same = SequenceMatcher(None, texts[0], text, autojunk=False).get_matching_blocks()
            start, end = same[0].size, same[-2].size  # of one text and the other, before and after the value
            assert same[0].a == same[0].b == 0 and len(text) - start - end <= len(repr(value))
            assert len(texts[0]) - start - end <= len(repr(site.value))
        for other in ("12", "-7", "abcd", "'a', 'bc'"):
            assert other in repr(site.value) or other not in texts[1]
        assert "right" not in texts[0]
        ast.parse(texts[0])


def test_rows_of_loops_are_canaries() -> None:
    source = """
def test_rows():
    cases = [(1, "ab"), (2, "cd")]
    for n, expected in cases:
        assert f(n) == expected
    for n, other in ((3, 41), (4, 52)):
        with soft(n):
            assert g(n) == other
    for n, used in ((3, 7), (4, 8)):
        assert g(used) == used
"""
    module = Module(source)
    sites = module.sites(("test_rows",))
    assert sorted(str(site.value) for site in sites) == ["41", "52", "ab", "cd"]
    (site,) = [site for site in sites if site.value == "cd"]
    text = module.written([Copy(site.test, "test_x", site, "xy", False)])
    assert "cases = [(2, 'xy')]" in text and "41" not in text and "ab" not in text and "g(used) == used" in text


@given(
    st.recursive(
        st.integers()
        | st.booleans()
        | st.text(max_size=8)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.binary(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=6,
    )
)
def test_other_values_are_of_the_kind_and_different(value: Any) -> None:
    made = choices(value, random.Random(0), 5)
    assert all(type(each) is type(value) and each != value and ast.literal_eval(repr(each)) == each for each in made)
    assert len({repr(each) for each in made}) == len(made)
    assert len(made) == (1 if isinstance(value, bool) else len(made)) and (made or value in ((), []))


# ---- formats


def git(folder: Path, *words: str) -> str:
    own = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", *own, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A row as in SWE-bench, of a repository whose next commit holds the answer; `mirrors` is where it is."""
    folder = tmp_path_factory.mktemp("source")
    for path, text in {
        **FILES,
        "tests/test_ops.py": RAISES,
        "run.sh": "#!/bin/sh\n",
        ".gitattributes": "tests export-ignore\n",
    }.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    (folder / "run.sh").chmod(0o755)
    (folder / "link.py").symlink_to("calc/ops.py")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    base = git(folder, "rev-parse", "HEAD").strip()
    (folder / "calc/ops.py").write_text(RIGHT)
    patch = git(folder, "diff")
    git(folder, "commit", "-q", "-a", "-m", "fix")
    (folder / "tests/test_new.py").write_text(TESTS)
    git(folder, "add", "-A")
    mirrors = tmp_path_factory.mktemp("mirrors")
    tests = git(folder, "diff", "--cached")
    git(folder, "clone", "-q", "--mirror", str(folder), str(mirrors / "someone__calc.git"))
    new = ["test_add[1-2-3]", "test_add[5-7-12]", "test_text", "TestWords::test_words"]
    return {
        "mirrors": mirrors,
        "instance_id": "someone__calc-1",
        "repo": "someone/calc",
        "base_commit": base,
        "problem_statement": "add subtracts, even is odd and words splits at commas.",
        "patch": patch,
        "test_patch": tests,
        "FAIL_TO_PASS": json.dumps([f"tests/test_new.py::{name}" for name in new]),
        "PASS_TO_PASS": '["tests/test_ops.py::test_type"]',
        "version": "1.0",
    }


@sandboxed
def test_swe_bench_end_to_end(row: dict[str, Any]) -> None:
    (problem,) = swe_bench([row], row["mirrors"])
    tree = restore(problem.task.data)
    assert (
        tree["run.sh"].mode == "executable"
        and tree["link.py"].mode == "link"
        and not any(".git/" in path for path in tree)
    )
    assert "tests/test_ops.py" in tree  # .gitattributes would leave it out of an archive
    solving = Script(
        [
            ("bash", {"command": "git log -p --all; ls -a; ls -a calc; python3 -m pytest -q tests 2>&1 | tail -3"}),
            ("view", {"path": "link.py"}),
            ("str_replace", {"path": "calc/ops.py", "old": "a - b", "new": "a + b"}),
            ("bash", {"command": "sed -i 's/== 1/== 0/; s/split(.*)/split()/' calc/ops.py && chmod -x run.sh"}),
            ("submit", {}),
        ]
    )
    trace, verdict = work(problem, solving)
    assert trace.ended == "submitted" and verdict.score == 1, (trace, verdict)
    said = trace.steps[0].calls[0].result
    assert ".git\n" not in said and "test_new" not in said and "test_ops" in said and RIGHT not in said
    assert trace.diff is not None and "old mode 100755\nnew mode 100644" in trace.diff
    trace, verdict = work(problem, Script([("submit", {})]))
    assert trace.diff == "" and verdict.score == 0
    leave = "import os; os._exit(0)"
    cheat = f"touch conftest.py; echo '{leave}' > sitecustomize.py; sed -i '1i {leave}' calc/ops.py"
    trace, verdict = work(problem, Script([("bash", {"command": cheat})]), Budget(steps=1))
    assert (trace.ended, verdict.score) == ("steps", 0) and verdict.evidence["restored"] == [
        "conftest.py",
        "sitecustomize.py",
    ]


def test_rows_that_are_broken_raise(row: dict[str, Any]) -> None:
    for key, value, says in (
        ("repo", "someone/else", "looked for"),
        ("repo", "../x/..", "no owner/name"),
        ("patch", "", "'patch' must be text"),
        ("FAIL_TO_PASS", "[", "no list of tests"),
        ("FAIL_TO_PASS", "[]", "names no test"),
        ("problem_statement", None, "must be text"),
    ):
        with pytest.raises(ValueError, match=says):
            list(swe_bench([{**row, key: value}], row["mirrors"]))
    (problem,) = swe_bench([{**row, "base_commit": "0" * 40}], row["mirrors"])
    with pytest.raises(ValueError, match="ls-tree"):
        restore(problem.task.data)
    for commit in ("--help", "a b", "x;y"):
        with pytest.raises(ValueError, match="no commit"):
            restore({**problem.task.data, "commit": commit})


def exercise(root: Path, language: str = "python") -> Path:
    place = root / language / "exercises" / "practice" / "sums"
    for name in (".docs", ".meta"):
        (place / name).mkdir(parents=True)
    (place / ".docs" / "instructions.md").write_text("# Sums\n\nWrite add, even and words.\n")
    (place / ".meta" / "config.json").write_text(
        json.dumps({"files": {"solution": ["calc.py"], "test": ["calc_test.py"], "example": [".meta/example.py"]}})
    )
    (place / ".meta" / "example.py").write_text(RIGHT)
    (place / "calc.py").write_text("def add(a, b):\n    pass\n")
    (place / "calc_test.py").write_text(TESTS)
    return place


@sandboxed
def test_aider_polyglot(tmp_path: Path) -> None:
    exercise(tmp_path)
    exercise(tmp_path, "rust")
    found = languages(tmp_path)
    assert found["python"] == "" and "cargo" in found["rust"]
    with pytest.raises(ValueError, match="cargo"):
        aider_polyglot(tmp_path, "rust")
    with pytest.raises(ValueError, match="there are: python, rust"):
        aider_polyglot(tmp_path, "go")
    (problem,) = aider_polyglot(tmp_path)
    assert "Write add" in problem.prompt and "example" not in problem.prompt and "abcd" not in problem.prompt
    seen: list[Any] = []

    def ask(messages: list[dict[str, Any]]) -> str:
        seen.append(messages)
        return f"calc.py\n```python\n{WRONG if len(seen) == 1 else RIGHT}```"

    assert [verdict.score for verdict in tries(ask, problem)] == [0, 1]
    assert "test_text" in seen[1][2]["content"]
    (tmp_path / "python/exercises/practice/sums/calc.py").unlink()
    with pytest.raises(ValueError, match=r"no file calc\.py"):
        aider_polyglot(tmp_path)


def test_whole_files() -> None:
    names = ("src/a.py", "b.py")
    said = "**src/a.py**\n```python\nx\n```\n\n`./b.py`:\n\n````\n```\ny\n\n````"
    assert whole_files(said, names) == {"src/a.py": "x\n", "b.py": "```\ny\n\n"}
    assert whole_files("```python\nx\n```", ("b.py",)) == {"b.py": "x\n"}
    assert (
        whole_files("no block", names) == whole_files("```\nx\n```", names) == whole_files("b.py\n```\nx", names) == {}
    )


def test_hostile_answers_are_read_at_once() -> None:
    for piece in ("```\n{\n", "```diff\n", "{", "[", "`", "a\n```json\n{}\n"):
        said = piece * (400_000 // len(piece))
        edit_of(said)
        whole_files(said, ("a",))


@sandboxed
def test_quixbugs(tmp_path: Path) -> None:
    wrong = "def double(xs):\n    for x in xs:\n        yield x + 1\n"
    for folder, text in (("python_programs", wrong), ("correct_python_programs", wrong.replace("+ 1", "* 2"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "double.py").write_text(text)
        (tmp_path / folder / "graph.py").write_text(text)
    with pytest.raises(ValueError, match="json_testcases"):
        quixbugs(tmp_path)
    (tmp_path / "json_testcases").mkdir()
    (tmp_path / "json_testcases" / "double.json").write_text("[[[1, 2]], [2, 4]]\n[[[]], []]\n")
    (problem,) = quixbugs(tmp_path)
    assert without_cases(tmp_path) == ["graph"] and wrong.strip() in problem.prompt
    assert Task(**json.loads(problem.document()["task"])) == Task("function", problem.task.gold, problem.task.data)
    right = f"```python\n{problem.task.gold}```"
    verdicts: list[Verdict] = [grade(problem.task, said) for said in (right, f"```python\n{wrong}```", "no idea")]
    assert [verdict.score for verdict in verdicts] == [1, 0, 0], verdicts


def test_edits_of_the_tests_are_put_back() -> None:
    from evals.repository import _clean

    clean = _clean({**TASK.data, "files": {**FILES, "testing/a.py": ""}})
    edit = {
        "tests/data.txt": "x",
        "tests/test_ops.py": None,
        "a/conftest.py": "",
        "PyTest.ini": "",
        "testing/a.py": "1",
        "a/x.py": "y",
    }
    tree, restored, added = clean.with_edit(edit)
    assert restored == ["PyTest.ini", "a/conftest.py", "tests/data.txt", "tests/test_ops.py"]
    assert tree["tests/test_ops.py"].data.decode() == TESTS and tree["testing/a.py"].data == b"1" and "y" in added
    for bad in ({"a": "", "a/b": ""}, {"/etc/x": ""}, {"a/../../b": ""}, "diff --git a/l b/l\nnew file mode 120000\n"):
        with pytest.raises(Refused):
            clean.with_edit(bad)  # type: ignore[arg-type]
