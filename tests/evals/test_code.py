"""Programs are graded right, and no program grades itself.

pytest tests/evals/test_code.py          the whole of HumanEval and MBPP: pytest -m slow tests/evals/test_code.py
"""

import contextlib
import gzip
import json
import math
import os
import subprocess
import sys
import threading
import time
import types
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.sandbox import SandboxError
from evals import attacks, code, code_eval
from evals.attacks import ATTACKS, COMM, PROMPT, RIGHT, SECRET, TEST
from evals.candidate import choose
from evals.code import blocks, limits_of, same_output
from evals.graders import Task, Verdict, grade, grade_all
from evals.values import Unreadable, Writer, read
from tests.sandboxes import sandboxed

pytestmark = sandboxed

TOTAL = {"prompt": PROMPT, "entry_point": "total", "test": TEST}


def score(gold: str, data: dict[str, Any], said: str) -> tuple[float | None, str]:
    verdict = grade(Task("function", gold, data), said)
    return verdict.score, str(verdict.evidence.get("error"))


# ---- values

plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(10**18, 10**40),
        st.floats(allow_nan=False),
        st.text(),
        st.binary(),
        st.complex_numbers(allow_nan=False),
        st.fractions(),
        st.dates(),
        st.timedeltas(),
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.sets(st.integers()),
        st.frozensets(st.text()),
        st.dictionaries(st.text(), inner),
    ),
    max_leaves=12,
)


@given(value=plain)
def test_values_arrive_as_they_were_sent(value: Any) -> None:
    got = read(Writer(10**6).write(value))
    assert got == value and type(got) is type(value)


@given(text=st.one_of(st.text(), st.text('["ltszdbBicreqDTvyok0123456789,]nul.-', max_size=40)))
@settings(max_examples=300)
def test_no_text_raises_anything_but_unreadable(text: str) -> None:
    with contextlib.suppress(Unreadable):
        read(text)


def test_what_hides_behind_a_plain_type_arrives_without_it() -> None:
    class Yes(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    class Always(list):  # type: ignore[type-arg]
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    class Text(str):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    class Colour(IntEnum):
        RED = 3

    for value, wanted in [
        (Yes(5), 5),
        (Always([Yes(1)]), [1]),
        (Text("a"), "a"),
        (Colour.RED, 3),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (deque([1, 2]), deque([1, 2])),
        (Decimal("1.50"), Decimal("1.50")),
        (Fraction(1, 3), Fraction(1, 3)),
        ({1: 2}.keys(), {1: 2}.keys()),
        (range(3), range(3)),
        (bytearray(b"x"), bytearray(b"x")),
        (int, int),
        (10**5000, 10**5000),
        (-0.0, -0.0),
        ("\ud800", "\ud800"),
    ]:
        got = read(Writer(10**6).write(value))
        assert got == wanted and type(got) is type(wanted)
    assert math.isnan(read(Writer(100).write(math.nan)))
    assert math.copysign(1, read(Writer(100).write(-0.0))) == -1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "9" * 100_000,
        '["i",[1]]',
        '{"a":1}',
        '["s",["l"]]',
        '["d",1]',
        '["D","x"]',
        '["zz"]',
        '["o",1]',
        "[]",
    ],
)
def test_bombs_and_junk_are_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        read(text)


def test_what_is_too_deep_or_too_long_is_not_written() -> None:
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    for value in (deep, "x" * 1000, [0] * 1000, object()):
        with pytest.raises(Unreadable):
            Writer(500).write(value)


# ---- attacks


def test_no_attack_passes_or_leaves_anything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(ATTACKS) == 22
    monkeypatch.setenv(SECRET, "hush")
    monkeypatch.setattr(code, "FLOOR", 1.0)
    monkeypatch.setattr(code, "ASLEEP", 2.0)
    tmp_path.chmod(0o777)
    own, most, ended = tmp_path / "grader.py", [0], threading.Event()
    own.write_text("return 0.0")
    own.chmod(0o666)

    def watch() -> None:
        while not ended.wait(0.05):
            most[0] = max(most[0], len(attacks._named_processes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with attacks._listener() as (port, heard):
            bodies = []
            for at, attack in enumerate(ATTACKS):
                body = attack.body.replace("{port}", str(port)).replace("{own}", str(own))
                bodies.append(body.replace("{file}", str(tmp_path / f"made{at}")))
            task = Task("function", RIGHT, TOTAL)
            verdicts = grade_all([(task, body) for body in bodies])
    finally:
        ended.set()
        watcher.join()
    passed = [(a.name, v) for a, v in zip(ATTACKS, verdicts, strict=True) if (v.score, v.status) != (0.0, "graded")]
    assert passed == []
    assert os.listdir(tmp_path) == ["grader.py"] and own.read_text() == "return 0.0"
    assert heard == [] and most[0] < 40
    assert attacks._named_processes() == [], f"{COMM} is left"
    assert capfd.readouterr().out == ""
    status = {a.name: v.evidence["status"] for a, v in zip(ATTACKS, verdicts, strict=True)}
    assert status["takes 1.5 GiB of memory"] in ("memory", "timeout")  # on a busy machine the clock is first
    assert status["never ends, and ignores the alarm"] == "timeout"
    assert status["`os._exit(0)`"] == "exited"
    assert grade(task, RIGHT).score == 1


SPY = """
    import os
    for pid in ["self", os.getppid(), *[p for p in os.listdir("/proc") if p.isdigit()]]:
        try:
            data = open("/proc/%s/environ" % pid, "rb").read()
        except Exception:
            data = b""
        if b"hush" in data or "hush" in os.environ.values():
            return "hush"
    return "nothing"
"""


def test_a_secret_of_the_graders_cannot_even_be_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "hush")
    data = {"prompt": "def spy():\n", "entry_point": "spy", "test": 'def check(f):\n    assert f() == "nothing"'}
    assert score("    return 'nothing'", data, SPY) == (1.0, "None")


FORGES = {
    "an answer of its own to the pipe, and the true one after it": """
    import os
    for fd in os.listdir("/proc/self/fd"):
        try:
            os.write(int(fd), b"\\0\\0\\0\\x0a[1,2,3,4] ")
        except OSError:
            pass
    return 5
""",
    "the verdict of the judge": """
    import os
    text = b'v["d","passed",1,"of",1,"error",null,"broken",null,"changed",false,"calls",1]'
    for fd in range(3, 64):
        try:
            os.write(fd, len(text).to_bytes(4, "big") + text)
        except OSError:
            pass
    os._exit(0)
""",
    "every answer twice": """
    import gc
    for found in gc.get_objects():
        if type(found).__name__ == "Pipe":
            send = found.send
            found.send = lambda text, mark="": (send(text), send(text))
    return n * (n + 1) // 2 if n < 3 else -1
""",
    "a nest of lists": "\n    value = []\n    for _ in range(100000):\n        value = [value]\n    return value\n",
    "an int of a million digits": "\n    return 10 ** 1000000\n",
    "a string of a gigabyte": '\n    return "x" * 900_000_000\n',
    "an endless iterator": "\n    import itertools\n    return itertools.count()\n",
    "an endless generator of nothing": "\n    return iter(int, 1)\n",
    "itself": "\n    return total\n",
    "an object whose class lies": """
    class Lie:
        __class__ = int
        def __eq__(self, other): return True
        def __index__(self): return 1
        def __bool__(self): return True
    return Lie()
""",
    "too late": "\n    import time\n    time.sleep(60)\n    return 1\n",
    "a thread that answers on": """
    import threading
    threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()
    return -1
""",
}


def test_no_forged_answer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "FLOOR", 1.0)
    monkeypatch.setattr(code, "ASLEEP", 2.0)
    began = time.monotonic()
    task = Task("function", RIGHT, TOTAL)
    verdicts = dict(zip(FORGES, grade_all([(task, body) for body in FORGES.values()], workers=4), strict=True))
    assert {name: (v.score, v.status) for name, v in verdicts.items()} == dict.fromkeys(FORGES, (0.0, "graded"))
    assert verdicts["too late"].evidence["status"] == "timeout"
    assert time.monotonic() - began < 300


def test_what_is_expected_is_never_sent() -> None:
    """A candidate that returns what it finds in the memory of its process finds no value that only the test knows."""
    body = """
    import os
    with open("/proc/self/mem", "rb", 0) as memory:
        for line in open("/proc/self/maps"):
            span, rights = line.split()[:2]
            if "rw" in rights and "[" not in line.split()[-1][:1]:
                begin, end = (int(part, 16) for part in span.split("-"))
                try:
                    memory.seek(begin)
                    data = memory.read(min(end - begin, 1 << 24))
                except (OSError, ValueError, OverflowError):
                    continue
                at = data.find(b"only" + b"-here-")
                if at >= 0:
                    return data[at:at + 14].decode()
    return "nothing found"
"""
    data = {"prompt": "def f():\n", "entry_point": "f", "test": 'def check(f):\n    assert f() == "only-here-1234"'}
    assert score('    return "only-here" + "-1234"', data, body)[0] == 0.0


# ---- what tests of functions need


def asserts(*lines: str, setup: str = "") -> dict[str, Any]:
    return {"tests": list(lines), "setup": setup}


FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "changes in place": (
        "def grow(xs, seen):\n    xs.append([1])\n    xs[0].append(2)\n    seen['k'] = {1}\n",
        asserts(
            "a, b = [[0]], {}\nfirst = a[0]\ngrow(a, b)\nassert a == [[0, 2], [1]]",
            "assert first == [0, 2] and b == {'k': {1}}",
        ),
    ),
    "a generator": (
        "def up(n):\n    yield from range(n)\n",
        asserts("assert list(up(300)) == list(range(300))", "assert up(2) != [0, 1]"),
    ),
    "an endless one": (
        "def odd():\n    n = 1\n    while True:\n        yield n\n        n += 2\n",
        asserts("import itertools\nassert list(itertools.islice(odd(), 5)) == [1, 3, 5, 7, 9]"),
    ),
    "sets and floats": (
        "def f(x):\n    return {x, 0.1 + 0.2}, frozenset([1]), float('inf'), -0.0\n",
        asserts(
            "assert f(2)[0] == {2, 0.30000000000000004}", "assert math.isinf(f(1)[2]) and f(1)[1] == frozenset([1])"
        ),
    ),
    "big ints, complex, bytes": (
        "def f():\n    return 7 ** 9000, 1 + 2j, b'\\xff', bytearray(b'a')\n",
        asserts("assert f() == (7 ** 9000, 1 + 2j, b'\\xff', bytearray(b'a'))"),
    ),
    "an error that is expected": (
        "class Bad(ValueError):\n    pass\ndef f(x):\n    raise Bad('no', x)\n",
        asserts("try:\n    f(1)\nexcept ValueError as e:\n    assert e.args == ('no', 1)\nelse:\n    assert False"),
    ),
    "functions as arguments": (
        "def twice(f, x, key=None):\n    return f(f(x)), key(x) if key else None\n",
        asserts("assert twice(lambda v: v + 1, 3, key=str) == (5, '3')", "assert twice(math.sqrt, 16)[0] == 2"),
    ),
    "an error in a function of the test": (
        "def f(g):\n    try:\n        return g(0)\n    except ZeroDivisionError:\n        return 'caught'\n",
        asserts("assert f(lambda x: 1 / x) == 'caught'"),
    ),
    "a function as the answer": ("def adder(n):\n    return lambda x: x + n\n", asserts("assert adder(3)(4) == 7")),
    "classes": (
        "class Node:\n    def __init__(self, v):\n        self.v, self.next = v, None\n"
        "    def __len__(self):\n        return 1\n"
        "def last(node):\n    while node.next:\n        node = node.next\n    return node\n",
        asserts(
            "assert last(a).v == 2 and last(a) == b and last(a) is b and len(b) == 1",
            setup="a = Node(1)\nb = Node(2)\na.next = b",
        ),
    ),
    "a class with state": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n"
        "    def push(self, x):\n        self.items.append(x)\n"
        "    def pop(self):\n        return self.items.pop()\n",
        asserts("s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2 and s.items == [1] and isinstance(s, Stack)"),
    ),
    "a name of a built-in": ("def sum(a, b):\n    return a * b\n", asserts("assert sum(3, 4) == 12")),
    "a name of the grader's": ("def check(x):\n    return x\n", asserts("assert check(3) == 3")),
    "keywords": (
        "def f(a, *, b=1, **c):\n    return a, b, c\n",
        asserts("assert f(1, b=2, d=[3]) == (1, 2, {'d': [3]})"),
    ),
    "input that is not there, and output": (
        "import sys\ndef f():\n    print('x' * 100000)\n    sys.stderr.write('y')\n    return sys.stdin.read()\n",
        asserts("assert f() == ''"),
    ),
    "type names": (
        "def f(xs, kind):\n    return [x for x in xs if type(x) is kind], kind\n",
        asserts("assert f([1, 'a'], int) == ([1], int)"),
    ),
    "imports of the solution": (
        "from collections import Counter\ndef f(s):\n    return Counter(s)\n",
        asserts("assert f('aab') == Counter('aab')"),
    ),
}


def test_what_tests_of_functions_use_works() -> None:
    verdicts = {
        name: grade(Task("function", gold, data), f"```python\n{gold}```") for name, (gold, data) in FEATURES.items()
    }
    assert {name: (v.score, v.evidence["error"]) for name, v in verdicts.items()} == dict.fromkeys(
        FEATURES, (1.0, None)
    )


# the forms of evalplus/humanevalplus and evalplus/mbppplus on the hub, with fewer inputs
PLUS = """


import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    same = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not same and atol != 0:
        np.testing.assert_allclose(out, exp, atol=atol)
    else:
        assert same

def ref_func(x):
    return [x / 2, x / 4]

def check(candidate):
    inputs = [[1.0], [2.0], [1e9], [0.0]]
    results = [[0.5, 0.25], [1.0, 0.5], [5e8, 2.5e8], [0.0, 0.0]]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
    for i, inp in enumerate(inputs):
        assertion(candidate(*inp), ref_func(*inp), 0)
"""
MBPP_PLUS = """import numpy as np
from math import inf

def is_floats(x) -> bool:
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    return isinstance(x, float) or isinstance(x, np.ndarray) and x.dtype == np.float64

def assertion(out, exp, atol):
    if isinstance(out, bool) or isinstance(exp, bool):
        assert out == exp, f"out: {out}, exp: {exp}"
        return
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if isinstance(out, (list, tuple)) and isinstance(exp, (list, tuple)):
        out, exp = set(out), set(exp)
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

inputs = [[[3, 1, 3]], [[]], [[inf, 2]], [True]]
results = [[1, 3], [], [2, inf], True]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(distinct(*inp), exp, 0)
"""


def test_the_form_of_humaneval_plus() -> None:
    data = {"prompt": "def f(x):\n", "entry_point": "f", "test": PLUS}
    gold = "    return [x / 2, x / 4]"
    assert score(gold, data, "    return [x / 2 + 1e-8, x / 4]")[0] == 1.0
    assert score(gold, data, "    return [x / 2 + 1e-3, x / 4]")[0] == 0.0
    assert score(gold, data, "    return x / 2")[0] == 0.0
    assert score(gold, data, "    return [x / 2 + 40, x / 4] if x > 1e8 else [x / 2, x / 4]")[0] == 1.0  # rtol 1e-7


def test_the_form_of_mbpp_plus() -> None:
    data = {"prompt": "", "entry_point": "distinct", "setup": "import math", "test": MBPP_PLUS}
    gold = "def distinct(xs):\n    return xs if xs is True else sorted(set(xs))"
    assert score(gold, data, "```python\ndef distinct(xs):\n    return xs is True or [*{*xs}]\n```")[0] == 1.0
    assert score(gold, data, "```python\ndef distinct(xs):\n    return xs\n```")[0] == 1.0  # as sets they are alike
    assert score(gold, data, "```python\ndef distinct(xs):\n    return xs is True or [*{*xs}][:1]\n```")[0] == 0.0


def test_answers_may_import_numpy() -> None:
    data = {"prompt": "def f(x):\n", "entry_point": "f", "test": PLUS}
    gold = "    return [x / 2, x / 4]"
    numbers = "import numpy as np\ndef f(x):\n    return {}\n"
    for text, right in (
        ("[np.float32(x / 2), np.array([x / 4])[0]]", 1.0),
        ("list(np.array([x / 2, x / 4]))", 1.0),
        ("np.array([x / 2, x / 4])", 0.0),  # as beside an array in one process: its truth has no value
        ("[np.float64(x), np.float64(x)]", 0.0),
    ):
        got = score(gold, data, f"```python\n{numbers.format(text)}```")
        assert got[0] == right, (text, got)
    counted = asserts("assert f([3, 1]) == 4\nassert f([]) == 0\nassert f([0]) is not None")
    said = "```python\nimport numpy\ndef f(xs):\n    return numpy.array(xs, dtype=int).sum()\n```"
    assert score("def f(xs):\n    return sum(xs)", counted, said)[0] == 1.0
    printed = {"io": [{"input": "2 3\n", "output": "5\n"}], "unchecked": True}
    said = "```python\nimport numpy as np\nprint(np.array(input().split(), dtype=np.int64).sum())\n```"
    assert score(None, printed, said)[0] == 1.0
    # it can be read and not changed, and nothing else of this program's packages is there
    writes = "    import numpy, os\n    open(numpy.__file__, 'a').write('0')\n    return [x / 2, x / 4]"
    assert score(gold, data, writes)[0] == 0.0
    assert score(gold, data, "    import numpy, scipy\n    return [x / 2, x / 4]")[0] == 0.0


def test_arguments_stay_as_they_were_where_the_reference_leaves_them() -> None:
    """Emptying the argument would make both sides of this test empty."""
    data = asserts("xs = [3, 1, 2]\nassert f(xs) == sorted(xs)")
    assert score("def f(xs):\n    return sorted(xs)", data, "def f(xs):\n    xs.clear()\n    return []")[0] == 0.0
    sorting = "def f(xs):\n    xs.sort()\n    return xs"
    assert score("def f(xs):\n    return sorted(xs)", data, sorting)[0] == 1.0


def test_helpers_of_the_prompt_are_the_tests_own() -> None:
    prompt = "def poly(x):\n    return x - 3\n\ndef root():\n"
    data = {"prompt": prompt, "entry_point": "root", "test": "def check(root):\n    assert poly(root()) == 0"}
    assert score("    return 3", data, "    global poly\n    poly = lambda x: 0\n    return 17")[0] == 0.0
    assert score("    return 3", data, "    return 3.0")[0] == 1.0


def test_an_object_never_equals_what_is_expected() -> None:
    data = asserts("assert 5 == f() or 3 in f() or f() in [5] or not f() != 5")
    lie = "class L:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
    lie += "    def __contains__(self, o): return True\n    def __iter__(self): return iter([1])\n"
    lie += "def f():\n    return L()\n"
    assert score("def f():\n    return 5", data, lie)[0] == 0.0


# ---- which text is the program

BODY = "    return n * (n + 1) // 2\n"
FULL = f"def total(n):\n{BODY}"
REPLIES = {
    "a completion": BODY,
    "a completion that rambles": f"{BODY}\nprint('hello\n\nQ: what is next?\n",
    "a whole function": FULL,
    "a block": f"Sure:\n```python\n{FULL}```\nThat is it.",
    "the last block": f"```python\ndef total(n):\n    return 0\n```\nBetter:\n```python\n{FULL}```\n",
    "a block and an example after it": f"```python\n{FULL}```\nUse it:\n```python\nprint(total(3))\n```\n",
    "a block of another language after it": f"```python\n{FULL}```\n```bash\npython a.py\n```\n",
    "a block that is cut off": f"```python\n{FULL}",
    "a block with the body only": f"```python\n{BODY}```",
    "a body without its indent": "```\nreturn n * (n + 1) // 2\n```",
    "a block that the prompt has opened": f"{BODY}```\nThis adds.\n```python\ntotal(3)\n```",
    "no block, but prose": f"Here is the function:\n{FULL}\nIt adds the numbers.",
    "with the prompt again": f"```python\n{PROMPT}{BODY}```",
    "thoughts before": f"<think>```python\nbad\n```</think>\n```python\n{FULL}```",
    "windows": f"```python\r\n{FULL}```".replace("\n", "\r\n"),
    "as a list item": "1. So:\n\n   ```python\n   def total(n):\n       return n * (n + 1) // 2\n   ```\n",
    "a name and a helper": "```py\ndef half(x):\n    return x // 2\n\ndef total(n):\n    return half(n * (n + 1))\n```",
}


def test_the_program_is_found_in_a_reply() -> None:
    task = Task("function", RIGHT, TOTAL)
    verdicts = grade_all([(task, said) for said in REPLIES.values()])
    assert {name: v.score for name, v in zip(REPLIES, verdicts, strict=True)} == dict.fromkeys(REPLIES, 1.0)


@given(said=st.text("`~ \n\tdefprtu:()python#\"'\\", max_size=200))
@settings(max_examples=100)
def test_any_text_gives_some_program(said: str) -> None:
    found = blocks(said)
    assert found and isinstance(choose({"prompt": PROMPT, "entry": "total", "options": found}), str)


# ---- programs, functional input and output, prediction

ADDS = "a, b = map(int, input().split())\nprint(a + b)\n"
IO = {"io": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7", "output": "12"}]}


def test_programs_that_read_and_print() -> None:
    assert score(ADDS, IO, f"```python\n{ADDS}```") == (1.0, "None")
    assert score(ADDS, IO, "```python\nprint(3)\n```")[1] == "printed '3\\n', wanted '12'"
    assert (
        score(ADDS, IO, "if __name__ == '__main__':\n    print(sum(map(int, input().split())))\n    exit()")[0] == 1.0
    )
    assert score(ADDS, IO, "raise SystemExit(1)")[0] == 0.0
    assert "EOFError" in score(ADDS, IO, "input(); input()")[1]
    with pytest.raises(ValueError, match="reference"):
        score("print(3)", IO, ADDS)


def test_functions_with_json_arguments() -> None:
    data = {
        "io": [{"input": "[1, 2]\n3", "output": "[1, 2, 3]"}],
        "entry_point": "Solution.push",
        "prelude": code.LIVE_PRELUDE,
    }
    gold = "class Solution:\n    def push(self, xs: List[int], x: int):\n        return xs + [x]\n"
    assert score(gold, data, f"```python\n{gold}```") == (1.0, "None")
    assert score(gold, data, gold.replace("xs + [x]", "(*xs, x)"))[0] == 1.0
    assert score(gold, data, gold.replace("xs + [x]", "xs"))[0] == 0.0


def test_predictions_are_values_and_never_the_function() -> None:
    base = {"code": "def f(a, b):\n    return a * b", "input": "'ab', 2", "output": "'abab'"}
    wanted = {**base, "predict": "output"}
    for said, right in [
        ("'abab'", 1.0),
        ('[ANSWER]f("ab", 2) == "abab"[/ANSWER]', 1.0),
        ("The answer is 'abab'", 1.0),
        ("'ab'", 0.0),
        ("f('ab', 2)", 0.0),
        ("type('Y', (str,), {'__eq__': lambda *a: True})('x')", 0.0),
        (")\n    return (", 0.0),
    ]:
        assert grade(Task("function", "'abab'", wanted), said).score == right, said
    given = {**base, "predict": "input"}
    for said, right in [("f('ab', 2)", 1.0), ("'abab', 1", 1.0), ("f('ab', b=2) == 'abab'", 1.0), ("'ab', 3", 0.0)]:
        assert grade(Task("function", "'ab', 2", given), said).score == right, said


def test_output_is_compared_by_lines_and_numbers() -> None:
    assert same_output("1 2 \n3\n\n", "1 2\n3") and same_output("1.0 x", "1 x") and same_output("0.1", "0.10001", 1e-3)
    assert not same_output("1\n2", "1 2") and not same_output("0.1", "0.10001") and not same_output("", "1")
    assert not same_output("nan", "inf") and not same_output("1e999999999", "1") and not same_output("9" * 10**6, "1")


# ---- tasks, limits, failures


@pytest.mark.parametrize(
    ("gold", "data"),
    [
        ("    return n", TOTAL),
        ("    return (", TOTAL),
        (None, TOTAL),
        ("", TOTAL),
        (RIGHT, {**TOTAL, "test": "assert ("}),
        (RIGHT, {**TOTAL, "test": "x = 1"}),
        (RIGHT, {**TOTAL, "entry_point": "a b"}),
        (RIGHT, {"prompt": PROMPT}),
        (RIGHT, {"tests": []}),
        ("print(1)", {"io": []}),
        ("print(1)", {"io": [{"in": ""}]}),
        ("1", {"predict": "code", "code": "", "input": "", "output": ""}),
    ],
)
def test_a_broken_task_raises(gold: str | None, data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="function"):
        grade(Task("function", gold, data), RIGHT)


def test_a_task_without_a_reference_must_say_so() -> None:
    task = Task("function", None, {**TOTAL, "unchecked": True})
    assert grade(task, RIGHT).score == 1 and grade(task, "    return n").score == 0


def test_limits_follow_the_reference() -> None:
    fast, slow = code.Outcome(True, cpu_s=0.01), code.Outcome(True, cpu_s=2.0, wall_s=8.0)
    assert limits_of({}, fast).cpu_s == code.FLOOR and limits_of({}, slow).cpu_s == 20.0
    assert limits_of({}, slow).wall_s == 80.0
    assert limits_of({"cpu_s": 7}, None).cpu_s == 7.0


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("function", RIGHT, TOTAL)
    assert grade(task, "    return 0").score == 0

    async def fail(spec: Any = None) -> Any:
        raise SandboxError("no more sandboxes")

    monkeypatch.setattr(code.sandboxes().backend, "open", fail)
    verdict = grade(task, RIGHT + "#")
    assert verdict == Verdict(None, "infra_error", verdict.evidence) and "no more" in verdict.evidence["error"]


def test_many_are_graded_in_order() -> None:
    task, seen = Task("function", RIGHT, TOTAL), list[int]()
    pairs = [(task, RIGHT), (task, "    return n"), (Task("number", 4), "4"), (task, RIGHT)]
    verdicts = grade_all(pairs, workers=2, progress=lambda done, verdict: seen.append(done))
    assert [verdict.score for verdict in verdicts] == [1, 0, 1, 1] and seen == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="reference"):
        grade_all([*pairs, (Task("function", "    return n", TOTAL), "x")])


# ---- lm-eval's metric


def test_code_eval_is_ours_and_needs_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate: Any = types.ModuleType("evaluate")  # the true one takes long to import; see below
    evaluate.load = lambda path: path
    monkeypatch.setitem(sys.modules, "evaluate", evaluate)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    code_eval.install()
    code_eval.install()
    assert evaluate.load("accuracy") == "accuracy"
    metric = evaluate.load("code_eval")
    right, wrong = "def add(a, b):\n    return a + b", "import os\nos._exit(0)"
    rates, results = metric.compute(
        references=["assert add(2, 3) == 5", TEST + "\ncheck(total)"],
        predictions=[[right, wrong], [PROMPT + "    return 0", PROMPT + RIGHT]],
        k=[1, 2, 3],
    )
    assert rates == {"pass@1": 0.5, "pass@2": 1.0}
    assert [found["passed"] for _, found in results[0]] == [True, False]
    assert results[1][1] == (1, {"task_id": 1, "passed": True, "result": "passed", "completion_id": 1})
    with pytest.raises(ValueError, match="predictions"):
        metric.compute(references=["x"], predictions=["a program"])
    with pytest.raises(ValueError, match="references"):
        metric.compute(references=["x"], predictions=[])


STOCK = """
import importlib.util, sys
from pathlib import Path
from evals.code_eval import install
install()
folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
for name in ("humaneval", "mbpp"):
    spec = importlib.util.spec_from_file_location(name, folder / name / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "humaneval":
        made = module.build_predictions([["    return a + b", "    return a"]], [{"prompt": "def add(a, b):\\n"}])
        print(module.pass_at_k(["def check(f):\\n    assert f(2, 3) == 5\\ncheck(add)"], made, k=1))
    else:
        print(module.pass_at_1("assert add(2, 3) == 5", ["def add(a, b):\\n    return a + b"]))
"""


@pytest.mark.slow
def test_the_stock_tasks_of_lm_eval_use_it_without_a_network() -> None:
    pytest.importorskip("lm_eval")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    env.pop("HF_ALLOW_CODE_EVAL", None)
    done = subprocess.run([sys.executable, "-c", STOCK], capture_output=True, text=True, env=env, timeout=600)
    assert done.stdout.splitlines() == ["{'pass@1': 0.5}", "1.0"], done.stderr[-2000:]


# ---- the whole of two benchmarks


def humaneval(data: Path) -> list[tuple[str, Task]]:
    path = data / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    fields = ("prompt", "test", "entry_point")
    return [(r["task_id"], Task("function", r["canonical_solution"], {f: r[f] for f in fields})) for r in rows]


def mbpp(data: Path) -> list[tuple[str, Task]]:
    path = data / "mbpp" / "mbpp.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    return [
        (r["task_id"], Task("function", r["code"], {"tests": r["test_list"], "setup": r["test_setup_code"]}))
        for r in rows
    ]


def failing(tasks: list[tuple[str, Task]]) -> list[str]:
    def passes(task: Task) -> bool:
        try:
            return grade(task, task.gold).score == 1
        except ValueError:
            return False

    with ThreadPoolExecutor(2) as pool:
        return [name for (name, _), ok in zip(tasks, pool.map(passes, [t for _, t in tasks]), strict=True) if not ok]


def test_some_reference_solutions_pass(data: Path) -> None:
    picked = {"HumanEval/32", "HumanEval/38", "HumanEval/50"}  # tests that use helpers of the prompt
    tasks = [each for at, each in enumerate(humaneval(data)) if at % 10 == 3 or each[0] in picked]
    hard = {126, 367, 596, 601, 640, 769, 912, 927}  # built-in names, classes, a missing import
    tasks += [each for at, each in enumerate(mbpp(data)) if at % 80 == 5 or each[0] in hard]
    assert len(tasks) >= 35 and failing(tasks) == []


@pytest.mark.slow
def test_every_reference_solution_of_humaneval_passes(data: Path) -> None:
    tasks = humaneval(data)
    assert len(tasks) == 164 and failing(tasks) == []


@pytest.mark.slow
def test_every_reference_solution_of_mbpp_passes(data: Path) -> None:
    tasks = mbpp(data)
    assert len(tasks) == 974 and failing(tasks) == []
