"""All experts of a layer at once, forward and backward: what training runs instead of expert after expert.

    x (tokens, dim) - rows sorted by expert - gate, up - silu(gate) * up * share - down - sum over the chosen - y
                      (rows, dim)             one product per matrix for all experts

Two forms of such a product, with the same mathematics. In float32 rows lie end to end and a grouped product runs over
them: nothing is padded. In half precision every expert gets the same room and one batched product runs, because there
each new number of rows costs the CPU's library a kernel build. Where one expert has much more than its part, padding
costs more than that, and rows lie end to end again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_STEP = 64  # rooms are multiples of it: few distinct sizes
_WASTE = 1.75  # how many rows, as a multiple of the real ones, padding may make


@dataclass(frozen=True)
class Route:
    """Which slot (a token's n-th choice) every row holds, and where each slot's row is.

    slots    |t4.0 t0.1 t2.0|t0.0 t1.1 ....|t1.0 ....|      rows of experts 0, 1, 2; a padded row holds slot 0
    """

    slots: Tensor  # int64 (rows)
    rows: Tensor  # int64 (tokens, chosen)
    padded: Tensor | None  # bool (rows): a row that counts for nothing; None when there is none
    ends: Tensor | None  # int32 (experts): where each expert's rows end; None when all have the same room
    counts: list[int]  # tokens of each expert


def route(chosen: Tensor, experts: int, dtype: torch.dtype) -> Route:
    """chosen: int64 (tokens, chosen)."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # (tokens * chosen)
    load = flat.bincount(minlength=experts)
    counts: list[int] = load.tolist()
    room = -(-max(counts) // _STEP) * _STEP
    even = room * experts <= _WASTE * len(flat)
    padding = dtype == torch.float64 or (dtype != torch.float32 and chosen.device.type == "cpu" and even)
    if not padding:
        rows = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return Route(order, rows.view_as(chosen), None, load.cumsum(0).to(torch.int32), counts)
    rank = torch.arange(len(flat), device=flat.device) - (load.cumsum(0) - load).repeat_interleave(load)
    row = flat[order] * room + rank
    rows = torch.empty_like(order).index_copy_(0, order, row)
    slots = order.new_zeros(experts * room).index_copy_(0, row, order)
    padded = torch.ones_like(slots, dtype=torch.bool).index_fill_(0, row, False)
    return Route(slots, rows.view_as(chosen), padded, None, counts)


class RoutedExperts(torch.autograd.Function):
    """y (tokens, dim) of x (tokens, dim), weights float32 (tokens, chosen) and the experts' matrices.

    `stacks` are gate and up (experts, inner, dim) and down (experts, dim, inner). `parameters` are the same numbers as
    the model's parameters, all gates, all ups, all downs: they only receive the gradients, each a view into the
    gradient of its stack. An expert that no token chose gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, way: Route, stacks: tuple[Tensor, Tensor, Tensor], *parameters: Tensor
    ) -> Tensor:
        gate, up, down = stacks
        rows = x.index_select(0, way.slots // weights.shape[1])  # (rows, dim)
        share = weights.flatten()[way.slots, None].to(x.dtype)  # (rows, 1)
        if way.padded is not None:
            share = share.masked_fill(way.padded[:, None], 0)
        gated = _through(rows, gate.mT, way)  # (rows, inner)
        upped = _through(rows, up.mT, way)
        # the share goes on the inner rows: down is linear, and they are narrower than its result
        y = _through(F.silu(gated).mul_(upped).mul_(share), down.mT, way)
        ctx.save_for_backward(rows, share, gated, upped, *stacks)
        ctx.way, ctx.dtype = way, parameters[0].dtype
        return _sum_chosen(y, way.rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, share, gated, upped, gate, up, down = ctx.saved_tensors
        way = ctx.way
        grad = grad.index_select(0, way.slots // way.rows.shape[1])  # (rows, dim)
        silu = F.silu(gated)
        inner = silu * upped
        grad_inner = _through(grad, down, way)  # before the share
        grad_share = torch.linalg.vecdot(grad_inner, inner)
        grad_down = _matrices(grad, inner.mul_(share), way)
        grad_inner.mul_(share)
        grad_gated = torch.ops.aten.silu_backward(grad_inner * upped, gated)
        grad_upped = silu.mul_(grad_inner)
        grad_rows = _through(grad_gated, gate, way).add_(_through(grad_upped, up, way))
        stacks = (_matrices(grad_gated, rows, way), _matrices(grad_upped, rows, way), grad_down)
        each = [
            matrix if count else None
            for stack in stacks  # one cast per stack, under autocast
            for matrix, count in zip(stack.to(ctx.dtype).unbind(), way.counts, strict=True)
        ]
        return _sum_chosen(grad_rows, way.rows), grad_share[way.rows].float(), None, None, *each


def _through(rows: Tensor, matrices: Tensor, way: Route) -> Tensor:
    """Every row times its expert's matrix: (rows, a) and (experts, a, b) to (rows, b)."""
    if way.ends is not None:
        return F.grouped_mm(rows, matrices, offs=way.ends)
    return torch.bmm(rows.unflatten(0, (len(way.counts), -1)), matrices).flatten(0, 1)


def _matrices(left: Tensor, right: Tensor, way: Route) -> Tensor:
    """Every expert's sum of outer products of its rows: (rows, a) and (rows, b) to (experts, a, b)."""
    if way.ends is not None:
        return F.grouped_mm(left.mT, right, offs=way.ends)
    each = (len(way.counts), -1)
    return torch.bmm(left.unflatten(0, each).mT, right.unflatten(0, each))


def _sum_chosen(rows: Tensor, index: Tensor) -> Tensor:
    """(tokens, dim): the sum of each token's rows, gathered and added in one go."""
    return F.embedding_bag(index, rows, mode="sum")
