"""Balance without a loss: the rule, and that it balances.

pytest tests/train/test_router.py
"""

import pytest
import torch

from lm.config import tiny
from lm.model import LanguageModel
from lm.moe import MoE
from lm.taps import Routing, Taps
from train.router import RouterBalance


def routing(chosen: list[list[int]]) -> Routing:
    return Routing(torch.zeros(len(chosen), 16), torch.tensor(chosen), torch.ones(len(chosen), len(chosen[0])))


def test_the_rule() -> None:
    model = LanguageModel(tiny())
    balance = RouterBalance(model)
    even = [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(4)]
    for _ in range(2):  # two micro-batches
        balance.add([routing([[0, 1, 2, 3]] * 4), routing(even)])
    load = balance.step(0.01)
    first, second = (layer.gate.e_score_correction_bias for layer in balance.layers)
    # 4 experts over the mean, 12 below: signs have the mean 0.5
    torch.testing.assert_close(first, torch.tensor([-0.015] * 4 + [0.005] * 12))
    assert torch.equal(second, torch.zeros(16)), "even loads move nothing"
    assert first.sum().abs() < 1e-6 and first.dtype == torch.float32
    assert load.largest == 4.0 and load.idle == pytest.approx(12 / 32)


def test_a_lopsided_router_becomes_even() -> None:
    """Without any gradient: only the biases move, and the busiest expert comes down to near the mean."""
    torch.manual_seed(0)
    model = LanguageModel(tiny())
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            torch.nn.init.normal_(layer.mlp.gate.weight, std=0.2)
            layer.mlp.gate.e_score_correction_bias += torch.linspace(0, 0.5, 16)
    balance = RouterBalance(model)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    largest = []
    for _ in range(120):
        taps = Taps()
        with torch.no_grad():
            model(x, taps=taps)
        balance.add(taps.routing)
        largest.append(balance.step(0.01).largest)
    assert largest[0] > 2.0 > 1.4 > max(largest[-5:])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())


def test_what_makes_no_sense() -> None:
    balance = RouterBalance(LanguageModel(tiny()))
    with pytest.raises(ValueError, match="no forward pass"):
        balance.step(0.1)
    with pytest.raises(ValueError, match="routing of 1 MoE layers, but the model has 2"):
        balance.add([routing([[0]])])
    balance.add([routing([[0]]), routing([[0]])])
    with pytest.raises(ValueError, match="must not be negative"):
        balance.step(-1)
