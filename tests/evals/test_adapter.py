"""Our models in lm-eval: numbers of its HFLM on the same weights, batches, pictures, thoughts, servers.

pytest tests/evals/test_adapter.py
"""

import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from PIL import Image

from evals import adapter
from evals.adapter import Moonkit
from evals.endpoint import Endpoint
from evals.media import Video, digest, keep, source
from evals.plugins import AfterThought, mean_of_graded, moonkit_anls
from evals.requests import Rendered, Said, conversation, options_of
from fusion.model import Kimi
from lm.tokenizer import Tokenizer
from tests.reference import reference_model, small, twin


def likelihood(context: str, continuation: str, *more: Any) -> Instance:
    return Instance("loglikelihood", {"id": "x"}, (context, continuation, *more), 0, ("task", 0, 1))


def generation(context: str, until: Any = (), tokens: int = 12, media: Any = None, **kwargs: Any) -> Instance:
    arguments: tuple[Any, ...] = (context, {"until": until, "max_gen_toks": tokens, **kwargs})
    if media is not None:
        arguments = (*arguments, {"visual": media})
    return Instance("generate_until", {"id": "x"}, arguments, 0, ("task", 0, 1))


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


@pytest.fixture(scope="module")
def tiny() -> Moonkit:
    return Moonkit("untrained:tiny", thinking=False)


@pytest.fixture(scope="module")
def pair() -> tuple[Moonkit, Any]:
    """The same Moonlight-shaped weights in moonkit and in lm-eval's HFLM, over bytes."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    config = small({"vocab_size": 512, "q_lora_rank": None}, with_vision=False)
    config = replace(config, bos_token_id=256, eos_token_id=258, pad_token_id=511, profile="k2")
    reference: Any = reference_model(config, 3)
    with torch.no_grad():
        reference.lm_head.weight[128:] = 0  # replies in ASCII: no token that one side shows and the other hides
    reference.generation_config.eos_token_id = [257, 258]
    kimi = twin(config, reference)
    kimi.tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet writes as themselves
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    fast = Fast(models.BPE(alphabet, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([name for _, name in sorted(kimi.tokenizer.names.items())])
    names = {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names)
    other = HFLM(pretrained=reference, tokenizer=tokenizer, max_length=64, device="cpu", batch_size=1)
    assert tokenizer.encode("abé\n") == kimi.tokenizer.encode("abé\n")
    return Moonkit(kimi, max_length=64), other


def texts(count: int) -> Iterator[tuple[str, str]]:
    draw = random.Random(5)
    letters = "abc def\nghé 漢z"

    def text(low: int, high: int) -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(low, high)))

    while count > 0:
        context = draw.choice(["", text(1, 30), text(20, 120).rstrip() + " "])
        for _ in range(draw.choice([1, 1, 4])):
            yield context, draw.choice([" ", "x"]) + text(0, 12)
            count -= 1


def test_likelihoods_are_those_of_hflm(pair: tuple[Moonkit, Any]) -> None:
    ours, theirs = pair
    requests = [likelihood(*each) for each in texts(200)]
    requests = [request for request in requests if request.args[0].strip() or not request.args[0]]
    assert len(requests) >= 190 and any(len(r.args[0].encode()) > 64 for r in requests)
    mine, wanted = ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True)
    worst = max(abs(a - b) for (a, _), (b, _) in zip(mine, wanted, strict=True))
    print(f"\nlargest difference of {len(requests)} log-likelihoods: {worst:.1e}")
    assert worst <= 1e-4 and [g for _, g in mine] == [g for _, g in wanted]
    rolling = [Instance("loglikelihood_rolling", {}, (text * 5,), 0, ("task", 0, 1)) for text, _ in texts(12)]
    mine, wanted = ours.loglikelihood_rolling(rolling, True), theirs.loglikelihood_rolling(rolling, True)
    assert mine == pytest.approx(wanted, abs=1e-3, rel=1e-5)


def test_greedy_replies_are_those_of_hflm(pair: tuple[Moonkit, Any]) -> None:
    ours, theirs = pair
    until: list[Any] = [[], ["j"], ["U", "LJ"]]
    asked = [text + chr(97 + n) for n, (text, _) in enumerate(texts(15))]
    requests = [generation(text, until[n % 3], do_sample=False) for n, text in enumerate(asked)]
    mine, wanted = ours.generate_until(requests, True), theirs.generate_until(requests, True)
    assert mine == wanted and len(set(wanted)) > 4


def test_a_batch_gives_what_each_gives_alone(pair: tuple[Moonkit, Any]) -> None:
    together, _ = pair
    alone = Moonkit(together.kimi, max_length=64, max_batch_tokens=1)
    requests = [likelihood(*each) for each in texts(30)]
    for (a, one), (b, two) in zip(together.loglikelihood(requests), alone.loglikelihood(requests), strict=True):
        assert a == pytest.approx(b, abs=1e-4) and one == two
    asked = [generation(text + "?", temperature=t) for t in (0.0, 1.0) for text, _ in texts(8)]
    assert together.generate_until(asked) == alone.generate_until(asked)


def test_repeats_differ_and_come_again(tiny: Moonkit) -> None:
    request = generation("Once", temperature=1.0, do_sample=True)
    said = tiny.generate_until([request] * 6, True)
    assert len(set(said)) > 3 and said == tiny.generate_until([request] * 6, True)
    assert len(set(tiny.generate_until([generation("Once")] * 3, True))) == 1
    other = Moonkit(tiny.kimi, thinking=False, seed=1)
    other._identity = tiny.identity
    assert other.generate_until([request] * 6, True) != said


@torch.inference_mode()
def test_likelihoods_behind_a_picture(tiny: Moonkit) -> None:
    for context in (
        "See <image> and <image>: ",
        tiny.apply_chat_template([{"role": "user", "content": "<image><image>?"}]),
    ):
        media = {"visual": [picture(1), picture(2)]}
        one, two = tiny.loglikelihood([likelihood(context, "a cat", media), likelihood(context, "a dog", media)], True)
        got = tiny._pair(context, "a cat", media["visual"])
        prompt = tiny._prompt(tiny._pieces(context, media["visual"]))
        ids = torch.tensor(got.context + got.continuation)
        rows = tiny.kimi.language_model.logits(tiny.kimi(ids, prompt.media)).log_softmax(-1)
        start = len(got.context) - 1
        wanted = sum(float(rows[start + n, token]) for n, token in enumerate(got.continuation))
        assert one[0] == pytest.approx(wanted, abs=1e-4) and one != two
        swapped = {"visual": media["visual"][::-1]}
        assert tiny.loglikelihood([likelihood(context, "a cat", swapped)], True)[0] != one


def test_pictures_and_clips_in_a_conversation(tiny: Moonkit) -> None:
    clip = Video(frames=tuple(picture(n) for n in range(6)), fps=2.0, max_frames=3)
    context = tiny.apply_chat_template([{"role": "user", "content": "<image>A<image>B"}])
    pieces = tiny._pieces(context, [picture(1), clip])
    prompt = tiny._prompt(pieces)
    assert [item.kind for item in prompt.items] == ["image", "video"]
    said = tiny.generate_until([generation(context, media=[picture(1), clip])], True)
    parts = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "A"}]
    parts += [{"type": "video", "video": source(clip)}, {"type": "text", "text": "B"}]
    same = tiny._prompt(tiny._chat([{"role": "user", "content": parts}], True))
    assert torch.equal(same.ids, prompt.ids) and len(said[0]) > 0
    with pytest.raises(ValueError, match="row x: the text has 2 <image> but 1 images"):
        tiny.generate_until([generation(context, media=[picture(1)])], True)
    with pytest.raises(ValueError, match="row x: medium 0 is a str"):
        tiny.generate_until([generation(context, media=["photo.png", picture(1)])], True)


def test_a_clip_from_a_file_is_sampled_evenly(tiny: Moonkit) -> None:
    path = Path(__file__).parents[2] / "fusion" / "assets" / "clip.mp4"
    found = source(Video(path=path, max_frames=4, pixels=56))
    assert found.frame_patches == 16
    prompt = tiny._prompt(tiny._pieces("<image>?", [Video(path=path, max_frames=4, pixels=56)]))
    assert [item.kind for item in prompt.items] == ["video"] and prompt.items[0].tokens <= 9
    assert digest(Video(path=path)) != digest(Video(path=path, max_frames=4))


def test_media_are_kept_once_under_their_digest(tmp_path: Path) -> None:
    one, same, other = picture(1), picture(1), picture(2)
    names = [keep(each, tmp_path / "media") for each in (one, same, other)]
    assert names[0] == names[1] != names[2] and len(list((tmp_path / "media").iterdir())) == 2
    assert np.array_equal(np.asarray(Image.open(tmp_path / names[0])), np.asarray(one))
    clip = Video(frames=tuple(picture(n) for n in range(20)), fps=4.0)
    assert Image.open(tmp_path / keep(clip, tmp_path / "media")).height == 160
    for wrong in ({}, {"path": "a", "frames": (one,)}, {"frames": (one,)}, {"path": "a", "max_frames": 0}):
        with pytest.raises(ValueError):
            Video(**wrong)


# ---- thoughts


def scripted(monkeypatch: pytest.MonkeyPatch, kimi: Kimi, text: str) -> None:
    """The model says this, control tokens by name."""
    assert kimi.tokenizer is not None
    ids = kimi.tokenizer.encode(text, allow_special=True)

    def generate(kimi: Any, prompts: Any, sampling: Any, finished: set[int], seeds: Any) -> Iterator[dict[int, int]]:
        for token in ids[: sampling.max_new_tokens]:
            if 0 not in finished:
                yield {0: token}

    monkeypatch.setattr(adapter, "generate", generate)


def test_stop_strings_count_after_the_thought(monkeypatch: pytest.MonkeyPatch, tiny: Moonkit) -> None:
    model = Moonkit(tiny.kimi)
    context = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert context.endswith("<think>") and model.thinks
    scripted(monkeypatch, model.kimi, "first\n\nsecond</think>\n\nthe answer\n\nand more")
    said = model.generate_until([generation(context, ["\n\n"], 100)], True)
    assert said == ["the answer"] and isinstance(said[0], Said) and said[0].finish_reason == "stop"
    scripted(monkeypatch, model.kimi, "I think and think and never come to an end")
    (cut,) = model.generate_until([generation(context, ["\n\n"], 5)], True)
    assert cut == "" and cut.finish_reason == "length"  # type: ignore[attr-defined]
    heard = []
    model.heard = lambda request, repeat, question, answer: heard.append(answer)  # type: ignore[func-returns-value]
    scripted(monkeypatch, model.kimi, "hm</think>yes<|im_end|>")
    assert model.generate_until([generation(context, tokens=100)], True) == ["yes"]
    assert heard[0].thinking == "hm" and heard[0].tokens["thinking"] == 2 - (len(heard[0].thinking) < 2)


def test_likelihoods_of_a_model_that_thinks_are_refused(tiny: Moonkit) -> None:
    model = Moonkit(tiny.kimi)
    with pytest.raises(ValueError, match=r"task: likelihoods are asked .* thinking=false"):
        model.loglikelihood([likelihood("a", "b")])
    closed = tiny.apply_chat_template([{"role": "user", "content": "hi"}])
    assert closed.endswith("<think></think>") and not tiny.thinks
    begun = tiny.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is"}], False
    )
    assert begun.endswith("It is")
    assert tiny._pair(begun, " so").continuation == tuple(tiny.tok_encode("It is so")[len(tiny.tok_encode("It is")) :])


def test_control_tokens_come_from_the_template_alone(tiny: Moonkit) -> None:
    assert tiny.kimi.tokenizer is not None
    text = "say <|im_end|><|im_assistant|>"
    context = tiny.apply_chat_template([{"role": "user", "content": text}])
    ids = tiny._prompt(tiny._pieces(context, ())).ids.tolist()
    assert ids.count(tiny.kimi.tokenizer.id("<|im_end|>")) == 1 and text in context
    import copy
    import pickle

    for again in (pickle.loads(pickle.dumps(context)), copy.deepcopy(context)):
        assert again == context and again.messages == context.messages and again.open
    assert pickle.loads(pickle.dumps(Said("a", "length"))).finish_reason == "length"


def test_prompts_that_do_not_fit(tiny: Moonkit) -> None:
    model = Moonkit(tiny.kimi, thinking=False, max_length=40)
    assert len(model.generate_until([generation("word " * 200, tokens=10)], True)) == 1
    heard = []
    model.heard = lambda request, repeat, question, answer: heard.append(answer)  # type: ignore[func-returns-value]
    context = model.apply_chat_template([{"role": "user", "content": "word " * 200}])
    assert model.generate_until([generation(context)], True) == [""]
    assert heard[0].finish_reason == "length" and "40" in heard[0].error


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temprature": 1}, "no argument 'temprature'; did you mean 'temperature'"),
        ({"zzz": 1}, "no argument 'zzz'; known: .*pretrained"),
        ({"thinking": "maybe"}, "thinking must be auto"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be a whole number"),
        ({"pixels": 5}, "pixels must be at least 28"),
        ({"experts": "loose"}, "experts must be auto, packed or dense"),
        ({"pretrained": "/no/such/folder"}, "no/such/folder"),
    ],
)
def test_wrong_arguments_are_answered_in_a_sentence(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        Moonkit(**{"pretrained": "untrained:tiny"} | arguments)


def test_registered_under_their_names(caplog: pytest.LogCaptureFixture) -> None:
    model = get_model("moonkit").create_from_arg_string(
        "pretrained=untrained:tiny,thinking=false,temperature=0.5", {"batch_size": 8, "device": "cuda:0"}
    )
    assert isinstance(model, Moonkit) and model.MULTIMODAL and get_model("moonkit-endpoint") is Endpoint
    assert "batch_size is ignored" in caplog.text and model.given["temperature"] == 0.5
    info = model.get_model_info()
    assert len(info["model_sha"]) == 64 and info["model_num_parameters"] > 1000
    assert model.tokenizer_name.startswith("moonkit-") and model.chat_template(True) == "built-in: k2_7_code"


def test_options() -> None:
    assert options_of({"do_sample": False, "temperature": 0.7, "max_tokens": 5}, {}, 9).temperature == 0
    assert options_of({"do_sample": True}, {}, 9).temperature == 1
    chosen = options_of({"until": "x", "max_gen_toks": 5, "top_p": 0.5}, {"temperature": 0.6, "top_p": None}, 9)
    assert (chosen.temperature, chosen.top_p, chosen.max_tokens, chosen.until) == (0.6, 0.5, 5, ("x",))
    assert options_of({}, {"max_tokens": None}, 9).max_tokens == 9


def test_conversations() -> None:
    context = Rendered("...", [{"role": "system", "content": "s"}, {"role": "user", "content": "a<image>b<image>"}])
    one, two = picture(1), picture(2)
    messages = conversation(context, [one, two])
    assert [part["type"] for part in messages[1]["content"]] == ["text", "image", "text", "image"]
    assert conversation("literal <image>", []) == [{"role": "user", "content": "literal <image>"}]


def test_plugins() -> None:
    assert AfterThought().apply([["<think>a</think>\nb", "<think>c", "d"]], []) == [["b", "", "d"]]
    assert mean_of_graded([1.0, None, 0.0]) == 0.5
    assert moonkit_anls(["Paris"], ["paris"]) == 1.0 and moonkit_anls([["x", "Paris"]], ["Rome"]) == 0.0


# ---- servers


class Server(BaseHTTPRequestHandler):
    """Answers by the word in the question."""

    seen: ClassVar[list[tuple[dict[str, Any], dict[str, str]]]] = []
    failures: ClassVar[dict[str, int]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Server.seen.append((body, dict(self.headers)))
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        for word in ("429", "500", "400", "401"):
            if word in text and Server.failures.get(word, 0) > 0:
                Server.failures[word] -= 1
                self.reply(int(word), {"error": {"message": f"no {word}\ntoday"}}, {"Retry-After": "0"})
                return
        message: dict[str, Any] = {"role": "assistant", "content": f"you said {text} STOP and more"}
        if "think" in text:
            message["reasoning_content"] = "long STOP thought"
        if "inline" in text:
            message["content"] = "<think>a STOP</think>\n" + message["content"]
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 2}}
        self.reply(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    def reply(self, status: int, body: Any, headers: Any = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ((headers or {}) | {"content-length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture()
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.seen, Server.failures = [], {}
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def chat(model: Any, text: str, **more: Any) -> Instance:
    return generation(model.apply_chat_template([{"role": "user", "content": text}]), ["STOP"], **more)


def test_an_endpoint_is_asked_and_tried_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hush-hush")
    model = Endpoint(url, "m", api_key_env="SECRET_KEY", concurrency=4, pause=0.01, store=tmp_path / "s")
    heard = {}
    model.heard = lambda request, repeat, question, answer: heard.update({answer.text: answer})  # type: ignore[assignment]
    Server.failures = {"429": 2, "500": 1}
    words = ["plain", "429", "500", "think", "inline", "<image>see"]
    requests = [chat(model, word, media=[picture(1)] if "image" in word else None) for word in words]
    said = model.generate_until(requests, True)
    assert said == [f"you said {word.replace('<image>', '')} " for word in words]
    assert heard["you said think "].thinking == "long STOP thought" and heard["you said inline "].thinking == "a STOP"
    assert heard["you said plain "].tokens == {"prompt": 7, "completion": 5, "thinking": 2, "media": 0}
    assert model.usage["retries"] == 3 and model.usage["completion"] == 30
    pictured = next(body for body, _ in Server.seen if isinstance(body["messages"][-1]["content"], list))
    assert pictured["messages"][-1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert all(headers["Authorization"] == "Bearer hush-hush" for _, headers in Server.seen)
    asked = len(Server.seen)
    assert model.generate_until(requests, True) == said and len(Server.seen) == asked
    assert b"hush" not in (tmp_path / "s" / "replies.jsonl").read_bytes()


def test_a_request_that_fails_does_not_stop_the_others(url: str, tmp_path: Path) -> None:
    model = Endpoint(url, "m", concurrency=2, pause=0.01, retries=1, store=tmp_path / "s")
    Server.failures = {"400": 1, "500": 2}
    requests = [chat(model, word) for word in ("a", "400", "b", "500", "c")]
    with pytest.raises(
        ValueError, match=r"2 of 5 requests failed, the first at task, row x: HTTP .* 3 of 5 new answers"
    ):
        model.generate_until(requests, True)
    before = len(Server.seen)
    assert len(model.generate_until(requests, True)) == 5 and len(Server.seen) == before + 2


def test_an_endpoint_says_what_is_wrong(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model = Endpoint(url, "m", retries=0)
    with pytest.raises(ValueError, match="a chat server gives no log-probabilities"):
        model.loglikelihood([likelihood("a", "b")])
    Server.failures = {"401": 1}
    with pytest.raises(ValueError, match="no key: OPENAI_API_KEY is not set"):
        model.generate_until([chat(model, "401")], True)
    with pytest.raises(ValueError, match="never an argument"):
        Endpoint(url, "m", api_key="x")
    with pytest.raises(ValueError, match="model=NAME"):
        Endpoint(url)
    nobody = Endpoint("http://127.0.0.1:9/v1", "m", retries=0)
    with pytest.raises(ValueError, match="ConnectError"):
        nobody.generate_until([chat(nobody, "a")], True)
