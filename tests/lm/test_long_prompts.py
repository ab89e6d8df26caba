"""Prompts in bfloat16 by kernels/wide.cpp equal the plain form: pytest tests/lm/test_long_prompts.py

Both forms are held against the same weights in float32, with the routing's own choices pinned: the kernels round less
than the plain form, so they must be at least as near.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import wide
from lm.config import TextConfig, moonlight, tiny
from lm.model import LanguageModel
from lm.taps import Taps

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(wide._code() is None, reason="no AMX, or no compiler"),
]

CONFIGS = {
    "tiny": tiny(),
    "wide": replace(
        moonlight(),
        num_hidden_layers=3,
        vocab_size=1000,
        n_routed_experts=8,
        num_attention_heads=4,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=288,
    ),
    "no shared experts": replace(tiny(), n_shared_experts=0, first_k_dense_replace=0),
}


def make(config: TextConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).eval()
    model.stack_experts()
    return model


def hidden(model: LanguageModel, x: Tensor, sequences: list[int], parts: int, pinned: list[Tensor]) -> Tensor:
    """Final states; `parts` > 1 reads one sequence in pieces, into a cache. Choices are kept, or taken from there."""
    if parts == 1:
        taps = Taps(pinned=pinned or None)
        out = model(x, sequences, taps=taps)
        pinned.extend([] if pinned else [routing.chosen for routing in taps.routing])
        return out
    cache = model.new_cache(1, len(x))
    outs, chosen = [], []
    for n, piece in enumerate(x.chunk(parts)):
        at = slice(n * -(-len(x) // parts), None)
        taps = Taps(pinned=[layer[at][: len(piece)] for layer in pinned] or None)
        outs.append(model(piece, cache=cache, taps=taps))
        chosen.append([routing.chosen for routing in taps.routing])
    pinned.extend([] if pinned else [torch.cat(layer) for layer in zip(*chosen, strict=True)])
    return torch.cat(outs)


def far(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


@pytest.mark.parametrize("sequences, parts", [([300], 1), ([90, 90, 41, 7], 1), ([300], 3), ([5], 1)])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_prompts_are_nearer_to_the_truth_than_in_the_plain_form(
    name: str, sequences: list[int], parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(CONFIGS[name])
    truth = copy.deepcopy(model).float()
    x = torch.randn(sum(sequences), model.config.hidden_size).bfloat16()
    pinned: list[Tensor] = []
    want = hidden(truth, x.float(), sequences, parts, pinned)
    calls = []
    monkeypatch.setattr(wide, "_SMALL", 0)  # else one thread does all of it
    real = wide.attention
    monkeypatch.setattr(wide, "attention", lambda *args, **more: calls.append(args) or real(*args, **more))
    got = hidden(model, x, sequences, parts, pinned)
    assert calls, "the kernels were not used"
    monkeypatch.setattr(wide, "fits", lambda *tensors: False)
    calls.clear()
    plain = hidden(model, x, sequences, parts, pinned)
    assert not calls
    assert far(got, want) < 2e-2
    assert far(got, want) <= far(plain, want) * 1.1


@torch.inference_mode()
def test_an_expert_without_tokens_is_left_out() -> None:
    model = make(CONFIGS["wide"])
    layer = model.model.layers[-1].mlp
    x = torch.randn(9, 512).bfloat16()
    chosen, weights = torch.tensor([[1, 5, 6, 7, 0, 3]] * 9), torch.rand(9, 6)
    got = layer.routed(x, chosen, weights)
    want = sum(w[:, None] * layer.experts[int(e)](x).float() for e, w in zip(chosen[0], weights.T, strict=True))
    assert far(got, want) < 1e-2


def test_training_does_not_take_the_kernels() -> None:
    model = make(CONFIGS["tiny"])
    x = torch.randn(40, model.config.hidden_size).bfloat16().requires_grad_()
    model(x).float().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
