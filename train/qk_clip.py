"""QK-Clip: after an optimizer step, shrink the heads whose largest attention logit went over tau.

    S (heads): largest scaled logit of the step's own forward passes, over all micro-batches and ranks
    gamma = tau / S where S > tau, else 1
    q rows without position * gamma^alpha, k rows without position * gamma^(1 - alpha), rotary q rows * gamma

Values and the rotary key, which all heads share, stay. Rows are scaled in place: hand in the float32 master weights.
Momentum is left alone (the report does not say). Source: Kimi K2 report, algorithm 1 and appendix D; tau is 100 there.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lm.attention import Attention
from lm.model import LanguageModel


class PeakLogits:
    """Largest logit of each head and layer since the last step: (layers, heads), float32."""

    def __init__(self) -> None:
        self.peaks: Tensor | None = None

    def add(self, max_logits: list[Tensor]) -> None:
        """`taps.max_logits` of one forward pass."""
        new = torch.stack(max_logits)
        self.peaks = new if self.peaks is None else torch.maximum(self.peaks, new)

    def take(self) -> Tensor:
        """The peaks over all ranks, and start again. Raises ValueError when there was no forward pass."""
        if self.peaks is None:
            raise ValueError("no forward pass has reported its logits: run it with Taps(want_max_logits=True)")
        peaks, self.peaks = self.peaks, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        return peaks


@torch.no_grad()
def clip_qk(attention: Attention, peaks: Tensor, tau: float, alpha: float = 0.5) -> int:
    """Clip the heads of one layer, in place; the number of heads that were clipped. peaks: (heads)."""
    config = attention.config
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if peaks.shape != (config.num_attention_heads,):
        raise ValueError(f"peaks must be ({config.num_attention_heads},), one per head, got {tuple(peaks.shape)}")
    if peaks.isnan().any():
        raise ValueError("a head's largest logit is NaN: the model has diverged before the clip")
    over = peaks > tau  # never true for a maximum of zero or below, so nothing is divided by it
    if not bool(over.any()):
        return 0
    gamma = torch.where(over, tau / peaks.clamp(min=tau), torch.ones_like(peaks))[:, None, None]
    nope = config.qk_nope_head_dim
    q_rows = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
    q = q_rows.weight.unflatten(0, (config.num_attention_heads, -1))  # (heads, nope + rope, in)
    kv = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))  # (heads, nope + v, latent)
    q[:, :nope] *= gamma.to(q) ** alpha
    q[:, nope:] *= gamma.to(q)
    kv[:, :nope] *= gamma.to(kv) ** (1 - alpha)
    return int(over.sum())


def clip_heads(model: LanguageModel, peaks: Tensor, tau: float) -> int:
    """Clip every layer of a model; the number of clipped heads. peaks: (layers, heads), as PeakLogits.take gives."""
    if len(peaks) != len(model.model.layers):
        raise ValueError(f"peaks of {len(peaks)} layers, but the model has {len(model.model.layers)}")
    clipped = 0
    for layer, peak in zip(model.model.layers, peaks, strict=True):
        attention: Any = layer.self_attn
        clipped += clip_qk(attention, peak, tau)
    return clipped
