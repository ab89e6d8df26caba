"""Tokens back to thinking, text and calls: in any pieces, from anything that a model may write.

pytest tests/fusion/test_parse.py
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.checkpoint import bundled_tokenizer
from fusion.parse import Event, ReplyParser, ToolCall, read_call_id
from fusion.template import encode_pieces, render

TOKENIZER = bundled_tokenizer()
MARKERS = {
    "T": "<think>",
    "/T": "</think>",
    "S": "<|tool_calls_section_begin|>",
    "/S": "<|tool_calls_section_end|>",
    "C": "<|tool_call_begin|>",
    "A": "<|tool_call_argument_begin|>",
    "/C": "<|tool_call_end|>",
    "E": "<|im_end|>",
}


def tokens(*pieces: str) -> list[int]:
    """Pieces: names of MARKERS, else text."""
    ids: list[int] = []
    for piece in pieces:
        ids += [TOKENIZER.id(MARKERS[piece])] if piece in MARKERS else TOKENIZER.encode(piece)
    return ids


TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"properties": {key: {}}, "required": [key]}},
    }
    for name, key in (("get_weather", "city"), ("exec", "code"), ("search", "q"), ("a.b-c", "z"))
]


def parse(ids: list[int], thinking: bool = False, step: int = 0, **options: Any) -> tuple[str, str, list[ToolCall]]:
    parser = ReplyParser(TOKENIZER, thinking=thinking, **options)
    events: list[Event] = []
    for start in range(0, len(ids), step or max(len(ids), 1)):
        events += parser.feed(ids[start : start + (step or len(ids))])
    events += parser.finish()
    join = {kind: "".join(e.delta for e in events if e.kind == kind) for kind in ("thinking", "text")}
    return join["thinking"], join["text"], [e.tool_call for e in events if e.tool_call is not None]


def call(name: str, index: int, arguments: str) -> ToolCall:
    return ToolCall(f"functions.{name}:{index}", name, arguments, index)


def test_a_reply() -> None:
    ids = tokens("hm 世界", "/T", "It is 🙂.", "S", "C", "functions.exec:0", "A", '{"code": "1"}', "/C", "/S", "E")
    wanted = ("hm 世界", "It is 🙂.", [call("exec", 0, '{"code": "1"}')])
    for step in (0, 1, 2, 3):
        assert parse(ids, thinking=True, step=step) == wanted


def test_several_calls_and_the_index_of_the_conversation() -> None:
    ids = tokens("S", "C", "functions.exec:3", "A", '{"code":"1"}', "/C", "C", "search", "A", '{"q":"x"}', "/C", "/S")
    found = parse(ids, first_index=3, tools=TOOLS)[2]
    assert [c.id for c in found] == ["functions.exec:3", "functions.search:4"]
    assert found[0].parsed() == {"code": "1"}


@pytest.mark.parametrize(
    ("raw", "arguments", "name", "index"),
    [  # the forms seen in the wild
        ("functions.get_weather:0", "{}", "get_weather", 0),
        ("functions.get_weather:12", "{}", "get_weather", 12),
        ("get_weather:2", "{}", "get_weather", 2),
        ("functions.get_weather: 1", "{}", "get_weather", 1),
        ("functions.get_weather:1\n", "{}", "get_weather", 1),
        (" functions.get_weather:1 ", "{}", "get_weather", 1),
        ("functionsexec5", "{}", "exec", None),
        ("functions.exec5", "{}", "exec", None),
        ("functions.exec", "{}", "exec", None),
        ("exec", "{}", "exec", None),
        ("a.b-c:0", "{}", "a.b-c", 0),
        ("functions.a.b-c:7", "{}", "a.b-c", 7),
        ("call_00123", '{"code": "1"}', "exec", None),
        ("call12345", '{"q": "x"}', "search", None),
        ("6f1c0b9e-9d5f-4c8e-8a57-0f4a54f5c0de", '{"city": "x"}', "get_weather", None),
        ("search:0", '{"q": 1}', "search", 0),
    ],
)
def test_malformed_ids(raw: str, arguments: str, name: str, index: int | None) -> None:
    declared = {t["function"]["name"]: t["function"] for t in TOOLS}
    assert read_call_id(raw, arguments, declared) == (name, index)


def test_ids_without_declared_tools() -> None:
    assert read_call_id("functions.f:0", "", {}) == ("f", 0)
    assert read_call_id("functionsexec5", "", {}) == ("exec", None)
    assert read_call_id("", "", {}) == ("unknown", None)
    assert read_call_id("two words", "", {}) == ("two_words", None)


ARGUMENTS = '{"code": "1"}'


@pytest.mark.parametrize(
    ("pieces", "thinking", "expected"),
    [
        # a call inside a thought ends the thought
        (("hm", "S", "C", "functions.exec:0", "A", ARGUMENTS, "/C", "/S"), True, ("hm", "", 1)),
        (("hm", "C", "functions.exec:0", "A", ARGUMENTS, "/C"), True, ("hm", "", 1)),
        # no section around the call
        (("ok", "C", "functions.exec:0", "A", ARGUMENTS, "/C", "E"), False, ("", "ok", 1)),
        # end marks forgotten
        (("S", "C", "functions.exec:0", "A", ARGUMENTS), False, ("", "", 1)),
        (("S", "C", "functions.exec:0", "A", ARGUMENTS, "/S"), False, ("", "", 1)),
        (("S", "C", "functions.exec:0", "A", ARGUMENTS, "C", "functions.exec:1", "A", "{}", "/C"), False, ("", "", 2)),
        # the argument mark forgotten
        (("S", "C", "functions.exec:0" + ARGUMENTS, "/C", "/S"), False, ("", "", 1)),
        # cut off in the middle of the arguments: not a call
        (("S", "C", "functions.exec:0", "A", '{"code": "1'), False, ("", "", 0)),
        (("S", "C", "functions.ex"), False, ("", "", 0)),
        # text after the section, think opened by the model, end marks with nothing to end
        (("a", "S", "/S", "b"), False, ("", "ab", 0)),
        (("T", "hm", "/T", "yes"), False, ("hm", "yes", 0)),
        (("/C", "/S", "A", "x", "/T"), False, ("", "x", 0)),
        # the section mark spelled out, in the singular
        (
            (
                "ok<|tool_call_section_begin|>",
                "C",
                "functions.exec:0",
                "A",
                ARGUMENTS,
                "/C",
                "<|tool_call_section_end|>",
            ),
            False,
            ("", "ok", 1),
        ),
        # markers spelled out in text are text
        (("use <|tool_call_begin|> and </think>",), False, ("", "use <|tool_call_begin|> and </think>", 0)),
        ((), True, ("", "", 0)),
    ],
)
def test_malformed_replies(pieces: tuple[str, ...], thinking: bool, expected: tuple[str, str, int]) -> None:
    for step in (0, 1):
        thought, text, calls = parse(tokens(*pieces), thinking, step, tools=TOOLS)
        assert (thought, text, len(calls)) == expected
        assert all(c.name == "exec" for c in calls)


def test_a_truncated_call_is_kept_for_the_curious() -> None:
    parser = ReplyParser(TOKENIZER, thinking=False)
    parser.feed(tokens("S", "C", "functions.exec:0", "A", '{"code": "1'))
    assert parser.finish() == [] and parser.truncated == 'functions.exec:0{"code": "1'


@settings(max_examples=300)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60), st.booleans())
def test_garbage_never_raises_and_pieces_do_not_matter(ids: list[int], thinking: bool) -> None:
    assert parse(ids, thinking, 1, tools=TOOLS) == parse(ids, thinking, 0, tools=TOOLS)


MIXED = st.lists(
    st.one_of(
        st.sampled_from(list(MARKERS)),
        st.sampled_from(
            ["functions.exec:0", "call_1", ARGUMENTS, "世界", "🙂", "<|tool_call_section_begin|>", "{", "\n"]
        ),
    ),
    max_size=25,
)


@settings(max_examples=300)
@given(MIXED, st.booleans(), st.integers(1, 5))
def test_any_mixture_of_markers(pieces: list[str], thinking: bool, step: int) -> None:
    ids = tokens(*pieces)
    found = parse(ids, thinking, step, tools=TOOLS)
    assert found == parse(ids, thinking, 0, tools=TOOLS)
    indices = [c.index for c in found[2]]
    assert all(i >= 0 for i in indices)


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_\-]{0,10}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.lists(st.tuples(NAMES, st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), VALUES)), max_size=3),
)
def test_what_the_template_renders_comes_back(thought: str, text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    message: dict[str, Any] = {"role": "assistant", "reasoning": thought, "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": f"functions.{name}:{i}", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for i, (name, arguments) in enumerate(calls)
        ]
    pieces = render([message], profile="k2_7_code", add_generation_prompt=False)
    ids: Any = encode_pieces(pieces, TOKENIZER)
    start = ids.index(TOKENIZER.id("<|im_middle|>")) + 1
    found = parse(ids[start:], step=1)
    spelled = ("<|tool_call_section_begin|>", "<|tool_call_section_end|>")
    assert not any(mark in thought + text for mark in spelled)
    assert found[:2] == (thought, text)
    assert [(c.name, c.index, c.parsed()) for c in found[2]] == [(n, i, a) for i, (n, a) in enumerate(calls)]


@pytest.mark.parametrize("arguments", ["[1]", "5", "{", "nonsense"])
def test_arguments_that_are_no_object(arguments: str) -> None:
    with pytest.raises(ValueError, match=r"arguments of functions\.f:0"):
        call("f", 0, arguments).parsed()
