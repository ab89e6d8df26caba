"""Where a patch is: the learned 2-D table, the fixed time embedding, and the 2-D rotation of queries and keys.

In: the grids (t, h, w) of the items. Out: one row per patch.

    table 64x64 --bicubic--> h x w  (+ time row f, chunks of 2-4 frames only)     added once, after the patch embedding
    rotation by column and row index                                              applied to q and k in every block

Source: the released remote code of Kimi-K2.5 (Learnable2DInterpPosEmbDividedFixed, Rope2DPosEmbRepeated).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int, int]  # frames, rows, columns, in patches


def time_embedding(frames: int, dim: int) -> Tensor:
    """Fixed sin-cos embedding of the frame index, float32 (frames, dim): all sines, then all cosines.

    Frame 0 is not zero: its cosine half is all ones. So a 1-frame chunk, which gets no time embedding at all, and
    frame 0 of a longer chunk differ. The released weights were trained with that.
    """
    half = torch.arange(dim // 2, dtype=torch.float32)
    omega = 10_000.0 ** (-half / (dim / 2))
    angle = torch.arange(frames, dtype=torch.float32)[:, None] * omega  # (frames, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class PositionTable(nn.Module):
    """Learned (rows, columns, dim) table, resized to each item. Not interpolated when the item has the table's size."""

    def __init__(self, rows: int, columns: int, frames: int, dim: int) -> None:
        super().__init__()
        self.max_frames = frames
        self.weight = nn.Parameter(torch.empty(rows, columns, dim))
        if not self.weight.is_meta:  # drawing on the meta device makes torch import a symbolic-algebra library
            nn.init.normal_(self.weight)

    def forward(self, grids: Sequence[Grid]) -> Tensor:
        """Rows to add to the embedded patches: (patches, dim), in the table's dtype."""
        dim = self.weight.shape[-1]
        tables: dict[Grid, Tensor] = {}  # many items share a grid
        for t, h, w in dict.fromkeys(grids):
            if t > self.max_frames:
                raise ValueError(
                    f"a chunk has {t} frames but the tower knows at most {self.max_frames}; split the clip"
                )
            table = self._resized(h, w)
            if t > 1:
                # rounded to the table's dtype before the sum, as the released code does when it runs in bfloat16
                time = time_embedding(t, dim).to(table)
                table = (table[None] + time[:, None]).flatten(0, 1)
            tables[t, h, w] = table
        return torch.cat([tables[grid] for grid in grids])

    def _resized(self, h: int, w: int) -> Tensor:
        if (h, w) == self.weight.shape[:2]:
            return self.weight.flatten(0, 1)
        # antialias off, also when shrinking: turning it on moves the table by 0.05-0.5
        table = F.interpolate(self.weight.permute(2, 0, 1)[None], size=(h, w), mode="bicubic", align_corners=False)
        return table[0].permute(1, 2, 0).flatten(0, 1)


def rotation(grids: Sequence[Grid], head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every patch's angles, float32 (patches, 1, head_dim / 2).

    Slot 2i turns by column * f_i and slot 2i+1 by row * f_i: width first, whatever the released docstring says.
    Frames repeat the same angles; time does not rotate. Made fresh in float32 for every call and never stored in
    the module, so that no `.to(bfloat16)` can reach it.
    """
    slots = head_dim // 2
    f = theta ** (-torch.arange(0, head_dim, 4, dtype=torch.float32, device=device)[: slots // 2] / head_dim)
    angles: dict[Grid, Tensor] = {}
    for t, h, w in dict.fromkeys(grids):
        columns = torch.arange(w, dtype=torch.float32, device=device)[:, None] * f  # (w, slots / 2)
        rows = torch.arange(h, dtype=torch.float32, device=device)[:, None] * f
        item = torch.stack([columns.expand(h, -1, -1), rows[:, None].expand(-1, w, -1)], dim=-1)
        angles[t, h, w] = item.flatten(2).flatten(0, 1).repeat(t, 1)  # (t * h * w, slots)
    angle = torch.cat([angles[grid] for grid in grids])[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[2j], x[2j+1]) of (patches, heads, head_dim) in float32; returns x's dtype."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
