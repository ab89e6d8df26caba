"""NaViT packing: items of any size laid end to end in one array of patches, nothing padded.

In: items (one image, or one video chunk of 1-4 frames), each already cut into patches. Out: PackedPatches.

    pixels    |aaaaaaaaaa|bbbb|cccccccccccccccccc|      (patches, 3, 14, 14)
    grid_thw   1x2x5      1x2x2 3x2x3                     (items, 3), in patches, before the 2x2 merge

Attention never crosses a bar. Source: NaViT (arXiv 2307.06304); the layout is the released processor's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedPatches:
    """Patches of one or more items, and the grid of each. Checks itself when made.

    pixels: float (patches, 3, patch_size, patch_size), normalised; frame-major, then rows, then columns.
    grid_thw: int64 (items, 3): frames, rows and columns of each item in patches. Rows and columns are even.
    Raises ValueError when the two do not describe the same patches.
    """

    pixels: Tensor
    grid_thw: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, Tensor) or not isinstance(self.grid_thw, Tensor):
            raise ValueError(
                f"PackedPatches needs two tensors, got {type(self.pixels).__name__} and {type(self.grid_thw).__name__}"
            )
        if self.grid_thw.ndim != 2 or self.grid_thw.shape[1] != 3 or len(self.grid_thw) == 0:
            raise ValueError(f"grid_thw must be (items, 3) with at least one item, got {tuple(self.grid_thw.shape)}")
        if self.grid_thw.dtype != torch.int64:
            raise ValueError(f"grid_thw must be int64, got {self.grid_thw.dtype}")
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3 or self.pixels.shape[2] != self.pixels.shape[3]:
            raise ValueError(f"pixels must be (patches, 3, size, size), got {tuple(self.pixels.shape)}")
        if not self.pixels.is_floating_point():
            raise ValueError(f"pixels must be floating point and normalised, got {self.pixels.dtype}")
        for index, (t, h, w) in enumerate(self.grid_thw.tolist()):
            if t < 1 or h < 1 or w < 1:
                raise ValueError(f"item {index} has grid {t}x{h}x{w}; every side must be at least 1")
            if h % 2 or w % 2:
                raise ValueError(
                    f"item {index} has grid {t}x{h}x{w}; rows and columns must be even because 2x2 patches "
                    "merge into one token (pad the image to a multiple of 28 pixels)"
                )
        if sum(self.lengths) != len(self.pixels):
            raise ValueError(
                f"grid_thw describes {sum(self.lengths)} patches but pixels holds {len(self.pixels)}; "
                "pixels and grid come from different items"
            )

    @property
    def lengths(self) -> list[int]:
        """Patches of each item."""
        return [t * h * w for t, h, w in self.grid_thw.tolist()]

    @property
    def tokens(self) -> list[int]:
        """Vision tokens of each item: (h/2)*(w/2), however many frames."""
        return [(h // 2) * (w // 2) for _, h, w in self.grid_thw.tolist()]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.grid_thw)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PackedPatches":
        """The same items with `pixels` on another device or in another dtype; the grid stays on the CPU."""
        return PackedPatches(self.pixels.to(device=device, dtype=dtype), self.grid_thw)

    def split(self) -> list["PackedPatches"]:
        """One PackedPatches per item, views into this one."""
        return [
            PackedPatches(pixels, grid[None])
            for pixels, grid in zip(self.pixels.split(self.lengths), self.grid_thw, strict=True)
        ]


def pack(items: Sequence[PackedPatches]) -> PackedPatches:
    """Lay items end to end, in order. Raises ValueError for an empty list or different patch sizes."""
    if not items:
        raise ValueError("nothing to pack: the list of items is empty")
    sizes = {item.pixels.shape[-1] for item in items}
    if len(sizes) > 1:
        raise ValueError(f"items were cut into patches of different sizes: {sorted(sizes)}")
    if len(items) == 1:
        return items[0]
    return PackedPatches(torch.cat([item.pixels for item in items]), torch.cat([item.grid_thw for item in items]))


def plan_packs(lengths: Iterable[int], budget: int, open_packs: int = 8) -> Iterator[list[int]]:
    """Fill packs of at most `budget` patches with whole items; yields the indices of each pack, in order of arrival.

    Online best fit: an item goes into the fullest of at most `open_packs` open packs that still holds it; when none
    does and all are open, the fullest is closed. The same lengths give the same packs, and an item waits a bounded
    time, so a data stream stays deterministic and resumable. open_packs=1 keeps the items' order across packs too.
    Raises ValueError for an item that no pack can hold.
    """
    if budget < 1 or open_packs < 1:
        raise ValueError(f"the patch budget and open_packs must be at least 1, got {budget} and {open_packs}")
    waiting: list[tuple[int, list[int]]] = []  # patches used, indices; oldest first
    for index, length in enumerate(lengths):
        if length > budget:
            raise ValueError(
                f"item {index} has {length} patches, more than the whole budget of {budget}; "
                "raise the budget or lower in_patch_limit so that the image is resized"
            )
        if length < 1:
            raise ValueError(f"item {index} has {length} patches; an item has at least one")
        fits = [number for number, (used, _) in enumerate(waiting) if used + length <= budget]
        if fits:
            number = max(fits, key=lambda n: waiting[n][0])
            used, indices = waiting[number]
            waiting[number] = (used + length, [*indices, index])
        else:
            if len(waiting) == open_packs:
                yield waiting.pop(max(range(len(waiting)), key=lambda n: waiting[n][0]))[1]
            waiting.append((length, [index]))
            number = len(waiting) - 1
        if waiting[number][0] == budget:
            yield waiting.pop(number)[1]
    for _, indices in waiting:
        yield indices


def in_packs(items: Sequence[PackedPatches], budget: int, run: Callable[[PackedPatches], Tensor]) -> list[Tensor]:
    """Features of each single-item pack, in order: `run` (patches to tokens) sees at most `budget` patches at a time.

    Raises ValueError for an item larger than the budget.
    """
    features: dict[int, Tensor] = {}
    for indices in plan_packs([len(item.pixels) for item in items], budget):
        packed = pack([items[i] for i in indices])
        features |= dict(zip(indices, run(packed).split(packed.tokens), strict=True))
    return [features[i] for i in range(len(items))]
