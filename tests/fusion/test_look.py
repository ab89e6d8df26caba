"""What `look` shows is what the model did: attention against a softmax by hand, pixels, tokens, experts, drawings.

pytest tests/fusion/test_look.py
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusion.look
from fusion.checkpoint import bundled_tokenizer
from fusion.config import tiny as tiny_config
from fusion.drawing import describe, percent
from fusion.look import Look, SeenItem, draw_experts, draw_heat, draw_items, draw_patches, look, look_at, spell
from fusion.model import Kimi
from fusion.prompt import Prompt
from lm.attention import Attention, make_layout
from lm.model import LanguageModel
from lm.taps import Taps
from moonvit.image import pad_frame, plan_resize
from tests.reference import randomise, small

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def kimi() -> Kimi:
    """Weights of unit gain: with those of an untrained model all attention is flat and any answer is right."""
    model = Kimi.untrained("tiny")
    randomise(model, 3)
    return model


@pytest.fixture(scope="module")
def seen(kimi: Kimi) -> Look:
    reply = kimi.tokenizer.encode("a thought") if kimi.tokenizer else []
    return look(
        kimi, messages(), [*reply, special(kimi, "</think>"), *words(kimi, "Two ✓"), special(kimi, "<|im_end|>")]
    )


def special(kimi: Kimi, name: str) -> int:
    assert kimi.tokenizer is not None
    return kimi.tokenizer.id(name)


def words(kimi: Kimi, text: str) -> list[int]:
    assert kimi.tokenizer is not None
    return kimi.tokenizer.encode(text)


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Clip:
    frames = tuple(noise(70, 50, seed) for seed in range(12))
    fps = 4.0


def messages() -> Messages:
    parts = [
        {"type": "image", "image": noise(100, 60, 9)},
        {"type": "video", "video": Clip()},
        {"type": "text", "text": "How many?\nnaïve <|im_end|> 雪"},
    ]
    return [{"role": "user", "content": parts}]


# ---- taps ------------------------------------------------------------------------------------------------------------


def by_hand(attention: Attention, x: Tensor, past: int = 0) -> Tensor:
    """float64 (tokens, heads, tokens): a plain causal softmax from the block's own queries and keys."""
    config = attention.config
    layout = make_layout(config, [len(x)], [past], x.device, x.dtype)
    q = torch.cat(attention.queries(x, layout), -1).double()
    latent, rope = attention.latents(x, layout).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
    both = attention.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
    nope = both[..., : config.qk_nope_head_dim]
    k = torch.cat([nope, rope[:, None].expand(-1, config.num_attention_heads, -1)], -1).double()
    scores = torch.einsum("qhd,khd->qhk", q, k) * config.softmax_scale
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)


def watched(model: LanguageModel, run: Callable[[], Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What went into and came out of each layer's attention while `run` ran; several runs of a layer end to end."""
    layers = len(model.model.layers)
    ins: list[list[Tensor]] = [[] for _ in range(layers)]
    outs: list[list[Tensor]] = [[] for _ in range(layers)]

    def keep(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            ins[index].append(args[0])
            outs[index].append(out)

        return hook

    hooks = [layer.self_attn.register_forward_hook(keep(n)) for n, layer in enumerate(model.model.layers)]
    run()
    for hook in hooks:
        hook.remove()
    return [torch.cat(part) for part in ins], [torch.cat(part) for part in outs]


def unit_gain(dtype: torch.dtype, low_rank: int | None = 16) -> LanguageModel:
    model = LanguageModel(small({"q_lora_rank": low_rank}).text).eval()
    randomise(model, 3)
    return model.to(dtype)


def draw(model: LanguageModel, tokens: int, seed: int = 1) -> Tensor:
    x = torch.randn(tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x.to(model.model.embed_tokens.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_rank", [16, None])
@torch.inference_mode()
def test_shares_of_a_whole_pass_are_the_softmax_by_hand(dtype: torch.dtype, low_rank: int | None) -> None:
    """Lengths that share a block, one that stands alone and one of a single token."""
    model, lengths = unit_gain(dtype, low_rank), [9, 30, 26, 1, 30]
    taps, x = Taps(want_shares=True), draw(model, sum(lengths))
    ins, _ = watched(model, lambda: model(x, lengths, taps=taps))
    assert len(taps.shares) == model.config.num_hidden_layers
    for layer, found, entered in zip(model.model.layers, taps.shares, ins, strict=True):
        for share, own in zip(found, entered.split(lengths), strict=True):
            expected = by_hand(layer.self_attn, own)[-1]
            assert share.dtype == torch.float32 and share.shape == expected.shape
            torch.testing.assert_close(share.double(), expected, atol=2e-6, rtol=1e-4)
    assert max(float(share.max()) for share in taps.shares[1]) > 2 / 9, "the attention is flat: nothing was tested"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_shares_over_a_cache_are_the_softmax_by_hand(dtype: torch.dtype) -> None:
    """Pieces of several tokens run expanded over the cache, single ones absorbed."""
    model = unit_gain(dtype)
    x, cache, every = draw(model, 40), model.new_cache(1, 4), []

    def run() -> None:
        for part in x.split([17, 1, 20, 1, 1]):
            every.append(Taps(want_shares=True))
            model(part, cache=cache, taps=every[-1])

    ins, _ = watched(model, run)
    for n, layer in enumerate(model.model.layers):
        expected = by_hand(layer.self_attn, ins[n])
        for taps, last in zip(every, (16, 17, 37, 38, 39), strict=True):
            (share,) = taps.shares[n]
            # absorbed, scores are products of bfloat16 latents and are rounded before the softmax, not after
            loose = dtype == torch.bfloat16 and last in (17, 38, 39)
            exact = {"atol": 0.06, "rtol": 0.0} if loose else {"atol": 2e-6, "rtol": 1e-4}
            torch.testing.assert_close(share.double(), expected[last, :, : last + 1], **exact)
            assert abs(float(share.sum(-1).max()) - 1) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_absorbed_shares_are_the_ones_that_were_used(dtype: torch.dtype) -> None:
    """A ragged batch: mixing the cached latents by the shares gives the block's output, to the last bit."""
    model = unit_gain(dtype)
    cache, lengths = model.new_cache(3), [5, 19, 12]
    model(draw(model, sum(lengths)), lengths, cache)
    taps = Taps(want_shares=True)
    _, outs = watched(model, lambda: model(draw(model, 3, 2), [1, 1, 1], cache, taps))
    config = model.config
    for n, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        weight = attention.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        assert [share.shape[1] for share in taps.shares[n]] == [6, 20, 13]
        for s, share in enumerate(taps.shares[n]):
            known = cache.layers[n][s, : share.shape[1], : config.kv_lora_rank]
            mixed = share.to(dtype) @ known  # (heads, latent)
            out = torch.einsum("hl,hvl->hv", mixed, weight[:, config.qk_nope_head_dim :])
            again = attention.o_proj(out.flatten()[None])[0]
            gap = float((again - outs[n][s]).abs().max() / outs[n].abs().max())
            assert gap <= (1e-5 if dtype == torch.float32 else 1e-2)


@torch.inference_mode()
def test_asking_changes_nothing() -> None:
    model = unit_gain(torch.float32)
    x = draw(model, 40)
    results = []
    for taps in (None, Taps(want_shares=True)):
        cache = model.new_cache(1)
        results.append(torch.cat([model(part, cache=cache, taps=taps) for part in x.split([30, 1, 9])]))
    assert torch.equal(*results)
    plain = Taps()
    model(x, taps=plain)
    assert plain.shares == []


# ---- attention -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_attention_is_that_of_one_whole_pass(kimi: Kimi) -> None:
    prompt = kimi.prepare(messages())
    reply = words(kimi, "It shows two cats.")
    seen = look_at(kimi, prompt, reply)
    total = len(prompt) + len(reply)
    whole = torch.cat([kimi.embed(prompt.ids, prompt.media), kimi.language_model.embed(torch.tensor(reply))])
    ins, _ = watched(kimi.language_model, lambda: kimi.language_model(whole))
    layers = kimi.language_model.model.layers
    rows = torch.stack([by_hand(layer.self_attn, x) for layer, x in zip(layers, ins, strict=True)], 1).numpy()
    assert rows.shape == (total, seen.layers, seen.heads, total)  # every row; `seen` keeps none of them
    for position in (0, 1, seen.items[0].start + 3, len(prompt) - 1, len(prompt), total - 1):
        np.testing.assert_allclose(seen.shares(position), rows[position].mean((0, 1)), atol=2e-5)
        np.testing.assert_allclose(seen.shares(position, 1), rows[position, 1].mean(0), atol=2e-5)
        np.testing.assert_allclose(seen.shares(position, 2, 3), rows[position, 2, 3], atol=5e-5)
        np.testing.assert_allclose(seen.shares(position, head=1), rows[position, :, 1].mean(0), atol=5e-5)
        items, text = seen.attention(position), seen.attention_to_text(position)
        assert abs(sum(item.sum() for item in items) + text.sum() - 1) < 1e-6
        by_kind = seen.attention_by_kind(position)
        assert abs(sum(by_kind.values()) - 1) < 1e-6
        assert abs(by_kind["media"] - sum(item.sum() for item in items)) < 1e-9
        assert [item.shape for item in items] == [item.cells for item in seen.items]
    flat = rows[total - 1].mean((0, 1))
    first = seen.items[0]
    np.testing.assert_allclose(
        seen.attention(total - 1)[0][1], flat[first.start + first.cells[1] :][: first.cells[1]], atol=2e-5
    )


def test_a_token_cannot_see_a_picture_that_comes_later(seen: Look) -> None:
    early = seen.items[0].start - 1
    assert all((item == 0).all() for item in seen.attention(early))
    inside = seen.items[1].start  # the first square of the first chunk sees the image, itself, and no other chunk
    found = seen.attention(inside)
    assert found[0].min() > 0 and found[1][0, 0] > 0 and (found[1].ravel()[1:] == 0).all() and not found[2].any()


def test_asking_again_and_from_several_threads_gives_the_same(seen: Look) -> None:
    places = [5, len(seen.tokens) - 1, 40, 5, 0] * 4
    alone = {place: seen.shares(place) for place in set(places)}
    with ThreadPoolExecutor(4) as pool:
        for place, shares in zip(places, pool.map(seen.shares, places), strict=True):
            assert np.array_equal(shares, alone[place])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(kimi: Kimi, dtype: torch.dtype) -> None:
    seen = look(copy.deepcopy(kimi).to(dtype), messages(), words(kimi, "yes"))
    assert abs(seen.shares(len(seen.tokens) - 1).sum() - 1) < 1e-5


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_a_long_prompt_never_needs_tokens_times_tokens(kimi: Kimi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion.look, "_CHUNK", 128)
    ids = torch.randint(0, 3000, (1024,), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        seen = look_at(kimi, Prompt(ids), [5, 6])
        assert 1026 * 64 <= largest.elements <= 1026 * 128, (
            "reading: a chunk's causal mask over the cache is the largest"
        )
        largest.elements = 0
        assert abs(seen.shares(1025).sum() - 1) < 1e-5
    assert largest.elements <= 1026 * 64, "asking: a layer's cache is the largest"
    assert seen.items == () and seen.attention(1025) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1,), "position must lie in 0.."),
        ((10**6,), "position must lie in 0.."),
        ((3, 99), "layer must lie in 0..2, got 99"),
        ((3, -1), "layer must lie in 0..2"),
        ((3, 0, 4), "head must lie in 0..3, got 4"),
    ],
)
def test_questions_without_an_answer(seen: Look, arguments: tuple[int, ...], says: str) -> None:
    for ask in (seen.shares, seen.attention, seen.attention_to_text, seen.attention_by_kind):
        with pytest.raises(ValueError, match=says):
            ask(*arguments)


def test_conversations_that_cannot_be_looked_at(kimi: Kimi) -> None:
    with pytest.raises(ValueError, match="context of this model is 32,768"):
        look(kimi, messages(), [5] * 32_768)
    with pytest.raises(ValueError, match="token ids run from 5 to 999999"):
        look(kimi, messages(), [5, 999_999])
    with pytest.raises(ValueError, match="messages is empty"):
        look(kimi, [])
    prompt = kimi.prepare(messages())
    with pytest.raises(ValueError, match="holds 3 pictures but describes 0"):
        look_at(kimi, replace(prompt, items=()))
    blind = copy.copy(kimi)
    blind.tokenizer = None
    with pytest.raises(ValueError, match="without a tokenizer"):
        look_at(blind, prompt)


def test_a_text_only_checkpoint(kimi: Kimi) -> None:
    text = Kimi(replace(tiny_config(), vision=None)).eval()
    text.tokenizer = bundled_tokenizer("tiny")
    seen = look(text, [{"role": "user", "content": "hi"}], words(kimi, "hello"))
    assert seen.items == () and seen.attention(3) == [] and seen.experts
    assert abs(seen.attention_to_text(3).sum() - 1) < 1e-6
    with pytest.raises(ValueError, match="text only"):
        draw_items(seen.items)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_items_are_what_the_tower_gets(kimi: Kimi, seen: Look) -> None:
    image, *chunks = seen.items
    media = kimi.config.media
    assert (image.kind, image.size, image.resized, image.padding) == ("image", (100, 60), (100, 60), (12, 24))
    assert image.grid == (6, 8) and image.cells == (3, 4) and image.tokens == 12 and image.stamp is None
    (frame,) = image.frames
    plan = plan_resize(100, 60, media, media.in_patch_limit)
    assert np.array_equal(np.asarray(frame), pad_frame(noise(100, 60, 9), plan))
    assert [len(chunk.frames) for chunk in chunks] == [4, 2]  # 12 frames at 4/s, seen at 2/s
    assert [chunk.timestamp for chunk in chunks] == [0.0, pytest.approx(9 / 4)]
    assert chunks[0].stamp == "00:00:00.000" and chunks[1].kind == "video" and chunks[1].size == (70, 50)
    plan = plan_resize(70, 50, media, media.in_patch_limit)
    assert chunks[0].padding == (14, 6)
    assert np.array_equal(np.asarray(chunks[0].frames[1]), pad_frame(Clip.frames[2], plan))
    for item in seen.items:
        assert all(token.item is not None for token in seen.tokens[item.start : item.start + item.tokens])
        assert seen.tokens[item.start].cell == (0, 0)
        assert seen.tokens[item.start + item.tokens - 1].cell == (item.cells[0] - 1, item.cells[1] - 1)


def test_a_picture_too_large_is_shown_resized(kimi: Kimi) -> None:
    kimi = copy.copy(kimi)
    kimi.config = replace(kimi.config, media=replace(kimi.config.media, in_patch_limit=256))
    seen = look(kimi, [{"role": "user", "content": [{"type": "image", "image": noise(900, 300, 1)}]}])
    (item,) = seen.items
    assert (
        item.size == (900, 300)
        and item.resized[0] < 900
        and item.frames[0].size
        == (
            item.resized[0] + item.padding[0],
            item.resized[1] + item.padding[1],
        )
    )
    assert f"resized to {item.resized[0]}×{item.resized[1]}" in describe(item)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_every_token_has_its_kind(kimi: Kimi, seen: Look) -> None:
    tokens = seen.tokens
    assert tokens[0].text == "<|im_user|>" and tokens[0].kind == "control"
    assert sum(token.kind == "media" for token in tokens) == sum(item.tokens for item in seen.items)
    assert "".join(t.raw.decode() for t in tokens if t.kind == "thinking") == "a thought"
    assert b"".join(t.raw for t in tokens if t.kind == "answer").decode() == "Two ✓"
    assert tokens[-1].kind == "control" and tokens[-1].text == "<|im_end|>"
    text = b"".join(token.raw for token in tokens if token.kind == "text").decode()
    assert "naïve <|im_end|> 雪" in text, "what a user spells like a control token stays text"
    fragments = [token for token in tokens if token.whole == "雪"]
    assert len(fragments) > 1 and all(token.text.startswith("‹") for token in fragments)
    assert "".join(token.text for token in fragments) == "‹E9›‹9B›‹AA›"
    assert any(token.text == "↵" for token in tokens)
    assert len(tokens) == seen.prompt_tokens + len(words(kimi, "a thought")) + len(words(kimi, "Two ✓")) + 2


def test_a_reply_of_odd_tokens(kimi: Kimi) -> None:
    """Placeholders, thoughts that no one closes and calls: whatever a model may write."""
    pad = kimi.config.media_placeholder_token_id
    call = [special(kimi, "<|tool_calls_section_begin|>"), *words(kimi, "{}"), special(kimi, "<|im_end|>")]
    reply = [pad, *words(kimi, "x"), special(kimi, "<think>"), *words(kimi, "y"), *call, *words(kimi, "雪")[:1], pad]
    seen = look(kimi, messages(), reply)
    kinds = [token.kind for token in seen.tokens[seen.prompt_tokens :]]
    assert kinds[0] == kinds[-1] == "control" and len(seen.items) == 3
    assert kinds[1] == "thinking" and kinds[3] == "thinking" and kinds[5] == "answer"
    assert seen.tokens[-2].text == "‹E9›" and seen.tokens[-2].whole is None  # cut off: no character to belong to
    assert abs(sum(seen.attention_by_kind(len(seen.tokens) - 1).values()) - 1) < 1e-6


def cuts(text: bytes, at: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(text), *(n % (len(text) + 1) for n in at)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(st.one_of(st.text(max_size=20).map(str.encode), st.binary(max_size=20)), st.lists(st.integers(0, 60)))
def test_any_bytes_can_be_printed(text: bytes, at: list[int]) -> None:
    raws = cuts(text, at)
    shown = spell(raws)
    assert len(shown) == len(raws)
    for raw, (words, whole) in zip(raws, shown, strict=True):
        assert words and words.isprintable()
        assert whole is None or set(raw) & set(whole.encode())
        if whole is None and raw.decode("utf-8", "ignore").encode() == raw and raw.decode().isalnum():
            assert words.replace("\N{DOTTED CIRCLE}", "") == raw.decode()


@pytest.mark.parametrize(
    ("raws", "shown"),
    [
        ([b"\n"], [("↵", None)]),
        ([b"a\r\n\t"], [("a‹U+000D›↵⇥", None)]),
        ([b"  "], [("␣␣", None)]),
        ([b" the"], [(" the", None)]),
        ([b"x\xe2\x9c", b"\x93y"], [("x‹E2 9C›", "✓"), ("‹93›y", "✓")]),
        ([b"\xf0\x9f", b"\x90", b"\x88\xf0"], [("‹F0 9F›", "🐈"), ("‹90›", "🐈"), ("‹88 F0›", "🐈")]),
        ([b"\xff\xe2\x9c\x93"], [("‹FF›✓", None)]),
        (["\u202eevil\u200b".encode()], [("‹U+202E›evil‹U+200B›", None)]),
        (["\u0301".encode()], [("\u25cc\u0301", None)]),
    ],
)
def test_how_bytes_are_spelled(raws: list[bytes], shown: list[tuple[str, str | None]]) -> None:
    assert spell(raws) == shown


# ---- experts ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_experts_are_those_of_a_whole_pass(kimi: Kimi) -> None:
    prompt = kimi.prepare(messages())
    seen, taps = look_at(kimi, prompt), Taps()
    kimi(prompt.ids, prompt.media, taps=taps)
    text = kimi.config.text
    assert seen.expert_layers == (1, 2) and len(seen.experts) == len(taps.routing)
    for load, routing in zip(seen.experts, taps.routing, strict=True):
        counts = routing.chosen.flatten().bincount(minlength=text.n_routed_experts)
        np.testing.assert_allclose(load, counts / counts.sum())
        assert load.sum() == pytest.approx(1)


def test_experts_of_prompt_and_reply_make_up_all(kimi: Kimi, seen: Look) -> None:
    n, total = seen.prompt_tokens, len(seen.tokens)
    for both, prompt, reply in zip(seen.experts, seen.load(0, n), seen.load(n), strict=True):
        np.testing.assert_allclose(both, (prompt * n + reply * (total - n)) / total)
        assert prompt.sum() == pytest.approx(1) and reply.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="no tokens from"):
        look(kimi, messages()).load(10_000)


def test_a_model_without_experts(kimi: Kimi) -> None:
    config = tiny_config()
    dense = Kimi(replace(config, text=replace(config.text, first_k_dense_replace=3))).eval()
    dense.tokenizer = bundled_tokenizer("tiny")
    seen = look(dense, messages(), words(kimi, "yes"))
    assert seen.experts == [] and seen.load(0, 3) == [] and abs(seen.shares(9).sum() - 1) < 1e-6
    with pytest.raises(ValueError, match="no expert layers"):
        draw_experts(seen)


# ---- drawings --------------------------------------------------------------------------------------------------------


def plain_item(width: int, height: int, shade: int, frames: int = 1, padding: tuple[int, int] = (0, 0)) -> SeenItem:
    picture = Image.new("RGB", (width, height), (shade,) * 3)
    grid = (height // 14, width // 14)
    small = (width - padding[0], height - padding[1])
    tokens = grid[0] * grid[1] // 4
    kind: Any = "image" if frames == 1 else "video"
    return SeenItem(kind, small, small, padding, grid, 2, tokens, 0, (picture,) * frames, 0.0, "00:00")


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=int)


@pytest.mark.parametrize("shade", [0, 128, 255])
@pytest.mark.parametrize(("width", "height"), [(28, 28), (280, 196), (1792, 1792), (7168, 28), (28, 7168)])
def test_lines_show_on_any_picture_and_nothing_is_too_wide(shade: int, width: int, height: int) -> None:
    drawn = draw_patches(plain_item(width, height, shade))
    assert drawn.width <= 1024 and drawn.height <= 1024 + 250
    picture = grey(drawn)[16:40, 16:42]  # the upper left corner, with the first strong lines
    assert abs(picture - shade).max() >= 90
    if min(width, height) > 28:
        assert (abs(picture - shade) < 3).mean() > 0.3, "lines must not cover the picture"


def test_padding_is_hatched_and_said() -> None:
    without, padded = plain_item(280, 196, 0), plain_item(280, 196, 0, padding=(20, 27))
    assert "padding" not in describe(without)
    assert "20 px of padding on the right and 27 px of padding below" in describe(padded)
    drawn = grey(draw_patches(padded))
    scale = 640 // 280
    inner = drawn[16 : 16 + 190 * scale, 16 + 262 * scale : 16 + 279 * scale]
    assert inner.std() > 50 and drawn.shape[0] > draw_patches(without).height


def test_a_chunk_shows_each_frame() -> None:
    item = plain_item(280, 196, 90, frames=4)
    assert draw_patches(item).width <= 1024
    assert "Each token sees its square in every frame" in describe(item)
    assert "4 frames" in describe(item) and "= 70 tokens" in describe(item)
    one = replace(item, frames=item.frames[:1])
    assert "1 frame of" in describe(one) and "every frame" not in describe(one)


def test_heat_is_darker_where_there_is_less() -> None:
    item = plain_item(28 * 9, 28, 128)
    weights = np.linspace(0, 0.1, 9)[None]
    drawn = np.asarray(draw_heat(item, weights).convert("L"), dtype=int)
    cell = 28 * (640 // (28 * 9))
    middles = [drawn[16 + cell // 2, 16 + round((n + 0.5) * cell)] for n in range(9)]
    assert all(b > a for a, b in pairwise(middles)), middles


def test_heat_of_nothing_says_so_and_a_scale_can_be_shared() -> None:
    item = plain_item(56, 56, 40)
    nothing = draw_heat(item, np.zeros((2, 2)))
    some = draw_heat(item, np.full((2, 2), 0.1), most=0.2)
    assert nothing.size != some.size
    assert grey(some)[60, 60] < grey(draw_heat(item, np.full((2, 2), 0.1)))[60, 60]


@pytest.mark.parametrize(
    ("weights", "most", "says"),
    [
        (np.ones((3, 2)) / 6, None, r"\(2, 2\) rows and columns of tokens but the weights are \(3, 2\)"),
        (np.full((2, 2), np.nan), None, "weights must be shares"),
        (np.full((2, 2), -0.1), None, "weights must be shares"),
        (np.full((2, 2), 0.5), None, "weights must be shares"),
        (np.full((2, 2), 0.2), 0.1, "below the largest weight"),
    ],
)
def test_heat_of_other_things_is_refused(weights: np.ndarray, most: float | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw_heat(plain_item(56, 56, 40), weights, most)


def test_drawings_of_a_whole_look(seen: Look) -> None:
    last = len(seen.tokens) - 2
    for item, weights in zip(seen.items, seen.attention(last), strict=True):
        assert draw_heat(item, weights).size[0] == draw_patches(item).size[0]
    drawn = draw_experts(seen)
    assert drawn.width <= 1024
    part = draw_experts(seen, seen.load(seen.prompt_tokens))
    assert part.size[0] == drawn.size[0] and np.asarray(part).tobytes() != np.asarray(drawn).tobytes()
    assert draw_items(seen.items).height > 300


def test_the_largest_models_experts_fit(seen: Look) -> None:
    many = replace(seen, expert_layers=tuple(range(1, 61)), num_experts=384)
    load = np.random.default_rng(0).dirichlet(np.full(384, 0.3), 60)
    drawn = draw_experts(many, list(load))
    assert drawn.width <= 1024 and drawn.height < 700
    with pytest.raises(ValueError, match="60 expert layers but the load has 2"):
        draw_experts(many, seen.load())


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, "0 %"), (1e-6, "under 0.001 %"), (0.0213, "2.1 %"), (0.0999, "10 %"), (0.413, "41 %"), (1.0, "100 %")],
)
def test_percent(share: float, said: str) -> None:
    assert percent(share) == said
