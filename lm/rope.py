"""Rotary positions of the language model, with YaRN.

In: integer positions. Out: cos and sin per position; rotated queries and keys.
Source: the released modeling_deepseek.py (K2 and later); YaRN: arXiv 2309.00071.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lm.config import TextConfig


@lru_cache(maxsize=64)
def inverse_frequencies(config: TextConfig, device: torch.device) -> Tensor:
    """float32 (rope / 2). With YaRN: fast frequencies stay, slow ones are divided by the factor, a ramp between."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    extrapolated = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    yarn = config.yarn
    if yarn is None:
        return extrapolated

    def slot_turning(times: float) -> float:
        """The slot (not rounded) that turns `times` times within the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(slot_turning(yarn.beta_fast)), 0)
    high: float = min(math.ceil(slot_turning(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # as released: a step instead of a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    return extrapolated / yarn.factor * ramp + extrapolated * (1 - ramp)


def rotation(config: TextConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (tokens, rope / 2) in `dtype`. The angles are float32 whatever the model's dtype.

    Made for each forward pass from the config, never a buffer: `.to(bfloat16)` would round the frequencies and
    move long positions by whole turns.
    """
    angle = positions.to(torch.float32)[:, None] * inverse_frequencies(config, positions.device)
    scale = config.yarn.rotation_scale if config.yarn else 1.0
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) of (..., rope). The result holds the even slots first, then the odd ones.

    That order is the released code's. Queries and keys share it, so their products are those of the pairs.
    """
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
