"""Running the tests of a code answer: which tests a question holds, and that no answer passes them by anything else.

pytest tests/evals/test_snippets.py
"""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.sandbox import SandboxError
from evals import code
from evals.snippets import MOST_TESTS, program_of, run_tests
from evals.snippets import tests_of as questioned  # as it is, pytest takes it for a test
from tests.sandboxes import sandboxed

FIB = """Write a function `fib(n)`, the n-th Fibonacci number. Examples:
fib(1) -> 1
`fib(10)` returns 55.
- `assert fib(2) == 1`
assert fib(7) == 13, "not 13"
>>> fib(3)
2
>>> xs = [fib(i) for i in range(4)]
>>> xs
[0, 1, 1, 2]
>>> fib(-1)
Traceback (most recent call last):
    ...
ValueError: negative
>>> print(fib(5))
5
"""
RIGHT = """def fib(n):
    if n < 0:
        raise ValueError("negative")
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
"""


def sources(prompt: str) -> list[str]:
    return [test.source for test in questioned(prompt).tests]


def answer(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nIt prints:\n```\n55\n```\n"


def test_asserts_doctests_and_examples_are_found() -> None:
    tests = questioned(FIB)
    assert tests.entry == "fib" and tests.origin == "question"
    assert [test.source.split("  ->  ")[0] for test in tests.tests] == [
        "fib(2) == 1",
        "fib(7) == 13, 'not 13'",
        "fib(3)",
        "xs",
        "fib(-1)",
        "print(fib(5))",
        "fib(1)",
        "fib(10)",
    ]
    stub = 'Complete:\n```python\ndef add(a, b):\n    """Add.\n\n    >>> add(2, 3)\n    5\n    """\n```\n'
    assert sources(stub) == ["add(2, 3)  ->  5"]
    block = "```python\nxs = [1, 2]\nassert total(xs) == 3\ndef test_more():\n    assert total([]) == 0\n```"
    assert sources(block) == ["total(xs) == 3", "test_more()"]
    several = "assert f(\n    [1,\n     2]) == 3"
    assert sources(several) == ["f([1, 2]) == 3"]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Write f(n).",
        "f(xs: list) -> int",
        "def f(n) -> int: ...",
        "f(n) -> n + 1",
        "f(1) -> about two",
        "f(0) = 1, f(n) = n * f(n - 1)",
        "I assert that f is good",
        "assert True",
        "assert x == 1",
        ">>> import math",
        ">>>",
        "g(1) -> f(2)",
    ],
)
def test_what_is_no_test_is_none(prompt: str) -> None:
    assert sources(prompt) == []


@given(
    text=st.one_of(
        st.text(max_size=200),
        st.lists(
            st.sampled_from([">>> ", "f(", ")", "1", "\n", "assert ", "```", "->", " == ", '"""', "xs", " ", "["])
        ).map("".join),
    )
)
@settings(max_examples=150)
def test_no_question_raises(text: str) -> None:
    questioned(text)


@pytest.mark.parametrize("inner", ["(", "[", "-", "not ", "f(", "lambda:", "{", "x if ", "~", "f'{", "a.", "1+", "(\n"])
def test_hostile_questions_are_read_without_harm(inner: str) -> None:
    for deep in (150, 600, 1900, 9000):
        for prompt in (f"assert f({inner * deep}1)", f">>> f({inner * deep}1\n1", f"```\nx = ({inner * deep}\n```"):
            questioned(prompt)
    assert len(questioned("\n".join(f"assert f({n}) == {n}" for n in range(300)))) == MOST_TESTS


@sandboxed
def test_a_right_answer_passes_and_a_wrong_one_is_told_why() -> None:
    tests = questioned(FIB)
    outcome = run_tests(answer(RIGHT), tests)
    assert outcome.right and (outcome.passed, outcome.total) == (8, 8), outcome
    assert outcome.isolation and outcome.note == "8 of 8 tests passed." and outcome.program.startswith("def fib")
    wrong = run_tests(answer(RIGHT.replace("return a", "return b").replace("ValueError", "KeyError")), tests)
    assert not wrong.right and [each.ok for each in wrong.tests] == [False] * 6 + [True, False]
    assert [each.what for each in wrong.tests][:6] == [
        "gave 2, wanted 1",
        "gave 21, wanted 13",
        "gave 3, wanted 2",
        "gave [1, 1, 2, 3], wanted [0, 1, 1, 2]",
        "raised KeyError",
        "printed '8\\n'",
    ]


CHEATS = {
    "equals everything": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def f(n):\n    return E(1)",
    "is everything": "class A:\n    def __eq__(self, o): return True\n    def __getattr__(self, n): return self\n"
    "    def __call__(self, *a): return self\n    def __bool__(self): return True\nf = A()",
    "leaves": "import os\ndef f(n):\n    os._exit(0)",
    "leaves at once": "import sys\nsys.exit(0)\ndef f(n): pass",
    "looks at its caller": "import sys\ndef f(n):\n    frame = sys._getframe(1)\n    return frame.f_locals['wanted_']",
    "changes the tests": "import builtins\nbuiltins.AssertionError = None\ndef f(n):\n    return 1",
    "raises what is expected": "def f(n):\n    raise AssertionError",
    "no code": "",
    "another function": "def g(n):\n    return n",
}


@sandboxed
@pytest.mark.parametrize("name", CHEATS)
def test_no_cheating_answer_passes(name: str) -> None:
    outcome = run_tests(answer(CHEATS[name]), questioned("assert f(3) == 2\n>>> f(4)\n3\nf(5) -> 5"))
    assert (outcome.passed, outcome.total) == (0, 3), outcome


@sandboxed
def test_arguments_that_a_program_changes() -> None:
    empties = answer("def order(xs):\n    xs.clear()\n    return []")
    assert run_tests(empties, questioned("```\nxs = [3, 1]\nassert order(xs) == sorted(xs)\n```")).passed == 0
    sorts = answer("def order(xs):\n    xs.sort()")
    assert run_tests(sorts, questioned("```\nxs = [3, 1]\norder(xs)\nassert xs == [1, 3]\n```")).right


@sandboxed
def test_the_question_s_code_helps_but_does_not_answer() -> None:
    own = "import math\ndef half(x):\n    return x / 2\ndef f(n):\n    return half(n) + 1"
    prompt = f"Explain:\n```python\n{own}\n```\nf(4) -> 3.0"
    assert run_tests(answer("def f(n):\n    return half(n) + math.sqrt(1)"), questioned(prompt)).right
    assert run_tests(answer("# it is fine as it is"), questioned(prompt)).passed == 0
    assert run_tests("It halves and adds one.", questioned(prompt)).note == "The answer holds no Python code."
    stub = 'Complete:\n```python\ndef add(a, b):\n    """Add.\n\n    >>> add(2, 3)\n    5\n    """\n```\n'
    assert run_tests("```python\n    return a + b\n```", questioned(stub)).right


@sandboxed
def test_programs_without_an_end() -> None:
    outcome = run_tests(
        answer("def f(n):\n    while True: pass"), questioned("\n".join(f"f({n}) -> 1" for n in range(5)))
    )
    assert [each.what for each in outcome.tests[:2]] == ["ran out of time"] * 2 and outcome.passed == 0
    assert outcome.tests[4].ok is None and "3 were not run" in outcome.note
    late = run_tests(answer(RIGHT), questioned(FIB), seconds=0)
    assert {each.ok for each in late.tests} == {None}


@sandboxed
def test_without_tests_the_program_is_run() -> None:
    none = questioned("Print something.")
    parts = "First\n```python\nx = 3\n```\nthen\n```python\nprint(x)\n```\nwhich prints\n```\n4\n```"
    outcome = run_tests(parts, none)
    assert outcome.output == "3" and outcome.total == 0 and not outcome.right and outcome.note.endswith("It ran.")
    failed = run_tests(answer("print('a')\nprint(input())"), none)
    assert failed.output.startswith("a\nTraceback") and "exit code 1" in failed.note
    assert len(run_tests(answer("print('x' * 10**5)"), none).output) < 5000
    assert run_tests("```js\nlet x\n```", none).note == "The answer holds no Python code."
    assert program_of("```js\nlet x\n```") is None and program_of("def f(): pass") == "def f(): pass"
    assert program_of("</think>From the start, I import goods.") is None


@sandboxed
def test_hidden_tests_of_the_world() -> None:
    from world import sample

    tests = questioned("", "world/function/7/heldout")
    assert tests.origin == "world" and len(tests) == 6
    gold = sample("function", 7, "heldout").turns[0].answer
    assert run_tests(answer(gold), tests).right and run_tests(gold + "\n", tests).right
    assert run_tests(answer("def f(xs):\n    return 'no'"), tests).passed == 0
    repair = questioned("", "world/repair/3/seen/1/2/0")
    assert run_tests(sample("repair", 3, "seen", 1, 2).turns[0].answer + "\n", repair).right


def test_unknown_questions_are_named(tmp_path: Path) -> None:
    for question, why in [
        ("world/function/7", "wanted world/"),
        ("world/function/x/seen", "wanted world/"),
        ("world/function/²/seen", "wanted world/"),
        ("world/picture/1/seen", "no family|asks for no function"),
        ("world/output/1/seen", "asks for no function"),
        ("world/function/1/seen/0/1/9", "there is no number 9"),
        ("GSM8K/1", "no question"),
    ]:
        with pytest.raises(ValueError, match=why):
            questioned("", question)
    with pytest.raises(ValueError, match="gone has no"):
        questioned("", "HumanEval/1", tmp_path / "gone")


@sandboxed
def test_hidden_tests_of_published_sets(data: Path) -> None:
    tests = questioned("", "HumanEval/0", data / "humaneval")
    assert len(tests) == 7 and tests.entry == "has_close_elements"
    assert tests.tests[0].source.startswith("has_close_elements(")
    assert run_tests("```python\n" + str(tests.tests[0].gold) + "\n```", tests).right
    wrong = run_tests("```python\n    return 1\n```", tests)
    assert wrong.passed == 4 and wrong.tests[1].what == "gave 1, wanted False"
    mbpp = questioned("", "MBPP/11", data / "mbpp")
    assert mbpp.origin == "MBPP" and len(mbpp) == 3
    assert run_tests("```python\n" + str(mbpp.tests[0].gold) + "\n```", mbpp).right


def test_without_a_sandbox_the_outcome_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise SandboxError("no sandbox works here")

    monkeypatch.setattr(code, "sandboxes", none)
    outcome = run_tests(answer(RIGHT), questioned(FIB))
    assert outcome.note == "Nothing was run: no sandbox works here" and outcome.passed == 0 and outcome.total == 8
    assert {each.ok for each in outcome.tests} == {None}
