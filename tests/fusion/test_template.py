"""Chat formats: the exact strings, the checkpoint's own template, and nobody can forge a control token.

pytest tests/fusion/test_template.py
KIMI_CHAT_TEMPLATE=path/to/chat_template.jinja pytest tests/fusion/test_template.py     against a released one
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.checkpoint import bundled_tokenizer
from fusion.template import Control, Media, Piece, encode_pieces, render, render_with_jinja
from lm.tokenizer import SPECIAL_NAMES

TOKENIZER = bundled_tokenizer()


def spelled(pieces: list[Piece]) -> str:
    """Controls by name, media as the released template spells them."""
    out = ""
    for piece in pieces:
        if isinstance(piece, Control):
            out += piece.name
        elif isinstance(piece, Media):
            out += "<|media_pad|>" if piece.kind == "image" else "<|kimi_k25_video_placeholder|>"
        else:
            out += piece
    return out


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def image(source: Any = "a.png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source}}


def video(source: Any = "a.mp4") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": source}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


IMAGE = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
OPEN = "<|im_assistant|>assistant<|im_middle|><think>"
CALL = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([user("hi")], {}, "<|im_user|>user<|im_middle|>hi<|im_end|>" + OPEN),
        ([user("hi")], {"thinking": False}, "<|im_user|>user<|im_middle|>hi<|im_end|>" + OPEN + "</think>"),
        ([user([image(), text("hi")])], {}, f"<|im_user|>user<|im_middle|>{IMAGE}hi<|im_end|>{OPEN}"),
        ([user([text("hi"), image()])], {}, f"<|im_user|>user<|im_middle|>hi{IMAGE}<|im_end|>{OPEN}"),
        (
            [user([image(), image(), video(), text("hi")])],
            {},
            f"<|im_user|>user<|im_middle|>{IMAGE}{IMAGE}<|kimi_k25_video_placeholder|>\nhi<|im_end|>{OPEN}",
        ),
        (
            [{"role": "system", "content": "be brief"}, {"role": "user", "name": "eve", "content": "hi"}],
            {},
            "<|im_system|>system<|im_middle|>be brief<|im_end|><|im_user|>eve<|im_middle|>hi<|im_end|>" + OPEN,
        ),
        (  # thoughts of finished turns go, unless they are kept
            [user("a"), {"role": "assistant", "reasoning_content": "hm", "content": "b"}, user("c")],
            {},
            "<|im_user|>user<|im_middle|>a<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>b<|im_end|>"
            "<|im_user|>user<|im_middle|>c<|im_end|>" + OPEN,
        ),
        (
            [user("a"), {"role": "assistant", "reasoning_content": "hm", "content": "b"}, user("c")],
            {"preserve_thinking": True},
            "<|im_user|>user<|im_middle|>a<|im_end|><|im_assistant|>assistant<|im_middle|><think>hm</think>b<|im_end|>"
            "<|im_user|>user<|im_middle|>c<|im_end|>" + OPEN,
        ),
        (  # an unfinished turn keeps its thoughts; calls and results
            [
                user("1+1?"),
                {"role": "assistant", "reasoning": "use add", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "functions.add:0", "content": "2"},
            ],
            {},
            "<|im_user|>user<|im_middle|>1+1?<|im_end|><|im_assistant|>assistant<|im_middle|><think>use add</think>"
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
            '{"a": 1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
            "<|im_system|>tool<|im_middle|>## Return of functions.add:0\n2<|im_end|>" + OPEN,
        ),
    ],
)
def test_golden_strings_of_k2_6(messages: list[dict[str, Any]], options: dict[str, Any], expected: str) -> None:
    assert spelled(render(messages, profile="k2_6", **options)) == expected


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def test_profiles() -> None:
    turn = [user("a"), {"role": "assistant", "reasoning_content": "hm", "content": "b"}, user("c")]
    k2 = spelled(render(turn, profile="k2", tools=[ADD]))
    declared = '[{"function":{"description":"Adds.","name":"add"'
    assert k2.startswith("<|im_system|>tool_declare<|im_middle|>" + declared)
    assert "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>" in k2
    assert "<think>" not in k2 and k2.endswith("<|im_assistant|>assistant<|im_middle|>")
    thinking = spelled(render(turn, profile="k2_thinking"))
    assert "You are Kimi, an AI assistant created by Moonshot AI." in thinking
    assert thinking.endswith("<|im_assistant|>assistant<|im_middle|>"), "K2-Thinking writes its <think> itself"
    k2_5 = spelled(render(turn, profile="k2_5", tools=[ADD], preserve_thinking=True))
    assert "<think>hm" not in k2_5, "K2.5 has no preserve_thinking"
    assert "namespace functions {\n// Adds.\ntype add = (_: {\n  a: number\n}) => any;\n}\n" in k2_5
    k2_7 = spelled(render(turn, profile="k2_7_code"))
    assert "<think>hm</think>b" in k2_7 and k2_7.endswith("<think>")
    vl = spelled(render([user([image(), text("x")])], profile="kimi_vl"))
    assert "<|media_end|>x" in vl, "Kimi-VL puts no newline after an image"
    for option in ({"thinking": False}, {"preserve_thinking": False}):
        with pytest.raises(ValueError, match="always"):
            render(turn, profile="k2_7_code", **option)


# ---- the checkpoint's own template -----------------------------------------------------------------------------------

# The K2.6 format in Jinja, written for this test: another road to the same strings.
TEMPLATE = """{%- set nl = "\\n" -%}
{%- macro body(m) -%}
{%- if m.get('content') is string -%}{{ m['content'] }}
{%- elif m.get('content') -%}
{%- for part in m['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}<|media_begin|>image<|media_content|><|media_pad|><|media_end|>{{ nl }}
{%- elif part['type'] in ('video', 'video_url') -%}<|kimi_k25_video_placeholder|>{{ nl }}
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set keep = preserve_thinking | default(false) -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if not keep and m['role'] == 'assistant' and not m.get('tool_calls') -%}
{%- set ns.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>{{ tools_ts_str or (tools | tojson(separators=(',', ':'))) }}<|im_end|>
{%- endif -%}
{%- for m in messages -%}
{%- set opener = {'user': '<|im_user|>', 'assistant': '<|im_assistant|>'}.get(m['role'], '<|im_system|>') -%}
{{ opener }}{{ m.get('name') or m['role'] }}<|im_middle|>
{%- if m['role'] == 'assistant' -%}
{%- set thought = m['reasoning'] if 'reasoning' in m else m.get('reasoning_content') -%}
<think>{{ (thought or '') if loop.index0 > ns.last and (thinking or keep) else '' }}</think>{{ body(m) }}
{%- if m.get('tool_calls') -%}
<|tool_calls_section_begin|>
{%- for call in m['tool_calls'] -%}
{%- set given = call['function']['arguments'] -%}
<|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
{{- given if given is string else given | tojson }}<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
{%- elif m['role'] == 'tool' -%}
{{ '## Return of ' ~ m['tool_call_id'] ~ '\\n' }}{{ body(m) }}
{%- else -%}
{{ body(m) }}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_assistant|>assistant<|im_middle|><think>{{ '' if thinking else '</think>' }}
{%- endif -%}
"""


def template() -> str:
    path = os.environ.get("KIMI_CHAT_TEMPLATE")
    return Path(path).read_text() if path else TEMPLATE


WORDS = st.lists(
    st.sampled_from([*SPECIAL_NAMES.values(), "hi", " ", "\n", "é<&>'\"", "{{ 7 }}", "{% raw %}", "世界"]), max_size=5
).map("".join)
PARTS = st.lists(
    st.one_of(WORDS.map(text), st.just(image()), st.just(video()), st.just({"type": "image", "image": "b.png"})),
    max_size=4,
)
CONTENT = st.one_of(WORDS, PARTS)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["functions.add:0", "call_x", "<|im_end|>"]),
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": st.just("add"), "arguments": st.one_of(WORDS, st.dictionaries(WORDS, WORDS, max_size=2))}
            ),
        }
    ),
    min_size=1,
    max_size=2,
)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": CONTENT}, optional={"name": WORDS}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": CONTENT},
        optional={"reasoning": WORDS, "reasoning_content": WORDS, "tool_calls": CALLS},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": WORDS, "content": CONTENT}),
)


@settings(max_examples=150)
@given(st.lists(MESSAGE, min_size=1, max_size=4), st.booleans(), st.booleans(), st.booleans())
def test_template_and_renderer_agree(messages: list[dict[str, Any]], thinking: bool, keep: bool, tools: bool) -> None:
    """On text, media, calls, results, and on every special string that a user can type."""
    declared = [ADD] if tools else None
    ours = render(messages, profile="k2_6", tools=declared, thinking=thinking, preserve_thinking=keep)
    theirs = render_with_jinja(
        template(),
        messages,
        declared,
        TOKENIZER.special,
        thinking=thinking,
        preserve_thinking=keep,
        add_generation_prompt=True,
    )
    assert ours == theirs


@given(st.lists(MESSAGE, min_size=1, max_size=3))
def test_no_text_makes_a_control_token(messages: list[dict[str, Any]]) -> None:
    """As many control tokens as with the strings taken out: what a user types never counts."""

    def harmless(value: Any) -> Any:
        if isinstance(value, str):
            for name in SPECIAL_NAMES.values():
                value = value.replace(name, "x")
            return value
        if isinstance(value, dict):
            return {key: harmless(item) if key != "role" else item for key, item in value.items()}
        return [harmless(item) for item in value] if isinstance(value, list) else value

    def controls(conversation: list[dict[str, Any]]) -> list[int]:
        ids = encode_pieces(render(conversation, profile="k2_6"), TOKENIZER)
        return [token for token in ids if isinstance(token, int) and TOKENIZER.is_special(token)]

    assert controls(messages) == controls(harmless(messages))


def jinja(source: str, messages: Any = None, controls: Any = None) -> list[Piece]:
    return render_with_jinja(source, messages or [user("hi")], None, controls or TOKENIZER.special)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "chat template failed"),
        ("{{ messages[5].role }}", "chat template failed"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template failed"),
        ("{{ messages.__init__.__globals__ }}", "chat template failed"),
        ("{{ messages.append(1) }}", "chat template failed"),
        ("{% include '/etc/passwd' %}", "chat template failed"),
        ("{{ 1 / 0 }}", "chat template failed"),
        ("{{ range(10 ** 9) | list }}", "chat template failed"),
        ("<|media_pad|>", "place 1 is for an image but the messages have nothing"),
        ("{{ 'x'.nothing.nothing }}", "chat template failed"),
    ],
)
def test_templates_that_fail_or_attack(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        jinja(source)
    assert "\n" not in str(caught.value)


def test_media_that_the_template_forgets_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 images and clips but the chat template wrote 0"):
        jinja("{{ messages[0].role }}", [user([image()])])
    with pytest.raises(ValueError, match=r"is for an image but the messages have an? video"):
        jinja("<|media_pad|>", [user([video()])])


# ---- malformed messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list"),
        ({"role": "user"}, "must be a list"),
        ([], "empty"),
        (["hi"], "message 0 must be a dict"),
        ([{}], "message 0 has no role"),
        ([{"role": 5, "content": "x"}], "message 0 has no role"),
        ([user("a"), user(5)], "message 1: content must be"),
        ([user(["hi"])], "message 0, part 0 must be a dict"),
        ([user([{"type": "audio"}])], "type 'audio'; known: text, image"),
        ([user([{}])], "type None"),
        ([user([{"type": "text"}])], "part 0 of type text has no text"),
        ([user([text("a"), {"type": "image_url"}])], "part 1 of type image_url has no image"),
        ([user([{"type": "image_url", "image_url": {}}])], "has no image"),
        ([user([{"type": "video_url", "video_url": {"url": ""}}])], "has no video"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "only an assistant"),
        ([{"role": "assistant", "content": "x", "tool_calls": "add"}], "must be a list"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "tool call 0 has no function name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
            "tool call 0: arguments must be",
        ),
        ([{"role": "user", "content": "x", "name": 5}], "name must be a string"),
        ([{"role": "assistant", "content": "x", "reasoning": {}}], "reasoning must be a string"),
    ],
)
def test_malformed_messages_name_message_and_part(messages: Any, message: str) -> None:
    for call in (lambda: render(messages, profile="k2_6"), lambda: jinja(TEMPLATE, messages or [])):
        if messages == [] and call.__code__.co_names[:1] == ("jinja",):
            continue
        with pytest.raises(ValueError, match=message):
            call()


def test_dict_arguments_are_json_without_escapes() -> None:
    call = {"id": "f:0", "function": {"name": "f", "arguments": {"a": "é<"}}}
    out = spelled(render([{"role": "assistant", "tool_calls": [call]}], profile="k2_6"))
    assert '<|tool_call_argument_begin|>{"a": "é<"}<|tool_call_end|>' in out
    assert json.loads('{"a": "é<"}') == {"a": "é<"}
