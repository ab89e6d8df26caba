"""The Python API as people use it: chat, stream, prepare, logits; sampling; what they may get wrong.

pytest tests/fusion/test_api.py
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fusion import Kimi
from fusion.generate import ReplyReader, Sampling, complete, sample, stop_ids
from fusion.prompt import Prompt
from fusion.stages import bundled
from moonvit.packing import PackedPatches

PHOTO, CLIP = bundled("photo.jpg"), bundled("clip.mp4")


@pytest.fixture(scope="module")
def kimi() -> Kimi:
    return Kimi.untrained("tiny")


def ask(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_chat(kimi: Kimi) -> None:
    reply = kimi.chat(
        "How many?", images=[PHOTO], videos=[CLIP], thinking=True, max_new_tokens=5, temperature=0.0, seed=0
    )
    assert reply.usage.completion_tokens == 5 and reply.finish_reason == "length"
    assert reply.usage.media_tokens > 100 and reply.usage.total_tokens == reply.usage.prompt_tokens + 5
    assert isinstance(reply.text, str) and isinstance(reply.thinking, str) and reply.tool_calls == ()
    again = kimi.chat("How many?", images=[PHOTO], videos=[CLIP], max_new_tokens=5)
    assert again == reply


def test_stream_gives_the_reply_in_pieces(kimi: Kimi) -> None:
    events = list(kimi.stream(ask("hi"), max_new_tokens=12, temperature=1.0, seed=3))
    reply = events[-1].reply
    assert reply is not None and [e.kind for e in events].count("end") == 1
    assert "".join(e.delta for e in events if e.kind == "text") == reply.text
    assert "".join(e.delta for e in events if e.kind == "thinking") == reply.thinking
    assert len(reply.ids) == 12


def test_prepare_and_logits(kimi: Kimi) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": PHOTO}},
        {"type": "text", "text": "and"},
        {"type": "video_url", "video_url": {"url": str(CLIP)}},
        {"type": "image", "image": Image.new("RGB", (30, 30))},
    ]
    prompt = kimi.prepare(ask(parts))
    assert prompt.media is not None and prompt.thinking
    assert [i.kind for i in prompt.items] == ["image", *["video"] * (len(prompt.items) - 2), "image"]
    pads = int((prompt.ids == kimi.config.media_placeholder_token_id).sum())
    assert pads == sum(prompt.media.tokens) == sum(i.tokens for i in prompt.items)
    logits = kimi.logits(prompt)
    assert logits.shape == (len(prompt), 4096) and logits.dtype == torch.float32
    text = kimi.tokenizer.decode(prompt.ids.tolist())  # type: ignore[union-attr]
    assert "00:00:00.000<|media_begin|>video<|media_content|>" in text
    assert text.endswith("<|im_assistant|>assistant<|im_middle|><think>")
    assert kimi.prepare(ask("hi"), tools=None).media is None


def test_images_in_tool_results_count(kimi: Kimi) -> None:
    """The released processor forgets them, and then fails on the number of features."""
    messages = [
        *ask("look"),
        {"role": "assistant", "tool_calls": [{"id": "functions.shot:0", "function": {"name": "shot"}}]},
        {"role": "tool", "tool_call_id": "functions.shot:0", "content": [{"type": "image", "image": str(PHOTO)}]},
    ]
    prompt = kimi.prepare(messages)
    assert len(prompt.items) == 1 and kimi.logits(prompt).isfinite().all()


def test_a_pad_in_user_text_is_text(kimi: Kimi) -> None:
    prompt = kimi.prepare(ask("<|media_pad|><|im_end|><think>"))
    assert prompt.media is None
    assert kimi.config.media_placeholder_token_id not in prompt.ids.tolist()


@given(st.integers(1, 400), st.integers(1, 400))
def test_as_many_pads_as_features(width: int, height: int) -> None:
    model = Kimi.untrained("tiny") if not hasattr(test_as_many_pads_as_features, "kimi") else None
    if model is not None:
        test_as_many_pads_as_features.kimi = model  # type: ignore[attr-defined]
    kimi: Kimi = test_as_many_pads_as_features.kimi  # type: ignore[attr-defined]
    prompt = kimi.prepare(ask([{"type": "image", "image": np.zeros((height, width, 3), np.uint8)}]))
    assert prompt.media is not None
    with torch.inference_mode():
        features = kimi.see(prompt.media)
    assert len(features) == int((prompt.ids == kimi.config.media_placeholder_token_id).sum())


# ---- sampling and stopping -------------------------------------------------------------------------------------------


def test_greedy_top_k_top_p() -> None:
    logits = torch.tensor([0.1, 3.0, 2.0, 1.0, -5.0])
    draws = [torch.Generator().manual_seed(i) for i in range(400)]
    assert sample(logits, Sampling(), draws[0]) == 1

    def seen(**options: Any) -> set[int]:
        return {sample(logits, Sampling(**options), draw) for draw in draws}

    assert seen(temperature=1.0) >= {0, 1, 2, 3}
    assert seen(temperature=1.0, top_k=2) == {1, 2}
    assert seen(temperature=1.0, top_k=1) == {1}
    assert seen(temperature=1.0, top_p=0.6) == {1}  # the first holds 0.63
    assert seen(temperature=1.0, top_p=0.7) == {1, 2}
    assert seen(temperature=0.01) == {1}
    assert seen(temperature=1.0, top_p=1e-9) == {1}


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0])
    draw = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[sample(logits, Sampling(temperature=2.0), draw)] += 1
    torch.testing.assert_close(counts / 4000, (logits / 2).softmax(0), atol=0.03, rtol=0)


def forced(kimi: Kimi, pieces: list[Any], **options: Any) -> Any:
    """The events of a reply whose tokens are given: text, or the name of a special token in a tuple."""
    tokenizer = kimi.tokenizer
    assert tokenizer is not None
    ids = [i for p in pieces for i in ([tokenizer.id(p[0])] if isinstance(p, tuple) else tokenizer.encode(p))]
    prompt = Prompt(torch.tensor([1]), thinking=options.pop("thinking", False))
    reader = ReplyReader(tokenizer, prompt, Sampling(**options), stop_ids(kimi), 0, None)
    events = []
    for token in ids:
        events += list(reader.feed(token))
        if reader.ended or reader.stopped:
            break
    return [*events, *reader.finish()]


@pytest.mark.parametrize("end", ["<|im_end|>", "[EOS]"])
def test_both_end_tokens_stop(kimi: Kimi, end: str) -> None:
    reply = forced(kimi, ["yes", (end,), "no"])[-1].reply
    assert (reply.text, reply.finish_reason) == ("yes", "stop")


@pytest.mark.parametrize("stop", [("STOP",), ("OP!", "STOP"), ("zzz", "S")])
def test_stop_strings_end_the_visible_text(kimi: Kimi, stop: tuple[str, ...]) -> None:
    events = forced(kimi, ["think STOP", ("</think>",), "one STO two STOP! three"], thinking=True, stop=stop)
    reply = events[-1].reply
    assert reply.thinking == "think STOP", "thoughts are not searched"
    assert (
        reply.text == ("one " if "S" in stop else "one STO two " if "STOP" in stop else "")
        and reply.finish_reason == "stop"
    )
    assert "".join(e.delta for e in events if e.kind == "text") == reply.text, "nothing is shown that is taken back"


def test_a_stop_string_that_does_not_come_is_shown(kimi: Kimi) -> None:
    assert forced(kimi, ["almost STO"], stop=("STOP",))[-1].reply.text == "almost STO"


def test_tool_calls_end_the_turn(kimi: Kimi) -> None:
    pieces = ["ok", ("<|tool_calls_section_begin|>",), ("<|tool_call_begin|>",), "functions.add:0"]
    pieces += [("<|tool_call_argument_begin|>",), '{"a": 1}', ("<|tool_call_end|>",), ("<|tool_calls_section_end|>",)]
    reply = forced(kimi, [*pieces, ("<|im_end|>",)])[-1].reply
    assert reply.finish_reason == "tool_calls" and reply.tool_calls[0].parsed() == {"a": 1} and reply.text == "ok"


def test_thinking_budget_closes_the_thought(kimi: Kimi) -> None:
    close = kimi.tokenizer.id("</think>")  # type: ignore[union-attr]
    for budget in (0, 3):
        reply = kimi.chat("hi", max_new_tokens=8, thinking_budget=budget, temperature=1.0)
        assert reply.ids.index(close) == budget and reply.usage.thinking_tokens == budget
        assert reply.text
    assert kimi.chat("hi", max_new_tokens=8).ids.count(close) == 0


def test_the_context_ends_the_reply() -> None:
    kimi = Kimi.untrained("tiny")
    kimi.config = replace(kimi.config, text=replace(kimi.config.text, max_position_embeddings=40))
    prompt = Prompt(torch.tensor([5] * 37))
    reply = complete(kimi, [prompt], Sampling(max_new_tokens=50))[0]
    assert reply.finish_reason == "length" and len(prompt) + len(reply.ids) == 40
    with pytest.raises(ValueError, match="has 40 tokens and the context of this model is 40"):
        complete(kimi, [Prompt(torch.tensor([5] * 40))], Sampling())


def test_seeds(kimi: Kimi) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
    assert kimi.chat("hi", seed=1, **options).ids == kimi.chat("hi", seed=1, **options).ids
    assert kimi.chat("hi", seed=1, **options).ids != kimi.chat("hi", seed=2, **options).ids


def test_no_prompts_give_no_replies(kimi: Kimi) -> None:
    assert complete(kimi, [], Sampling()) == []


# ---- what people get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ({"max_new_tokens": "9"}, "max_new_tokens must be an integer"),
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 0}, "top_p must lie"),
        ({"top_p": 1.5}, "top_p must lie"),
        ({"top_k": -1}, "top_k must be"),
        ({"seed": 2**70}, "64 bits"),
        ({"seed": None}, "seed must be an integer"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"stop": [""]}, "non-empty strings"),
        ({"stop": [5]}, "non-empty strings"),
        ({"tools": [5]}, "tool 0 must look like"),
        ({"tools": [{"type": "function", "function": {}}]}, "tool 0 has no function name"),
        ({"images": "a.png"}, "images must be a list, also of one"),
        ({"images": np.zeros((30, 30, 3), np.uint8)}, "images must be a list"),
        ({"videos": b"x"}, "videos must be a list"),
        ({"videos": [CLIP], "max_frames": "2"}, "max_frames must be"),
        ({"thinking": False}, "always thinks"),
        ({"images": ["gone.png"]}, "no such image: gone.png"),
        ({"images": ["http://x/y.png"]}, "nothing is fetched"),
        ({"images": [b"junk"]}, "not an image"),
        ({"videos": ["gone.mp4"]}, "no such video: gone.mp4"),
        ({"videos": [b"junk"]}, "cannot be decoded"),
        ({"videos": [CLIP], "max_frames": 2}, "over max_frames=2"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_runs(kimi: Kimi, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        kimi.chat("hi", **options)
    assert "\n" not in str(caught.value)


def test_errors_come_at_the_call_not_at_the_first_event(kimi: Kimi) -> None:
    with pytest.raises(ValueError, match="message 0"):
        kimi.stream([{"content": "hi"}])


def test_a_text_model_takes_no_pictures(kimi: Kimi) -> None:
    blind = Kimi(replace(kimi.config, vision=None)).eval()
    blind.tokenizer = kimi.tokenizer
    assert blind.chat("hi", max_new_tokens=2).usage.completion_tokens == 2
    with pytest.raises(ValueError, match="text-only: it has no vision tower"):
        blind.chat("hi", images=[PHOTO])
    with pytest.raises(ValueError, match="text-only"):
        blind.see(PackedPatches(torch.zeros(4, 3, 14, 14), torch.tensor([[1, 2, 2]])))


def test_a_model_without_tokenizer_says_so(kimi: Kimi) -> None:
    mute = Kimi(kimi.config)
    with pytest.raises(ValueError, match="without a tokenizer"):
        mute.chat("hi")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "non-empty int64 vector"),
        (torch.zeros(2, 2, dtype=torch.int64), "non-empty int64 vector"),
        (torch.zeros(3), "non-empty int64 vector"),
    ],
)
def test_prompts_check_themselves(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(ids)


def test_token_ids_and_grids_that_do_not_fit_the_model(kimi: Kimi) -> None:
    with pytest.raises(ValueError, match="the vocabulary has 4096"):
        kimi(torch.tensor([4096]))
    with pytest.raises(ValueError, match="the vocabulary has 4096"):
        kimi(torch.tensor([-1]))
    with pytest.raises(ValueError, match="no pictures came with it"):
        kimi(torch.tensor([kimi.config.media_placeholder_token_id]))
    with pytest.raises(ValueError, match="largest side"):
        kimi.see(PackedPatches(torch.zeros(2 * 514, 3, 14, 14), torch.tensor([[1, 2, 514]])))
    with pytest.raises(ValueError, match="frames"):
        kimi.see(PackedPatches(torch.zeros(5 * 4, 3, 14, 14), torch.tensor([[5, 2, 2]])))
    with pytest.raises(ValueError, match="14"):
        kimi.see(PackedPatches(torch.zeros(4, 3, 16, 16), torch.tensor([[1, 2, 2]])))


@pytest.mark.parametrize("name", ["k2_7_code", "huge", ""])
def test_only_small_presets_can_be_made_untrained(name: str) -> None:
    with pytest.raises(ValueError, match="only the small presets"):
        Kimi.from_pretrained(f"untrained:{name}")


def test_first_token_comes_quickly() -> None:
    """From the import to the first token on the tiny preset: under 5 s on two cores."""
    code = (
        "import time; t = time.perf_counter()\n"
        "from fusion import Kimi\n"
        "events = Kimi.from_pretrained('untrained:tiny').stream([{'role': 'user', 'content': 'hi'}])\n"
        "next(events); print(time.perf_counter() - t)"
    )
    best = min(float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(2))
    print(f"\nfirst token after {best:.2f} s")
    assert best < 5


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, fusion; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_readme_snippet_names_exist() -> None:
    import fusion

    for name in fusion.__all__:
        assert getattr(fusion, name) is not None
    with pytest.raises(AttributeError):
        _ = fusion.nothing


def test_paths_may_be_path_objects(kimi: Kimi, tmp_path: Path) -> None:
    kimi.save_pretrained(tmp_path / "model")
    again = Kimi.from_pretrained(tmp_path / "model")
    assert again.chat("hi", images=[PHOTO], max_new_tokens=4) == kimi.chat("hi", images=[str(PHOTO)], max_new_tokens=4)


def test_another_format_of_the_family_can_be_asked_for(kimi: Kimi) -> None:
    own = kimi.prepare(ask("hi"))
    assert kimi.prepare(ask("hi"), profile=kimi.config.profile).ids.tolist() == own.ids.tolist()
    plain = kimi.prepare(ask("hi"), profile="k2")
    assert plain.ids.tolist() != own.ids.tolist() and not plain.thinking
    kimi.chat_template = "never {{ rendered"
    try:
        assert kimi.prepare(ask("hi"), profile="k2").ids.tolist() == plain.ids.tolist()
        with pytest.raises(ValueError, match="template failed"):
            kimi.prepare(ask("hi"))
    finally:
        kimi.chat_template = None
    with pytest.raises(ValueError, match="known: k2, "):
        kimi.prepare(ask("hi"), profile="k9")  # type: ignore[arg-type]


def test_replies_take_turns_and_can_be_halted(kimi: Kimi) -> None:
    whole = list(kimi.stream(ask("hi"), max_new_tokens=12))
    turns: list[str] = []

    class Turn:
        def __enter__(self) -> None:
            turns.append("in")

        def __exit__(self, *_: object) -> None:
            turns.append("out")

    same = list(kimi.stream(ask("hi"), max_new_tokens=12, turn=Turn()))
    assert same == whole and turns[:2] == ["in", "out"]
    assert len(turns) // 2 >= same[-1].reply.usage.completion_tokens  # type: ignore[union-attr]
    left = iter([False] * 4)
    cut = list(kimi.stream(ask("hi"), max_new_tokens=12, halt=lambda: next(left, True)))[-1].reply
    assert cut is not None and cut.finish_reason == "halted"
    assert cut.ids == whole[-1].reply.ids[:4]  # type: ignore[union-attr]
