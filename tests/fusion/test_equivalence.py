"""The same numbers by every road: packed = alone, cached = uncached, absorbed = expanded, batched = single.

    pytest tests/fusion/test_equivalence.py

float32, 1e-5 at unit-scale activations.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusion.config as presets
from fusion.generate import Sampling, decode, generate, prefill
from fusion.model import Kimi, splice
from fusion.prompt import Prompt
from lm.cache import LatentCache
from lm.config import TextConfig
from lm.model import LanguageModel
from lm.moe import sequence_balance_loss
from lm.taps import Taps
from moonvit.config import tiny as tiny_tower
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches, pack
from tests.reference import randomise, small


def close(a: Tensor, b: Tensor) -> None:
    difference = float((a - b).abs().max() / b.std().clamp(min=1.0))
    assert difference <= 1e-5, f"differs by {difference:.1e}"


@pytest.fixture(scope="module")
def kimi() -> Kimi:
    model = Kimi(small({"q_lora_rank": 16})).eval()
    randomise(model, 3)
    return model


@pytest.fixture(scope="module")
def tower() -> MoonViT:
    model = MoonViT(tiny_tower()).eval()
    randomise(model, 5)
    return model


def item(t: int, h: int, w: int, seed: int) -> PackedPatches:
    draw = torch.Generator().manual_seed(seed)
    return PackedPatches(torch.randn(t * h * w, 3, 14, 14, generator=draw), torch.tensor([[t, h, w]]))


def words(count: int, seed: int, vocab: int = 390) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


grids = st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 8]), st.sampled_from([2, 6, 8]), st.integers(0, 99))


@settings(max_examples=40)
@given(st.lists(grids, min_size=1, max_size=6))
def test_a_packed_item_has_the_features_it_has_alone(tower: MoonViT, sizes: list) -> None:
    items = [item(*size) for size in sizes]
    packed = pack(items)
    with torch.inference_mode():
        together = tower(packed).split(packed.tokens)
        for features, alone in zip(together, items, strict=True):
            close(features, tower(alone))


@torch.inference_mode()
def test_frames_of_a_chunk_see_each_other_and_items_do_not(tower: MoonViT) -> None:
    a, b = item(4, 4, 6, 1), item(4, 4, 6, 2)
    before = tower.encoder_states(pack([a, b]))
    moved = a.pixels.clone()
    moved[72:] += 1.0  # frame 3 of the first clip
    after = tower.encoder_states(pack([PackedPatches(moved, a.grid_thw), b]))
    assert (after[:24] - before[:24]).abs().max() > 1e-2  # frame 0 of the first clip
    assert torch.equal(after[96:], before[96:])  # the second clip: not a bit


@torch.inference_mode()
def test_a_picture_and_the_first_frame_of_a_clip_have_different_positions(tower: MoonViT) -> None:
    table = tower.patch_embed.pos_emb
    alone, clip = table([(1, 4, 6)]), table([(2, 4, 6)])
    half = tower.config.hidden_size // 2
    close(clip[:24, :half], alone[:, :half])
    close(clip[:24, half:], alone[:, half:] + 1)


@torch.inference_mode()
def test_bfloat16_after_a_forward_leaves_rotations_alone(tower: MoonViT) -> None:
    packed = item(1, 8, 8, 4)
    expected = tower(packed)
    rounded = copy.deepcopy(tower)
    rounded(packed)
    rounded = rounded.bfloat16()
    assert all(not torch.is_complex(t) for t in rounded.state_dict().values())
    back = rounded.float()(packed)  # only the weights were rounded
    assert (back - expected).abs().mean() < 0.05 * expected.std()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 99))
def test_a_packed_sequence_has_the_logits_it_has_alone(kimi: Kimi, lengths: list, seed: int) -> None:
    lm = kimi.language_model
    x = torch.randn(sum(lengths), kimi.config.text.hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        together = lm.logits(lm(x, lengths)).split(lengths)
        for logits, alone in zip(together, x.split(lengths), strict=True):
            close(logits, lm.logits(lm(alone)))


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 99))
def test_cached_in_any_pieces_is_uncached(kimi: Kimi, pieces: list, seed: int) -> None:
    """Pieces of one token decode absorbed, longer ones run expanded over the cache."""
    lm = kimi.language_model
    ids = words(sum(pieces), seed)
    with torch.inference_mode():
        whole = lm(lm.embed(ids))
        cache = lm.new_cache(1, capacity=4)  # grows on the way
        parts = [lm(lm.embed(part), cache=cache) for part in ids.split(pieces)]
        close(lm.logits(torch.cat(parts)), lm.logits(whole))
    assert cache.lengths == [len(ids)]


@torch.inference_mode()
def test_absorbed_is_expanded(kimi: Kimi) -> None:
    lm = kimi.language_model
    ids = words(30, 1)
    cache = lm.new_cache(1, 64)
    lm(lm.embed(ids[:-1]), cache=cache)
    other = cache.select([0])
    x = lm.embed(ids[-1:])
    absorbed = lm(x, [1], cache)
    expanded = lm(x, [1], other, Taps(want_max_logits=True))  # asking for logits takes the expanded road
    close(absorbed, expanded)


@torch.inference_mode()
def test_a_ragged_batch_decodes_as_its_sequences_do_alone(kimi: Kimi) -> None:
    lm = kimi.language_model
    prompts = [words(n, n) for n in (1, 5, 17, 17)]
    batch = lm.new_cache(4, 32)
    alone = [lm.new_cache(1, 32) for _ in prompts]
    for row, (ids, cache) in enumerate(zip(prompts, alone, strict=True)):
        lm(lm.embed(ids), cache=cache)
        lm(lm.embed(ids), cache=batch.row(row))
    batch.lengths = [len(ids) for ids in prompts]
    for step in range(6):
        following = words(4, step).tolist()
        together = decode(kimi, following, batch)
        for row, token in enumerate(following):
            close(together[row], decode(kimi, [token], alone[row])[0])
    kept = batch.select([2, 0])
    close(decode(kimi, [3, 4], kept)[1], decode(kimi, [4], alone[0])[0])


@torch.inference_mode()
def test_prefill_in_chunks_is_prefill_at_once(kimi: Kimi) -> None:
    pad = kimi.config.media_placeholder_token_id
    media = pack([item(1, 8, 8, 1), item(3, 4, 6, 2)])
    ids = torch.cat([words(5, 1), torch.full((16,), pad), words(3, 2), torch.full((6,), pad), words(40, 3)])
    prompt = Prompt(ids, media)
    logits = [prefill(kimi, prompt, kimi.language_model.new_cache(1, 8), chunk) for chunk in (1, 7, 16, 1024)]
    for other in logits[:-1]:
        close(other, logits[-1])
    close(logits[-1], kimi.logits(prompt)[-1])


@torch.inference_mode()
def test_vision_in_several_packs_is_vision_in_one(kimi: Kimi) -> None:
    media = pack([item(1, 8, 8, 1), item(4, 4, 6, 2), item(1, 2, 2, 3), item(2, 6, 6, 4)])
    close(kimi.see(media, patch_budget=70), kimi.see(media))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_in_a_batch_is_generation_alone(kimi: Kimi, temperature: float) -> None:
    prompts = [Prompt(words(n, n)) for n in (3, 11, 7)]
    sampling = Sampling(max_new_tokens=12, temperature=temperature, top_p=0.9, top_k=50, seed=4)
    together: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for tokens in generate(kimi, prompts, sampling):
        for index, token in tokens.items():
            together[index].append(token)
    for index, prompt in enumerate(prompts):
        assert together[index] == [tokens[0] for tokens in generate(kimi, [prompt], sampling)]


def test_max_logits_are_the_largest_products_of_each_head(kimi: Kimi) -> None:
    lm = kimi.language_model
    taps = Taps(want_max_logits=True)
    lengths = [9, 30, 30, 4]
    x = torch.randn(sum(lengths), kimi.config.text.hidden_size)
    with torch.no_grad():
        lm(x, lengths, taps=taps)
        assert len(taps.max_logits) == kimi.config.text.num_hidden_layers
        # layer 0 by hand
        from lm.attention import make_layout

        layer = lm.model.layers[0]
        layout = make_layout(kimi.config.text, lengths, [0] * 4, x.device, x.dtype)
        h = layer.input_layernorm(x)
        nope, rope = layer.self_attn.queries(h, layout)
        known = layer.self_attn.latents(h, layout)
        peaks = []
        for rows in torch.arange(len(x)).split(lengths):
            keys, _ = layer.self_attn._expand(known[rows][None])
            scores = torch.cat([nope, rope], -1)[rows].transpose(0, 1) @ keys[0].transpose(1, 2)
            visible = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
            peaks.append((scores * kimi.config.text.softmax_scale).masked_fill(~visible, -torch.inf).amax((1, 2)))
    close(taps.max_logits[0], torch.stack(peaks).amax(0))


def test_training_carries_gradient_to_every_parameter() -> None:
    kimi = Kimi(small())
    randomise(kimi, 3)
    for layer in kimi.language_model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()  # or some experts would never be chosen
    media = pack([item(1, 4, 4, 1), item(2, 4, 4, 2)])
    pad = kimi.config.media_placeholder_token_id
    ids = torch.cat([words(40, 1), torch.full((4,), pad), words(40, 2), torch.full((4,), pad), words(200, 3)])
    taps = Taps()
    hidden = kimi(ids, media, taps=taps)
    loss = kimi.language_model.logits(hidden).logsumexp(-1).mean()
    loss = loss + sum(sequence_balance_loss(routing, [100, len(ids) - 100], 0.001) for routing in taps.routing)
    loss.backward()
    without = [name for name, p in kimi.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(0, 99))
def test_experts_in_one_product_are_experts_one_by_one(kimi: Kimi, tokens: int, seed: int) -> None:
    block: Any = copy.deepcopy(kimi.language_model.model.layers[1].mlp)
    x = torch.randn(tokens, kimi.config.text.hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        apart = block(x)
        block.stack_experts()
        close(block(x), apart)
        assert block._stacked() is not None
        block.double()  # casting leaves the stacks behind
        assert block._stacked() is None
        close(block(x.double()).float(), apart)


def test_balance_loss_is_alpha_at_balance_and_larger_otherwise() -> None:
    from lm.taps import Routing

    experts, k, tokens = 8, 2, 16
    scores = torch.full((tokens, experts), 0.5, requires_grad=True)
    even = torch.stack([torch.arange(tokens) % experts, (torch.arange(tokens) + 4) % experts], dim=1)
    weights = torch.ones(tokens, k)
    assert sequence_balance_loss(Routing(scores, even, weights), [tokens], 0.1).item() == pytest.approx(0.1)
    skewed = scores.detach().clone()
    skewed[:, :2] = 0.9
    crowd = torch.tensor([[0, 1]]).expand(tokens, 2)
    assert sequence_balance_loss(Routing(skewed, crowd, weights), [tokens], 0.1).item() > 0.12


def test_groups_limit_the_router() -> None:
    config = replace(presets.tiny().text, n_group=4, topk_group=1, num_experts_per_tok=3)
    lm = LanguageModel(config)
    randomise(lm, 1)
    taps = Taps()
    lm(torch.randn(50, config.hidden_size), taps=taps)
    for routing in taps.routing:
        assert (routing.chosen // 4).eq(routing.chosen[:, :1] // 4).all(), "experts of a token come from two groups"


@pytest.mark.parametrize("move", ["bfloat16", "half", "to"])
def test_correction_bias_stays_float32(move: str) -> None:
    lm = LanguageModel(presets.tiny().text)
    gate = lm.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(torch.linspace(0, 1, 16) + 1e-4)
    before = gate.e_score_correction_bias.clone()
    lm.to(torch.bfloat16) if move == "to" else getattr(lm, move)()
    assert gate.weight.dtype != torch.float32
    assert torch.equal(lm.model.layers[1].mlp.gate.e_score_correction_bias, before)


def test_the_cache_says_what_it_costs() -> None:
    for preset in (presets.k2, presets.k2_7_code, presets.kimi_vl_a3b):
        config: TextConfig = preset().text
        assert config.cache_dim == 576
    config = replace(presets.k2_7_code().text, num_hidden_layers=2)
    cache = LatentCache(config, 1, 4, dtype=torch.bfloat16)
    assert cache.bytes_per_token == 2 * 576 * 2
    assert "576 elements per token and layer" in repr(cache)


@pytest.mark.parametrize(
    ("slots", "tokens", "message"),
    [
        ([0, 1, 1, 0], [3], "2 <|media_pad|> tokens but the vision tower made 3"),
        ([1, 1, 0, 1], [1, 2], "item 0"),
        ([0, 1, 1, 0], [1, 1], "1 runs of <|media_pad|> but 2 images"),
        ([0, 0, 0, 0], [4], "0 runs"),
    ],
)
def test_splice_checks_every_item(slots: list, tokens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        splice(torch.zeros(4, 2), torch.tensor(slots, dtype=torch.bool), torch.zeros(sum(tokens), 2), tokens)


def test_bfloat16_experts_are_summed_in_float32_as_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain form, bit for bit against transformers' grouped experts with the routing pinned."""
    monkeypatch.setattr("kernels.wide.fits", lambda *tensors: False)
    from tests.reference import reference_model, twin

    config = small({"n_routed_experts": 8, "num_experts_per_tok": 4}, with_vision=False)
    reference = reference_model(config, 2)
    kimi = twin(config, reference).bfloat16()
    reference = reference.bfloat16()
    block: Any = reference.model.layers[1].mlp
    ours = kimi.language_model.model.layers[1].mlp
    x = torch.randn(64, config.text.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        routing = ours.gate(x)
        theirs = block.experts(x, routing.chosen, routing.weights)
        mine = ours.routed(x, routing.chosen, routing.weights)
    assert torch.equal(mine, theirs)
