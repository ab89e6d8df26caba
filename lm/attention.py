"""Multi-head latent attention (MLA): keys and values of all heads are read from one small latent per token.

    x -- q_a -> norm -> q_b --> q_nope | q_rope          (per head; one q_proj when q_lora_rank is None)
    x -- kv_a_proj_with_mqa --> latent -> norm | k_rope  (shared by all heads; this is what the cache keeps)
    latent -- kv_b -----------> k_nope | v               (per head)

Two forms of the same product, tested equal:
- expanded (training, prefill): make every head's keys and values, then ordinary attention.
- absorbed (decoding): fold kv_b into the query and the output instead, and attend to the latents themselves. Nothing
  is expanded, so a step reads cache_dim numbers per past token instead of computing heads * (nope + v) of them.

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1; numerics as in the released modeling_deepseek.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import wide
from lm.cache import LatentCache
from lm.config import TextConfig
from lm.linear import Linear
from lm.rope import rotate, rotation
from lm.tiles import TiledAttention, fits


class RMSNorm(nn.Module):
    """Normalised in float32, rounded to the input's dtype, then scaled: the released order of roundings."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


@dataclass(frozen=True)
class Blocks:
    """Sequences that attend in one call lie together, padded to the longest of them.

    rows     |a a a|c c c|b b b b b|d d d d d|      the flat array's rows in the order of the blocks; None: its own
                          ^ here b and d attend in one call; the shorter one repeats its last token

    A repeated token adds no pair of query and key that was not there already. So neither results nor largest logits
    need a mask beyond the causal one.
    """

    shapes: tuple[tuple[int, int], ...]  # sequences and tokens of each block
    rows: Tensor | None  # int64 (padded tokens)
    places: Tensor | None  # int64 (tokens): where each token's own row is in that order


_STEP = 16  # sequences whose lengths round up to the same multiple share a block


def _make_blocks(new: Sequence[int], past: Sequence[int], device: torch.device) -> Blocks:
    if any(past):  # the cache holds sequences in this order: only equally long neighbours go in one call
        return Blocks(tuple((len(list(run)), n) for (n, _), run in groupby(zip(new, past, strict=True))), None, None)
    together: dict[int, list[int]] = {}
    for sequence, count in enumerate(new):
        together.setdefault(-(-count // _STEP), []).append(sequence)
    lengths = torch.tensor(new)
    starts = lengths.cumsum(0) - lengths
    shapes, rows = [], []
    places = torch.empty(int(lengths.sum()), dtype=torch.int64)
    done = 0
    for members in together.values():
        longest = max(new[sequence] for sequence in members)
        at = torch.arange(longest).minimum(lengths[members, None] - 1) + starts[members, None]  # (sequences, longest)
        places[at.flatten().flip(0)] = torch.arange(done, done + at.numel()).flip(0)
        shapes.append((len(members), longest))
        rows.append(at.flatten())
        done += at.numel()
    order = torch.cat(rows)
    if torch.equal(order, torch.arange(len(places))):
        return Blocks(tuple(shapes), None, None)
    return Blocks(tuple(shapes), order.to(device), places.to(device))


@dataclass(frozen=True)
class Layout:
    """Which rows of a flat (tokens, dim) array belong to which sequence, and where each token stands.

    rows       |s0 s0 s0 s0|s1|s2 s2 s2|      new tokens, end to end
    past        0           7  3              tokens of the sequence already in the cache
    positions   0  1  2  3  7  3  4  5
    """

    new: tuple[int, ...]
    past: tuple[int, ...]
    cos: Tensor  # (tokens, rope / 2)
    sin: Tensor
    key_mask: Tensor | None = None  # decoding a ragged batch: (sequences, 1, longest), True where a key exists

    @property
    def decoding(self) -> bool:
        return all(count == 1 for count in self.new) and any(self.past)

    @cached_property
    def blocks(self) -> Blocks:
        return _make_blocks(self.new, self.past, self.cos.device)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        dim, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(dim, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(dim, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(dim, config.cache_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, dim)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: LatentCache | None = None,
        max_logits: list[Tensor] | None = None,
        shares: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """(tokens, dim) to (tokens, dim).

        Appends each head's largest scaled logit to `max_logits` when given, and to `shares` one (heads, keys) per
        sequence: how its last token divides its attention.
        """
        q_nope, q_rope = self.queries(x, layout)
        latents = self.latents(x, layout)
        if cache is not None:
            cache.write(self.layer, latents, layout.new)
        if cache is not None and layout.decoding and max_logits is None:
            out = self.absorbed(q_nope, q_rope, cache.layers[self.layer], layout, shares)
        else:
            out = self.expanded(q_nope, q_rope, latents, cache, layout, max_logits)
            if shares is not None:
                shares.append(self._last_shares(q_nope, q_rope, latents, cache, layout))
        return self.o_proj(out.flatten(1))

    def queries(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """q_nope (tokens, heads, nope) and the rotated q_rope (tokens, heads, rope)."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))  # (tokens, heads * (nope + rope))
        q = q.unflatten(-1, (config.num_attention_heads, -1))  # (tokens, heads, nope + rope)
        nope, rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return nope, rotate(rope, layout.cos[:, None], layout.sin[:, None])

    def latents(self, x: Tensor, layout: Layout) -> Tensor:
        """What the cache keeps: normalised latent and rotated shared key, (tokens, latent + rope)."""
        latent, rope = self.kv_a_proj_with_mqa(x).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        return torch.cat([self.kv_a_layernorm(latent), rotate(rope, layout.cos, layout.sin)], dim=-1)

    def expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latents: Tensor,
        cache: LatentCache | None,
        layout: Layout,
        max_logits: list[Tensor] | None,
    ) -> Tensor:
        """Ordinary causal attention inside each sequence; (tokens, heads, v)."""
        config, blocks = self.config, layout.blocks
        q = torch.cat([q_nope, q_rope], dim=-1)
        if blocks.rows is not None:
            q, latents = q.index_select(0, blocks.rows), latents.index_select(0, blocks.rows)
        sizes = [count * new for count, new in blocks.shapes]
        parts: list[Tensor] = []
        peaks = []
        sequence = 0
        for (count, new), queries, known in zip(blocks.shapes, q.split(sizes), latents.split(sizes), strict=True):
            past = layout.past[sequence]  # of all in the block
            if past:
                assert cache is not None, "tokens have a past but there is no cache"
                known = cache.layers[self.layer][sequence : sequence + count, : past + new]
            else:
                known = known.unflatten(0, (count, new))  # (sequences, keys, latent + rope)
            if max_logits is None and wide.fits(queries, known, self.kv_b_proj.weight):
                parts.append(self._on_tiles(queries, known))
                sequence += count
                continue
            keys, values = self._expand(known)
            queries = queries.unflatten(0, (count, new)).transpose(1, 2)  # (sequences, heads, new, nope + rope)
            if torch.is_grad_enabled() and not past and fits(queries):
                out, peak = TiledAttention.apply(queries, keys, values, config.softmax_scale)
            else:
                out, peak = _causal_attention(queries, keys, values, config.softmax_scale, past), None
                if max_logits is not None:
                    peak = _max_logits(queries.detach(), keys.detach(), config.softmax_scale, past)
            parts.append(out.transpose(1, 2).flatten(0, 1))  # (tokens, heads, v)
            peaks.append(peak)
            sequence += count
        if max_logits is not None:
            max_logits.append(torch.stack(peaks).amax(0))
        out = torch.cat(parts)
        return out if blocks.places is None else out.index_select(0, blocks.places)

    def _on_tiles(self, queries: Tensor, known: Tensor) -> Tensor:
        """Causal attention in bfloat16 by kernels/wide.cpp: (sequences * new, heads, nope + rope) to (.., heads, v)."""
        config, heads = self.config, self.config.num_attention_heads
        latent, rope = known.flatten(0, 1).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        both = self.kv_b_proj(latent).unflatten(-1, (heads, -1))  # (keys, heads, nope + v)
        nope, values = both.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        keys = torch.cat([nope, rope[:, None].expand(-1, heads, -1)], dim=-1)  # (keys, heads, nope + rope)
        each = [t.chunk(len(known)) for t in (queries, keys, values)]
        one = [
            wide.attention(q, k, v, [len(q)], config.softmax_scale, causal=True) for q, k, v in zip(*each, strict=True)
        ]
        return torch.cat(one) if len(one) > 1 else one[0]

    def _expand(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (sequences, keys, latent + rope) to keys (sequences, heads, keys, nope + rope) and values."""
        config = self.config
        latent, rope = known.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        both = self.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
        nope, values = both.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        rope = rope[:, None].expand(-1, config.num_attention_heads, -1, -1)
        return torch.cat([nope, rope], dim=-1), values

    @torch.no_grad()
    def _last_shares(
        self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, cache: LatentCache | None, layout: Layout
    ) -> list[Tensor]:
        """Attention of each sequence's last token, which sees all of its keys: float32 (heads, keys)."""
        shares, end = [], 0
        for sequence, (new, past) in enumerate(zip(layout.new, layout.past, strict=True)):
            end += new
            known = latents[end - new : end] if cache is None else cache.layers[self.layer][sequence, : past + new]
            keys, _ = self._expand(known[None])
            query = torch.cat([q_nope[end - 1], q_rope[end - 1]], dim=-1)  # (heads, nope + rope)
            scores = torch.einsum("hd,hkd->hk", query.float(), keys[0].float()) * self.config.softmax_scale
            shares.append(scores.softmax(-1))
        return shares

    def absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cached: Tensor,
        layout: Layout,
        kept: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """One new token per sequence against its cached latents; (sequences, heads, v)."""
        config = self.config
        weight = self.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        to_key, to_value = weight.split(
            [config.qk_nope_head_dim, config.v_head_dim], dim=1
        )  # (heads, nope | v, latent)
        known = cached[:, : max(layout.past) + 1]  # (sequences, keys, latent + rope)
        q_latent = torch.bmm(q_nope.transpose(0, 1), to_key).transpose(0, 1)  # (sequences, heads, latent)
        scores = torch.bmm(torch.cat([q_latent, q_rope], dim=-1), known.transpose(1, 2)) * config.softmax_scale
        if layout.key_mask is not None:
            scores = scores.masked_fill(~layout.key_mask, float("-inf"))
        shares = scores.softmax(-1, dtype=torch.float32)  # (sequences, heads, keys)
        if kept is not None:
            kept.append([row[:, : past + 1] for row, past in zip(shares, layout.past, strict=True)])
        mixed = torch.bmm(shares.to(scores.dtype), known[..., : config.kv_lora_rank])  # (sequences, heads, latent)
        return torch.bmm(mixed.transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, past: int) -> Tensor:
    # values are narrower than keys; padded to the same width, attention stays on the path that never holds scores
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    mask = None
    if past:
        rows = torch.arange(past, past + q.shape[2], device=q.device)
        mask = torch.arange(k.shape[2], device=q.device) <= rows[:, None]  # (new, keys)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]


@torch.no_grad()
def _max_logits(q: Tensor, k: Tensor, scale: float, past: int, rows: int = 512) -> Tensor:
    """Largest scaled logit of each head over visible pairs, float32 (heads); `rows` queries at a time."""
    peak = q.new_full((q.shape[1],), float("-inf"), dtype=torch.float32)
    for start in range(0, q.shape[2], rows):
        part = q[:, :, start : start + rows]
        seen = past + start + part.shape[2]
        logits = part @ k[:, :, :seen].transpose(-1, -2)  # (sequences, heads, rows, keys)
        hidden = torch.ones(part.shape[2], part.shape[2], dtype=torch.bool, device=q.device).triu_(1)
        logits[..., past + start :].masked_fill_(hidden, float("-inf"))
        peak = torch.maximum(peak, logits.amax((2, 3)).amax(0))
    return peak * scale


def make_layout(
    config: TextConfig, new: Sequence[int], past: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Layout:
    """Positions, rotations and masks that all layers of one forward pass share."""
    positions = torch.cat([torch.arange(p, p + n, device=device) for n, p in zip(new, past, strict=True)])
    cos, sin = rotation(config, positions, dtype)
    layout = Layout(tuple(new), tuple(past), cos, sin)
    if layout.decoding and len(set(past)) > 1:
        ends = torch.tensor(past, device=device)[:, None]
        mask = torch.arange(max(past) + 1, device=device) <= ends  # (sequences, keys)
        layout = Layout(layout.new, layout.past, cos, sin, mask[:, None])
    return layout
