"""Block-scaled FP8, as K2-Base, K2-Instruct and K2-0905 store their matrices: read to bfloat16 once, while loading.

    weight float8_e4m3fn (rows, columns), weight_scale_inv float32 (ceil(rows / 128), ceil(columns / 128))
    w = weight * scale_inv of its block       (a product, despite the name)

Source: DeepSeek-V3's checkpoint format; the last block of a row or column may be ragged.
"""

import torch
from torch import Tensor

BLOCK = 128


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def dequantize_fp8(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix (rows, columns) in `dtype`. Raises ValueError when the scales do not cover it."""
    rows, columns = weight.shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(scale_inv.shape) != blocks:
        raise ValueError(f"an FP8 matrix of {rows}x{columns} needs {blocks} block scales, got {tuple(scale_inv.shape)}")
    return (weight.float() * _spread(scale_inv.float(), rows, columns)).to(dtype)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (float8_e4m3fn) and weight_scale_inv of a matrix: each block's largest value becomes 448."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (rows, 128, columns, 128) in blocks
    scale = (blocks.abs().amax((1, 3)) / 448).clamp(min=1e-12)
    return (weight.float() / _spread(scale, rows, columns)).to(torch.float8_e4m3fn), scale
