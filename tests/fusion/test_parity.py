"""Our numbers against transformers' Kimi_K25 and DeepseekV3, float32, random configs and inputs.

    pytest tests/fusion/test_parity.py -s        # -s prints the largest differences, routing free and pinned

Weights have unit gain, norms, biases and correction biases are random: with the default initialisation many wrong
models would pass (see test_wrong_twins.py, which shows that here they do not).
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusion.config import KimiConfig
from lm.config import Yarn
from lm.taps import Taps
from moonvit.packing import PackedPatches
from tests.reference import reference_model, small, twin

TOLERANCE = 1e-4


@st.composite
def configs(draw: Any, with_vision: bool) -> KimiConfig:
    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    groups, experts = pick((1, 4), (1, 16), (2, 8), (4, 16))
    kept = draw(st.integers(1, groups))
    yarn = pick(
        None,
        Yarn(factor=32.0, beta_fast=1.0, original_max_position_embeddings=64),
        Yarn(factor=64.0, beta_fast=32.0, original_max_position_embeddings=512),
        Yarn(factor=4.0, beta_fast=32.0, original_max_position_embeddings=4096),
    )
    text = {
        "hidden_size": pick(24, 48, 64),
        "intermediate_size": pick(16, 96),
        "moe_intermediate_size": pick(8, 24),
        "num_hidden_layers": pick(1, 2, 3),
        "num_attention_heads": pick(1, 2, 4),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(6, experts // groups * kept))),
        "n_shared_experts": pick(1, 2),
        "first_k_dense_replace": pick(0, 1, 2),
        "q_lora_rank": pick(None, 12, 32),
        "kv_lora_rank": pick(8, 32),
        "qk_nope_head_dim": pick(4, 16),
        "qk_rope_head_dim": pick(2, 8, 16),
        "v_head_dim": pick(4, 16, 24),
        "n_group": groups,
        "topk_group": kept,
        "rms_norm_eps": pick(1e-5, 1e-6),
        "rope_theta": pick(50_000.0, 800_000.0),
        "routed_scaling_factor": pick(1.0, 2.446, 2.827),
        "yarn": yarn,
    }
    heads, head_dim, table = pick(1, 2, 4), pick(4, 12, 24), pick(2, 5, 8)
    vision = {
        "hidden_size": heads * head_dim,
        "num_heads": heads,
        "num_layers": pick(1, 2),
        "intermediate_size": pick(16, 40),
        "pos_emb_height": table,
        "pos_emb_width": table,
    }
    return small(text, vision, with_vision)


grids = st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 6, 8]), st.sampled_from([2, 4, 6, 10]))
worst: dict[str, float] = {}


def record(kind: str, difference: float) -> None:
    worst[kind] = max(worst.get(kind, 0.0), difference)


@pytest.fixture(scope="module", autouse=True)
def report() -> Any:
    yield
    print("\nlargest absolute difference:", {kind: f"{value:.1e}" for kind, value in sorted(worst.items())})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def items(sizes: list[tuple[int, int, int]], seed: int) -> PackedPatches:
    count = sum(t * h * w for t, h, w in sizes)
    return PackedPatches(torch.randn(count, 3, 14, 14, generator=seeded(seed)), torch.tensor(sizes))


def record_routing(reference: nn.Module) -> list[Tensor]:
    """The experts that the oracle chooses, layer by layer, filled while it runs."""
    chosen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        picks = [part for part in (output if isinstance(output, tuple) else (output,)) if part.dtype == torch.int64]
        chosen.extend(picks)

    for name, module in reference.named_modules():
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(keep)
    return chosen


def compare(kind: str, ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1, "the oracle's output is too small to compare at unit scale"
    difference = float((ours - theirs).abs().max() / theirs.std().clamp(min=1.0))  # at unit scale
    record(kind, difference)
    assert difference <= TOLERANCE, f"{kind}: differs by {difference:.2e}"


def compare_language(kimi: Any, reference: nn.Module, kind: str, run_reference: Any, embeddings: Tensor) -> None:
    """Logits with our own routing and with the oracle's pinned. A near tie may flip the free one; then say so."""
    routing = record_routing(reference)
    theirs = run_reference()
    taps = Taps()
    lm = kimi.language_model
    free = lm.logits(lm(embeddings, taps=taps))
    pinned = lm.logits(lm(embeddings, taps=Taps(pinned=routing)))
    compare(kind + ", routing pinned", pinned, theirs)
    same = all(
        torch.equal(mine.chosen.sort(-1).values, other.sort(-1).values)
        for mine, other in zip(taps.routing, routing, strict=True)
    )
    if same:
        compare(kind + ", routing free", free, theirs)
    else:
        record(kind + ", prompts whose routing flipped", worst.get(kind + ", prompts whose routing flipped", 0) + 1)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs(with_vision=False), st.integers(0, 10**6), st.integers(1, 80), st.sampled_from([1.0, 3e-3]))
@torch.inference_mode()
def test_text_logits(config: KimiConfig, seed: int, length: int, scale: float) -> None:
    reference = reference_model(config, seed)
    kimi = twin(config, reference)
    embeddings = scale * torch.randn(length, config.text.hidden_size, generator=seeded(seed))
    compare_language(kimi, reference, "text", lambda: reference(inputs_embeds=embeddings[None]).logits[0], embeddings)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    configs(with_vision=True),
    st.integers(0, 10**6),
    st.lists(grids, min_size=1, max_size=4),
    st.sampled_from([1.0, 3e-3]),
)
@torch.inference_mode()
def test_tower_and_projector_on_packed_mixtures(config: KimiConfig, seed: int, sizes: list, scale: float) -> None:
    """Chunks of 1-4 frames and images, packed for us, one at a time for the oracle (it fails on mixtures)."""
    reference = reference_model(config, seed)
    kimi = twin(config, reference)
    media = items(sizes, seed)
    media = PackedPatches(media.pixels * scale, media.grid_thw)
    parts = []
    for item in media.split():
        pooled = reference.model.vision_tower(item.pixels, grid_thw=item.grid_thw).pooler_output
        parts.append(reference.model.mm_projector(pooled).squeeze(1))
    compare("vision tokens", kimi.see(media), torch.cat(parts))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs(with_vision=True), st.integers(0, 10**6), st.lists(grids, min_size=1, max_size=3))
@torch.inference_mode()
def test_logits_of_prompts_with_images_and_chunks(config: KimiConfig, seed: int, sizes: list) -> None:
    reference = reference_model(config, seed)
    kimi = twin(config, reference)
    media = items(sizes, seed)
    pad = config.media_placeholder_token_id
    ids: list[int] = []
    for tokens in media.tokens:
        ids += [*torch.randint(0, 390, (3,), generator=seeded(seed)).tolist(), *[pad] * tokens, 5]
    prompt = torch.tensor(ids)
    embeddings = kimi.embed(prompt, media)

    def run_reference() -> Tensor:
        if all(t == 1 for t, _, _ in sizes):  # the oracle's own fusion; it is broken for t > 1
            out = reference(input_ids=prompt[None], pixel_values=media.pixels, image_grid_thw=media.grid_thw)
            return out.logits[0]
        parts = [reference.model.vision_tower(i.pixels, grid_thw=i.grid_thw).pooler_output for i in media.split()]
        vision = torch.cat([reference.model.mm_projector(part).squeeze(1) for part in parts])
        text = reference.get_input_embeddings()(prompt.masked_fill(prompt == pad, 0))
        merged = text.masked_scatter((prompt == pad)[:, None], vision)
        return reference(inputs_embeds=merged[None]).logits[0]

    compare_language(kimi, reference, "prompts with media", run_reference, embeddings)
