"""The metric "code_eval" for lm-eval's own tasks, on our grader of programs.

    install()                                       # from here on, evaluate.load("code_eval") is CodeEval
    lm_eval --tasks humaneval,mbpp ...              # lm-eval's stock YAML, on local data, without a network

    references   ["assert add(2, 3) == 5"]                     ->   {"pass@1": 0.5}
    predictions  [["def add(a, b): return a + b", "..."]]           {0: [(0, {"passed": True, ...}), ...]}

Hugging Face's metric is a download, runs a prediction in the process that knows the tests, and asks for an environment
variable that says so. This one has its arguments and results, needs no such switch and reads none: the prediction runs
in a sandbox and the reference in another (evals/code.py). Nothing weaker is ever used in its place.

A difference that remains: where lm-eval gives no prompt apart from the prediction, helpers that a test takes from the
prompt (three tasks of HumanEval: 32, 38 and 50) are the candidate's own copies.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agent.sandbox import Limits, SandboxError
from evals.code import MEMORY_MB, OUTPUT_KB, Outcome, run_tests
from evals.statistics import pass_at

CALLED = re.compile(r"\bcheck\(([A-Za-z_]\w*)\)\s*$")


class CodeEval:
    """With the call that lm-eval makes of evaluate's metric."""

    name = "code_eval"

    def compute(
        self,
        *,
        predictions: Sequence[Sequence[str]],
        references: Sequence[str],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over all tasks, and each prediction's result by task.

        predictions: programs, several for each reference; references: tests that are run after the program. timeout:
        seconds of processor time. Raises ValueError for arguments that do not fit together, SandboxError where the
        machinery fails twice: that is no result.
        """
        if isinstance(predictions, str) or isinstance(references, str) or len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} lists of predictions for {len(references)} references")
        for programs in predictions:
            if isinstance(programs, str) or not all(isinstance(program, str) for program in programs):
                raise ValueError("predictions holds a list of programs for each reference")
        limits = Limits(wall_s=timeout + 5, cpu_s=timeout, memory_mb=MEMORY_MB, output_kb=OUTPUT_KB)
        jobs = [(task, at, program) for task, each in enumerate(predictions) for at, program in enumerate(each)]

        def run(job: tuple[int, int, str]) -> tuple[int, dict[str, Any]]:
            task, at, program = job
            outcome = run_tests(program, references[task], limits, entry_point=_entry(references[task]))
            return at, {"task_id": task, "passed": outcome.passed, "result": _said(outcome), "completion_id": at}

        results: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            for (task, _, _), found in zip(jobs, pool.map(run, jobs), strict=True):
                results[task].append(found)
        totals = [len(results[task]) for task in range(len(references))]
        right = [sum(found["passed"] for _, found in results[task]) for task in range(len(references))]
        rates = {
            f"pass@{each}": sum(pass_at(n, c, each) for n, c in zip(totals, right, strict=True)) / len(totals)
            for each in k
            if totals and all(n >= each for n in totals)
        }
        return rates, results


def _entry(reference: str) -> str | None:
    """The function that a test of HumanEval's form is called with."""
    called = CALLED.search(reference.strip())
    return called[1] if called and "def check(" in reference else None


def _said(outcome: Outcome) -> str:
    if outcome.passed is None:
        raise SandboxError(f"a program could not be graded: {outcome.evidence.get('error')}")
    if outcome.passed:
        return "passed"
    return "timed out" if outcome.evidence["status"] == "timeout" else f"failed: {outcome.evidence['error']}"


def install() -> None:
    """Make evaluate.load("code_eval") give this metric; every other name goes where it went."""
    import evaluate

    loading: Callable[..., Any] = evaluate.load
    if getattr(loading, "gives_code_eval", False):
        return

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval() if path == "code_eval" else loading(path, *arguments, **options)

    load.gives_code_eval = True  # type: ignore[attr-defined]
    evaluate.load = load
