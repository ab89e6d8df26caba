"""Mixture of experts: a sigmoid router picks a few small experts per token, one shared expert sees every token.

    x - gate - scores - (+ correction bias) top-k -> which experts;  scores without bias -> how much of each
    y = sum over chosen of weight * expert(x), in float32   + shared_experts(x)

Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; numerics as in the released modeling_deepseek.py. The released
code refuses to run in training mode; here the same forward carries gradient to experts, weights and scores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import wide
from lm.config import TextConfig
from lm.experts import RoutedExperts, route
from lm.linear import Linear
from lm.taps import Routing, Taps

_KINDS = ("gate_proj", "up_proj", "down_proj")
Stacks = tuple[Tensor, Tensor, Tensor]  # gate, up and down of all experts: (experts, out, in) each


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The dense layers, the shared experts and each routed expert."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, inner)
        self.up_proj = Linear(dim, inner)
        self.down_proj = Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        # a quantised layer has no such weight
        gate, up, down = (getattr(getattr(self, kind), "weight", None) for kind in _KINDS)
        if gate is not None and up is not None and down is not None and wide.fits(x, gate, up, down):
            return wide.linear(wide.linear(x, gate, act="swiglu", weight2=up), down)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router. Scores, bias and weights are float32 whatever the model's dtype."""

    e_score_correction_bias: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        # a buffer: training moves it by the load of the experts, not by gradient
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        # `.to(bfloat16)` must not round the bias: with a bf16 bias most tokens change at least one expert
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, x: Tensor, pinned: Tensor | None = None) -> Routing:
        """x (tokens, dim). `pinned` (tokens, chosen) replaces the top-k, not the scores."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()  # (tokens, experts)
            chosen = self._top_k(scores.detach()) if pinned is None else pinned  # (tokens, chosen)
            weights = scores.gather(1, chosen)
            if config.norm_topk_prob:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return Routing(scores, chosen, weights * config.routed_scaling_factor)

    def _top_k(self, scores: Tensor) -> Tensor:
        config = self.config
        biased = scores + self.e_score_correction_bias
        if config.n_group > 1:
            groups = biased.unflatten(-1, (config.n_group, -1))  # (tokens, groups, experts / groups)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
            # the released code writes 0.0 here, which can win against negative biased scores; no release has groups
            biased = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        return biased.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


class MoE(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        inner = config.moe_intermediate_size
        self._stacks: Stacks | None = None
        self.gate = Gate(config)
        self.experts = nn.ModuleList(MLP(config.hidden_size, inner) for _ in range(config.n_routed_experts))
        self.shared_experts = (
            MLP(config.hidden_size, inner * config.n_shared_experts) if config.n_shared_experts else None
        )

    def forward(self, x: Tensor, taps: Taps | None = None) -> Tensor:
        """(tokens, dim) to (tokens, dim)."""
        routing = self.gate(x, taps.next_pinned() if taps else None)
        if taps is not None:
            taps.routing.append(routing)
        y = self.routed(x, routing.chosen, routing.weights)
        return y + self.shared_experts(x) if self.shared_experts is not None else y

    def routed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Every chosen expert on its tokens; summed in float32 and rounded once."""
        if torch.is_grad_enabled() and self._trains_together():
            return self._routed_with_gradient(x, chosen, weights)
        stacks = None if torch.is_grad_enabled() else self._stacked()
        if stacks is not None and wide.fits(x, *stacks):
            return self._on_tiles(x, chosen, weights, stacks)
        if stacks is not None and stacks[0][0].numel() <= _TINY and chosen.numel() * 2 <= len(self.experts):
            outs = _gathered(x.repeat_interleave(chosen.shape[1], 0), chosen.flatten(), stacks)
        else:
            order = chosen.flatten().argsort(stable=True)  # (tokens * chosen), grouped by expert
            counts = chosen.flatten().bincount(minlength=len(self.experts))
            grouped = self._by_expert(x[order // chosen.shape[1]], counts, stacks)
            outs = torch.empty_like(grouped).index_copy(0, order, grouped)  # back to the order of the slots
        slots = outs.view(*chosen.shape, -1)  # (tokens, chosen, dim)
        return (slots.float() * weights[..., None]).sum(1).to(x.dtype)

    def _on_tiles(self, x: Tensor, chosen: Tensor, weights: Tensor, stacks: Stacks) -> Tensor:
        """The same in bfloat16 by kernels/wide.cpp: nothing is gathered, and experts without tokens cost nothing."""
        order = chosen.flatten().argsort(stable=True)  # (tokens * chosen), grouped by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        used = [expert for expert, count in enumerate(counts) if count]
        which = [part for part in (order // chosen.shape[1]).split(counts) if len(part)]
        gate, up, down = ([stack[expert] for expert in used] for stack in stacks)
        inner = x.new_empty(len(order), gate[0].shape[0])
        outs = x.new_empty(len(order), x.shape[1])
        inners = [part for part in inner.split(counts) if len(part)]
        parts = [part for part in outs.split(counts) if len(part)]
        jobs = [(x, matrix, part) for matrix, part in zip(gate, inners, strict=True)]
        wide.linears(jobs, act="swiglu", seconds=up, which=which)
        wide.linears(list(zip(inners, down, parts, strict=True)))
        rows = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))  # of each slot
        return wide.weigh(outs, rows.view_as(chosen), weights)

    def _by_expert(self, rows: Tensor, counts: Tensor, stacks: Stacks | None) -> Tensor:
        """Rows that lie expert by expert, through their expert: (rows, dim)."""
        if stacks is None:
            parts = rows.split(counts.tolist())  # one per expert, most of them empty at times
            return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        most = int(counts.max())
        if stacks[0][0].numel() <= _TINY and most <= (32 if rows.dtype == torch.float32 else 128):
            return _padded(rows, counts, most, stacks)
        return _grouped(rows, counts, stacks)

    def _routed_with_gradient(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        experts: list[Any] = list(self.experts)
        parameters = [getattr(expert, kind).weight for kind in _KINDS for expert in experts]
        with torch.no_grad():
            count = len(self.experts)
            stacks = self._stacked()
            if stacks is None:  # for instance gathered by FSDP for this pass only
                gate, up, down = (torch.stack(parameters[i * count : (i + 1) * count]) for i in range(3))
            else:
                gate, up, down = stacks
            cast = (gate.to(dtype), up.to(dtype), down.to(dtype))
        way = route(chosen, count, dtype)
        return RoutedExperts.apply(x.to(dtype), weights, way, cast, *parameters).to(x.dtype)

    def _trains_together(self) -> bool:
        """Plain matrices whose rows are whole multiples of 16 bytes. Sharded or quantised ones go one by one."""
        first: Any = self.experts[0]
        weight = first.gate_proj.weight if self._stackable() else None
        return type(weight) is nn.Parameter and not any(size % 8 for size in weight.shape)

    @torch.no_grad()
    def stack_experts(self) -> None:
        """Lay the experts' matrices side by side in memory, so that one product can run them without a copy.

        Names and values stay: each expert's parameter becomes a view. Moving or casting the model undoes it, and so
        does sharding it (after which they are copied together for each pass).
        """
        if not self._stackable() or self._stacked() is not None:
            return
        stacks = []
        for kind in _KINDS:
            parameters = [getattr(expert, kind).weight for expert in self.experts]
            stack = torch.stack([parameter.data for parameter in parameters])
            for parameter, view in zip(parameters, stack, strict=True):
                parameter.data = view
            stacks.append(stack)
        self._stacks = (stacks[0], stacks[1], stacks[2])

    def reserve_stacks(self, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        """Give the experts of a model on the meta device real, empty memory, side by side: for loading into."""
        if not self._stackable():
            return
        stacks = []
        for kind in _KINDS:
            linears: list[Any] = [getattr(expert, kind) for expert in self.experts]
            stack = torch.empty(len(linears), *linears[0].weight.shape, dtype=dtype, device=device or "cpu")
            for linear, view in zip(linears, stack, strict=True):
                linear.weight = nn.Parameter(view)
            stacks.append(stack)
        self._stacks = (stacks[0], stacks[1], stacks[2])

    def _stackable(self) -> bool:
        first = self.experts[0]
        return isinstance(first, MLP) and isinstance(first.gate_proj, Linear)  # INT4 experts stay apart

    def _stacked(self) -> Stacks | None:
        """The stacks, while the last expert's parameters still live in them."""
        if self._stacks is None:
            return None
        last: Any = self.experts[-1]
        weights = (last.gate_proj.weight, last.up_proj.weight, last.down_proj.weight)
        alive = all(w.data_ptr() == s[-1].data_ptr() for w, s in zip(weights, self._stacks, strict=True))
        if not alive:
            self._stacks = None
        return self._stacks


def _grouped(rows: Tensor, counts: Tensor, stacks: Stacks) -> Tensor:
    """The experts on their rows, one grouped product per matrix: touches only experts that were chosen."""
    # UNSURE: measured on a CPU only. A run on a GPU in bfloat16 and float32 would settle whether grouped_mm takes both.
    gate, up, down = (stack.transpose(1, 2) for stack in stacks)
    ends = counts.cumsum(0).to(torch.int32)
    inner = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
    return F.grouped_mm(inner, down, offs=ends)


def _padded(rows: Tensor, counts: Tensor, most: int, stacks: Stacks) -> Tensor:
    """The same, with every expert's rows padded to at least `most`, the largest count: batched products."""
    gate, up, down = (stack.transpose(1, 2) for stack in stacks)
    room = most if most <= 8 else -(-most // 16) * 16  # few distinct sizes: each new one costs a kernel build
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.arange(len(rows), device=rows.device) - starts
    expert = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
    padded = rows.new_zeros(len(counts), room, rows.shape[1])
    padded[expert, rank] = rows
    inner = F.silu(torch.bmm(padded, gate)) * torch.bmm(padded, up)
    return torch.bmm(inner, down)[expert, rank]


def _gathered(rows: Tensor, expert: Tensor, stacks: Stacks) -> Tensor:
    """The same for a few rows in any order: a copy of its expert's matrices for each."""
    gate, up, down = (stack[expert].transpose(1, 2) for stack in stacks)
    one = rows[:, None]  # (rows, 1, dim)
    return torch.bmm(F.silu(torch.bmm(one, gate)) * torch.bmm(one, up), down)[:, 0]


# Elements of a matrix up to which calls cost more than copies and padding do (measured on a CPU: up to 3 times).
_TINY = 2**16


def sequence_balance_loss(routing: Routing, lengths: Sequence[int], alpha: float) -> Tensor:
    """alpha * mean over sequences of sum_i f_i P_i: the loss that keeps one sequence from using few experts.

    f_i = experts / (chosen * T) * tokens that chose i (1 when balanced); P_i = mean share of expert i in the scores.
    Smallest at balance, where it is alpha. Source: DeepSeek-V3 eq. 17-20. Scalar float32 with gradient to the scores.
    """
    experts, k = routing.scores.shape[1], routing.chosen.shape[1]
    losses = []
    for scores, chosen in zip(routing.scores.split(list(lengths)), routing.chosen.split(list(lengths)), strict=True):
        load = chosen.flatten().bincount(minlength=experts).float() * experts / (k * len(chosen))
        share = (scores / scores.sum(-1, keepdim=True)).mean(0)
        losses.append((load * share).sum())
    return alpha * torch.stack(losses).mean()
