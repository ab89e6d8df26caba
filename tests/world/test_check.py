"""Checks: gold right, silence and garbage wrong, hostile programs contained, broken gold raised.

pytest tests/world/test_check.py
"""

import os
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from world.check import CHECKS, check, code_of, holds, overlap
from world.sample import Check, Turn

DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("red", {}),
    "number": ("12", {}),
    "output": ("[1, 2]", {}),
    "box": ("10 10 30 30", {"box": [10, 10, 30, 30]}),
    "point": ("20 20", {"box": [10, 10, 30, 30]}),
    "caption": ("red star top left", {"facts": [["red", "star", "top left"]]}),
    "constraint": ("ONE", {"constraints": [{"kind": "upper"}, {"kind": "words", "value": 1}]}),
    "svg": ('<svg><circle cx="3" cy="4" r="2" fill="red"/></svg>', {}),
    "program": ("def f(x):\n    return x + 1", {"tests": [[[1], 2], [[4], 5]], "name": "f"}),
}


def turn(kind: str, answer: str | None = None, data: dict[str, Any] | None = None) -> Turn:
    gold, given_ = DATA[kind]
    return Turn("q?", answer or gold, "t", "c", check=Check(kind, given_ if data is None else data))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", DATA)
def test_gold_is_right_and_silence_wrong(kind: str) -> None:
    one = turn(kind)
    assert check(one, one.answer) and check(one, f"  {one.answer}\n")
    assert not check(one, "") and not check(one, " \n ")


@given(text=st.text(max_size=60))
def test_garbage_never_raises(text: str) -> None:
    for kind in DATA.keys() - {"program"}:
        check(turn(kind), text)


@pytest.mark.parametrize(
    "kind, reply, right",
    [
        ("exact", "Red", True),
        ("exact", "red.", False),
        ("exact", "red blue", False),
        ("number", "12.0", True),
        ("number", "24/2", True),
        ("number", "12 or 13", False),
        ("number", "1" * 4000, False),
        ("number", "1/0", False),
        ("number", "١٢", False),
        ("output", "[1,2]", True),
        ("output", "[1, 2, 3]", False),
        ("box", "12 10 30 31", True),
        ("box", "[10, 10, 30, 30]", True),
        ("box", "30 30 10 10", False),
        ("box", "50 50 60 60", False),
        ("box", "10 10 30", False),
        ("point", "31 20", False),
        ("point", "20 20 20", False),
        ("caption", "red star top left, blue star top left", False),
        ("caption", "star red top left", False),
        ("constraint", "ONE TWO", False),
        ("constraint", "one", False),
        ("svg", '<svg><circle cx="3" cy="4" r="2" fill="blue"/></svg>', False),
        ("svg", '<svg><rect x="1" y="2" width="4" height="4" fill="red"/></svg>', True),
        ("svg", '<svg><circle cx="8" cy="4" r="2" fill="red"/></svg>', False),
        ("svg", '<svg><script src="x"/></svg>', False),
        ("svg", '<!DOCTYPE x [<!ENTITY a "b">]><svg>&a;</svg>', False),
        ("svg", "<svg>" + '<circle cx="3" cy="4" r="2" fill="red"/>' * 40 + "</svg>", False),
        ("svg", "<svg></svg>", False),
    ],
)
def test_single_verdicts(kind: str, reply: str, right: bool) -> None:
    assert check(turn(kind), reply) is right


@pytest.mark.parametrize(
    "source",
    [
        "def f(x",
        "def g(x): return x + 1",
        "f = 3",
        "def f(x): return str(x + 1)",
        "def f(x): return x + 1.0000001",
        "def f(x): return True if x == 1 else 5",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "def f(x): raise SystemExit(0)",
        "raise KeyboardInterrupt",
        "def f(x): return f(x)",
        "x = 'a' * 10**10",
        "def f(x):\n    print('{\"value\": 2}')",
        'import sys, os\nos.write(int(sys.argv[1]), b\'{"value": 2}\\n{"value": 5}\\n\')\nos._exit(0)',
        "class E:\n    def __eq__(self, o): return True\ndef f(x): return E()",
        "\x00",
        "\ud800",
    ],
)
def test_wrong_and_hostile_programs_are_wrong(source: str) -> None:
    assert check(turn("program"), source) is False


def test_an_endless_program_ends() -> None:
    started = time.monotonic()
    assert not check(turn("program"), "while True:\n    pass")
    assert time.monotonic() - started < 20


def test_a_fence_is_taken_off() -> None:
    assert code_of("text\n```python\nx = 1\n```\nmore") == "x = 1\n"
    assert check(turn("program"), "```python\ndef f(x):\n    return 1 + x\n```")


def test_no_process_is_left_behind(tmp_path: object) -> None:
    source = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\ndef f(x): return x + 1"
    before = _children()
    check(turn("program"), source)
    time.sleep(0.1)
    assert _children() <= before


def _children() -> int:
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                count += b"given[" in file.read()
        except OSError:
            continue
    return count


@pytest.mark.parametrize(
    "kind, answer, data",
    [
        ("number", "many", {}),
        ("box", "1 2 3 4", {"box": [5, 5, 1, 1]}),
        ("box", "1 2 3 4", {}),
        ("program", "def f(): pass", {}),
        ("constraint", "x", {}),
        ("caption", "x", {}),
        ("svg", "<svg>text</svg>", {}),
        ("constraint", "x", {"constraints": [{"kind": "rhymes", "value": "x"}]}),
    ],
)
def test_a_broken_gold_is_raised(kind: str, answer: str, data: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        check(turn(kind, answer, data), "12")


@pytest.mark.parametrize(
    "constraint, yes, no",
    [
        ({"kind": "equals", "value": "RED"}, "RED", "red"),
        ({"kind": "contains", "value": "cat"}, "a cat sat", "concat"),
        ({"kind": "excludes", "value": "cat"}, "a dog", "Cat"),
        ({"kind": "words", "value": 2}, "one two", "one"),
        ({"kind": "lower"}, "abc", "Abc"),
        ({"kind": "startswith", "value": "a"}, "ab", "ba"),
        ({"kind": "endswith", "value": "."}, "a.", "a"),
        ({"kind": "repeat", "value": ["a", 2]}, "a a", "a"),
        ({"kind": "lines", "value": 2}, "a\nb", "a b"),
    ],
)
def test_constraints(constraint: dict[str, Any], yes: str, no: str) -> None:
    assert holds(constraint, yes) and not holds(constraint, no)


def test_overlap_of_boxes() -> None:
    assert overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert overlap((0, 0, 2, 2), (2, 0, 4, 2)) == 0 and overlap((0, 0, 0, 2), (0, 0, 2, 2)) == 0


def test_every_kind_has_a_check() -> None:
    assert set(CHECKS) == set(DATA)
