"""What training runs instead of loops gives what the loops give: experts in one product, attention in tiles and blocks.

pytest tests/lm/test_training.py
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lm.attention
import lm.moe
from lm.attention import Attention, make_layout
from lm.config import nano
from lm.experts import route
from lm.model import LanguageModel
from lm.moe import MoE
from lm.taps import Taps

CONFIG = replace(nano(), hidden_size=32, moe_intermediate_size=16, n_routed_experts=6, num_experts_per_tok=2)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit_gain(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed, dtype=dtype) / parameter.shape[-1] ** 0.5


def results(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output and all gradients."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(draw(*y.shape, seed=99, dtype=y.dtype))
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def same(ours: list[Tensor | None], theirs: list[Tensor | None], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None), "an expert without tokens has no gradient on either side"
        if a is not None and b is not None:
            assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max() + 1e-6


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # rows end to end; rows padded to the same room
@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_experts_together_are_experts_one_by_one(
    monkeypatch: pytest.MonkeyPatch, stacked: bool, dtype: torch.dtype, tokens: int
) -> None:
    moe = MoE(CONFIG)
    unit_gain(moe, dtype)
    x = draw(tokens, 32, dtype=dtype)
    monkeypatch.setattr(MoE, "_trains_together", lambda self: False)
    one_by_one = results(moe, moe, x)
    monkeypatch.undo()
    if stacked:
        moe.stack_experts()
        assert moe._stacked() is not None
    same(results(moe, moe, x), one_by_one, 1e-5)
    if tokens == 1:
        without = [name for name, parameter in moe.named_parameters() if parameter.grad is None]
        assert len(without) == 3 * 4, "an expert without tokens has no gradient"


def test_gradients_of_experts_share_memory_and_add_up() -> None:
    moe = MoE(CONFIG)
    unit_gain(moe)
    moe.stack_experts()
    x = draw(200, 32)
    weights: list[Any] = [parameter for name, parameter in moe.named_parameters() if ".gate_proj." in name][:6]
    once = [gradient.clone() for gradient in results(moe, moe, x) if gradient is not None]
    assert len({weight.grad.untyped_storage().data_ptr() for weight in weights}) == 1
    moe(x).backward(draw(200, 32, seed=99))
    for parameter, gradient in zip(moe.parameters(), once[2:], strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    with torch.no_grad():
        weights[3].add_(weights[3].grad, alpha=-0.1)
    stacks = moe._stacked()
    assert stacks is not None, "an update in place leaves the experts in their stack"
    assert torch.equal(stacks[0][3], weights[3])


@pytest.mark.parametrize("uneven", [False, True])
def test_every_slot_has_its_row(uneven: bool) -> None:
    """In half precision rows are padded, unless one expert has most of them."""
    chosen = torch.stack([torch.arange(400) % 6, (torch.arange(400) + 1) % 6], 1)
    if uneven:
        chosen[:, 0] = 5
    for dtype in (torch.float32, torch.bfloat16):
        way = route(chosen, 6, dtype)
        padded = dtype == torch.bfloat16 and not uneven
        assert (way.ends is None) == padded and (way.padded is not None) == padded
        assert torch.equal(way.slots[way.rows.flatten()], torch.arange(800))
        if way.padded is not None:
            assert int((~way.padded).sum()) == 800 and len(way.slots) % (6 * 64) == 0
            expert = torch.arange(6).repeat_interleave(len(way.slots) // 6)
            assert torch.equal(expert[way.rows], chosen)
        assert way.counts == chosen.flatten().bincount(minlength=6).tolist()


def test_experts_under_autocast_and_in_bfloat16() -> None:
    moe = MoE(CONFIG)
    unit_gain(moe)
    x = draw(300, 32)
    whole = results(moe, moe, x)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return moe(x)

    rounded = results(autocast, moe, x)
    assert all(gradient.dtype == torch.float32 for gradient in rounded if gradient is not None)
    # the router is float32 in both, so the same experts are chosen; the shared expert and all products are rounded
    same(rounded, whole, 0.04)


def test_sizes_that_grouped_products_do_not_take_go_one_by_one() -> None:
    moe = MoE(replace(CONFIG, moe_intermediate_size=10))
    unit_gain(moe)
    assert not moe._trains_together()
    assert all(gradient is not None for gradient in results(moe, moe, draw(100, 32)))


# ---- attention -------------------------------------------------------------------------------------------------------

LENGTHS = [[1], [300, 17, 64, 65, 1, 128, 40, 41, 15], [16, 16], [130]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_tiles_and_blocks_are_sequences_one_by_one(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    attention = Attention(CONFIG, 0)
    unit_gain(attention)
    attention.q_b_proj.weight.data *= 8  # so that attention is not flat
    x = draw(sum(lengths), 32)
    found: dict[str, list[Tensor]] = {"tiles": [], "kernel": [], "alone": []}

    def run(kind: str) -> Callable[[Tensor], Tensor]:
        def attend(x: Tensor) -> Tensor:
            if kind != "alone":
                return attention(
                    x, make_layout(CONFIG, lengths, [0] * len(lengths), x.device, x.dtype), None, found[kind]
                )
            parts = x.split(lengths)
            layouts = [make_layout(CONFIG, [len(part)], [0], x.device, x.dtype) for part in parts]
            return torch.cat([attention(p, own, None, found[kind]) for p, own in zip(parts, layouts, strict=True)])

        return attend

    tiles = results(run("tiles"), attention, x)
    monkeypatch.setattr(lm.attention, "fits", lambda q: False)
    kernel = results(run("kernel"), attention, x)
    alone = results(run("alone"), attention, x)
    same(tiles, alone, 1e-5)
    same(kernel, alone, 1e-5)
    for kind in ("tiles", "kernel"):
        torch.testing.assert_close(found[kind][0], torch.stack(found["alone"]).amax(0))


def test_a_repeated_last_token_never_has_the_largest_logit_or_a_gradient() -> None:
    """Sequences of 17 and 30 tokens share a block; the shorter one's repeats must not show anywhere."""
    layout = make_layout(CONFIG, [17, 30], [0, 0], torch.device("cpu"), torch.float32)
    assert layout.blocks.shapes == ((2, 30),) and layout.blocks.rows is not None and layout.blocks.places is not None
    assert layout.blocks.rows[:30].tolist() == [*range(17), *[16] * 13]
    assert layout.blocks.places.tolist() == [*range(17), *range(30, 60)]
    even = make_layout(CONFIG, [30, 30], [0, 0], torch.device("cpu"), torch.float32)
    assert even.blocks.rows is None, "sequences that lie as they attend are not copied"


def test_recomputing_a_layer_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    model = LanguageModel(replace(CONFIG, num_hidden_layers=2))
    unit_gain(model)
    x = draw(90, 32)
    kept = results(lambda x: model(x, [50, 40], taps=Taps(want_max_logits=True)), model.model, x)

    def recompute(x: Tensor) -> Tensor:
        return checkpoint(lambda x: model(x, [50, 40], taps=Taps(want_max_logits=True)), x, use_reentrant=False)

    same(results(recompute, model.model, x), kept, 0)


def test_long_sequences_stay_with_the_kernel() -> None:
    q = torch.empty(1, 4, 1024, 8)
    assert lm.attention.fits(q)
    assert not lm.attention.fits(torch.empty(1, 4, 5000, 8)) and not lm.attention.fits(q.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not lm.attention.fits(q)
