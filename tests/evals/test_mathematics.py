"""Mathematics: the same value in another form is right; hostile formulas cost no more than their limit.

pytest tests/evals/test_mathematics.py
"""

import json
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import evals.workers
from evals import mathematics
from evals.graders import Task, grade
from evals.mathematics import answer_of, number, tidy, value
from evals.workers import Died, Worker, Workers

EXACT = [
    (r"\frac{3}{2}", r"so $\boxed{1.5}$", 1),
    (r"\frac{3}{2}", r"\boxed{1\frac{1}{2}}", 1),
    (r"\frac{3}{2}", "1 1/2", 1),
    (r"-\frac{1}{2}", r"\frac{-1}2", 1),
    ("0.5", "½", 1),
    ("18", "#### 18", 1),
    ("18", "She has 18 eggs left.", 1),
    ("18", "It costs $18.00", 1),
    ("18", "He has 3 + 15 = 18 dollars", 1),
    ("1,234", "1234", 1),
    ("1234", "1{,}234", 1),
    ("0.5", "50%", 1),
    (r"50\%", "50", 1),
    ("1, 2", r"\{2, 1\}", 1),
    ("1, 2", "x = 2 or x = 1", 1),
    ("1, 2", r"$x = 1$ and $x = 2$", 1),
    ("3,4", r"\boxed{3} and \boxed{4}", 1),
    ("4", r"\boxed{3}. Wait, \boxed{4}", 1),
    ("3", r"\boxed{3} or \boxed{4}", 0),
    ("3", r"\boxed{1,2,3,4}", 0),
    ("3", "x = 3", 1),
    ("x=3", "3", 1),
    ("(1,2)", "(2,1)", 0),
    ("(1,2)", "[1,2]", 0),
    ("[1,2)", r"\left[1,2\right)", 1),
    (r"(-\infty,3]", "(-∞, 3]", 1),
    (r"\pm 2", "2, -2", 1),
    (r"\pm 2", "2", 0),
    (r"45^\circ", "45 degrees", 1),
    ("5 cm", "50 mm", 1),
    ("5 cm", "5", 1),
    ("5 cm", "5 kg", 0),
    ("2", "2x", 0),
    ("3", r"3 \text{ or 4}", 0),
    ("3", "3 or 4", 0),
    ("3", "3; 4", 0),
    ("1/3", "0.333", 0),
    (r"0.\overline{3}", "1/3", 1),
    ("10^5", r"100\,000", 1),
    (r"2 \times 10^{5}", "2e5", 1),
    ("A", "(A) 5 cm", 1),
    ("A", "The answer is A.", 1),
    ("A", "a", 0),
    ("B", "A", 0),
    (r"\text{Evelyn}", "Evelyn", 1),
    ("even", r"\text{odd}", 0),
    ("10:30", "10:30", 1),
    ("0", r"\boxed{\frac{0}{0}}", 0),
]
ALGEBRA = [
    (r"\sqrt{8}", r"The answer is $2\sqrt{2}$.", 1),
    (r"\sqrt{8}", "2√2", 1),
    (r"\sqrt{8}", r"\sqrt{7}", 0),
    (r"\frac{\sqrt{3}}{2}", "sqrt(3)/2", 1),
    (r"\frac{\pi}{2}", "π/2", 1),
    ("x^2-1", "(x-1)(x+1)", 1),
    ("y=2x+3", "y = 3 + 2x", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", 1),
    (r"(-\infty,3]", r"x \le 3", 1),
    ("7", "we have $a=3$, so the total is $a+4=7$.", 1),
    ("3", r"\infty", 0),
    ("xy", "yx", 1),
    ("3", r"3 \lor 4", 0),
    ("3", r"\boxed{\text{not }3}", 0),
    ("3", r"\boxed{3 \text{ (or 4)}}", 0),
    ("3", r"\boxed{\emptyset}", 0),
]


@pytest.mark.parametrize(("gold", "said", "score"), EXACT)
def test_numbers_are_compared_exactly_and_at_once(gold: str, said: str, score: float) -> None:
    verdict = grade(Task("math", gold), said)
    assert verdict.score == score, verdict
    assert verdict.evidence["by"] in ("text", "exact") or score == 0, verdict


def test_formulas_are_compared_by_algebra() -> None:
    for gold, said, score in ALGEBRA:
        verdict = grade(Task("math", gold), said)
        assert verdict.score == score, (gold, said, verdict)
        assert verdict.evidence["by"] == "math-verify" or gold == "3" or score == 0, verdict
    assert grade(Task("math", [r"\sqrt{7}", r"\sqrt{8}"]), r"$2\sqrt2$").score == 1, "several golds, any is right"
    assert grade(Task("math", "3.14159", {"tolerance": 1e-3}), "3.1416").score == 1


@given(st.fractions(max_denominator=10**6), st.booleans())
def test_any_fraction_is_read_back(fraction: Fraction, words: bool) -> None:
    sign, above, below = "-" if fraction < 0 else "", abs(fraction.numerator), fraction.denominator
    for text in (f"{fraction}", rf"{sign}\frac{{{above}}}{{{below}}}", rf"$\dfrac{{{sign}{above}}}{{{below}}}$"):
        read = value(f"{text} apples" if words else text)
        assert isinstance(read, mathematics.Number) and read.value == fraction


@pytest.mark.parametrize("gold", [r"\frac{1}{", "???", r"\begin{", "", " ", "x" * 3000])
def test_a_gold_that_cannot_be_parsed_is_an_error(gold: str) -> None:
    with pytest.raises(ValueError, match="gold"):
        grade(Task("math", gold), "1")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    workers = Workers("compare", memory_mb=2048, seconds=1)
    monkeypatch.setattr(mathematics, "WORKERS", workers)
    yield workers
    workers.close()


BOMBS = [r"9^{9^{9^{9}}}", r"(10^{9})!", r"\binom{10^{10}}{10^{9}}"]


@pytest.mark.parametrize("said", [BOMBS[0], pytest.param(BOMBS[1], marks=pytest.mark.slow), BOMBS[2]])
def test_formulas_that_never_end_are_wrong(said: str, quick: Workers) -> None:
    verdict = grade(Task("math", r"\sqrt{3}"), rf"\boxed{{{said}}}")
    assert (verdict.score, verdict.status) == (0, "graded")
    assert grade(Task("math", r"\sqrt{3}"), r"\sqrt{3}+0").score == 1, "the next answer has a worker again"


def test_long_texts_take_no_time() -> None:
    for text in (
        "9" * 300_000 + "^",
        r"\(" * 150_000,
        "answer: " * 40_000,
        "1," * 150_000,
        "$" * 300_001,
        "(" * 300_000,
    ):
        start = time.process_time()
        assert grade(Task("math", "7"), text).score == 0
        assert time.process_time() - start < 5, text[:10]


def test_nesting_is_refused_before_it_costs() -> None:
    for said in (r"\frac{1}{" * 300 + "2" + "}" * 300, "(" * 900 + "x" + ")" * 900):
        verdict = grade(Task("math", "1"), rf"\boxed{{{said}}}" if said.count("{") == said.count("}") else said)
        assert verdict.score == 0 and verdict.status == "graded"


def test_a_worker_that_dies_is_replaced(quick: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    task, said = Task("math", r"\sqrt{8}"), r"\boxed{2\sqrt{2}}"
    assert grade(task, said).score == 1
    quick._free[0]._process.kill()
    assert grade(task, said).score == 1, "asked once more"

    def dies(worker: Worker, question: dict[str, str]) -> dict[str, str]:
        if "7" in str(question["answer"]):
            raise Died("the worker ended with status -11")
        return {"parsed": "yes"}

    monkeypatch.setattr(evals.workers.Worker, "ask", dies)
    killed = grade(task, r"\boxed{\sqrt{7}}")
    assert killed.score == 0 and "-11" in killed.evidence["why"], "the answer kills it, not the machinery"

    def gone(worker: Worker, question: dict[str, str]) -> dict[str, str]:
        raise Died("the worker ended with status -9")

    monkeypatch.setattr(evals.workers.Worker, "ask", gone)
    failed = grade(task, said)
    assert (failed.score, failed.status) == (None, "infra_error")


def test_from_many_threads() -> None:
    scores: list[float | None] = [None] * 12

    def work(at: int) -> None:
        scores[at] = grade(Task("math", r"\sqrt{8}"), rf"\boxed{{2\sqrt{{{at}}}}}").score

    threads = [threading.Thread(target=work, args=(at,)) for at in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [float(at == 2) for at in range(12)]


def test_golds_of_real_benchmarks(data: Path) -> None:
    rows = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        gold = row["answer"].split("####")[1].strip()
        assert grade(Task("math", gold), row["answer"]).score == 1, gold
        assert value(gold) is not None, "no process is started for a number"
    path = data / "math_vision_mini" / "testmini.jsonl"
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        assert grade(Task("math", row["answer"]), rf"Thus \boxed{{{row['answer']}}}.").score == 1, row["answer"]


def test_pieces() -> None:
    assert answer_of("so $1$, then $2$ and $3$.") == "2, 3" and answer_of("#### 5") == "5"
    assert tidy(r"$\dfrac{1}{2}\,\mathrm{cm}$") == r"\frac{1}{2} \text{cm}"
    assert number("1/0") is None and number("3 pi") is None and number("2^10") is None
