"""MuonClip: the update is torch.optim.Muon's, the clip is exact, and both survive what training does to them.

pytest tests/train/test_muon.py
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fusion.config import tiny
from fusion.model import Kimi
from lm.attention import Attention, make_layout
from lm.config import tiny as tiny_text
from lm.model import LanguageModel
from lm.taps import Taps
from train.loss import token_losses
from train.muon import Muon, orthogonalize, parameter_groups, takes_muon
from train.qk_clip import PeakLogits, clip_heads, clip_qk


def matrices(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)


SHAPES: list[tuple[int, ...]] = [(64, 32), (32, 64), (64, 32), (48, 48), (64, 32)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_update_is_torch_muons(nesterov: bool) -> None:
    """Five steps: equal to the rounding of bfloat16, though all matrices of a shape go in one product here."""
    ours, theirs = matrices(SHAPES), matrices(SHAPES)
    one = Muon([{"kind": "muon", "params": ours}], lr=1e-2, nesterov=nesterov)
    two = torch.optim.Muon(
        theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        for parameters, optimizer in ((ours, one), (theirs, two)):
            give_gradients(parameters, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 6e-4  # bfloat16's rounding over five updates of root mean square 2e-3
    assert one.newton_schulz_calls == 25


def test_the_rest_is_torch_adamw() -> None:
    ours, theirs = matrices([(7,), (3, 5)]), matrices([(7,), (3, 5)])
    one = Muon([{"kind": "adamw", "params": ours}], lr=1e-2)
    two = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(5):
        for parameters, optimizer in ((ours, one), (theirs, two)):
            give_gradients(parameters, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_together_is_one_by_one() -> None:
    stack = torch.randn(5, 24, 40)
    together = orthogonalize(stack)
    for matrix, update in zip(stack, together, strict=True):
        assert (orthogonalize(matrix[None])[0].float() - update.float()).abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_singular_values_land_near_one(shape: tuple[int, int]) -> None:
    update = orthogonalize(torch.randn(1, *shape)).float()[0]
    values = torch.linalg.svdvals(update)
    assert values.max() < 1.25 and values.median() > 0.6
    rms = update.square().mean().sqrt() * 0.2 * max(shape) ** 0.5
    assert 0.15 < rms < 0.21, "the update has the size of AdamW's"
    assert orthogonalize(torch.zeros(1, *shape)).abs().max() == 0


def test_which_parameter_goes_where() -> None:
    kimi = Kimi(tiny())
    chosen = {name for name, parameter in kimi.named_parameters() if takes_muon(name, parameter)}
    assert "language_model.model.layers.1.mlp.experts.3.up_proj.weight" in chosen
    assert "language_model.model.layers.1.mlp.gate.weight" in chosen
    assert "vision_tower.patch_embed.proj.weight" in chosen
    for name in ("embed_tokens.weight", "lm_head.weight", "norm.weight", "norm0.bias", "pos_emb.weight"):
        assert not any(each.endswith(name) for each in chosen)
    kimi.vision_tower.requires_grad_(False)
    groups = parameter_groups(kimi.named_parameters())
    names = {name for group in groups for name in group["names"]}
    assert not any(name.startswith("vision_tower") for name in names)
    assert "muon" in Muon(groups, lr=1e-3).table() and "adamw" in Muon(groups, lr=1e-3).table()


def test_an_expert_without_a_gradient_stays() -> None:
    parameters = matrices([(8, 8), (8, 8)])
    before = parameters[1].detach().clone()
    optimizer = Muon([{"kind": "muon", "params": parameters}], lr=0.1)
    parameters[0].grad = torch.randn(8, 8)
    optimizer.step()
    assert torch.equal(parameters[1], before) and parameters[1] not in optimizer.state


def test_saved_and_loaded_it_goes_on_bitwise() -> None:
    def run(parameters: list[nn.Parameter], optimizer: Muon, steps: range) -> None:
        for step in steps:
            give_gradients(parameters, step)
            optimizer.step()

    def make(parameters: list[nn.Parameter]) -> Muon:
        groups = [{"kind": "muon", "params": parameters[:2]}, {"kind": "adamw", "params": parameters[2:]}]
        return Muon(groups, lr=0.01)

    whole = matrices([(8, 4), (8, 4), (5,)])
    run(whole, make(whole), range(6))
    first = matrices([(8, 4), (8, 4), (5,)])
    optimizer = make(first)
    run(first, optimizer, range(3))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = make(second)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([{"kind": "sgd", "params": matrices([(2, 2)])}], {}, "kind 'muon' or 'adamw'"),
        ([{"kind": "muon", "params": matrices([(2,)])}], {}, "belongs to AdamW"),
        ([{"kind": "muon", "params": matrices([(2, 2)])}], {"lr": -1}, "out of range"),
        ([{"kind": "muon", "params": matrices([(2, 2)])}], {"momentum": 1.0}, "out of range"),
    ],
)
def test_wrong_settings(groups: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(groups, **{"lr": 0.1, **options})


# ---- QK-Clip ---------------------------------------------------------------------------------------------------------


def largest(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Largest scaled causal logit of each head, float64, from the definition."""
    config = attention.config
    layout = make_layout(config, [len(x)], [0], x.device, x.dtype)
    q_nope, q_rope = attention.queries(x, layout)
    keys, _ = attention._expand(attention.latents(x, layout)[None])
    q = torch.cat([q_nope, q_rope], -1).transpose(0, 1)  # (heads, tokens, nope + rope)
    scores = q @ keys[0].transpose(1, 2) * config.softmax_scale
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).amax((1, 2))


@pytest.mark.parametrize("rank", [None, 32])
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_the_clip_maps_the_largest_logit_to_the_smaller_of_it_and_tau(rank: int | None, alpha: float) -> None:
    from dataclasses import replace

    torch.manual_seed(0)
    attention = Attention(replace(tiny_text(), q_lora_rank=rank), 0).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(30, 64, dtype=torch.float64)
    before = largest(attention, x).detach()
    tau = float(before.sort().values[1]) + 1e-3  # two heads over, two below
    kv, shared = attention.kv_b_proj.weight.detach().clone(), attention.kv_a_proj_with_mqa.weight.detach().clone()
    assert clip_qk(attention, before, tau, alpha) == 2
    assert (largest(attention, x) - before.clamp(max=tau)).abs().max() < 1e-12
    values = slice(attention.config.qk_nope_head_dim, None)
    assert torch.equal(attention.kv_b_proj.weight.unflatten(0, (4, -1))[:, values], kv.unflatten(0, (4, -1))[:, values])
    assert torch.equal(attention.kv_a_proj_with_mqa.weight, shared), "the rotary key belongs to all heads"


def test_heads_below_tau_and_non_positive_maxima_stay_bitwise() -> None:
    attention = Attention(tiny_text(), 0)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    assert clip_qk(attention, torch.tensor([-3.0, 0.0, 99.9, float("-inf")]), 100.0) == 0
    assert clip_qk(attention, torch.tensor([-3.0, 0.0, 99.9, 200.0]), 100.0) == 1
    changed = attention.q_b_proj.weight.unflatten(0, (4, -1)) != before["q_b_proj.weight"].unflatten(0, (4, -1))
    assert changed.flatten(1).any(1).tolist() == [False, False, False, True]


def test_peaks_over_micro_batches_reach_the_right_layers() -> None:
    torch.manual_seed(1)
    model = LanguageModel(tiny_text())
    peaks, seen = PeakLogits(), []
    for seed in range(3):
        taps = Taps(want_max_logits=True)
        model(torch.randn(9, 64, generator=torch.Generator().manual_seed(seed)), taps=taps)
        peaks.add(taps.max_logits)
        seen.append(torch.stack(taps.max_logits))
    found = peaks.take()
    assert torch.equal(found, torch.stack(seen).amax(0)) and found.shape == (3, 4)
    before = [layer.self_attn.q_b_proj.weight.detach().clone() for layer in model.model.layers]
    only = torch.full((3, 4), -1.0)
    only[1, 2] = 50.0
    assert clip_heads(model, only, 10.0) == 1
    after = [layer.self_attn.q_b_proj.weight for layer in model.model.layers]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]
    with pytest.raises(ValueError, match="no forward pass"):
        peaks.take()


@pytest.mark.parametrize(
    ("peaks", "tau", "message"),
    [
        (torch.ones(4), 0.0, "tau must be positive"),
        (torch.ones(4), float("nan"), "tau must be positive"),
        (torch.ones(3), 1.0, "one per head"),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), 1.0, "diverged"),
    ],
)
def test_clips_that_make_no_sense(peaks: torch.Tensor, tau: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_qk(Attention(tiny_text(), 0), peaks, tau)
    with pytest.raises(ValueError, match="peaks of 1 layers"):
        clip_heads(LanguageModel(tiny_text()), torch.ones(1, 4), 1.0)


def copying(tau: float | None, steps: int = 300, rate: float = 0.03) -> tuple[list[float], float]:
    """Largest logit of every step and the mean loss of the last 20, of a small model that learns to copy 16 words.

    Muon at a raised rate, without weight decay, 3/5 of the steps constant and then a cosine to nothing.
    """
    words, length, batch = 64, 16, 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LanguageModel(replace(tiny_text(), vocab_size=128, num_hidden_layers=2, yarn=None))
    optimizer = Muon(parameter_groups(model.named_parameters()), lr=0.0, weight_decay=0.0)
    draw, peaks = torch.Generator().manual_seed(0), PeakLogits()
    logits, losses = [], []
    for step in range(steps):
        once = torch.randint(0, words, (batch, length), generator=draw)
        ids = torch.cat([once, once], 1)
        targets = torch.full_like(ids, -1)
        targets[:, length - 1 : -1] = once
        taps = Taps(want_max_logits=True)
        hidden = model(model.model.embed_tokens(ids.flatten()), lengths=[2 * length] * batch, taps=taps)
        loss = token_losses(hidden, model.lm_head.weight, targets.flatten()).sum() / (targets >= 0).sum()
        loss.backward()
        peaks.add(taps.max_logits)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = max(0.0, step / steps - 0.6) / 0.4
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad()
        peak = peaks.take()
        if tau is not None:
            clip_heads(model, peak, tau)
        logits.append(float(peak.max()))
        losses.append(loss.item())
    return logits, sum(losses[-20:]) / 20


def test_muon_alone_lets_logits_grow_and_the_clip_holds_them_at_the_same_loss() -> None:
    tau = 20.0
    free, loss = copying(None)
    held, held_loss = copying(tau)
    assert max(free) > 5 * tau and free[-1] > 5 * tau
    late = sorted(held[len(held) // 2 :])
    assert late[len(late) // 2] < 1.1 * tau, "each step starts from at most tau; what it adds is seen by the next"
    assert held[-1] < 1.1 * tau
    assert loss < 0.02 and held_loss < 0.02, "both have learned to copy; a guess is 4.16"
