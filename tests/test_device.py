"""What the CPU computes, an accelerator computes too: pytest tests/test_device.py -s

Skipped where there is none. MOONKIT_TEST_DEVICE names one by hand ("cuda:1", "mps"; "cpu" tries the tests themselves).
With -s each test also says how fast the device was.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lm.config
from fusion import Kimi
from fusion.batching import Batcher
from fusion.generate import Sampling, complete, decode
from fusion.prompt import Prompt
from lm.config import TextConfig
from lm.int4 import dequantize_int4, pack_experts, quantize_int4
from lm.model import LanguageModel
from lm.taps import Taps
from moonvit import MoonViT, PackedPatches
from moonvit.config import VisionConfig
from tests.train.tiny_run import tiny_run
from train.loop import train
from train.muon import orthogonalize
from train.parallel import Ranks


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    named = os.environ.get("MOONKIT_TEST_DEVICE")
    if named is None and not torch.accelerator.is_available():
        pytest.skip("no accelerator here")
    place = torch.device(named) if named else torch.accelerator.current_accelerator()
    assert place is not None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield place
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def far(got: Tensor, want: Tensor) -> float:
    """Relative distance, ||got - want|| / ||want||."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    return float((got - want).norm() / want.norm())


def seconds(device: torch.device, call: Callable[[], object], rounds: int = 5) -> float:
    """Median time of a call, with the device's queue empty before and after."""
    wait: Callable[[], object] = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    times = []
    for _ in range(rounds + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def drawn(config: TextConfig) -> LanguageModel:
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]


# ---- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.inference_mode()
def test_the_tower_sees_the_same(device: torch.device, dtype: torch.dtype, most: float) -> None:
    tower = MoonViT(VisionConfig(num_layers=3)).eval()
    images = pictures((224, 224), (112, 196), (224, 224), (448, 336))
    want = torch.cat(tower.encode(images))
    tower.to(device=device, dtype=dtype)
    assert far(torch.cat(tower.encode(images)), want) < most


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.inference_mode()
def test_the_language_model_reads_and_writes_the_same(device: torch.device, dtype: torch.dtype, most: float) -> None:
    """Two sequences read in two parts, then a step of both: expanded and absorbed attention, experts each way."""
    # routing is not smooth: in bfloat16 every expert is used, so that no choice can differ
    experts = {} if dtype == torch.float32 else {"n_routed_experts": 4, "num_experts_per_tok": 4}
    config = replace(lm.config.nano(), num_hidden_layers=3, **experts)
    model = drawn(config)
    ids = torch.randint(0, config.vocab_size, (3, 70))

    def run() -> Tensor:
        place = model.model.embed_tokens.weight.device
        cache = model.new_cache(2, 100)
        out = []
        for row, length in enumerate((70, 41)):
            one = cache.row(row)
            for part in model.embed(ids[row, :length].to(place)).split(40):
                out.append(model.logits(model(part, cache=one)))
        cache.lengths = [70, 41]
        out.append(model.step(model.embed(ids[2, :2].to(place)), cache))
        return torch.cat(out)

    want = run()
    model.to(device=device, dtype=dtype)
    assert far(run(), want) < most


@torch.inference_mode()
def test_four_bits_are_the_same_bits(device: torch.device) -> None:
    weight = torch.randn(64, 96)
    packed, scale = quantize_int4(weight)
    again, its_scale = quantize_int4(weight.to(device))
    assert torch.equal(again.cpu(), packed) and torch.equal(its_scale.cpu(), scale)
    assert torch.equal(dequantize_int4(again, its_scale, 96).cpu(), dequantize_int4(packed, scale, 96))
    model = drawn(lm.config.tiny())
    pack_experts(model)
    ids = torch.randint(0, 200, (50,))
    want = model.logits(model(model.embed(ids)))
    model.to(device)
    assert far(model.logits(model(model.embed(ids.to(device)))), want) < 1e-5


def test_gradients_are_the_same(device: torch.device) -> None:
    """Of every parameter, through packed sequences, experts together and balance; largest attention logits too."""
    config = replace(lm.config.nano(), num_hidden_layers=2)
    model = drawn(config)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "stack_experts"):
            layer.mlp.stack_experts()
    ids = torch.randint(0, config.vocab_size, (96,))

    def run(place: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        model.zero_grad()
        taps = Taps(want_max_logits=True)
        hidden = model(model.embed(ids.to(place)), lengths=[40, 56], taps=taps)
        model.logits(hidden).square().mean().backward()
        grads = {name: each.grad.cpu() for name, each in model.named_parameters() if each.grad is not None}
        return grads, torch.stack(taps.max_logits).cpu()

    want, peaks = run(torch.device("cpu"))
    model.to(device)
    got, its_peaks = run(device)
    assert got.keys() == want.keys()
    worst = max((far(got[name], want[name]), name) for name in want)
    assert worst[0] < 1e-4, worst
    torch.testing.assert_close(its_peaks, peaks, rtol=1e-4, atol=1e-4)


def test_newton_schulz_is_the_same(device: torch.device) -> None:
    matrices = torch.randn(3, 40, 72)
    want = orthogonalize(matrices, dtype=torch.float32)
    assert far(orthogonalize(matrices.to(device), dtype=torch.float32), want) < 1e-4


# ---- the whole -------------------------------------------------------------------------------------------------------


def questions(kimi: Kimi) -> list[Prompt]:
    small, clip = pictures((84, 112))[0], SimpleNamespace(frames=pictures(*[(56, 56)] * 6), fps=2.0)
    asked: Sequence[list[dict[str, Any]]] = [
        [{"type": "text", "text": "what is 12 plus 30?"}],
        [{"type": "image_url", "image_url": {"url": small}}, {"type": "text", "text": "what is this?"}],
        [{"type": "text", "text": "write a function that adds two numbers"}],
        [{"type": "video_url", "video_url": {"url": clip}}, {"type": "text", "text": "what moves?"}],
    ]
    return [kimi.prepare([{"role": "user", "content": parts}]) for parts in asked]


def test_the_model_in_the_box_answers_the_same(device: torch.device) -> None:
    kimi = Kimi.from_pretrained("nano", dtype=torch.float32, device="cpu")
    sampling = Sampling(max_new_tokens=24)
    want = [complete(kimi, [prompt], sampling)[0].ids for prompt in questions(kimi)]
    there = Kimi.from_pretrained("nano", dtype=torch.float32, device=str(device))
    assert [complete(there, [prompt], sampling)[0].ids for prompt in questions(there)] == want
    together = complete(there, questions(there), sampling)
    assert [reply.ids for reply in together] == want
    batcher = Batcher(there)
    requests = [batcher.submit(prompt, sampling) for prompt in questions(there)]
    while batcher.step():
        pass
    assert [request.reply.ids for request in requests if request.reply] == want


def test_a_training_run_goes_the_same_way(device: torch.device, tmp_path: Path) -> None:
    """Ten steps of MuonClip on pictures and text, clipped heads among them; stopped on the device and resumed there."""

    def losses(folder: Path, place: torch.device, *stops: int | None) -> list[float]:
        for stop in stops:
            train(run, folder, Ranks(device=place), stop_at=stop)
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    run = tiny_run(precision="float32")
    here = losses(tmp_path / "here", torch.device("cpu"), None)
    there = losses(tmp_path / "there", device, 4, None)
    assert len(here) == len(there) > 6
    np.testing.assert_allclose(there, here, rtol=2e-2)


# ---- how fast --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_speed_of_the_released_tower(device: torch.device) -> None:
    tower = MoonViT(VisionConfig(num_layers=27 if device.type != "cpu" else 1)).to(device, torch.bfloat16).eval()
    grids = torch.tensor([[1, 16, 16], [1, 32, 24], [1, 32, 32], [1, 46, 34], [1, 64, 48], [1, 100, 74]])
    packed = PackedPatches(torch.rand(14_084, 3, 14, 14), grids).to(device)
    took = seconds(device, lambda: tower(packed))
    depth = tower.config.num_layers
    print(f"\ntower, {depth} layers, 14,084 patches: {took * 1e3:.1f} ms, {14_084 / took:,.0f} patches/s")
    assert bool(tower(packed).isfinite().all())


@torch.inference_mode()
def test_speed_of_moonlights_layers(device: torch.device) -> None:
    from bench.shapes import filled_cache, random_model

    layers = 6 if device.type != "cpu" else 2
    config = replace(lm.config.moonlight(), num_hidden_layers=layers, max_position_embeddings=16_384)
    kimi = random_model(config).to(device)
    for module in kimi.modules():
        if hasattr(module, "stack_experts"):
            module.stack_experts()
    ids = torch.randint(0, config.vocab_size, (2048,), device=device)

    def reads() -> None:
        cache = kimi.language_model.new_cache(1, 2048)
        for part in kimi.embed(ids, None).split(1024):
            kimi.language_model(part, cache=cache)

    took = seconds(device, reads, 3)
    print(f"\nMoonlight's shape, {layers} layers, bfloat16")
    print(f"prompt of 2,048: {took * 1e3:.1f} ms, {2048 / took:,.0f} tokens/s")
    for sequences, context in ((1, 128), (1, 8192), (8, 2048), (64, 2048)):
        cache = filled_cache(kimi, sequences, context)
        took = seconds(device, lambda n=sequences, cache=cache: decode(kimi, [5] * n, cache), 10)
        print(f"decoding {sequences} after {context:,}: {took * 1e3:.2f} ms, {sequences / took:,.0f} tokens/s")
