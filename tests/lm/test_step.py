"""One step in one call of C++ equals the plain form: pytest tests/lm/test_step.py

float32 and INT4 agree to float32's rounding. In bfloat16 the kernel rounds less than the plain form, so both are held
against the same weights in float32, with the routing's own choices: at least as near as the plain form is.
"""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernels.build import library, reason
from lm.cache import LatentCache
from lm.config import TextConfig, moonlight, nano, tiny
from lm.int4 import pack_experts
from lm.model import LanguageModel
from lm.step import MOST, Stepper, Unfit, kernel

pytestmark = pytest.mark.usefixtures("two_threads")
needs_kernel = pytest.mark.skipif(library("decode") is None, reason=f"no kernel here: {reason('decode')}")

CONFIGS = {
    "tiny": tiny(),
    "nano": nano(),
    # attention of the released widths, so that every path with whole tiles runs; heads of more than one tile
    "wide": replace(
        moonlight(),
        num_hidden_layers=2,
        vocab_size=1000,
        n_routed_experts=8,
        num_attention_heads=20,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=288,
    ),
    "odd": replace(tiny(), hidden_size=72, moe_intermediate_size=40, kv_lora_rank=24, vocab_size=101, v_head_dim=10),
    "plain router": replace(tiny(), norm_topk_prob=False, n_shared_experts=0, first_k_dense_replace=2),
}


def make(config: TextConfig, dtype: torch.dtype = torch.float32, int4: bool = False) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    if int4:
        pack_experts(model)
    return model.to(dtype).eval()


def filled(model: LanguageModel, lengths: list[int]) -> LatentCache:
    torch.manual_seed(1)
    cache = model.new_cache(len(lengths), max(lengths) + 1)
    for layer in cache.layers:
        layer.normal_()
    cache.lengths = list(lengths)
    return cache


def both(model: LanguageModel, lengths: list[int], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the kernel and of the plain form; also compares what they leave in the cache."""
    mine, plain = filled(model, lengths), filled(model, lengths)
    got = Stepper(model)(x, mine)
    want = model.logits(model(x, [1] * len(x), plain))
    assert mine.lengths == plain.lengths == [length + 1 for length in lengths]
    for a, b in zip(mine.layers, plain.layers, strict=True):
        if model.model.embed_tokens.weight.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        for sequence, length in enumerate(lengths):
            assert torch.equal(a[sequence, :length], b[sequence, :length])  # the past is not touched
    return got, want


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@needs_kernel
@pytest.mark.parametrize("lengths", [[1], [70], [3, 90, 31], list(range(40, 60)), [700, 20]])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_float32_equals_the_plain_form(name: str, lengths: list[int]) -> None:
    model = make(CONFIGS[name])
    got, want = both(model, lengths, torch.randn(len(lengths), model.config.hidden_size))
    assert far(got, want) < 5e-6


@needs_kernel
@pytest.mark.parametrize("name", ["tiny", "nano", "wide"])
@torch.inference_mode()
def test_int4_equals_the_plain_form(name: str) -> None:
    model = make(CONFIGS[name], int4=True)
    for lengths in ([70], [3, 90, 31, 8, 8, 8]):
        got, want = both(model, lengths, torch.randn(len(lengths), model.config.hidden_size))
        assert far(got, want) < 5e-6


@needs_kernel
@pytest.mark.parametrize("int4", [False, True])
@torch.inference_mode()
def test_bfloat16_is_nearer_to_the_truth_than_the_plain_form(int4: bool) -> None:
    # one layer of experts, where a choice that flips cannot spread
    model = make(replace(CONFIGS["wide"], first_k_dense_replace=1), torch.bfloat16, int4)
    truth = copy.deepcopy(model).float()
    for lengths in ([70], [3, 90, 31, 8], [1500, 30]):
        x = torch.randn(len(lengths), model.config.hidden_size).bfloat16()
        got, plain = both(model, lengths, x)
        cache = filled(model, lengths)
        cache.layers = [layer.float() for layer in cache.layers]
        want = truth.logits(truth(x.float(), [1] * len(x), cache))
        assert far(got, want) < 1e-2
        assert far(got, want) <= far(plain, want) * 1.05


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int4", [False, True])
@torch.inference_mode()
def test_a_sequence_gives_in_a_batch_what_it_gives_alone_to_the_last_bit(dtype: torch.dtype, int4: bool) -> None:
    model = make(CONFIGS["wide"], dtype, int4)
    step = Stepper(model)
    lengths = [5 + 67 * i for i in range(18)]
    x = torch.randn(len(lengths), model.config.hidden_size).to(dtype)
    cache = filled(model, lengths)
    alone = []
    for i, length in enumerate(lengths):
        own = model.new_cache(1, length + 1)
        for layer, rows in zip(own.layers, cache.layers, strict=True):
            layer[0, :length] = rows[i, :length]
        own.lengths = [length]
        alone.append(step(x[i : i + 1], own))
    assert torch.equal(step(x, cache), torch.cat(alone))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_several_tokens_of_one_sequence_in_a_call_give_what_one_after_the_other_gives(dtype: torch.dtype) -> None:
    model = make(CONFIGS["wide"], dtype)
    step = Stepper(model)
    x = torch.randn(90, model.config.hidden_size).to(dtype)
    one = model.new_cache(1, 100)
    single = torch.cat([step(row[None], one) for row in x])
    many = model.new_cache(3, 100)
    # two sequences in the same calls, one of them answered
    first = step.rows(torch.cat([x[:40], x[:20]]), many, [2] * 40 + [0] * 20, [*range(40), *range(20)], answered=40)
    second = step.rows(x[40:], many, [2] * 50, range(40, 90))
    assert torch.equal(torch.cat([first, second]), single)
    assert torch.equal(many.layers[1][2], one.layers[1][0]) and torch.equal(
        many.layers[1][0, :20], one.layers[1][0, :20]
    )
    if dtype == torch.float32:
        cache = model.new_cache(1, 100)
        assert far(single, model.logits(model(x, None, cache))) < 5e-6
    for wrong in ({"slots": [3]}, {"places": [100]}):
        with pytest.raises(ValueError, match="sequences of 100"):
            step.rows(x[:1], many, **{"slots": [0], "places": [0]} | wrong)


@needs_kernel
@torch.inference_mode()
def test_without_amx_the_same() -> None:
    model = make(CONFIGS["wide"], torch.bfloat16, int4=True)
    x = torch.randn(3, model.config.hidden_size).bfloat16()
    step = Stepper(model)
    with_it = step(x, filled(model, [30, 600, 8]))
    try:
        kernel(amx=False)
        without = step(x, filled(model, [30, 600, 8]))
    finally:
        kernel()
    assert far(without, with_it) < 1e-2


@needs_kernel
@torch.inference_mode()
def test_new_values_are_seen_and_moved_weights_too() -> None:
    model = make(CONFIGS["tiny"])
    x = torch.randn(2, model.config.hidden_size)
    before = model.step(x, filled(model, [9, 4]))
    assert isinstance(model._stepper, Stepper)
    model.model.layers[1].mlp.experts[3].down_proj.weight.mul_(3)
    model.model.layers[2].self_attn.kv_a_layernorm.weight.mul_(1.5)
    changed = model.step(x, filled(model, [9, 4]))
    assert far(changed, before) > 1e-2
    assert far(changed, both(model, [9, 4], x)[1]) < 5e-6
    model.stack_experts()  # lays the experts elsewhere
    assert far(model.step(x, filled(model, [9, 4])), changed) < 5e-6
    half = model.bfloat16()
    assert half.step(x.bfloat16(), filled(half, [9, 4])).dtype == torch.float32
    twin = copy.deepcopy(half)
    twin.lm_head.weight.zero_()
    assert not twin.step(x.bfloat16(), filled(twin, [9, 4])).any()
    assert half.step(x.bfloat16(), filled(half, [9, 4])).any()


@needs_kernel
@torch.inference_mode()
def test_what_it_does_not_know_is_named_and_runs_in_the_plain_form() -> None:
    grouped = make(replace(tiny(), n_group=4, topk_group=2))
    with pytest.raises(Unfit, match="groups"):
        Stepper(grouped)
    assert grouped.step(torch.randn(1, 64), filled(grouped, [5])).shape == (1, 4096)
    double = make(tiny()).double()
    with pytest.raises(Unfit, match="float64"):
        Stepper(double)
    many = make(tiny())
    x = torch.randn(MOST + 1, 64)
    assert many.step(x, filled(many, [5] * len(x))).shape == (MOST + 1, 4096)


@needs_kernel
@torch.inference_mode()
def test_numbers_that_are_none_stay_in_their_sequence() -> None:
    model = make(CONFIGS["wide"], torch.bfloat16)
    x = torch.randn(3, model.config.hidden_size).bfloat16()
    clean = Stepper(model)(x, filled(model, [9, 300, 4]))
    x[1] = float("nan")
    spoilt = Stepper(model)(x, filled(model, [9, 300, 4]))
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
    assert spoilt[1].isnan().all()


def test_without_kernels_everything_runs_in_the_plain_form() -> None:
    code = (
        "import torch; from kernels.build import reason\n"
        "from lm.config import tiny; from lm.model import LanguageModel\n"
        "torch.set_num_threads(1); m = LanguageModel(tiny()); torch.set_grad_enabled(False)\n"
        "print(m.step(torch.zeros(1, 64), m.new_cache(1)).shape, m._stepper, reason('decode'))"
    )
    for environment in ({"MOONKIT_KERNELS": "0"}, {"CXX": "/bin/false", "XDG_CACHE_HOME": "/dev/null/nothing"}):
        result = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        assert "torch.Size([1, 4096])" in result.stdout and "Stepper" not in result.stdout
