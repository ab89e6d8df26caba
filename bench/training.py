"""A training step: rows of the group train, made of what `moonkit bench train` measures (train/bench.py).

It has more to tell: packed documents against padded ones, and where our step spends its time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

import train.bench
from bench.language import STOCK, TUNED
from bench.rows import Goal, Row
from bench.settings import Settings

_NAMES = {"transformers": f"{TUNED}, AdamW", "transformers, stock": f"{STOCK}, AdamW"}


def train_rows(settings: Settings) -> Iterator[Row]:
    """A step on equal sequences and on documents of mixed lengths."""
    torch.set_num_threads(settings.threads)
    if settings.tiny:
        arguments = train.bench.Bench(shape="tiny", tokens=96, length=24, rounds=1)
    else:
        # its rows come all at the end: they must come in time
        arguments = train.bench.Bench(rounds=min(settings.rounds, 3), threads=settings.threads)
    cases = [arguments]
    if not settings.tiny:
        cases.append(replace(arguments, shape="69M", dtype="bfloat16", workload="sequences", rounds=2))
    for case in cases:
        result = train.bench.measure(case, settings.note)
        for row in result["rows"]:
            yield from rows_of(row, result["shape"], result["dtype"], case.rounds)


def rows_of(row: Mapping[str, Any], shape: str, dtype: str, rounds: int) -> Iterator[Row]:
    """The speed of one workload and the optimizer's share of it. row: one of train.bench.measure."""
    rates = {_NAMES.get(side, side): rate for side, rate in row["tokens_per_second"].items()}
    faster = {_NAMES[side]: times for side, times in row["times_faster"].items()}
    goals = []
    if row["workload"] == "sequences":
        goals = [Goal("times", 4.0, _NAMES["transformers, stock"]), Goal("times", 2.5, _NAMES["transformers"])]
    yield Row(
        f"{shape}, a step on {row['sequences']} {row['workload']}, {row['tokens']:,} tokens",
        "tokens/s",
        rates,
        faster,
        goals=tuple(goal.judged(faster.get(goal.against)) for goal in goals),
        rounds=rounds,
        note=f"{dtype}; ours is all of MuonClip: largest logits, Muon, QK-Clip, router bias",
    )
    parts = row["parts"]
    optimizer = sum(ms for part, ms in parts.items() if part.startswith("optimizer"))
    yield Row.single(
        f"{shape}, the optimizer's share of a step on {row['workload']}",
        "%",
        100 * optimizer / sum(parts.values()),
        [Goal("at most", 10.0)],
        note="Newton-Schulz and the rest of Muon; a step with a stopwatch in it, which costs a little",
    )
