"""INT4 experts: the compressed-tensors "pack-quantized" format of K2-Thinking and K2.5 onwards.

    weight (out, in) -> groups of 32 along in -> scale = largest |w| / 7.5 -> round(w / scale) in -8..7
    weight_packed int32 (out, in / 8): eight values + 8 per word, lowest nibble first
    weight_scale bfloat16 (out, in / 32), weight_shape int32 (2): [out, in]

Symmetric: no zero point. 4.5 bits per weight. Source: compressed-tensors 0.20 and the released checkpoints.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 32


def pack_int4(values: Tensor) -> Tensor:
    """int8 (out, in) of -8..7 to int32 (out, ceil(in / 8)); a ragged last word is filled with zeros."""
    words = F.pad(values.to(torch.int32) + 8, (0, -values.shape[1] % 8)).unflatten(1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    return (words << shifts).sum(-1, dtype=torch.int32)


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """int32 (out, ceil(in / 8)) to int8 (out, in) of -8..7."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    values = ((packed[..., None] >> shifts) & 15).to(torch.int8) - 8
    return values.flatten(1)[:, :in_features]


def dequantize_int4(packed: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (out, in): one product in the scale's dtype, then cast. Exactly compressed-tensors' values."""
    values = unpack_int4(packed, in_features).to(scale.dtype)
    groups = values.unflatten(1, (scale.shape[1], -1))  # (out, groups, group)
    return (groups * scale[..., None]).flatten(1).to(dtype or scale.dtype)


def quantize_int4(
    weight: Tensor, group: int = GROUP, rule: Literal["minmax", "qat"] = "minmax"
) -> tuple[Tensor, Tensor]:
    """weight_packed and weight_scale (bfloat16) of a weight (out, in).

    rule "minmax": scale = largest / 7.5, values -8..7 (compressed-tensors). "qat": scale = largest / 7, values -7..7
    (the fake-quantisation of public QAT code; Moonshot's own is unpublished). Raises ValueError for a ragged group.
    """
    if weight.ndim != 2 or weight.shape[1] % group:
        raise ValueError(f"INT4 needs a matrix whose width is a multiple of {group}, got {tuple(weight.shape)}")
    groups = weight.float().unflatten(1, (-1, group))  # (out, groups, group)
    largest = groups.abs().amax(-1)
    scale = (largest / (7.5 if rule == "minmax" else 7.0)).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.finfo(torch.bfloat16).eps, scale)
    lowest = -8 if rule == "minmax" else -7
    values = (groups / scale.float()[..., None]).clamp(lowest, 7).round().to(torch.int8)
    return pack_int4(values.flatten(1)), scale


def requantize_int4(weight: Tensor, scale: Tensor) -> Tensor:
    """weight_packed of a dequantised weight under its stored scales: gives back the stored bytes."""
    group = weight.shape[1] // scale.shape[1]
    values = weight.float().unflatten(1, (-1, group)) / scale.float()[..., None]
    return pack_int4(values.round().clamp(-8, 7).to(torch.int8).flatten(1))


class PackedLinear(nn.Module):
    """A linear layer that stays in 4 bits and is dequantised as it is used. No gradient reaches its weight.

    Buffers have the checkpoint's names. `.to(dtype)` leaves them as they are: the output has the input's dtype.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor

    def __init__(self, in_features: int, out_features: int, group: int = GROUP) -> None:
        super().__init__()
        if in_features % group:
            raise ValueError(f"INT4 with groups of {group} needs a multiple of it as width, got {in_features}")
        self.in_features, self.out_features = in_features, out_features
        packed = torch.zeros(out_features, -(-in_features // 8), dtype=torch.int32)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.ones(out_features, in_features // group, dtype=torch.bfloat16))
        shape = torch.empty(2, dtype=torch.int32)
        if not shape.is_meta:
            shape.copy_(torch.tensor([out_features, in_features]))
        self.register_buffer("weight_shape", shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:  # a cast: the stored scale is the exact one
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in)."""
        return dequantize_int4(self.weight_packed, self.weight_scale, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=4"


def pack_experts(model: nn.Module) -> int:
    """Replace every routed expert's linear layers by PackedLinear, in place; the number replaced.

    Real weights are quantised (rule "minmax"); on the meta device only the shapes change.
    """
    replaced = 0
    for name, module in model.named_modules():
        if not name.rpartition(".")[0].endswith(".experts"):
            continue
        for kind in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(module, kind)
            if isinstance(linear, PackedLinear):
                continue
            with torch.device(linear.weight.device):
                packed = PackedLinear(linear.in_features, linear.out_features)
            if not linear.weight.is_meta:
                packed.weight_packed, packed.weight_scale = quantize_int4(linear.weight.data)
            setattr(module, kind, packed)
            replaced += 1
    return replaced
