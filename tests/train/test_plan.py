"""The plan's memory is what autograd really keeps.

pytest tests/train/test_plan.py -s
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lm.experts
from fusion.config import KimiConfig, kimi_vl_a3b, nano, tiny
from lm.model import LanguageModel
from lm.taps import Taps
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches
from recipes.nano import run as nano_run
from tests.train.tiny_run import tiny_run
from train.plan import activation_bytes, block_bytes, describe_run, layer_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def saved_bytes(model: nn.Module, half: bool, forward: Callable[[], Any]) -> int:
    """Bytes of all storages that the forward keeps, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []  # a storage that is freed could give its address to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    autocast: Any = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        out = forward()
    assert out is not None
    return sum(sizes.values())


def slope(measure: Callable[[int], int], few: int, many: int) -> float:
    """Bytes per token: what does not grow with tokens, such as weights cast to bfloat16, drops out."""
    return (measure(many) - measure(few)) / (many - few)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("config", [tiny(), nano()], ids=["tiny", "nano"])
def test_a_layer_keeps_so_much(config: KimiConfig, moe: bool, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.experts, "_WASTE", 0)  # no padded rooms: their number depends on the routing
    text, sequence = config.text, 64

    def measure(layers: int, tokens: int) -> int:
        torch.manual_seed(0)
        shape = replace(text, num_hidden_layers=layers, first_k_dense_replace=0 if moe else layers, vocab_size=512)
        model = LanguageModel(shape).train()
        model.stack_experts()
        x = model.embed(torch.randint(0, 512, (tokens,)))
        lengths = [sequence] * (tokens // sequence)
        return saved_bytes(model, half, lambda: model(x, lengths, taps=Taps(want_max_logits=True)))

    one, two = (slope(lambda tokens, n=layers: measure(n, tokens), 256, 512) for layers in (1, 2))  # type: ignore[misc]
    planned = layer_bytes(text, moe, sequence, half)
    print(f"\nbytes per token and layer: {two - one:,.1f}, planned {planned:,.1f}")
    assert two - one == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [tiny(), nano()], ids=["tiny", "nano"])
def test_a_block_of_the_tower_keeps_so_much(config: KimiConfig, half: bool) -> None:
    assert config.vision is not None
    vision = config.vision

    def measure(blocks: int, patches: int) -> int:
        torch.manual_seed(0)
        tower = MoonViT(replace(vision, num_layers=blocks)).train()
        side = vision.patch_size
        packed = PackedPatches(torch.randn(patches, 3, side, side), torch.tensor([[1, 4, 4]] * (patches // 16)))
        return saved_bytes(tower, half, lambda: tower(packed))

    one, two = (slope(lambda patches, n=blocks: measure(n, patches), 128, 256) for blocks in (1, 2))  # type: ignore[misc]
    assert two - one == pytest.approx(block_bytes(vision, half), rel=0.01)


def test_recomputation_and_fewer_sequences_take_less() -> None:
    run = nano_run()
    stage = run.schedule.stages[0]
    whole = activation_bytes(run, stage, half=False)
    assert activation_bytes(replace(run, recompute=True), stage, half=False) < 0.4 * whole
    half_batch = replace(run, batch=replace(run.batch, lanes_per_micro_batch=1))
    assert activation_bytes(half_batch, stage, half=False) == whole / 2
    text = replace(run, model=kimi_vl_a3b())
    assert activation_bytes(text, stage, half=True) > 10 * activation_bytes(run, stage, half=True)


def test_the_plan_says_both() -> None:
    text = describe_run(tiny_run(precision="bfloat16", recompute=True), ranks=1)
    assert "activations on top, layers are recomputed, bfloat16: 0.00 GiB for 2 sequences of 64" in text
