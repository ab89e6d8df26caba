"""MoonViT-3D: packed patches in, merged features out.

    pixels (patches, 3, 14, 14) - patch_embed + position - blocks (attention inside each item) - final_layernorm
      - merge 2x2, mean over frames - features (tokens, 4, dim)

Modules keep the released checkpoint's names. Source: remote code of Kimi-K2.5; K2.6, K2.7-Code, Kimi-VL and
MoonViT-SO-400M hold the same weights and run through the same code (an image is a chunk of one frame).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import wide
from moonvit.config import MediaConfig, VisionConfig
from moonvit.packing import PackedPatches, in_packs
from moonvit.position import Grid, PositionTable, rotate, rotation

if TYPE_CHECKING:
    from moonvit.image import ImageSource


class PatchEmbed(nn.Module):
    """Each patch times one matrix, plus its position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        # a convolution by name only: kernel = stride = one patch, so it is a linear map of the flattened patch
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.pos_emb = PositionTable(
            config.pos_emb_height, config.pos_emb_width, config.pos_emb_time, config.hidden_size
        )

    def forward(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        x = F.linear(pixels.flatten(1), self.proj.weight.flatten(1), self.proj.bias)  # (patches, dim)
        return x + self.pos_emb(grids)


class MLP(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(dim, inner)
        self.fc1 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(F.gelu(self.fc0(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block. All linear layers have a bias; nothing else is special."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.norm0 = nn.LayerNorm(dim, config.norm_eps)
        self.norm1 = nn.LayerNorm(dim, config.norm_eps)
        self.wqkv = nn.Linear(dim, 3 * dim)
        self.wo = nn.Linear(dim, dim)
        self.mlp = MLP(dim, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        if wide.fits(x, self.wqkv.weight):
            return self._on_tiles(x, cos, sin, lengths)
        q, k, v = (
            self.wqkv(self.norm0(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        )  # (patches, heads, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = x + self.wo(attend_within(q, k, v, lengths).flatten(1))
        return x + self.mlp(self.norm1(x))

    def _on_tiles(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        """The same in bfloat16 by kernels/wide.cpp: rotation, GELU and sums happen where the products end."""
        qkv = wide.linear(self.norm0(x), self.wqkv.weight, self.wqkv.bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(1)  # (patches, heads, head_dim)
        seen = wide.attention(q, k, v, lengths, q.shape[-1] ** -0.5, cos[:, 0], sin[:, 0])
        x = wide.linear(seen.flatten(1), self.wo.weight, self.wo.bias, residual=x)
        inner = wide.linear(self.norm1(x), self.mlp.fc0.weight, self.mlp.fc0.bias, act="gelu")
        return wide.linear(inner, self.mlp.fc1.weight, self.mlp.fc1.bias, residual=x)


def attend_within(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Full attention inside each item and none across items; all (patches, heads, head_dim).

    Every frame of a chunk sees every other. One call for all items of a length: no mask, no padding.
    """
    if len(lengths) == 1:
        return _attend(q, k, v, 1)
    sizes = list(lengths)
    by_length: dict[int, list[int]] = {}
    for item, length in enumerate(sizes):
        by_length.setdefault(length, []).append(item)
    qs, ks, vs = q.split(sizes), k.split(sizes), v.split(sizes)
    out: list[Tensor] = [q] * len(sizes)
    for same in by_length.values():
        together = [torch.cat([each[item] for item in same]) for each in (qs, ks, vs)]
        block = _attend(together[0], together[1], together[2], len(same))
        for item, part in zip(same, block.chunk(len(same)), strict=True):
            out[item] = part
    return torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, items: int) -> Tensor:
    # contiguous (items, heads, patches, head_dim): the fast layout on every backend
    block = [t.unflatten(0, (items, -1)).transpose(1, 2).contiguous() for t in (q, k, v)]
    return F.scaled_dot_product_attention(*block).transpose(1, 2).flatten(0, 1)


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        return self.final_layernorm(x)


def merge(x: Tensor, grids: Sequence[Grid], size: int) -> Tensor:
    """Each size x size cell of neighbours becomes one token, averaged over frames: (tokens, size * size, dim).

    Inside a cell the order is row-major. An item gives (h/size)*(w/size) tokens however many frames it has.
    """
    tokens = []
    for item, (t, h, w) in zip(x.split([t * h * w for t, h, w in grids]), grids, strict=True):
        cells = item.view(t, h // size, size, w // size, size, -1).transpose(2, 3)
        tokens.append(cells.mean(0).flatten(2, 3).flatten(0, 1))
    return torch.cat(tokens)


class MoonViT(nn.Module):
    """The vision tower. `forward` takes packed patches; `encode` takes pictures."""

    def __init__(self, config: VisionConfig, media: MediaConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.media = media or MediaConfig(patch_size=config.patch_size, merge_kernel_size=config.merge)
        self.patch_embed = PatchEmbed(config)
        self.encoder = Encoder(config)

    def forward(self, packed: PackedPatches) -> Tensor:
        """Features (tokens, 4, dim) of all items, end to end; `packed.tokens` says how many belong to each item."""
        grids: list[Grid] = [(t, h, w) for t, h, w in packed.grid_thw.tolist()]
        return merge(self.encoder_states(packed), grids, self.config.merge)

    def encoder_states(self, packed: PackedPatches) -> Tensor:
        """Last hidden states before merging, (patches, dim)."""
        config = self.config
        if packed.pixels.shape[-1] != config.patch_size:
            raise ValueError(
                f"pixels were cut into patches of {packed.pixels.shape[-1]} but the tower wants {config.patch_size}"
            )
        grids: list[Grid] = [(t, h, w) for t, h, w in packed.grid_thw.tolist()]
        for _, h, w in grids:
            if max(h, w) > config.max_grid:
                raise ValueError(f"an item has {h}x{w} patches; the tower's largest side is {config.max_grid}")
            if h % config.merge or w % config.merge:
                raise ValueError(f"an item has {h}x{w} patches; both sides must be multiples of {config.merge}")
        weight = self.patch_embed.proj.weight
        x = self.patch_embed(packed.pixels.to(weight), grids)  # (patches, dim)
        cos, sin = rotation(grids, config.head_dim, config.rope_theta, x.device)
        return self.encoder(x, cos, sin, packed.lengths)

    @torch.inference_mode()
    def encode(self, images: "Sequence[ImageSource]", patch_budget: int = 65_536) -> list[Tensor]:
        """Features of each image, (tokens, 4, dim): the last hidden states, four neighbouring patches to a token.

        `images`: paths, bytes, PIL images, arrays, tensors or data URLs (see moonvit.image.load_image). They run
        packed, at most `patch_budget` patches at a time.
        """
        from moonvit.image import image_patches, load_image

        if not isinstance(images, list | tuple):
            raise ValueError(f"images must be a list, also of one, got {type(images).__name__}")
        items = [image_patches(load_image(source), self.media) for source in images]
        return in_packs(items, patch_budget, self)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, dtype: torch.dtype | None = None, device: str | None = None
    ) -> "MoonViT":
        """Load a tower: MoonViT-SO-400M, or the tower inside a Kimi-VL or K2.5-family checkpoint.

        Only the shards that hold tower tensors are opened. dtype None keeps the file's. Raises ValueError for
        missing, unexpected or misshapen tensors, FileNotFoundError when the folder does not exist.
        """
        from moonvit.load import load_tower

        return load_tower(path_or_hub_id, dtype, device)

    @classmethod
    def from_siglip(cls, source: "str | nn.Module", table_size: int = 64) -> "MoonViT":
        """Start a tower from SigLIP: "timm:MODEL", "open_clip:MODEL/TAG" or such a module. See moonvit.siglip."""
        from moonvit.siglip import tower_from_siglip

        return tower_from_siglip(source, table_size)
