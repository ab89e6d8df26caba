"""Chat formats: OpenAI-style messages to the exact string that each model was trained on, in pieces.

    [{"role": "user", "content": "hi"}]  ->  <|im_user|> user <|im_middle|> hi <|im_end|> <|im_assistant|> ...

A rendered prompt is a list of text, Control (a token that only the template can make) and Media (an image or clip still
to be cut into patches). Adjacent texts are merged, so that the tokenizer sees what it would see in the released string.
Source: released chat templates (K2, K2-Thinking, K2.5, K2.6; K2.7-Code and Kimi-VL as described by their users).
"""

import json
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusion.config import Profile
from fusion.tool_schema import check_tools, declare_tools, tools_json
from lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Control:
    """A control token, by name."""

    name: str


@dataclass(frozen=True)
class Media:
    """An image or a clip, at the place where its tokens will stand."""

    kind: Literal["image", "video"]
    source: Any


Piece = str | Control | Media

# 163602 has another name in Kimi-VL's and K2-Thinking's tokenizer files
_ALIASES = {"<|media_begin|>": "<|media_start|>", "<|media_start|>": "<|media_begin|>"}
_THINKS = ("k2_thinking", "k2_5", "k2_6", "k2_7_code")
_DEFAULT_SYSTEM = {
    "k2": "You are a helpful assistant",
    "kimi_vl": "You are a helpful assistant",
    "k2_thinking": "You are Kimi, an AI assistant created by Moonshot AI.",
}
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"


def render(
    messages: Sequence[dict[str, Any]],
    *,
    profile: Profile,
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> list[Piece]:
    """The prompt of a conversation in a model's own format.

    messages: role, content (str, None, or parts of type text, image / image_url, video / video_url), and where they
    apply name, reasoning / reasoning_content, tool_calls, tool_call_id. thinking: open <think> for the reply (profiles
    that think). preserve_thinking: keep the thoughts of finished turns (K2.6 option; K2.7-Code always keeps).
    Raises ValueError that names message and part.
    """
    if profile == "k2_7_code":
        if not thinking:
            raise ValueError("Kimi-K2.7-Code always thinks: thinking=False is not available for it")
        if preserve_thinking is False:
            raise ValueError("Kimi-K2.7-Code always keeps earlier thoughts: preserve_thinking=False is not available")
        preserve_thinking = True
    keep_all = bool(preserve_thinking) and profile in ("k2_6", "k2_7_code")
    check_messages(messages)
    check_tools(tools or ())
    out: list[Piece] = []
    if tools:
        declaration = tools_json(tools) if profile in ("k2", "k2_thinking", "kimi_vl") else declare_tools(tools)
        out += [Control("<|im_system|>"), "tool_declare", Control("<|im_middle|>"), declaration, Control("<|im_end|>")]
    if messages and messages[0]["role"] != "system" and profile in _DEFAULT_SYSTEM:
        out += [Control("<|im_system|>"), "system", Control("<|im_middle|>")]
        out += [_DEFAULT_SYSTEM[profile], Control("<|im_end|>")]

    # thoughts of turns up to the last finished answer are dropped, unless all are kept
    finished = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    last_finished = -1 if keep_all or not finished else finished[-1]
    for index, message in enumerate(messages):
        role = message["role"]
        opener = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}.get(role, "<|im_system|>")
        out += [Control(opener), message.get("name") or role, Control("<|im_middle|>")]
        if role == "assistant":
            if profile in _THINKS:
                keep = index > last_finished and (thinking or keep_all or profile == "k2_thinking")
                out += [Control("<think>"), _thoughts(message) if keep else "", Control("</think>")]
            out += _content(message, profile)
            out += _tool_calls(message)
        elif role == "tool":
            out += [f"## Return of {message.get('tool_call_id') or ''}\n", *_content(message, profile)]
        else:
            out += _content(message, profile)
        out.append(Control("<|im_end|>"))

    if add_generation_prompt:
        out += [Control("<|im_assistant|>"), "assistant", Control("<|im_middle|>")]
        if profile in ("k2_5", "k2_6", "k2_7_code"):
            out += [Control("<think>")] if thinking else [Control("<think>"), Control("</think>")]
    return merge_text(out)


def merge_text(pieces: Iterable[Piece]) -> list[Piece]:
    """Join adjacent texts and drop empty ones."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        elif piece != "":
            merged.append(piece)
    return merged


def encode_pieces(pieces: Iterable[Piece], tokenizer: Tokenizer) -> list[int | Media]:
    """Token ids, with each Media left in its place."""
    ids: list[int | Media] = []
    for piece in merge_text(pieces):
        if isinstance(piece, str):
            ids += tokenizer.encode(piece)
        elif isinstance(piece, Control):
            name = piece.name if piece.name in tokenizer.special else _ALIASES.get(piece.name, piece.name)
            ids.append(tokenizer.id(name))
        else:
            ids.append(piece)
    return ids


# ---- messages --------------------------------------------------------------------------------------------------------


def check_messages(messages: Any) -> None:
    """Raise a ValueError that names the message and part at fault."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty: nothing to answer")
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be a dict with role and content, got {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ValueError(f"{where} has no role (user, assistant, system or tool)")
        for key in ("name", "reasoning", "reasoning_content", "tool_call_id"):
            if message.get(key) is not None and not isinstance(message[key], str):
                raise ValueError(f"{where}: {key} must be a string, got {type(message[key]).__name__}")
        calls = message.get("tool_calls")
        if calls is not None and (not isinstance(calls, list | tuple) or role != "assistant"):
            raise ValueError(f"{where}: tool_calls must be a list, and only an assistant makes them")
        for number, call in enumerate(calls or ()):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
                raise ValueError(f"{where}, tool call {number} has no function name")
            if not isinstance(function.get("arguments", ""), str | dict | None):
                raise ValueError(f"{where}, tool call {number}: arguments must be a JSON string or a dict")
        _parts(message, where)


def _parts(message: dict[str, Any], where: str = "message") -> list[str | Media]:
    """Content as text and media."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: content must be text, None or a list of parts, got {type(content).__name__}")
    parts: list[str | Media] = []
    for number, part in enumerate(content):
        here = f"{where}, part {number}"
        if not isinstance(part, dict):
            raise ValueError(f"{here} must be a dict with a type, got {type(part).__name__}")
        kind = part.get("type")
        if kind in ("image", "image_url", "video", "video_url"):
            source = part.get(kind)
            if source is None and kind in ("image", "video"):
                source = part.get(kind + "_url")
            if isinstance(source, dict):
                source = source.get("url")
            if source is None or (isinstance(source, str) and not source):
                raise ValueError(f"{here} of type {kind} has no {kind}")
            parts.append(Media("image" if kind.startswith("image") else "video", source))
        elif kind == "text" or (kind is None and "text" in part):
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{here} of type text has no text")
            parts.append(part["text"])
        else:
            raise ValueError(f"{here} has type {kind!r}; known: text, image, image_url, video, video_url")
    return parts


def _content(message: dict[str, Any], profile: Profile) -> list[Piece]:
    out: list[Piece] = []
    for part in _parts(message):
        if isinstance(part, str):
            out.append(part)
        elif part.kind == "image":
            out += [Control("<|media_begin|>"), "image", Control("<|media_content|>"), part, Control("<|media_end|>")]
            out.append("" if profile == "kimi_vl" else "\n")
        else:
            out += [part, "\n"]
    return out


def _thoughts(message: dict[str, Any]) -> str:
    # by presence: an empty "reasoning" wins over "reasoning_content"
    return (message["reasoning"] if "reasoning" in message else message.get("reasoning_content")) or ""


def _tool_calls(message: dict[str, Any]) -> list[Piece]:
    calls = message.get("tool_calls")
    if not calls:
        return []
    out: list[Piece] = [Control("<|tool_calls_section_begin|>")]
    for call in calls:
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        name = call.get("id") or call["function"]["name"]
        out += [Control("<|tool_call_begin|>"), name, Control("<|tool_call_argument_begin|>"), arguments]
        out.append(Control("<|tool_call_end|>"))
    out.append(Control("<|tool_calls_section_end|>"))
    return out


# ---- a checkpoint's own template -------------------------------------------------------------------------------------


def render_with_jinja(
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    controls: Collection[str],
    **flags: Any,
) -> list[Piece]:
    """Render with a checkpoint's chat_template.jinja, in a sandbox.

    controls: the tokenizer's special strings. Those that the template writes become Control; those inside the
    messages stay text: they are hidden from the template behind a random mark and put back afterwards. Images and
    clips are matched to the template's placeholders in order. Raises ValueError when the template fails or writes
    another number of placeholders.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    check_messages(messages)
    check_tools(tools or ())
    media = [part for message in messages for part in _parts(message) if isinstance(part, Media)]
    names = sorted([*controls, VIDEO_PLACEHOLDER], key=len, reverse=True)
    any_control = re.compile("|".join(map(re.escape, names)))
    nonce = secrets.token_hex(8)
    hide = {name: f"\N{WHITE SQUARE}{nonce}:{i}\N{WHITE SQUARE}" for i, name in enumerate(names)}
    show = {mark: name for name, mark in hide.items()}

    def protect(value: Any) -> Any:
        if isinstance(value, str):
            return any_control.sub(lambda match: hide[match[0]], value)
        if isinstance(value, dict):
            return {protect(key): protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [protect(item) for item in value]
        return value

    def without_sources(message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, list | tuple):
            return message
        parts = [p if isinstance(p.get("text"), str) else {"type": p["type"], p["type"]: "media"} for p in content]
        return message | {"content": parts}

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = fail
    shown_tools = json.loads(tools_json(tools)) if tools else None
    variables = {
        "messages": protect([without_sources(message) for message in messages]),
        "tools": protect(shown_tools),
        "tools_ts_str": protect(declare_tools(tools)) if tools else None,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
    }
    try:
        text = environment.from_string(template).render(**variables, **flags)
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"the checkpoint's chat template failed: {error}") from None

    def reveal(text: str) -> str:
        return re.sub("|".join(map(re.escape, show)), lambda match: show[match[0]], text) if nonce in text else text

    left = iter(media)
    out: list[Piece] = []
    written = 0
    at = 0
    for match in any_control.finditer(text):
        out.append(reveal(text[at : match.start()]))
        at = match.end()
        if match[0] in ("<|media_pad|>", VIDEO_PLACEHOLDER):
            written += 1
            item = next(left, None)
            wanted = "image" if match[0] == "<|media_pad|>" else "video"
            if item is None or item.kind != wanted:
                got = f"an {item.kind}" if item else "nothing"
                raise ValueError(
                    f"the chat template's media place {written} is for an {wanted} but the messages have {got}"
                )
            out.append(item)
        else:
            out.append(Control(match[0]))
    out.append(reveal(text[at:]))
    if written != len(media):
        raise ValueError(
            f"the messages have {len(media)} images and clips but the chat template wrote {written} places"
        )
    return merge_text(out)
