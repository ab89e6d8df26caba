"""Many requests at once: rows of the group batching.

    64 prompts of mixed lengths, some with a picture, 8 to 64 new tokens each, greedy
       one by one (fusion.generate.complete)      against      fusion.batching.Batcher: they join and leave a batch

Both must write the same tokens, or the row is an error.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bench.rows import Goal, Row
from bench.settings import Settings
from bench.timing import take_turns
from fusion.batching import Batcher
from fusion.generate import Reply, Sampling, complete
from fusion.model import Kimi
from fusion.prompt import Prompt
from train.memory import keep_memory

_WORDS = "how many red circles are there in this picture and what is left of the large blue square".split()


def batching_rows(settings: Settings) -> Iterator[Row]:
    """Mixed requests, in turn and together."""
    torch.set_num_threads(settings.threads)
    keep_memory()
    kimi = Kimi.untrained("tiny" if settings.tiny else "nano")
    count = 6 if settings.tiny else 64
    requests = mixture(kimi, count, 8 if settings.tiny else 64)
    alone = one_by_one(kimi, requests)
    # bfloat16 would round a row alone and a row in a larger product differently where no kernel runs
    assert kimi.dtype == torch.float32, f"the model that is compared token by token is {kimi.dtype}"
    together, steps = at_once(kimi, requests)
    for number, (a, b) in enumerate(zip(alone, together, strict=True)):
        if a.ids != b.ids:
            raise ValueError(f"request {number} wrote other tokens in a batch than alone: {b.ids} against {a.ids}")
    written = sum(len(reply.ids) for reply in alone)
    read = sum(len(prompt) for prompt, _ in requests)
    times = take_turns(
        {"ours": lambda: _drop(at_once(kimi, requests)), "one by one": lambda: _drop(one_by_one(kimi, requests))},
        settings.rounds,
        2 * settings.budget,
    )
    yield Row.of(
        f"{'tiny' if settings.tiny else 'nano'}, {count} mixed requests",
        "tokens written/s",
        times,
        written,
        peers=["one by one"],
        goals=[Goal("times", 5.0, "one by one")],
        note=f"{read:,} tokens read, {written:,} written in {steps} steps, token by token the same as one by one; "
        "random weights in float32, a fresh batcher each time, so no prefix is known before",
    )


def mixture(kimi: Kimi, count: int, most: int) -> list[tuple[Prompt, Sampling]]:
    """Requests of 8 or more words, every fourth with a small picture, that end after 1/8 of `most` tokens or later."""
    draw = random.Random(0)
    requests = []
    for number in range(count):
        text = " ".join(draw.choices(_WORDS, k=draw.randint(8, 60)))
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if number % 4 == 0:
            side = 28 * draw.randint(2, 6)
            pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
            parts.insert(0, {"type": "image_url", "image_url": {"url": pixels}})
        prompt = kimi.prepare([{"role": "user", "content": parts}])
        requests.append((prompt, Sampling(max_new_tokens=draw.randint(max(1, most // 8), most))))
    return requests


def one_by_one(kimi: Kimi, requests: Sequence[tuple[Prompt, Sampling]]) -> list[Reply]:
    return [complete(kimi, [prompt], sampling)[0] for prompt, sampling in requests]


def at_once(kimi: Kimi, requests: Sequence[tuple[Prompt, Sampling]]) -> tuple[list[Reply], int]:
    """Replies in the order of the requests, and the steps that it took."""
    batcher = Batcher(kimi)
    running = [batcher.submit(prompt, sampling) for prompt, sampling in requests]
    while batcher.step():
        pass
    replies = [request.reply for request in running]
    assert all(reply is not None for reply in replies), "a batcher that has nothing to do has answered everyone"
    return [reply for reply in replies if reply is not None], batcher.steps


def _drop(result: Any) -> None:
    """A side that returns nothing is timed from outside."""
