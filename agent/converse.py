"""A conversation in which the model may call tools: its words as they come, its calls, what they gave, its next words.

    for event in converse(stream, messages, [calculator(), python()]):
        event.kind     "thinking", "text": event.delta          "call": event.call     "wait": it still runs
                       "result": event.call, result, ok, seconds         "end": messages to append, usage, finish_reason

    messages, tools ──> stream ──> thinking, text, calls ──> tools, one after the other ──┐
          ^                                                                               │
          └────────────── assistant message, {"role": "tool", ...} for each call ─────────┘   until it calls nothing

`stream(messages, specifications)` gives events as fusion's do, and is asked once for each reply: kind, delta,
tool_call (id, name, arguments as text), and on "end" a reply (text, thinking, tool_calls, usage, finish_reason).
A call that is wrong, to no tool or with broken JSON, is a result that the model reads. Thoughts stay in the assistant
messages as reasoning_content; ids stay as they came, the models count them over the whole conversation.

The generator can be closed at any event: a program that runs is ended before `close` returns. While a tool works it
gives "wait" every quarter of a second, so that there is an event to close it at; `stop` ends it from another thread.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.tools import Parts, Tool, ToolResult

Message = dict[str, Any]
Stream = Callable[[list[Message], list[dict[str, Any]]], Iterable[Any]]
Finish = Literal["stop", "length", "rounds", "stopped"]
MOST_CALLS = 16  # of one message
WAIT = 0.25  # seconds
COUNTS = ("prompt_tokens", "completion_tokens", "media_tokens", "thinking_tokens")


@dataclass(frozen=True)
class Call:
    """A call as the model wrote it; arguments are text, usually JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Event:
    """What has happened; which fields are set depends on the kind, see the module.

    seconds: that a tool has worked; of all, on "end". messages: what to append to the conversation. usage: sums over
    all replies. finish_reason: "stop"; "length", the last reply was cut off; "rounds", the model still called tools
    when it had no replies left; "stopped". reply: the last one, as it came from the stream; None if it was cut short.
    """

    kind: Literal["thinking", "text", "call", "wait", "result", "end"]
    delta: str = ""
    call: Call | None = None
    result: str | Parts = ""
    ok: bool = True
    seconds: float = 0.0
    messages: tuple[Message, ...] = ()
    usage: dict[str, int] = field(default_factory=dict)
    finish_reason: Finish | None = None
    reply: Any = None


@dataclass
class _Said:
    """One reply, as far as it has come."""

    text: str = ""
    thinking: str = ""
    calls: list[Any] = field(default_factory=list)
    reply: Any = None


def converse(
    stream: Stream,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    rounds: int = 8,
    stop: threading.Event | None = None,
) -> Iterator[Event]:
    """Answer a conversation, with tools. rounds: replies at most; calls in the last of them are not run.

    stop: set it to end early; what has been said comes with the "end" event. Raises ValueError for two tools of one
    name, and what the stream raises.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds!r}")
    known = {tool.name: tool for tool in tools}
    if len(known) != len(tools):
        raise ValueError(f"two tools have the same name: {', '.join(tool.name for tool in tools)}")
    return _converse(stream, list(messages), known, rounds, stop or threading.Event())


def _converse(
    stream: Stream, before: list[Message], known: dict[str, Tool], rounds: int, stop: threading.Event
) -> Iterator[Event]:
    began = time.monotonic()
    specifications = [tool.specification for tool in known.values()]
    added: list[Message] = []
    usage = dict.fromkeys((*COUNTS, "rounds"), 0)
    said = _Said()
    finish: Finish = "rounds"
    for number in range(1, rounds + 1):
        said = _Said()
        yield from _listen(stream([*before, *added], specifications), said, stop)
        _count(usage, said.reply)
        stopped = said.reply is None or stop.is_set()
        cut = getattr(said.reply, "finish_reason", None) == "length"
        # a message that was cut off may lack calls that belong to the others: none of them is run
        calls = [] if stopped or cut else _numbered(said.calls, [*before, *added])
        if said.text or said.thinking or calls or not stopped:
            added.append(_assistant(said, calls))
        if not calls:
            finish = "stopped" if stopped else "length" if cut else "stop"
            break
        for at, call in enumerate(calls):
            yield Event("call", call=call)
            why = ""
            if number == rounds:
                why = f"not run: the limit of {rounds} replies is reached"
            elif at >= MOST_CALLS:
                why = f"not run: at most {MOST_CALLS} calls in one message"
            elif stop.is_set():
                why = "not run: stopped"
            start = time.monotonic()
            result = ToolResult(f"error: {why}", False) if why else (yield from _call(call, known, stop))
            added.append({"role": "tool", "tool_call_id": call.id, "content": result.content})
            seconds = time.monotonic() - start
            yield Event("result", call=call, result=result.content, ok=result.ok, seconds=seconds)
        if stop.is_set():
            finish = "stopped"
            break
    seconds = time.monotonic() - began
    yield Event("end", seconds=seconds, messages=tuple(added), usage=usage, finish_reason=finish, reply=said.reply)


def _listen(events: Iterable[Any], said: _Said, stop: threading.Event) -> Iterator[Event]:
    """Pass on one reply, and keep it. A stream that ends without "end" was stopped."""
    with contextlib.ExitStack() as stack:
        if hasattr(events, "close"):
            stack.callback(events.close)  # also when this generator is closed, so that the model stops at once
        for event in events:
            if event.kind == "thinking":
                said.thinking += event.delta
                yield Event("thinking", event.delta)
            elif event.kind == "text":
                said.text += event.delta
                yield Event("text", event.delta)
            elif event.kind == "tool_call":
                said.calls.append(event.tool_call)
            elif event.kind == "end":
                said.reply = event.reply
                return
            if stop.is_set():
                return


def _count(usage: dict[str, int], reply: Any) -> None:
    found = getattr(reply, "usage", None)
    for name in COUNTS:
        usage[name] += int(getattr(found, name, 0) or 0)
    usage["rounds"] += 1


def _numbered(calls: Sequence[Any], messages: Sequence[Message]) -> list[Call]:
    """Calls with their ids; one without gets the next of the conversation."""
    earlier = sum(len(message.get("tool_calls") or ()) for message in messages)
    found = []
    for at, call in enumerate(calls, earlier):
        name = str(call.name)
        found.append(Call(str(getattr(call, "id", "") or f"functions.{name}:{at}"), name, call.arguments or ""))
    return found


def _assistant(said: _Said, calls: Sequence[Call]) -> Message:
    message: Message = {"role": "assistant", "content": said.text, "reasoning_content": said.thinking}
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _call(call: Call, known: dict[str, Tool], stop: threading.Event) -> Generator[Event, None, ToolResult]:
    """Run one call beside this generator, which gives "wait" meanwhile; returns its ToolResult."""
    tool = known.get(call.name)
    if tool is None:
        there = f"there are {', '.join(known)}" if known else "there are none in this conversation"
        return ToolResult(f"error: no tool {call.name[:80]!r}; {there}", False)
    try:
        arguments = json.loads(call.arguments) if call.arguments.strip() else {}
    except (ValueError, RecursionError) as error:
        return ToolResult(f"error: the arguments are no JSON: {str(error)[:200]}", False)
    done: list[ToolResult] = []
    failed: list[BaseException] = []
    ending = threading.Event()

    def work() -> None:
        try:
            done.append(tool.run(arguments, ending))
        except BaseException as error:  # noqa: BLE001  raised again below, where somebody reads it
            failed.append(error)

    thread = threading.Thread(target=work, name=f"tool {call.name[:40]}", daemon=True)
    start = told = time.monotonic()
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.02)
            if stop.is_set():
                ending.set()
            if time.monotonic() - told >= WAIT:
                told = time.monotonic()
                yield Event("wait", call=call, seconds=told - start)
    finally:
        ending.set()
        thread.join()
    if failed:
        raise failed[0]
    return done[0]
