"""Tokens back to thinking, text and tool calls, as they come.

    thoughts </think> text <section> <call> functions.add:0 <argument> {"a": 1} </call> </section>

Control tokens are recognised by id: the same strings spelled out in a text stay text. Nothing that a model emits
raises: missing markers, calls inside a thought and malformed ids have defined results (the forms seen in the wild).
"""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolCall:
    """One call. `id` has the form functions.NAME:INDEX, the index counting over the whole conversation."""

    id: str
    name: str
    arguments: str  # as the model wrote them; usually JSON
    index: int

    def parsed(self) -> dict[str, Any]:
        """The arguments as a dict. Raises ValueError when the model wrote something else."""
        try:
            value = json.loads(self.arguments) if self.arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"arguments of {self.id} are not JSON ({error}): {self.arguments[:80]!r}") from None
        if not isinstance(value, dict):
            raise ValueError(f"arguments of {self.id} must be a JSON object, got {self.arguments[:80]!r}")
        return value


@dataclass(frozen=True)
class Event:
    """A piece of a reply: new text of kind "thinking" or "text", or a finished call."""

    kind: Literal["thinking", "text", "tool_call"]
    delta: str = ""
    tool_call: ToolCall | None = None


_MARKERS = {
    "<think>": "think",
    "</think>": "unthink",
    "<|tool_calls_section_begin|>": "section",
    "<|tool_calls_section_end|>": "unsection",
    "<|tool_call_begin|>": "call",
    "<|tool_call_argument_begin|>": "argument",
    "<|tool_call_end|>": "uncall",
}
# Some models spell the section marker in the singular; it is no token, so it comes as text.
_SPELLED = {"<|tool_call_section_begin|>": "section", "<|tool_call_section_end|>": "unsection"}


class ReplyParser:
    """Feed tokens, get events. thinking: the prompt already opened <think>.

    first_index: calls made earlier in the conversation. tools: the declared tools, which help to read malformed ids.
    After `finish`, `truncated` holds the text of a call that was cut off (it is not reported as a call).
    """

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool, first_index: int = 0, tools: Any = None) -> None:
        self.tokenizer = tokenizer
        self.in_thinking = thinking
        self.truncated: str | None = None
        self._markers = {tokenizer.special[n]: kind for n, kind in _MARKERS.items() if n in tokenizer.special}
        self._tools = {t["function"]["name"]: t["function"] for t in tools or () if t.get("type") == "function"}
        self._next_index = first_index
        self._where: Literal["text", "section", "id", "arguments"] = "text"
        self._decoder = _decoder()
        self._held = ""  # text that may turn out to be a spelled marker
        self._id = self._arguments = ""

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """Events of the next tokens; text whose bytes are not complete yet is kept back."""
        events: list[Event] = []
        for token in ids:
            marker = self._markers.get(token)
            if marker is not None:
                self._flush(events)
                self._mark(marker, events)
            elif not self.tokenizer.is_special(token):  # other control tokens say nothing
                self._add(self._decoder.decode(self.tokenizer.decode_bytes([token])), events)
        return _joined(events)

    def finish(self) -> list[Event]:
        """What is left when the model has stopped."""
        events: list[Event] = []
        self._flush(events)
        if self._where == "arguments" and _is_json(self._arguments):
            self._close_call(events)  # only the end marker is missing
        elif self._where in ("id", "arguments"):
            self.truncated = self._id + self._arguments
        self._where = "text"
        return _joined(events)

    # ---- inside ----

    def _mark(self, marker: str, events: list[Event]) -> None:
        if self._where == "arguments" and marker != "uncall":
            self._close_call(events)  # the end marker was forgotten
        if marker == "think":
            self.in_thinking = True
        elif marker == "unthink":
            self.in_thinking = False
        elif marker == "section":
            self.in_thinking = False  # a call inside a thought ends the thought
            self._where = "section"
        elif marker == "unsection":
            self._where = "text"
        elif marker == "call":
            self.in_thinking = False
            self._where, self._id, self._arguments = "id", "", ""
        elif marker == "argument":
            if self._where == "id":
                self._where = "arguments"
        elif marker == "uncall" and self._where in ("id", "arguments"):
            self._close_call(events)

    def _add(self, text: str, events: list[Event]) -> None:
        if not text:
            return
        if self._where == "id":
            self._id += text
        elif self._where == "arguments":
            self._arguments += text
        elif self._where == "text":
            self._show(text, events)
        # between the calls of a section there is only white space or noise

    def _show(self, text: str, events: list[Event]) -> None:
        text = self._held + text
        self._held = ""
        found = [(text.find(name), name) for name in _SPELLED if name in text]
        if found:
            at, name = min(found)
            self._emit(text[:at], events)
            self._mark(_SPELLED[name], events)
            self._add(text[at + len(name) :], events)
            return
        keep = max(overlap(text, name) for name in _SPELLED)
        self._held = text[len(text) - keep :]
        self._emit(text[: len(text) - keep], events)

    def _emit(self, text: str, events: list[Event]) -> None:
        if text:
            events.append(Event("thinking" if self.in_thinking else "text", text))

    def _flush(self, events: list[Event]) -> None:
        """Bytes and text kept back belong to what came before a marker."""
        rest = self._decoder.decode(b"", True)
        self._decoder = _decoder()
        self._add(rest, events)
        held, self._held = self._held, ""
        self._emit(held, events)

    def _close_call(self, events: list[Event]) -> None:
        raw, arguments = self._id, self._arguments
        self._where = "section"
        if not arguments and "{" in raw:  # the argument marker was forgotten
            raw, brace, rest = raw.partition("{")
            arguments = brace + rest
        name, index = read_call_id(raw, arguments, self._tools)
        if index is None:
            index = self._next_index
        self._next_index = max(self._next_index, index) + 1
        call = ToolCall(f"functions.{name}:{index}", name, arguments.strip(), index)
        events.append(Event("tool_call", tool_call=call))


def read_call_id(raw: str, arguments: str, tools: dict[str, Any]) -> tuple[str, int | None]:
    """Name and index out of an id: functions.NAME:3, NAME:3, functionsNAME3, NAME, call_abc, a uuid ...

    The index is None when the id has none. A name that no rule finds is looked for among the declared tools, by the
    arguments; failing that, the id itself is the name.
    """
    raw = raw.strip()
    proper = re.fullmatch(r"(?:functions\.)?(?P<name>[^\s:]+):\s*(?P<index>\d{1,9})", raw)
    if proper and not (tools and proper["name"] not in tools):
        return proper["name"], int(proper["index"])
    bare = re.sub(r":\s*\d+$", "", raw)
    for candidate in (bare, bare.removeprefix("functions."), bare.removeprefix("functions")):
        for name in (candidate, candidate.rstrip("0123456789"), candidate.strip(".:_- ")):
            if name in tools:
                return name, int(proper["index"]) if proper else None
    try:
        keys = set(json.loads(arguments)) if arguments.strip() else set()
    except (json.JSONDecodeError, TypeError):
        keys = set()
    fits = [name for name, function in tools.items() if _accepts(function, keys)]
    if len(fits) == 1:
        return fits[0], None
    if proper:
        return proper["name"], int(proper["index"])
    glued = re.fullmatch(r"functions\.?(?P<name>[A-Za-z_][\w.\-]*?)\d*", raw)
    return (glued["name"], None) if glued else (re.sub(r"\s+", "_", bare) or "unknown", None)


def _accepts(function: dict[str, Any], keys: set[str]) -> bool:
    parameters = function.get("parameters") or {}
    return set(parameters.get("required", ())) <= keys <= set(parameters.get("properties") or {})


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)


def _joined(events: list[Event]) -> list[Event]:
    joined: list[Event] = []
    for event in events:
        if joined and event.kind == joined[-1].kind != "tool_call":
            joined[-1] = Event(event.kind, joined[-1].delta + event.delta)
        else:
            joined.append(event)
    return joined
