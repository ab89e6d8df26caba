"""Means and their doubt against enumeration, brute force and simulation.

pytest tests/evals/test_statistics.py
"""

import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.statistics import (
    Estimate,
    estimate,
    ladder,
    paired,
    pass_all,
    pass_at,
    ratio,
    sign_flip,
    summarize,
)
from evals.world import wilson


def row(item: str, score: float | None, cluster: str | None = None, **more: Any) -> dict[str, Any]:
    tokens = {"completion": more.pop("completion", 10), "prompt": 5, "thinking": 0, "media": 0}
    status = "graded" if score is not None else "infra_error"
    return {"item_id": item, "cluster": cluster or item, "score": score, "status": status, "tokens": tokens} | more


# ---- several answers to one problem


@given(st.integers(1, 9), st.data())
@settings(max_examples=60)
def test_pass_at_k_equals_enumeration(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    answers = [True] * right + [False] * (n - right)
    draws = list(combinations(answers, k))
    assert pass_at(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    assert pass_all(n, right, k) == pytest.approx(sum(map(all, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_safe_for_large_numbers() -> None:
    exact = 1 - math.comb(2000 - 3, 1000) / math.comb(2000, 1000)
    assert pass_at(2000, 3, 1000) == pytest.approx(float(exact), rel=1e-12)
    assert pass_at(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12)  # 1 - (1 - 1e-6) would lose ten digits
    assert pass_at(10**6, 0, 10**6) == 0 and pass_at(10**6, 1, 10**6) == 1


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 50))
def test_pass_at_k_is_a_chance_that_grows_with_k(n: int, right: int, k: int) -> None:
    if right > n or k > n:
        with pytest.raises(ValueError, match="answers"):
            pass_at(n, right, k)
        return
    assert 0 <= pass_all(n, right, k) <= right / n + 1e-12 <= pass_at(n, right, k) + 2e-12 <= 1 + 2e-12
    if k < n:
        assert pass_at(n, right, k) <= pass_at(n, right, k + 1) + 1e-12


def test_the_columns_of_k() -> None:
    assert [ladder(n) for n in (1, 2, 5, 32)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8, 16, 32]]


# ---- intervals


def test_one_binary_item_per_cluster_is_wilson() -> None:
    made = estimate([1, 1, 0, 1])
    low, high = wilson(3, 4)
    assert made.method == "wilson" and made.value == 0.75
    assert (made.low, made.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6)), min_size=1, max_size=40))
def test_an_interval_of_shares_holds_the_mean_and_stays_inside(pairs: list[tuple[float, int]]) -> None:
    made = estimate([s for s, _ in pairs], [c for _, c in pairs])
    assert made.value == pytest.approx(np.mean([s for s, _ in pairs]))
    if made.low is None or made.high is None:
        assert made.clusters == 1
    else:
        assert 0 <= made.low <= made.value + 1e-9 and made.value - 1e-9 <= made.high <= 1
        assert made.high > made.low, "a few items never give certainty"


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_repeating_every_item_does_not_make_it_surer(scores: list[float]) -> None:
    once = estimate(scores, range(len(scores)))
    four = estimate([s for s in scores for _ in range(4)], [i for i in range(len(scores)) for _ in range(4)])
    assert once.low is not None and once.high is not None and four.low is not None and four.high is not None
    if once.method == "wilson":  # by the normal quantile, the other by Student's, which is wider
        assert four.high - four.low >= once.high - once.low - 1e-9
    else:
        assert (four.low, four.high) == (pytest.approx(once.low, abs=1e-6), pytest.approx(once.high, abs=1e-6))


def test_a_mean_of_any_numbers_is_students_interval() -> None:
    made = estimate([1.0, 2.0, 4.0, 9.0])
    assert made.method == "t" and made.value == 4.0
    half = 3.182446 * np.std([1, 2, 4, 9], ddof=1) / 2
    assert (made.low, made.high) == (pytest.approx(4 - half, abs=1e-4), pytest.approx(4 + half, abs=1e-4))


def beta_clusters(rng: np.random.Generator, count: int, size: int, p: float, alike: float) -> tuple[Any, Any]:
    chance = rng.beta(p * (1 - alike) / alike, (1 - p) * (1 - alike) / alike, count)
    sizes = rng.integers(1, 2 * size, count)
    scores = np.concatenate([rng.random(s) < q for q, s in zip(chance, sizes, strict=True)]).astype(float)
    return scores, np.repeat(np.arange(count), sizes)


@pytest.mark.parametrize(
    "count, size, p, alike", [(6, 6, 0.5, 0.3), (12, 5, 0.15, 0.3), (40, 4, 0.9, 0.2), (60, 3, 0.04, 0.5)]
)
def test_the_interval_covers_the_truth_as_often_as_it_says(count: int, size: int, p: float, alike: float) -> None:
    rng = np.random.default_rng(1)
    hits = naive = 0
    for _ in range(300):
        scores, clusters = beta_clusters(rng, count, size, p, alike)
        made = estimate(scores.tolist(), clusters.tolist())
        assert made.low is not None and made.high is not None
        hits += made.low <= p <= made.high
        low, high = wilson(int(scores.sum()), len(scores))
        naive += low <= p <= high
    # 300 draws of 95 %: standard error 1.3 %; a t with few clusters may be a little too wide, never much too narrow
    assert hits / 300 >= 0.93
    assert naive < hits, "an interval that takes every row for independent is too narrow"


@pytest.mark.parametrize("count", [8, 40])
def test_coverage_of_differences_and_ratios(count: int) -> None:
    rng = np.random.default_rng(2)
    hits = over = 0
    for _ in range(200):
        own = rng.normal(0, 1, count)
        size = rng.integers(1, 5, count)
        names = [str(g) for g in range(count) for _ in range(size[g])]
        shift = np.repeat(0.3 + 0.2 * own, size) + rng.normal(0, 0.3, len(names))
        first = [row(str(i), 0.0, c) for i, c in enumerate(names)]
        second = [row(str(i), float(s), c) for i, (c, s) in enumerate(zip(names, shift, strict=True))]
        made = paired(first, second)
        assert made is not None and made.difference.low is not None and made.difference.high is not None
        hits += made.difference.low <= 0.3 <= made.difference.high
        chance, cost = np.repeat(rng.beta(3, 3, count), size), rng.gamma(4, 50, len(names))
        right = (rng.random(len(names)) < chance).astype(float)
        if right.sum() and (spent := ratio(cost.tolist(), right.tolist(), names)).low is not None:
            assert spent.high is not None
            over += not spent.low <= 400 <= spent.high  # 200 tokens each, half of them right
    assert hits / 200 >= 0.91 and over / 200 <= 0.09


@pytest.mark.parametrize(
    "scores, clusters, message",
    [
        ([], None, "no scores"),
        ([1.0, math.nan], None, "score 1 is not a finite number"),
        ([1.0, math.inf], None, "finite"),
        ([1.0], [1, 2], "must match"),
    ],
)
def test_what_is_no_list_of_scores_is_refused(scores: list[float], clusters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(scores, clusters)


def test_one_cluster_tells_no_interval() -> None:
    made = estimate([0.0, 1.0, 1.0], ["a", "a", "a"])
    assert (made.low, made.high, made.method) == (None, None, "none") and made.half is None


def test_all_right_is_not_certain() -> None:
    made = estimate([1.0] * 20, [i // 2 for i in range(20)])
    assert made.low is not None and made.low == pytest.approx(0.66, abs=0.02) and made.high == 1  # ten, not twenty


# ---- two runs


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_sign_flips_equal_brute_force(differences: list[int]) -> None:
    every = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    brute = sum(total >= abs(sum(differences)) for total in every) / len(every)
    assert sign_flip([d / 7 for d in differences]) == pytest.approx(brute)


def test_drawn_sign_flips_agree_with_the_exact_ones_and_repeat() -> None:
    rng = np.random.default_rng(3)
    differences = rng.normal(0.35, 1, 14).tolist()
    exact = sign_flip(differences)
    from evals import statistics

    more = [*differences, *[1e-12] * 2]  # two more clusters that change nothing, and it is drawn
    assert len(more) > statistics.EXACT_FLIPS
    assert sign_flip(more) == pytest.approx(exact, abs=0.012)
    assert sign_flip(more) == sign_flip(more) and 0 < sign_flip([1.0] * 100) < 1e-4


def test_the_p_value_holds_its_level_with_clusters() -> None:
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(300):
        shared = np.repeat(rng.normal(0, 1, 10), 6) + rng.normal(0, 0.2, 60)  # no true difference, strong clusters
        wrong += sign_flip(shared.tolist(), np.repeat(np.arange(10), 6).tolist()) < 0.05
    assert wrong / 300 <= 0.08


def test_a_comparison_is_of_the_common_items() -> None:
    first = [row("a", 1.0), row("a", 0.0), row("b", 0.0), row("c", 1.0), row("d", None)]
    second = [row("a", 1.0), row("b", 1.0), row("d", 1.0), row("e", 0.0), row("c", 1.0)]
    made = paired(first, second, "t")
    assert made is not None and made.n == 3
    assert (made.better, made.worse, made.same, made.only_first, made.only_second) == (2, 0, 1, 0, 2)
    assert made.difference.value == pytest.approx(0.5) and made.second - made.first == pytest.approx(0.5)
    assert paired(first, [row("z", 1.0)]) is None


def test_the_detectable_effect_is_detected_four_times_in_five() -> None:
    rng = np.random.default_rng(5)
    found, effects = 0, []
    for _ in range(300):
        base = [row(str(i), 0.0) for i in range(60)]
        effect = 0.374  # (2.00 + 0.85) / sqrt(60), for a standard deviation of 1
        deltas = rng.normal(effect, 1, 60)
        made = paired(base, [row(str(i), float(d)) for i, d in enumerate(deltas)])
        assert made is not None and made.detectable is not None and made.difference.low is not None
        effects.append(made.detectable)
        found += made.difference.low > 0
    assert np.mean(effects) == pytest.approx(0.374, rel=0.05)
    assert 0.73 <= found / 300 <= 0.87


# ---- one task


def test_a_task_is_summed_up() -> None:
    rows = [
        row("a", 1.0, completion=100),
        row("a", 0.0, completion=50, status="truncated"),
        row("b", 1.0, completion=30),
        row("b", 1.0, completion=20),
        row("c", 0.0, completion=0, status="silent"),
        row("c", 0.0, completion=100, finish_reason="length"),
    ]
    made = summarize("t", rows)
    assert (made.rows, made.items, made.clusters, made.repeats, made.solved) == (6, 3, 3, 2, 3)
    assert (made.truncated, made.silent, made.infra_errors, made.valid) == (2, 1, 0, True)
    assert made.score is not None and made.score.value == 0.5
    assert {k: e.value for k, e in made.pass_at.items()} == {1: pytest.approx(0.5), 2: pytest.approx(2 / 3)}
    assert {k: e.value for k, e in made.pass_all.items()} == {1: pytest.approx(0.5), 2: pytest.approx(1 / 3)}
    assert made.avg_at[2].value == pytest.approx(0.5)
    assert made.tokens_answer is not None and made.tokens_answer.value == 50
    assert made.tokens_solved is not None and made.tokens_solved.value == 100
    assert made.tokens_right is not None and made.tokens_right.value == 50


def test_what_the_machinery_lost_is_no_zero() -> None:
    rows = [row(str(i), 1.0) for i in range(97)] + [row(str(97 + i), None) for i in range(3)]
    made = summarize("t", rows)
    assert made.score is not None and made.score.value == 1.0 and made.infra_errors == 3
    assert not made.valid and "3 of 100" in made.why
    assert summarize("t", rows, infra_share=0.03).valid
    lost = summarize("t", [row("a", None)])
    assert lost.score is None and not lost.valid and lost.tokens_solved is None


def test_a_metric_without_a_value_per_answer_is_no_failure() -> None:
    made = summarize("bleu", [row(str(i), None, status="no_score") for i in range(5)])
    assert made.valid and made.infra_errors == 0 and made.score is None and made.rows == 5


def test_an_item_with_lost_repeats_is_left_out_of_pass_at_k() -> None:
    rows = [row("a", 1.0), row("a", 0.0), row("b", 0.0), row("b", None)]
    made = summarize("t", rows)
    assert made.short == 1 and made.pass_at[2].value == 1.0 and made.pass_at[2].n == 1


def test_scores_beyond_one_have_no_pass_at_k() -> None:
    made = summarize("perplexity", [row("a", 12.5), row("a", 11.0), row("b", 30.0), row("b", 31.0)])
    assert made.score is not None and made.score.method == "t" and not made.pass_at and made.solved == 0
    assert made.tokens_solved is None and made.avg_at[2].value == pytest.approx(made.score.value)


@pytest.mark.parametrize("break_", [lambda r: r.pop("tokens"), lambda r: r["tokens"].update(completion=None)])
def test_unknown_tokens_are_not_zero(break_: Callable[[dict[str, Any]], Any]) -> None:
    rows = [row("a", 1.0), row("b", 1.0)]
    for one in rows:
        break_(one)
    made = summarize("t", rows)
    assert made.tokens_answer is None and made.tokens_solved is None


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize("t", [])


def test_a_ratio_whose_solved_items_are_one_cluster_has_no_interval() -> None:
    made = ratio([10, 20, 30], [1, 0, 0], ["a", "b", "c"])
    assert made == Estimate(60.0, None, None, 3, 3, "none")
