"""The whole plan of a run before it starts: stages with steps, tokens and rates, parameters, memory of each rank.

Nothing is allocated: K2's trillion parameters are planned in seconds, on any machine.
"""

import torch

from fusion.model import Kimi
from fusion.sizes import count
from train.loop import Run
from train.muon import parameter_groups

_GIB = 2**30


def describe_run(run: Run, ranks: int) -> str:
    """Several lines of text. Raises ValueError when the lanes cannot be shared by so many ranks."""
    if ranks < 1 or run.batch.lanes % ranks:
        raise ValueError(f"{run.batch.lanes} lanes cannot be shared by {ranks} ranks: lanes must be a multiple of them")
    config = run.config()
    parts = count(config)
    with torch.device("meta"):
        named = [(n, p) for n, p in Kimi(config).named_parameters() if not (run.frozen and n.startswith(run.frozen))]
    groups = parameter_groups(named)
    lines = [
        f"model        {parts['whole']:,} parameters, {parts['activated']:,} activated per token; "
        f"tower {parts['tower']:,}",
        f"batch        {run.batch.lanes:,} sequences, {run.batch.lanes_per_micro_batch} at a time on each rank; "
        f"at most {run.batch.patch_budget:,} patches in one sequence",
    ]
    sums: dict[str, int] = {}
    for group in groups:
        kind = "adamw" if run.optimization.kind == "adamw" else group["kind"]
        sums[kind] = sums.get(kind, 0) + sum(parameter.numel() for parameter in group["params"])
        tensors = len(group["params"])
        lines.append(f"{kind:<12} {tensors:,} tensors, {sum(p.numel() for p in group['params']):,} parameters")
    clip = f"QK-Clip at {run.optimization.tau:g}" if run.optimization.tau is not None else "no QK-Clip"
    lines.append(
        f"             weight decay {run.optimization.weight_decay:g}, gradient norm at most "
        f"{run.optimization.max_norm:g}, {clip}, router bias speed {run.optimization.router_speed:g}"
    )
    lines += ["", *_stages(run), "", "token shares of the data"]
    for source in run.mixture.sources:
        what = source.corpus or ", ".join(source.families)
        lines.append(f"  {source.name:<14} {run.mixture.shares[source.name]:>5.1%}  {source.group:<8} {what}")
    lines += ["", *_memory(run, ranks, sums)]
    return "\n".join(lines)


def _stages(run: Run) -> list[str]:
    lines = [f"{'stage':<14}{'sequence':>9}{'tokens':>22}{'steps':>12}   rate"]
    total = run.schedule.tokens
    steps_in_all = 0.0
    for stage in run.schedule.stages:
        if run.steps is not None:
            steps = run.steps * stage.tokens / total
        else:
            steps = stage.tokens / (run.batch.lanes * stage.sequence)
        steps_in_all += steps
        still = ", router at rest" if stage.name in run.optimization.router_still else ""
        tokens = f"{stage.tokens:,.0f}" if run.minutes is None and run.steps is None else f"{stage.tokens / total:.1%}"
        count_ = f"{steps:,.0f}" if run.minutes is None else f"{run.minutes * stage.tokens / total:,.1f} min"
        rates = f"{stage.start:g}" if stage.start == stage.end else f"{stage.start:g} to {stage.end:g}, {stage.shape}"
        lines.append(f"{stage.name:<14}{stage.sequence:>9,}{tokens:>22}{count_:>12}   {rates}{still}")
    if run.minutes is not None:
        lines.append(f"in all {run.minutes:g} minutes of training: the tokens follow from the measured speed")
    elif run.steps is not None:
        lines.append(
            f"in all {run.steps:,} steps of at most {run.batch.lanes * run.schedule.stages[0].sequence:,} tokens"
        )
    else:
        lines.append(f"in all {total:,.0f} tokens, about {steps_in_all:,.0f} steps if every sequence is full")
    return lines


def _memory(run: Run, ranks: int, sums: dict[str, int]) -> list[str]:
    """float32 master weights and gradients, one momentum for Muon, two for AdamW. Activations are not counted."""
    sliced = ranks if run.parallel == "fsdp" else 1
    trained = sum(sums.values())
    sizes = {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 4 * sums.get("muon", 0) + 8 * sums.get("adamw", 0),
    }
    how = f"sliced over {ranks:,} ranks (fsdp)" if sliced > 1 else "whole on every rank"
    whole = sum(sizes.values()) / sliced
    listed = ", ".join(f"{name} {size / sliced / _GIB:,.2f}" for name, size in sizes.items())
    recompute = "layers are recomputed" if run.recompute else "kept for all layers"
    return [
        f"memory of each rank, {how}: {whole / _GIB:,.2f} GiB ({listed})",
        f"activations come on top ({recompute}): they grow with the {run.batch.lanes_per_micro_batch} sequences of a "
        "micro-batch",
    ]
