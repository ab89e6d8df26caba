"""From graded samples to numbers with their doubt: means, pass@k, differences between runs, tokens per solved task.

    summarize("gsm8k", rows)    ->  TaskSummary   score with 95 % interval, pass@k, tokens, truncated, infra errors
    paired(rows_a, rows_b)      ->  Paired        mean difference on common items, interval, p, what could be detected

    rows     {"item_id", "cluster", "repeat", "score", "status", "tokens": {...}, "finish_reason"}
      |      several rows per item (repeats), several items per cluster (one picture, one repository, one twin pair)
    items    mean over the repeats of an item
      |
    cluster  what is drawn at random: the doubt comes from how clusters differ, not from how many rows there are

A row whose score is None has been failed by the machinery, not by the model: it is left out of every mean and counted,
and where too many are, the result is not valid. Intervals follow E. Miller, "Adding Error Bars to Evals" (2024), with
the jackknife over clusters (MacKinnon, Nielsen and Webb 2023, CV3), which holds its level with few clusters.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.world import wilson, wilson_of

Row = Mapping[str, Any]
Floats = NDArray[np.float64]

INFRA_SHARE = 0.02  # more of a task's rows failed by the machinery: the result is not valid
POWER = 0.8
EXACT_FLIPS = 14  # up to so many clusters with a difference, all 2^n signs are tried
FLIPS = 20_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval. low and high are None where nothing can be said (one cluster).

    method: "wilson" (one binary item per cluster), "clustered wilson" (scores from 0 to 1), "t" (anything else),
    "log t" (a ratio of sums), "none".
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    method: str
    level: float = 0.95

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def estimate(scores: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = 0.95) -> Estimate:
    """Mean of scores with its interval, clustered. clusters: one name per score; None: every score is its own.

    Scores between 0 and 1 get Wilson's interval with the number of independent items that would have the same error
    (Korn and Graubard 1998), and Student's quantile: it stays inside 0 to 1 and is honest near both ends, where a
    symmetric one is not. Raises ValueError for no scores, for a score that is no finite number, for unequal lengths.
    """
    values, groups = _checked(scores, clusters, level)
    n, count = len(values), len(groups)
    mean = float(values.mean())
    unit = bool(((values >= 0) & (values <= 1)).all())
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if binary and count == n:
        low, high = wilson(round(float(values.sum())), n, _normal(level))
        return Estimate(mean, low, high, n, count, "wilson", level)
    if count < 2:
        return Estimate(mean, None, None, n, count, "none", level)
    sums = np.array([values[at].sum() for at in groups])
    sizes = np.array([len(at) for at in groups], float)
    error, freedom = _jackknife(sums, sizes)
    t = _student(level, freedom)
    if not unit:
        return Estimate(mean, mean - t * error, mean + t * error, n, count, "t", level)
    # so many independent binary items would be as uncertain; where all clusters agree, as many as there are clusters
    alike = mean * (1 - mean) / error**2 if error > 1e-9 else float(count)
    low, high = wilson_of(mean, max(1.0, alike), t)
    return Estimate(mean, low, high, n, count, "clustered wilson", level)


def ratio(
    above: Sequence[float], below: Sequence[float], clusters: Sequence[Hashable], level: float = 0.95
) -> Estimate:
    """sum(above) / sum(below) with its interval, clustered: tokens spent over tasks solved, for instance.

    The jackknife of its logarithm, so that the interval stays positive. Raises ValueError where a sum is not positive.
    """
    values, groups = _checked(above, clusters, level)
    counts = np.asarray(below, float)
    if len(counts) != len(values):
        raise ValueError(f"{len(values)} values above and {len(counts)} below")
    if not (values.sum() > 0 and counts.sum() > 0):
        raise ValueError("a ratio needs positive sums above and below")
    value, count = float(values.sum() / counts.sum()), len(groups)
    tops = values.sum() - np.array([values[at].sum() for at in groups])
    bottoms = counts.sum() - np.array([counts[at].sum() for at in groups])
    if count < 2 or not (tops > 0).all() or not (bottoms > 0).all():  # all that was solved is in one cluster
        return Estimate(value, None, None, len(values), count, "none", level)
    logs = np.log(tops / bottoms)
    error = math.sqrt((count - 1) / count * float(((logs - math.log(value)) ** 2).sum()))
    spread = math.exp(min(700.0, _student(level, count - 1) * error))
    return Estimate(value, value / spread, value * spread, len(values), count, "log t", level)


def _checked(
    scores: Sequence[float], clusters: Sequence[Hashable] | None, level: float
) -> tuple[Floats, list[list[int]]]:
    """Scores as an array, and the places of each cluster."""
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
    values = np.asarray(scores, float)
    if values.ndim != 1 or not len(values):
        raise ValueError("no scores, so there is no mean")
    if not np.isfinite(values).all():
        raise ValueError(f"score {int(np.flatnonzero(~np.isfinite(values))[0])} is not a finite number")
    if clusters is None:
        return values, [[i] for i in range(len(values))]
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} scores and {len(clusters)} clusters must match one to one")
    places: dict[Hashable, list[int]] = defaultdict(list)
    for at, name in enumerate(clusters):
        places[name].append(at)
    return values, list(places.values())


def _jackknife(sums: Floats, sizes: Floats) -> tuple[float, float]:
    """Standard error of sum(sums) / sum(sizes), from how it moves when each cluster is left out; degrees of freedom.

    Those are fewer than clusters - 1 where few clusters make most of the error, as where hardly any is solved
    (Satterthwaite: the spread of the squares says how well their mean is known).
    """
    count = len(sums)
    squares = ((sums.sum() - sums) / (sizes.sum() - sizes) - sums.sum() / sizes.sum()) ** 2
    mean, spread = float(squares.mean()), float(squares.var())
    freedom = float(count - 1)
    if spread > 0:
        freedom = round(min(freedom, 2 * count * mean**2 / spread), 2)
    return math.sqrt((count - 1) * mean), freedom


@lru_cache(maxsize=1024)
def _student(level: float, freedom: float) -> float:
    from scipy.special import stdtrit  # scipy.stats takes seconds to import

    return float(stdtrit(freedom, (1 + level) / 2))


def _normal(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


# ---- several answers to one problem


def pass_at(n: int, right: int, k: int) -> float:
    """Chance that at least one of k answers is right, drawn from n answers of which `right` are: 1 - C(n-c,k) / C(n,k).

    Unbiased (Chen et al. 2021). As a sum of logarithms: no large binomials, and small chances keep their digits.
    Raises ValueError unless 1 <= k <= n and 0 <= right <= n.
    """
    _must_be_draw(n, right, k)
    if n - right < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - right + 1, n + 1)))


def pass_all(n: int, right: int, k: int) -> float:
    """pass^k: chance that all of k answers are right, drawn from n of which `right` are: C(c,k) / C(n,k)."""
    _must_be_draw(n, right, k)
    if right < k:
        return 0.0
    return math.prod((right - i) / (n - i) for i in range(k))


def _must_be_draw(n: int, right: int, k: int) -> None:
    if not 0 <= right <= n:
        raise ValueError(f"{right} right answers of {n}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} answers that there are, got {k}")


def ladder(repeats: int) -> list[int]:
    """The k that are worth a column: 1, powers of two, and the number of repeats itself."""
    return sorted({1, repeats, *(2**i for i in range(1, 20) if 2**i < repeats)})


# ---- one task


@dataclass(frozen=True)
class TaskSummary:
    """All numbers of one task of one run. None: there is nothing to say, as for pass@k of a score beyond 0 to 1.

    rows: answers asked for. items: problems. score: mean over rows with a score, an item's repeats being one cluster.
    pass_at, pass_all: by k. avg_at: by the number of repeats, mean over items of the mean over their repeats (avg@k).
    tokens_answer: generated per answer, thoughts included. tokens_solved: all that was generated, over the number of
    right answers: what one solved task costs, failures included. tokens_right: generated per right answer.
    short: items with fewer than `repeats` scored rows, left out of pass@k. valid: False with `why` in words. unit: all
    scores lie between 0 and 1.
    """

    name: str
    rows: int
    items: int
    clusters: int
    repeats: int
    score: Estimate | None
    pass_at: Mapping[int, Estimate] = field(default_factory=dict)
    pass_all: Mapping[int, Estimate] = field(default_factory=dict)
    avg_at: Mapping[int, Estimate] = field(default_factory=dict)
    tokens_answer: Estimate | None = None
    tokens_solved: Estimate | None = None
    tokens_right: Estimate | None = None
    solved: int = 0
    truncated: int = 0
    silent: int = 0
    infra_errors: int = 0
    short: int = 0
    valid: bool = True
    why: str = ""
    unit: bool = True


def cluster_of(row: Row) -> Hashable:
    """A row's cluster; an item without one is its own."""
    return str(row.get("cluster") or row["item_id"])


def lost(row: Row) -> bool:
    """Whether the machinery failed. A metric that has no value for a single answer (status no_score) is no failure."""
    return row.get("score") is None and row.get("status") != "no_score"


def solved(row: Row) -> bool:
    """Whether the answer is wholly right."""
    return row.get("score") is not None and row["score"] >= 1


def truncated(row: Row) -> bool:
    """Whether the answer ran into the token limit."""
    return row.get("status") == "truncated" or row.get("finish_reason") == "length"


def summarize(name: str, rows: Sequence[Row], *, infra_share: float = INFRA_SHARE, level: float = 0.95) -> TaskSummary:
    """The numbers of one task. Raises ValueError for no rows, or for a score that is no finite number."""
    if not rows:
        raise ValueError(f"{name}: no samples, so there is nothing to sum up")
    scored = [row for row in rows if row.get("score") is not None]
    by_item: dict[str, list[Row]] = defaultdict(list)
    for row in scored:
        by_item[str(row["item_id"])].append(row)
    items = len({str(row["item_id"]) for row in rows})
    asked: dict[str, int] = defaultdict(int)
    for row in rows:
        asked[str(row["item_id"])] += 1
    repeats = max(asked.values())
    failed = sum(lost(row) for row in rows)
    why = ""
    if failed == len(rows):
        why = "every answer was lost to the machinery"
    elif failed > infra_share * len(rows):
        why = f"{failed} of {len(rows)} answers were lost to the machinery, more than {infra_share:.0%}"
    score = estimate([row["score"] for row in scored], [cluster_of(r) for r in scored], level) if scored else None
    full = {item: group for item, group in by_item.items() if len(group) >= repeats}
    at: dict[int, Estimate] = {}
    all_: dict[int, Estimate] = {}
    avg: dict[int, Estimate] = {}
    unit = all(0 <= row["score"] <= 1 for row in scored)
    if repeats > 1 and full:
        of = [cluster_of(group[0]) for group in full.values()]
        avg[repeats] = estimate([sum(r["score"] for r in g) / len(g) for g in full.values()], of, level)
        for k in ladder(repeats) if unit else ():
            counts = [(len(group), sum(map(solved, group))) for group in full.values()]
            at[k] = estimate([pass_at(n, c, k) for n, c in counts], of, level)
            all_[k] = estimate([pass_all(n, c, k) for n, c in counts], of, level)
    tokens = [(row, spent) for row in scored if (spent := generated(row)) is not None]
    right = [(row, spent) for row, spent in tokens if solved(row)]
    enough = unit and bool(right) and sum(spent for _, spent in right) > 0
    return TaskSummary(
        name,
        len(rows),
        items,
        len({cluster_of(row) for row in rows}),
        repeats,
        score,
        at,
        all_,
        avg,
        _tokens(tokens, level) if tokens else None,
        ratio(
            [spent for _, spent in tokens],
            [float(solved(row)) for row, _ in tokens],
            [cluster_of(row) for row, _ in tokens],
            level,
        )
        if enough
        else None,
        _tokens(right, level) if enough else None,
        sum(map(solved, scored)) if unit else 0,
        sum(map(truncated, rows)),
        sum(row.get("status") == "silent" for row in rows),
        failed,
        items - len(full),
        not why,
        why,
        unit,
    )


def generated(row: Row) -> float | None:
    """Tokens that the model wrote for this row, thoughts included; None where it is not known."""
    count = (row.get("tokens") or {}).get("completion")
    return float(count) if isinstance(count, int | float) and math.isfinite(count) and count >= 0 else None


def _tokens(counted: Sequence[tuple[Row, float]], level: float) -> Estimate:
    made = estimate([spent for _, spent in counted], [cluster_of(row) for row, _ in counted], level)
    if made.low is None or made.high is None:
        return made
    return Estimate(made.value, max(0.0, made.low), made.high, made.n, made.clusters, made.method, level)


# ---- two runs


@dataclass(frozen=True)
class Paired:
    """The second run less the first, on the items that both have.

    difference: mean over items, with its interval. p: paired sign-flip test, two-sided, signs drawn per cluster.
    detectable: the smallest true difference that this many items would show at p < 0.05 in four cases of five.
    better, worse, same: items. only_first, only_second: items that the other run lacks, or has no score for.
    tokens: tokens per answer, the second less the first, on the same items.
    """

    name: str
    n: int
    clusters: int
    first: float
    second: float
    difference: Estimate
    p: float
    detectable: float | None
    better: int
    worse: int
    same: int
    only_first: int
    only_second: int
    tokens: Estimate | None = None


def paired(
    first: Iterable[Row],
    second: Iterable[Row],
    name: str = "",
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Paired | None:
    """Compare two runs of one task item by item; None where they have no scored item in common.

    Repeats of an item are averaged first. The signs are drawn from `seed`, so the p value is the same each time.
    """
    a, b = _items(first), _items(second)
    common = [item for item in a if item in b]
    if not common:
        return None
    x = np.array([np.mean([row["score"] for row in a[item]]) for item in common], float)
    y = np.array([np.mean([row["score"] for row in b[item]]) for item in common], float)
    clusters = [cluster_of(a[item][0]) for item in common]
    difference, error, freedom = _difference(y - x, clusters, level)
    spent = [(_mean_tokens(a[item]), _mean_tokens(b[item])) for item in common]
    known = [i for i, (u, v) in enumerate(spent) if u is not None and v is not None]
    tokens = None
    if known:
        deltas = np.array([(spent[i][1] or 0.0) - (spent[i][0] or 0.0) for i in known])
        tokens = _difference(deltas, [clusters[i] for i in known], level)[0]
    detectable = None
    if freedom:
        # Student's quantile at `POWER` is that of a two-sided level of 2 * POWER - 1
        detectable = error * (_student(0.95, freedom) + _student(2 * POWER - 1, freedom))
    return Paired(
        name,
        len(common),
        difference.clusters,
        float(x.mean()),
        float(y.mean()),
        difference,
        sign_flip((y - x).tolist(), clusters, seed=seed),
        detectable,
        int((y > x).sum()),
        int((y < x).sum()),
        int((y == x).sum()),
        len(a) - len(common),
        len(b) - len(common),
        tokens,
    )


def _items(rows: Iterable[Row]) -> dict[str, list[Row]]:
    items: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("score") is not None:
            items[str(row["item_id"])].append(row)
    return dict(items)


def _mean_tokens(rows: Sequence[Row]) -> float | None:
    counts = [count for row in rows if (count := generated(row)) is not None]
    return sum(counts) / len(counts) if counts else None


def _difference(deltas: Floats, clusters: Sequence[Hashable], level: float) -> tuple[Estimate, float, float]:
    """Mean with its t interval (differences have no end to be near to), standard error, degrees of freedom."""
    values, groups = _checked(deltas.tolist(), clusters, level)
    mean, count = float(values.mean()), len(groups)
    if count < 2:
        return Estimate(mean, None, None, len(values), count, "none", level), 0.0, 0.0
    sums = np.array([values[at].sum() for at in groups])
    error, freedom = _jackknife(sums, np.array([len(at) for at in groups], float))
    half = _student(level, freedom) * error
    return Estimate(mean, mean - half, mean + half, len(values), count, "t", level), error, freedom


def sign_flip(
    differences: Sequence[float], clusters: Sequence[Hashable] | None = None, *, flips: int = FLIPS, seed: int = 0
) -> float:
    """Two-sided p value of "both runs are alike": how often random signs give a sum as far from 0 as the observed one.

    All items of a cluster share a sign. Up to 2**14 sets of signs are tried one by one and p is exact; beyond that,
    `flips` are drawn, and (hits + 1) / (flips + 1) is never 0. No difference at all is p = 1.
    """
    values, groups = _checked(differences, clusters, 0.95)
    sums = np.array([values[at].sum() for at in groups])
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    # a sum that is equal but for rounding counts as equal
    least = abs(float(sums.sum())) - 1e-9 * float(np.abs(sums).sum())
    if len(sums) <= EXACT_FLIPS:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(sums))))
        return float((np.abs(signs @ sums) >= least).mean())
    rng = np.random.Generator(np.random.PCG64(seed))
    hits, left = 0, flips
    while left:  # in parts: a matrix of signs for all would be large
        part = min(left, max(1, 4_000_000 // len(sums)))
        signs = rng.integers(0, 2, (part, len(sums)), np.int8).astype(np.float32) * 2 - 1
        hits += int((np.abs(signs @ sums.astype(np.float32)) >= least - 1e-6 * float(np.abs(sums).sum())).sum())
        left -= part
    return (hits + 1) / (flips + 1)
