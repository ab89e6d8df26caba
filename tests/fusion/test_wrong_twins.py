"""Deliberately wrong models must fail the parity tests' tolerance: the check of the checks.

    pytest tests/fusion/test_wrong_twins.py -s      # -s prints how far off each wrong twin is

Each twin makes one mistake that a real implementation of this family has made or could make. Text twins run on
embeddings at scale 1 and 3e-3 and on attention blocks alone, vision twins on a packed mixture; the right model stays
below the tolerance on the very same inputs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lm.attention
import lm.moe
import lm.rope
import moonvit.encoder
import moonvit.position
from fusion.model import Kimi
from lm.attention import make_layout
from lm.config import TextConfig, Yarn
from lm.taps import Routing
from moonvit.packing import PackedPatches
from tests.reference import reference_model, small, twin

TOLERANCE = 1e-4

TEXT = {
    "yarn": Yarn(factor=64.0, beta_fast=32.0, original_max_position_embeddings=256),
    "qk_rope_head_dim": 16,
    "num_hidden_layers": 3,
}
SIZES = [(1, 4, 6), (4, 4, 10), (2, 6, 6), (1, 8, 8), (3, 2, 4)]


@lru_cache(maxsize=1)
def oracle() -> tuple[nn.Module, Any]:
    config = small(TEXT)
    return reference_model(config, 7), config


def right() -> Kimi:
    reference, config = oracle()
    return twin(config, reference)


@torch.inference_mode()
def text_difference(kimi: Kimi) -> float:
    """Largest over whole-model logits and single attention blocks, at input scales 1 and 3e-3."""
    reference, config = oracle()
    language = reference.model.language_model
    differences = []
    for scale in (1.0, 3e-3):
        x = scale * torch.randn(150, config.text.hidden_size, generator=torch.Generator().manual_seed(1))
        theirs = reference.lm_head(language(inputs_embeds=x[None]).last_hidden_state)[0]
        ours = kimi.language_model.logits(kimi.language_model(x))
        differences.append(float((ours - theirs).abs().max()))
        positions = torch.arange(150)[None]
        mask = torch.full((150, 150), float("-inf")).triu(1)[None, None]
        block = language.layers[0].self_attn
        theirs = block(x[None], language.rotary_emb(x[None], positions), attention_mask=mask)[0][0]
        layout = make_layout(kimi.config.text, [150], [0], x.device, x.dtype)
        ours = kimi.language_model.model.layers[0].self_attn(x, layout)
        differences.append(float((ours - theirs).abs().max() / theirs.std()))
    return max(differences)


@torch.inference_mode()
def vision_difference(kimi: Kimi) -> float:
    """Largest over vision tokens of a packed mixture of images and chunks, at input scales 1 and 3e-3.

    At 3e-3 the position table is scaled down too (in both), so that layer norms see small inputs.
    """
    reference, _ = oracle()
    differences = []
    for scale in (1.0, 3e-3):
        count = sum(t * h * w for t, h, w in SIZES)
        pixels = torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(2)) * scale
        media = PackedPatches(pixels, torch.tensor(SIZES))
        parts = []
        for item in media.split():
            pooled = reference.model.vision_tower(item.pixels, grid_thw=item.grid_thw).pooler_output
            parts.append(reference.model.mm_projector(pooled).squeeze(1))
        differences.append(float((kimi.see(media) - torch.cat(parts)).abs().max()))
    # norms alone, on small inputs: eps shows there
    x = 3e-3 * torch.randn(64, kimi.config.vision.hidden_size, generator=torch.Generator().manual_seed(3))
    tower = reference.model.vision_tower
    pairs = [
        (kimi.vision_tower.encoder.blocks[0].norm0, tower.layers[0].norm1),
        (kimi.vision_tower.encoder.blocks[1].norm1, tower.layers[1].norm2),
        (kimi.vision_tower.encoder.final_layernorm, tower.final_layernorm),
        (kimi.mm_projector.pre_norm, reference.model.mm_projector.pre_norm),
    ]
    differences += [float((mine(x) - other(x)).abs().max()) for mine, other in pairs]
    return max(differences)


def test_the_right_model_passes() -> None:
    kimi = right()
    assert text_difference(kimi) <= TOLERANCE
    assert vision_difference(kimi) <= TOLERANCE


# ---- wrong language models -------------------------------------------------------------------------------------------


def with_text(**changes: Any) -> Callable[[Any], Kimi]:
    """The same weights under a changed config."""

    def build(monkeypatch: Any) -> Kimi:
        reference, config = oracle()
        return twin(replace(config, text=replace(config.text, **changes)), reference)

    return build


def patched(module: Any, name: str, wrong: Any) -> Callable[[Any], Kimi]:
    def build(monkeypatch: Any) -> Kimi:
        monkeypatch.setattr(module, name, wrong)
        return right()

    return build


def changed(change: Callable[[Kimi], None]) -> Callable[[Any], Kimi]:
    def build(monkeypatch: Any) -> Kimi:
        kimi = right()
        change(kimi)
        return kimi

    return build


def half_split_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def backwards_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return RIGHT_ROTATE(x, cos, -sin)


RIGHT_ROTATE = lm.rope.rotate
RIGHT_FREQUENCIES = lm.rope.inverse_frequencies
RIGHT_ROUTE = lm.moe.Gate.forward


def rounded_frequencies(config: TextConfig, device: torch.device) -> Tensor:
    return RIGHT_FREQUENCIES(config, device).bfloat16().float()


def route(self: lm.moe.Gate, x: Tensor, pinned: Tensor | None = None, *, mistake: str) -> Routing:
    config = self.config
    logits = F.linear(x.float(), self.weight.float())
    scores = logits.softmax(-1) if mistake == "softmax" else logits.sigmoid()
    bias = 0 if mistake == "no bias" else self.e_score_correction_bias
    if mistake == "bias in bfloat16":
        bias = self.e_score_correction_bias.bfloat16().float()
    chosen = (scores + bias).topk(config.num_experts_per_tok, dim=-1).indices
    weights = (scores + bias if mistake == "biased weights" else scores).gather(1, chosen)
    if mistake != "not normalised":
        weights = weights / weights.sum(-1, keepdim=True)
    if mistake == "weights in bfloat16":
        weights = weights.bfloat16().float()
    return Routing(scores, chosen, weights if mistake == "not scaled" else weights * config.routed_scaling_factor)


def norm_all_of_the_latent(kimi: Kimi) -> None:
    """Rotary key normalised along with the latent."""
    for layer in kimi.language_model.model.layers:
        attention = layer.self_attn

        def latents(x: Tensor, layout: Any, attention: Any = attention) -> Tensor:
            config = attention.config
            both = attention.kv_a_proj_with_mqa(x)
            both = F.rms_norm(both, (both.shape[-1],), None, 1e-6)
            latent, rope = both.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
            rotated = RIGHT_ROTATE(rope, layout.cos, layout.sin)
            return torch.cat([latent * attention.kv_a_layernorm.weight, rotated], dim=-1)

        attention.latents = latents


def swap_gate_and_up(kimi: Kimi) -> None:
    for layer in kimi.language_model.model.layers[1:]:
        for expert in layer.mlp.experts:
            expert.gate_proj, expert.up_proj = expert.up_proj, expert.gate_proj


def drop_shared_experts(kimi: Kimi) -> None:
    for layer in kimi.language_model.model.layers[1:]:
        layer.mlp.shared_experts = None


def tie_head(kimi: Kimi) -> None:
    kimi.language_model.lm_head.weight = kimi.language_model.model.embed_tokens.weight


def see_the_future(q: Tensor, k: Tensor, v: Tensor, scale: float, past: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


YARN = Yarn(factor=64.0, beta_fast=32.0, original_max_position_embeddings=256)

WRONG_TEXT: dict[str, Callable[[Any], Kimi]] = {
    "RoPE halves swapped for pairs": patched(lm.attention, "rotate", half_split_rope),
    "RoPE turned backwards": patched(lm.attention, "rotate", backwards_rope),
    "RoPE frequencies rounded to bfloat16": patched(lm.rope, "inverse_frequencies", rounded_frequencies),
    "latent norms with rms_norm_eps": with_text(latent_norm_eps=1e-5),
    "block norms with the latent eps": with_text(rms_norm_eps=1e-6),
    "no correction bias": patched(lm.moe.Gate, "forward", lambda *a: route(*a, mistake="no bias")),
    "correction bias in bfloat16": patched(lm.moe.Gate, "forward", lambda *a: route(*a, mistake="bias in bfloat16")),
    "correction bias in the weights": patched(lm.moe.Gate, "forward", lambda *a: route(*a, mistake="biased weights")),
    "softmax router": patched(lm.moe.Gate, "forward", lambda *a: route(*a, mistake="softmax")),
    "weights not normalised": with_text(norm_topk_prob=False),
    "weights in bfloat16": patched(lm.moe.Gate, "forward", lambda *a: route(*a, mistake="weights in bfloat16")),
    "weights not scaled": with_text(routed_scaling_factor=1.0),
    "one expert fewer": with_text(num_experts_per_tok=3),
    "softmax scale without mscale": patched(Yarn, "softmax_scale", 1.0),
    "softmax scale with mscale once": patched(Yarn, "softmax_scale", YARN.softmax_scale**0.5),
    "no YaRN": with_text(yarn=None),
    "YaRN with the other beta_fast": with_text(yarn=replace(YARN, beta_fast=1.0)),
    "YaRN with another factor": with_text(yarn=replace(YARN, factor=32.0)),
    "rotary key normalised with the latent": changed(norm_all_of_the_latent),
    "gate and up swapped in the experts": changed(swap_gate_and_up),
    "no shared experts": changed(drop_shared_experts),
    "head tied to the embedding": changed(tie_head),
    "attention to the future": patched(lm.attention, "_causal_attention", see_the_future),
}


@pytest.mark.parametrize("mistake", WRONG_TEXT)
def test_wrong_language_model_fails(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    difference = text_difference(WRONG_TEXT[mistake](monkeypatch))
    print(f"\n{mistake}: {difference:.1e}")
    assert difference > 2 * TOLERANCE


# ---- wrong towers and projectors -------------------------------------------------------------------------------------

RIGHT_GRID = moonvit.position.rotation
RIGHT_GELU = F.gelu
RIGHT_INTERPOLATE = F.interpolate


def height_first(grids: Any, head_dim: int, theta: float, device: Any) -> tuple[Tensor, Tensor]:
    cos, sin = RIGHT_GRID(grids, head_dim, theta, device)
    return tuple(part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) for part in (cos, sin))  # type: ignore[return-value]


def half_split_vision(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def no_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x


def complex_table_without_imaginary_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return moonvit.position.rotate(x, cos, torch.zeros_like(sin))


def interpolated(mode: str, **options: Any) -> Callable[..., Tensor]:
    def interpolate(table: Tensor, size: Any, **ignored: Any) -> Tensor:
        return RIGHT_INTERPOLATE(table, size=size, mode=mode, **options)

    return interpolate


def time_always(frames: int, dim: int, zero_first: bool) -> Tensor:
    time = RIGHT_TIME(frames, dim)
    return torch.cat([torch.zeros(1, dim), time])[:frames] if zero_first else time.roll(1, 0)


RIGHT_TIME = moonvit.position.time_embedding


def interleaved_time(frames: int, dim: int) -> Tensor:
    sines, cosines = RIGHT_TIME(frames, dim).chunk(2, dim=1)
    return torch.stack([sines, cosines], dim=-1).flatten(1)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Any, *, mistake: str) -> Tensor:
    whole = moonvit.encoder.attend_within
    if mistake == "across items":
        return RIGHT_ATTEND(q, k, v, [len(q)])
    frames = [h * w for t, h, w in SIZES for _ in range(t)]
    assert whole is not RIGHT_ATTEND
    return RIGHT_ATTEND(q, k, v, frames)


RIGHT_ATTEND = moonvit.encoder.attend_within


def merged(x: Tensor, grids: Any, size: int, *, mistake: str) -> Tensor:
    tokens = []
    for item, (t, h, w) in zip(x.split([t * h * w for t, h, w in grids]), grids, strict=True):
        cells = item.view(t, h // size, size, w // size, size, -1).transpose(2, 3)
        if mistake == "column-major cells":
            cells = cells.transpose(3, 4)
        pooled = {"first frame": cells[0], "largest": cells.amax(0)}.get(mistake, cells.mean(0))
        tokens.append(pooled.flatten(2, 3).flatten(0, 1))
    return torch.cat(tokens)


def set_eps(kimi: Kimi) -> None:
    for module in kimi.vision_tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def set_projector_eps(kimi: Kimi) -> None:
    kimi.mm_projector.pre_norm.eps = 1e-6


def tanh_projector(kimi: Kimi) -> None:
    kimi.mm_projector.proj[1] = nn.GELU(approximate="tanh")


def norm_after_flattening(kimi: Kimi) -> None:
    norm = kimi.mm_projector.pre_norm

    def forward(features: Tensor) -> Tensor:
        flat = features.flatten(1)
        wide = F.layer_norm(flat, (flat.shape[-1],), norm.weight.repeat(4), norm.bias.repeat(4), norm.eps)
        return kimi.mm_projector.proj(wide)

    kimi.mm_projector.forward = forward  # type: ignore[method-assign]


WRONG_VISION: dict[str, Callable[[Any], Kimi]] = {
    "2-D RoPE height first": patched(moonvit.encoder, "rotation", height_first),
    "2-D RoPE halves swapped for pairs": patched(moonvit.encoder, "rotate", half_split_vision),
    "no 2-D RoPE": patched(moonvit.encoder, "rotate", no_rotation),
    "2-D RoPE table without its imaginary part": patched(
        moonvit.encoder, "rotate", complex_table_without_imaginary_part
    ),
    "erf GELU in the tower": patched(moonvit.encoder.F, "gelu", lambda x, approximate="none": RIGHT_GELU(x)),
    "eps 1e-6 in the tower": changed(set_eps),
    "eps 1e-6 in the projector": changed(set_projector_eps),
    "tanh GELU in the projector": changed(tanh_projector),
    "projector norm after flattening": changed(norm_after_flattening),
    "antialiased position table": patched(F, "interpolate", interpolated("bicubic", antialias=True)),
    "bilinear position table": patched(F, "interpolate", interpolated("bilinear")),
    "position table with aligned corners": patched(F, "interpolate", interpolated("bicubic", align_corners=True)),
    "frame 0 of a chunk without time": patched(
        moonvit.position, "time_embedding", partial(time_always, zero_first=True)
    ),
    "frames in the wrong order": patched(moonvit.position, "time_embedding", partial(time_always, zero_first=False)),
    "sines and cosines of time interleaved": patched(moonvit.position, "time_embedding", interleaved_time),
    "attention across items": patched(moonvit.encoder, "attend_within", partial(attend, mistake="across items")),
    "attention inside frames only": patched(moonvit.encoder, "attend_within", partial(attend, mistake="frames")),
    "column-major cells": patched(moonvit.encoder, "merge", partial(merged, mistake="column-major cells")),
    "first frame instead of the mean": patched(moonvit.encoder, "merge", partial(merged, mistake="first frame")),
    "largest instead of the mean": patched(moonvit.encoder, "merge", partial(merged, mistake="largest")),
}


@pytest.mark.parametrize("mistake", WRONG_VISION)
def test_wrong_tower_fails(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    difference = vision_difference(WRONG_VISION[mistake](monkeypatch))
    print(f"\n{mistake}: {difference:.1e}")
    assert difference > 2 * TOLERANCE
