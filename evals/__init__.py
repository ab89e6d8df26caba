"""evals: model to numbers. evals.evaluate(model, tasks, limit=..., out=...) is moonkit eval from Python."""

from typing import Any

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # not before it is asked for: lm-eval and torch take seconds to import
        from evals.run import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
