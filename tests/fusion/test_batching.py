"""Requests that join and leave a running batch give what they give alone: pytest tests/fusion/test_batching.py"""

import threading

import numpy as np
import pytest
import torch

from fusion import Kimi
from fusion.batching import BLOCK, Batcher, Request, embed_rest
from fusion.generate import Sampling, complete
from fusion.prompt import Prompt
from lm.model import LanguageModel


@pytest.fixture(scope="module")
def kimi() -> Kimi:
    torch.manual_seed(3)
    kimi = Kimi.untrained("tiny")
    with torch.no_grad():
        kimi.language_model.lm_head.weight.mul_(40)  # clear winners: no two logits nearly alike
    return kimi


@pytest.fixture(params=["kernel", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kimi: Kimi) -> str:
    if request.param == "plain":
        monkeypatch.setattr(LanguageModel, "stepper", lambda self: None)
    elif kimi.language_model.stepper() is None:
        pytest.skip("no kernel here")
    return request.param


def picture(seed: int, size: int = 84) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def ask(kimi: Kimi, text: str, *pictures: np.ndarray, **options: object) -> Prompt:
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": each}} for each in pictures]
    return kimi.prepare([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **options)


def mixture(kimi: Kimi) -> list[Prompt]:
    prompts = [ask(kimi, "word " * (7 * n % 90)) for n in range(9)]
    prompts += [ask(kimi, "what is this?", picture(n, 56 + 28 * n)) for n in range(4)]
    return [*prompts, ask(kimi, "both?", picture(1), picture(2))]


def test_a_mixture_gives_what_each_gives_alone(kimi: Kimi, path: str) -> None:
    prompts = mixture(kimi)
    samplings = [Sampling(max_new_tokens=5 + 3 * n, temperature=n % 2 * 0.7, seed=n) for n in range(len(prompts))]
    alone = [complete(kimi, [prompt], sampling)[0] for prompt, sampling in zip(prompts, samplings, strict=True)]
    batcher = Batcher(kimi, most=5)
    requests: list[Request] = []
    for prompt, sampling in zip(prompts, samplings, strict=True):  # they come while others run
        requests.append(batcher.submit(prompt, sampling))
        batcher.step()
    while batcher.step():
        pass
    for request, reply in zip(requests, alone, strict=True):
        assert request.reply == reply
    assert batcher.steps < sum(len(reply.ids) for reply in alone)


def test_what_came_before_is_not_read_again(kimi: Kimi, path: str) -> None:
    system = "You are told much. " * 30
    batcher = Batcher(kimi)
    first = ask(kimi, system + "first", picture(1))
    second = ask(kimi, system + "second", picture(1))
    replies = []
    for prompt in (first, second, first):
        request = batcher.submit(prompt, Sampling(max_new_tokens=12))
        while batcher.step():
            pass
        replies.append((request.cached_tokens, request.reply))
    assert replies[0][0] == 0
    assert replies[2][0] == (len(first) - 1) // BLOCK * BLOCK
    assert replies[2][1] == replies[0][1]
    assert replies[1][1] == complete(kimi, [second], Sampling(max_new_tokens=12))[0]


def test_another_picture_of_the_same_size_is_another_prefix(kimi: Kimi) -> None:
    batcher = Batcher(kimi)
    tail = "and then " * 40
    for number, expected in ((1, 0), (2, 0), (1, True)):
        prompt = ask(kimi, tail, picture(number, 280))
        request = batcher.submit(prompt, Sampling(max_new_tokens=3))
        while batcher.step():
            pass
        assert bool(request.cached_tokens) == bool(expected)
        assert request.reply == complete(kimi, [prompt], Sampling(max_new_tokens=3))[0]


def test_a_conversation_goes_on_from_its_last_turn(kimi: Kimi) -> None:
    batcher = Batcher(kimi)
    messages = [{"role": "user", "content": "say much " * 20}]
    sampling = Sampling(max_new_tokens=80)
    (reply,) = batcher.run([kimi.prepare(messages)], sampling)
    told = {"role": "assistant", "content": reply.text, "reasoning_content": reply.thinking}
    messages += [told, {"role": "user", "content": "more"}]
    request = batcher.submit(kimi.prepare(messages), sampling)
    while batcher.step():
        pass
    assert request.cached_tokens >= BLOCK
    assert request.reply == complete(kimi, [request.prompt], sampling)[0]


def test_the_store_keeps_to_its_limit(kimi: Kimi) -> None:
    batcher = Batcher(kimi, prefix_mb=1)
    batcher.prefixes.limit = 40_000
    batcher.run([ask(kimi, f"{n} " * 200) for n in range(6)], Sampling(max_new_tokens=2))
    assert 0 < batcher.prefixes.held <= 40_000
    assert batcher.prefixes.held == sum(entry.bytes for entry in batcher.prefixes._entries.values())
    nothing = Batcher(kimi, prefix_mb=0)
    nothing.run([ask(kimi, "word " * 200)] * 2, Sampling(max_new_tokens=2))
    assert len(nothing.prefixes) == 0


@pytest.mark.parametrize("start", [0, 3, 10, 40, 64])
def test_the_rest_of_a_prompt_has_the_embeddings_of_the_whole(kimi: Kimi, start: int) -> None:
    prompt = ask(kimi, "and now " * 20, picture(1), picture(2, 112))
    with torch.inference_mode():
        whole = kimi.embed(prompt.ids, prompt.media)
        torch.testing.assert_close(embed_rest(kimi, prompt, start), whole[start:], rtol=1e-4, atol=1e-5)


def test_threads_share_a_batcher_and_one_that_leaves_stops(kimi: Kimi) -> None:
    prompts = mixture(kimi)[:6]
    alone = [complete(kimi, [prompt], Sampling(max_new_tokens=15))[0] for prompt in prompts]
    got: dict[int, object] = {}
    with Batcher(kimi) as batcher:
        endless = batcher.submit(prompts[0], Sampling(max_new_tokens=20_000, temperature=1.0))

        def one(n: int) -> None:
            got[n] = batcher.submit(prompts[n], Sampling(max_new_tokens=15)).wait(timeout=60)

        threads = [threading.Thread(target=one, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [got[n] for n in range(6)] == alone
        endless.cancel()
        reply = endless.wait(timeout=60)
        assert reply.finish_reason == "halted" and reply.ids
        last = batcher.submit(prompts[1], Sampling(max_new_tokens=20_000, temperature=1.0))
    assert last.wait(timeout=60).finish_reason == "halted"
    with pytest.raises(ValueError, match="closed"):
        batcher.submit(prompts[0])


def test_one_that_fails_fails_alone(kimi: Kimi) -> None:
    batcher = Batcher(kimi)
    good = batcher.submit(ask(kimi, "fine"), Sampling(max_new_tokens=4))
    broken = Prompt(torch.tensor([kimi.config.media_placeholder_token_id] * 3))
    bad = batcher.submit(broken, Sampling(max_new_tokens=4))
    while batcher.step():
        pass
    assert good.reply is not None
    with pytest.raises(ValueError, match="no pictures came with it"):
        bad.wait(timeout=1)
    for wrong, message in ((0, "1 to 64"), (65, "1 to 64")):
        with pytest.raises(ValueError, match=message):
            Batcher(kimi, most=wrong)
    with pytest.raises(ValueError, match="context"):
        batcher.submit(Prompt(torch.zeros(40_000, dtype=torch.int64)))


def test_waiting_in_order_is_told(kimi: Kimi) -> None:
    batcher = Batcher(kimi, most=1)
    requests = [batcher.submit(ask(kimi, f"{n}"), Sampling(max_new_tokens=3)) for n in range(3)]
    batcher.step()
    assert [batcher.position(request) for request in requests] == [0, 0, 1]
    requests[1].cancel()
    while batcher.step():
        pass
    assert requests[1].reply is not None and requests[1].reply.finish_reason == "halted"
    assert requests[2].reply is not None and len(requests[2].reply.ids) <= 3
