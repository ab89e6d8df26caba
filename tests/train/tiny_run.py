"""A run that takes milliseconds per step: a model of two layers, pictures of one colour, sums of digits."""

import multiprocessing
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fusion
from fusion.config import KimiConfig, _own_ids, tiny
from train.data import Mixture, Source
from train.loop import BatchSize, Optimization, Run, Saving, train
from train.schedule import wsd
from world.sample import Image, Sample, Split, Turn

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def make_colour(rng: random.Random, split: Split, level: int) -> Sample:
    name = rng.choice(list(COLOURS))
    pixels = np.full((28, 28 * rng.randint(1, 2), 3), COLOURS[name], np.uint8)
    return Sample("colour", (Turn("what colour?", name, "colour", name),), (Image(pixels),), split=split)


def make_sum(rng: random.Random, split: Split, level: int) -> Sample:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return Sample("sum", (Turn(f"{a} plus {b}?", str(a + b), "sum", f"{a}+{b}"),), split=split)


def tiny_config() -> KimiConfig:
    """Small even beside the preset "tiny": a dense layer and one of eight experts."""
    config = tiny()
    text = replace(
        config.text,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.05,
    )
    assert config.vision is not None
    vision = replace(config.vision, num_layers=1)
    return replace(config, text=text, vision=vision, **_own_ids(text))


def tiny_run(tokens: float = 2560, **changes: Any) -> Run:
    """About ten steps of four lanes."""
    makers = {"colour": make_colour, "sum": make_sum}
    sources = (
        Source("colours", "vision", 1.0, {"colour": 1.0}, makers=makers),
        Source("sums", "text", 1.0, {"sum": 1.0}, makers=makers),
    )
    run = Run(
        model=tiny_config(),
        mixture=Mixture(sources),
        schedule=wsd(1e-2, tokens, 0.1 * tokens, 0.3 * tokens, sequence=64),
        batch=BatchSize(lanes=4, lanes_per_micro_batch=2, patch_budget=64),
        optimization=Optimization(tau=0.5),  # low enough that heads are clipped
        saving=Saving(steps=3, log_seconds=1e9),
        tokenizer=str(Path(fusion.__file__).parent / "assets" / "tokenizer-4k"),
        workers=0,
    )
    return replace(run, **changes)


def train_in(folder: Path, environment: dict[str, str], changes: dict[str, Any], stop_at: int | None = None) -> None:
    """Body of a child process: the tiny run in `folder`, as a rank where `environment` says so."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    train(tiny_run(**changes), folder, stop_at=stop_at)


def children() -> Any:
    """Processes that start in milliseconds: forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.tiny_run"])
    return context
