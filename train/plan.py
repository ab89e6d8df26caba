"""The whole plan of a run before it starts: stages with steps, tokens and rates, parameters, memory of each rank.

Nothing is allocated: K2's trillion parameters are planned in seconds, on any machine.
"""

from dataclasses import replace

import torch

from fusion.config import KimiConfig
from fusion.model import Kimi
from fusion.sizes import count
from lm.config import TextConfig
from moonvit.config import VisionConfig
from train.loop import Run
from train.muon import parameter_groups
from train.schedule import Stage

_GIB = 2**30


def describe_run(run: Run, ranks: int) -> str:
    """Several lines of text. Raises ValueError when the lanes cannot be shared by so many ranks."""
    if ranks < 1 or run.batch.lanes % ranks:
        raise ValueError(f"{run.batch.lanes} lanes cannot be shared by {ranks} ranks: lanes must be a multiple of them")
    config = run.config()
    parts, sums = count(config), _optimized(run, config)
    lines = [
        f"model        {parts['whole']:,} parameters, {parts['activated']:,} activated per token; "
        f"tower {parts['tower']:,}",
        f"batch        {run.batch.lanes:,} sequences, {run.batch.lanes_per_micro_batch} at a time on each rank; "
        f"at most {run.batch.patch_budget:,} patches in one sequence",
    ]
    for kind, (tensors, numbers) in sums.items():
        lines.append(f"{kind:<12} {tensors:,} tensors, {numbers:,} parameters")
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


def _optimized(run: Run, config: KimiConfig) -> dict[str, tuple[int, int]]:
    """Tensors and parameters that each optimizer moves, counted on the meta device."""
    layers = config.text.num_hidden_layers
    known = config.text.first_k_dense_replace + 1
    if config.text.moe_layer_freq != 1 or layers <= known + 1:
        return _count(run, config)
    # expert layers are alike, so two models of a few layers tell what one layer adds: K2 has 70,000 matrices
    few, one_more = (
        _count(run, replace(config, text=replace(config.text, num_hidden_layers=n))) for n in (known, known + 1)
    )
    return {
        kind: (
            tensors + (layers - known) * (one_more[kind][0] - tensors),
            numbers + (layers - known) * (one_more[kind][1] - numbers),
        )
        for kind, (tensors, numbers) in few.items()
    }


def _count(run: Run, config: KimiConfig) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        named = [(n, p) for n, p in Kimi(config).named_parameters() if not (run.frozen and n.startswith(run.frozen))]
    found: dict[str, tuple[int, int]] = {}
    for group in parameter_groups(named):
        kind = "adamw" if run.optimization.kind == "adamw" else group["kind"]
        tensors, numbers = found.get(kind, (0, 0))
        found[kind] = (tensors + len(group["params"]), numbers + sum(p.numel() for p in group["params"]))
    return found


def _stages(run: Run) -> list[str]:
    lines = [f"{'stage':<14}{'sequence':>9}{'tokens':>22}{'steps':>12}   rate"]
    total = run.schedule.tokens
    steps_in_all = 0.0
    for stage in run.schedule.stages:
        if run.steps is not None:
            steps = run.steps * stage.tokens / total
        else:
            steps = stage.tokens / (run.lanes_of(stage) * stage.sequence)
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


def layer_bytes(config: TextConfig, moe: bool, sequence: int, half: bool) -> float:
    """Bytes that a layer keeps for its backward, per token. half: bfloat16 by autocast; else float32 on a CPU."""
    size = 2 if half else 4
    dim, inner, chosen, heads = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts_per_tok,
        config.num_attention_heads,
    )
    wide = config.qk_nope_head_dim + config.qk_rope_head_dim
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank
    # of each head: queries, keys, values and result; then the tiles' shares, or the kernel's sums
    if half:
        head = 8 * wide + 2 * config.v_head_dim + 4
        common = 24 * dim + 8 * latents
    else:
        head = 8 * wide + 8 * config.v_head_dim + 2 * (sequence + 64)
        common = 24 * dim + 12 * latents + 8 * config.qk_rope_head_dim
    kept = common + heads * head + 16
    if not moe:
        return kept + 4 * size * config.intermediate_size
    shared = 4 * size * inner * config.n_shared_experts
    routed = chosen * (size * (dim + 2 * inner) + 16) + 4 * config.n_routed_experts
    return kept + shared + routed + (4 * dim if half else 0)


def block_bytes(config: VisionConfig, half: bool) -> float:
    """Bytes that a block of the tower keeps for its backward, per patch."""
    per_dim, per_inner = (22, 4) if half else (36, 8)
    return per_dim * config.hidden_size + per_inner * config.intermediate_size + 4 * config.num_heads + 16


def activation_bytes(run: Run, stage: Stage, half: bool) -> float:
    """Bytes that one micro-batch of full sequences keeps for its backward, logits aside (train/loss.py bounds them).

    Counted from what autograd saves, layer by layer; tests compare it with the saved tensors of real models. A padded
    room of the experts on a CPU in bfloat16 is not in it, and what recomputation holds is one layer at a time.
    """
    config = run.config()
    tokens = run.batch.lanes_per_micro_batch * stage.sequence
    patches = min(run.batch.lanes_per_micro_batch * run.patch_budget_of(stage), 4 * tokens) if config.vision else 0
    text, blocks = config.text, config.vision.num_layers if config.vision else 0
    layers = [layer_bytes(text, text.is_moe(i), stage.sequence, half) for i in range(text.num_hidden_layers)]
    block = block_bytes(config.vision, half) if config.vision else 0.0
    if run.recompute:
        widths = 4 * text.hidden_size * len(layers), 4 * config.vision.hidden_size * blocks if config.vision else 0
        return tokens * (widths[0] + max(layers)) + patches * (widths[1] + block)
    return tokens * sum(layers) + patches * blocks * block


def _memory(run: Run, ranks: int, sums: dict[str, tuple[int, int]]) -> list[str]:
    """float32 master weights and gradients, one momentum for Muon, two for AdamW; then activations."""
    sliced = ranks if run.parallel == "fsdp" else 1
    muon, adamw = (sums.get(kind, (0, 0))[1] for kind in ("muon", "adamw"))
    sizes = {
        "weights": 4 * (muon + adamw),
        "gradients": 4 * (muon + adamw),
        "optimizer": 4 * muon + 8 * adamw,
    }
    how = f"sliced over {ranks:,} ranks (fsdp)" if sliced > 1 else "whole on every rank"
    whole = sum(sizes.values()) / sliced
    listed = ", ".join(f"{name} {size / sliced / _GIB:,.2f}" for name, size in sizes.items())
    how_kept = "layers are recomputed" if run.recompute else "kept for all layers"
    lines = [f"memory of each rank, {how}: {whole / _GIB:,.2f} GiB ({listed})"]
    half = run.precision == "bfloat16" or (run.precision == "auto" and torch.cuda.is_available())
    for stage in _longest(run.schedule.stages):
        size = activation_bytes(run, stage, half) / _GIB
        lines.append(
            f"activations on top, {how_kept}, {'bfloat16' if half else 'float32'}: {size:,.2f} GiB for "
            f"{run.batch.lanes_per_micro_batch} sequences of {stage.sequence:,}"
        )
    return lines


def _longest(stages: tuple[Stage, ...]) -> list[Stage]:
    """One stage of each sequence length, in order."""
    return list({stage.sequence: stage for stage in stages}.values())
