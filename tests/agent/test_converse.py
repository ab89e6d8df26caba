"""The tool loop: what is passed on, what is appended, what is wrong, and how it ends.

pytest tests/agent/test_converse.py
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace as Some
from typing import Any

import pytest

from agent.converse import MOST_CALLS, Event, converse
from agent.tools import Tool, calculator, python, specified
from tests.sandboxes import sandboxed

ASKED = [{"role": "user", "content": "hi"}]


class Script:
    """A stream that has its replies written down: (text, [(name, arguments), ...])."""

    def __init__(self, *replies: tuple[str, list[tuple[str, Any]]], cut: bool = False) -> None:
        self.replies = list(replies)
        self.cut = cut
        self.seen: list[list[dict[str, Any]]] = []
        self.offered: list[Any] = []
        self.closed = 0

    def __call__(self, messages: list[dict[str, Any]], specifications: list[dict[str, Any]]) -> Iterator[Any]:
        self.seen.append(json.loads(json.dumps(messages)))
        self.offered.append(specifications)
        text, wanted = self.replies.pop(0)
        before = sum(len(message.get("tool_calls") or ()) for message in messages)
        calls = [
            Some(
                id=f"functions.{name}:{at}", name=name, arguments=given if isinstance(given, str) else json.dumps(given)
            )
            for at, (name, given) in enumerate(wanted, before)
        ]
        try:
            yield Some(kind="thinking", delta="let me ")
            yield Some(kind="thinking", delta="see")
            for word in text.split(" "):
                yield Some(kind="text", delta=word)
            for call in calls:
                yield Some(kind="tool_call", delta="", tool_call=call)
            usage = Some(prompt_tokens=10, completion_tokens=5, thinking_tokens=2, media_tokens=0)
            reason = "length" if self.cut else "tool_calls" if calls else "stop"
            yield Some(kind="end", reply=Some(text=text, usage=usage, finish_reason=reason, ids=(1, 2)))
        finally:
            self.closed += 1


def said(script: Callable[..., Any], tools: list[Tool] | None = None, **options: Any) -> tuple[list[Event], Event]:
    events = [each for each in converse(script, ASKED, tools or [], **options) if each.kind != "wait"]
    assert [each.kind for each in events].count("end") == 1 and events[-1].kind == "end"
    return events[:-1], events[-1]


def test_an_answer_without_tools() -> None:
    script = Script(("hello", []))
    events, end = said(script, [calculator()])
    assert [(each.kind, each.delta) for each in events] == [
        ("thinking", "let me "),
        ("thinking", "see"),
        ("text", "hello"),
    ]
    assert end.messages == ({"role": "assistant", "content": "hello", "reasoning_content": "let me see"},)
    assert end.finish_reason == "stop" and end.reply.ids == (1, 2) and script.closed == 1
    assert script.offered == [[calculator().specification]]
    assert end.usage == {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "media_tokens": 0,
        "thinking_tokens": 2,
        "rounds": 1,
    }


def test_calls_in_one_message_and_thoughts_between_them() -> None:
    script = Script(
        ("", [("calculator", {"expression": "2^10"}), ("calculator", {"expression": "1/0"})]),
        ("so", [("calculator", {"expression": "3!"})]),
        ("6", []),
    )
    events, end = said(script, [calculator()])
    results = [(each.call and each.call.id, each.result, each.ok) for each in events if each.kind == "result"]
    assert results == [
        ("functions.calculator:0", "1024", True),
        ("functions.calculator:1", "error: division by zero", False),
        ("functions.calculator:2", "6", True),
    ]
    order = [each.kind for each in events if each.kind in ("call", "result")]
    assert order == ["call", "result"] * 3
    roles = [message["role"] for message in end.messages]
    assert roles == ["assistant", "tool", "tool", "assistant", "tool", "assistant"]
    assert all(m["reasoning_content"] == "let me see" for m in end.messages if m["role"] == "assistant")
    assert script.seen[1] == [*ASKED, *end.messages[:3]] and script.seen[2] == [*ASKED, *end.messages[:5]]
    assert end.messages[1] == {"role": "tool", "tool_call_id": "functions.calculator:0", "content": "1024"}
    assert end.usage["rounds"] == 3 and end.usage["completion_tokens"] == 15
    from fusion.template import render

    render([*ASKED, *end.messages], profile="k2_7_code", tools=[calculator().specification])


def test_what_the_model_gets_wrong_is_a_result() -> None:
    wrong = ["{broken", "[1]", '"text"', "null", "[" * 100_000, '{"expression": 1}', '{"expression": "\\ud800"}', ""]
    script = Script(("", [("fly", {}), ("x" * 5000, {}), *[("calculator", each) for each in wrong]]), ("oh", []))
    events, end = said(script, [calculator()])
    results = [each for each in events if each.kind == "result"]
    assert len(results) == len(wrong) + 2 and not any(each.ok for each in results)
    assert all(isinstance(each.result, str) and len(each.result) < 500 for each in results)
    assert results[0].result == "error: no tool 'fly'; there are calculator"
    assert end.finish_reason == "stop" and end.messages[-1]["content"] == "oh"
    none, _ = said(Script(("", [("fly", {})]), ("oh", [])))
    assert "none in this conversation" in str(none[-1 - 3].result)


def test_calls_without_an_id_get_the_next_of_the_conversation() -> None:
    def stream(messages: list[Any], specifications: list[Any]) -> Iterator[Any]:
        if len(messages) < 3:
            yield Some(kind="tool_call", tool_call=Some(name="calculator", arguments='{"expression": "1"}'))
        yield Some(kind="end", reply=Some(finish_reason="stop"))

    earlier = [{"role": "assistant", "content": "", "tool_calls": [{}, {}]}]
    events = list(converse(stream, earlier, [calculator()]))
    assert [each.call.id for each in events if each.kind == "call" and each.call] == ["functions.calculator:2"]
    assert events[-1].usage["prompt_tokens"] == 0


def test_rounds_calls_and_length_have_an_end() -> None:
    again = ("", [("calculator", {"expression": "1"})])
    events, end = said(Script(*[again] * 9), [calculator()], rounds=3)
    results = [each for each in events if each.kind == "result"]
    assert [each.ok for each in results] == [True, True, False] and "limit of 3 replies" in str(results[2].result)
    assert end.finish_reason == "rounds" and end.messages[-1]["role"] == "tool"
    events, end = said(Script(("", again[1] * 40), ("ok", [])), [calculator()])
    assert [each.ok for each in events if each.kind == "result"] == [True] * MOST_CALLS + [False] * (40 - MOST_CALLS)
    events, end = said(Script(again, cut=True), [calculator()])
    assert end.finish_reason == "length" and len(end.messages) == 1 and "tool_calls" not in end.messages[0]
    for rounds in (0, True, 1.5):
        with pytest.raises(ValueError, match="rounds"):
            converse(Script(), ASKED, rounds=rounds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same name"):
        converse(Script(), ASKED, [calculator(), calculator()])


def test_a_stop_keeps_what_was_said() -> None:
    stop = threading.Event()
    script = Script(("one two three", []))
    events = []
    for each in converse(script, ASKED, stop=stop):
        events.append(each)
        if each.delta == "two":
            stop.set()
    assert events[-1].finish_reason == "stopped" and script.closed == 1 and events[-1].reply is None
    assert events[-1].messages == ({"role": "assistant", "content": "onetwo", "reasoning_content": "let me see"},)

    def short(messages: list[Any], specifications: list[Any]) -> Iterator[Any]:
        yield Some(kind="text", delta="half")  # and no end: the model was stopped by others

    _, end = said(short)
    assert end.finish_reason == "stopped" and end.messages[0]["content"] == "half"


def test_errors_of_stream_and_tools_are_not_hidden() -> None:
    def broken(messages: list[Any], specifications: list[Any]) -> Iterator[Any]:
        yield Some(kind="text", delta="x")
        raise ValueError("message 0 has no role")

    with pytest.raises(ValueError, match="no role"):
        list(converse(broken, ASKED))

    def do(arguments: Any, stop: threading.Event) -> str:
        raise KeyError("an error in the tool")

    with pytest.raises(KeyError, match="an error in the tool"):
        list(converse(Script(("", [("bad", {})])), ASKED, [Tool("bad", specified("bad", ""), do)]))


def test_closing_ends_stream_and_tool() -> None:
    script = Script(("one two", []))
    events = converse(script, ASKED)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert script.closed == 1
    ended = threading.Event()

    def do(arguments: Any, stop: threading.Event) -> str:
        assert stop.wait(20)
        ended.set()
        return "late"

    events = converse(Script(("", [("slow", {})])), ASKED, [Tool("slow", specified("slow", ""), do)])
    waits = 0
    for each in events:
        waits += each.kind == "wait"
        if waits == 2:
            break
    assert not ended.is_set()
    events.close()  # type: ignore[attr-defined]
    assert ended.is_set()


def children() -> set[str]:
    """Processes that descend from this one, by number."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as file:
                    parents[entry.name] = file.read().rpartition(")")[2].split()[1]
            except OSError:  # gone meanwhile
                continue
    found, level = set[str](), {str(os.getpid())}
    while level:
        level = {name for name, parent in parents.items() if parent in level}
        found |= level
    return found


@sandboxed
@pytest.mark.parametrize("way", ["close", "stop"])
def test_a_program_that_runs_leaves_no_process(way: str) -> None:
    before = children()
    stop = threading.Event()
    code = "import os, time\nif os.fork():\n    time.sleep(60)\ntime.sleep(60)"
    events = converse(Script(("", [("python", {"code": code})])), ASKED, [python()], stop=stop)
    for each in events:
        if each.kind == "wait" and each.seconds > 1:
            break
    assert children() - before
    began = time.monotonic()
    if way == "close":
        events.close()  # type: ignore[attr-defined]
    else:
        stop.set()
        last = list(events)[-1]
        assert last.finish_reason == "stopped" and "stopped" in last.messages[-1]["content"]
    assert time.monotonic() - began < 10
    assert not children() - before


def test_the_model_in_the_box_calculates_with_the_tool() -> None:
    from fusion import Kimi

    kimi = Kimi.from_pretrained("nano", dtype="float32", experts="dense").eval()

    def stream(messages: list[Any], specifications: list[Any]) -> Any:
        return kimi.stream(messages, tools=specifications, max_new_tokens=64)

    asked = [{"role": "user", "content": "use the calculator: 4613+8777"}]
    events = list(converse(stream, asked, [calculator(plain=True)], rounds=3))
    results = [each for each in events if each.kind == "result"]
    assert [each.result for each in results] == ["13390"]
    assert results[0].call is not None and results[0].call.id == "functions.calculator:0"
    assert events[-1].messages[-1]["content"] == "13390" and events[-1].reply.ids
