"""Causal attention in tiles of queries, forward and backward: what training on a CPU in float32 runs.

    queries 64..127 |#######\\            |     keys to the right of a tile's last query are never touched;
                    |####### \\           |     only the square on the diagonal needs the mask

torch's own kernel gives neither the largest logits, which QK-Clip needs at every step, nor a fast backward at the small
head sizes of models that train on a CPU. Here the logits of a tile are at hand, and keeping its shares instead of
computing them again takes half the time of the kernel and the extra product for the maxima together (8 sequences of
1,024 tokens, 4 heads, 40 and 24 wide: 173 against 347 ms of a core). The price is memory that grows with the square of
the length, so longer sequences stay with the kernel.
"""

from typing import Any

import torch
from torch import Tensor

_TILE = 64
_KEEP = 2**25  # shares that one call may keep: 128 MB


def fits(q: Tensor) -> bool:
    """Whether training attends this way: q (sequences, heads, tokens, width), without a past."""
    sequences, heads, tokens, _ = q.shape
    plain = q.dtype == torch.float32 and q.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and sequences * heads * tokens * (tokens + _TILE) // 2 <= _KEEP


class TiledAttention(torch.autograd.Function):
    """Result (sequences, heads, tokens, v width) and each head's largest scaled logit, (heads)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        shape = q.shape[:3]
        q, k, v = (q * scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (sequences * heads, tokens, width)
        out = torch.empty_like(v)
        future = torch.full((_TILE, _TILE), float("-inf")).triu_(1)
        kept, peaks = [], []
        for start in range(0, shape[2], _TILE):
            end = min(shape[2], start + _TILE)
            tile = torch.bmm(q[:, start:end], k[:, :end].mT)
            tile[..., start:].add_(future[: end - start, : end - start])
            peaks.append(tile.amax((1, 2)))
            torch.softmax(tile, -1, out=tile)
            out[:, start:end] = torch.bmm(tile, v[:, :end])
            kept.append(tile)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.shape, ctx.scale = shape, scale
        peak = torch.stack(peaks).amax(0).view(shape[:2]).amax(0)
        ctx.mark_non_differentiable(peak)
        return out.view(*shape, -1), peak

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        grad = grad.flatten(0, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, tile in zip(range(0, ctx.shape[2], _TILE), kept, strict=True):
            end = start + tile.shape[1]
            part = grad[:, start:end]
            grad_v[:, :end].baddbmm_(tile.mT, part)
            inner = torch.bmm(part, v[:, :end].mT)
            torch.ops.aten._softmax_backward_data.out(inner, tile, -1, tile.dtype, grad_input=inner)
            grad_q[:, start:end] = torch.bmm(inner, k[:, :end])
            grad_k[:, :end].baddbmm_(inner.mT, q[:, start:end])  # q carries the scale
        gradients = (grad_q.mul_(ctx.scale), grad_k, grad_v)
        return *(each.view(*ctx.shape, -1) for each in gradients), None  # type: ignore[return-value]
