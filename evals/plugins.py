"""What moonkit adds to lm-eval's registries besides its models; found by entry points, or on import.

filter_list: [{name: seen, filter: [{function: after_thought}, {function: take_first}]}]
metric_list: [{metric: moonkit_anls, aggregation: mean_of_graded}]

after_thought     filter       what stands after the last </think>; nothing if the thought never ended
moonkit_anls      metric       DocVQA's edit distance, by evals/graders.py
mean_of_graded    aggregation  the mean without what could not be graded (None): a broken machine is no zero
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_aggregation, register_filter, register_metric

from evals.graders import Task, grade, visible


@register_filter("after_thought")
class AfterThought(Filter):
    def apply(self, resps: Iterable[Any], docs: Any) -> list[list[str]]:
        return [[visible(reply)[0].lstrip() for reply in replies] for replies in resps]


@register_aggregation("mean_of_graded")
def mean_of_graded(items: Sequence[float | None]) -> float:
    """nan when nothing could be graded."""
    graded = [item for item in items if item is not None]
    return sum(graded) / len(graded) if graded else float("nan")


@register_metric(metric="moonkit_anls", higher_is_better=True, aggregation="mean_of_graded")
def moonkit_anls(references: Sequence[Any], predictions: Sequence[str], **_: Any) -> float | None:
    """Of one document: references are its golds, predictions hold the reply."""
    golds = [str(one) for gold in references for one in (gold if isinstance(gold, list | tuple) else [gold])]
    return grade(Task("anls", golds), str(predictions[0])).score
