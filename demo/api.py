"""The endpoint /chat, for programs: one question with pictures and clips, one answer, streamed.

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7860")
    report = client.predict("how many red rings are there?", [handle_file("a.png")], api_name="/chat")

    question, files, settings, tools ── admit ── converse ── {"text", "thinking", ...} as it grows, at last "over": true

It remembers nothing: earlier turns come with the question, and its files are removed when it has answered.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from demo.guard import visitor_of
from demo.models import Settings
from demo.pieces import asked, told
from demo.shown import parts_of

if TYPE_CHECKING:
    from demo.chat import Desk


def build(desk: "Desk") -> None:
    """Add the endpoint, inside gr.Blocks."""
    import gradio as gr

    from demo.chat import AT_ONCE

    def chat(
        question: str,
        files: list[dict[str, Any]] | None = None,
        settings: dict[str, Any] | None = None,
        model: str = "",
        tools: list[str] | None = None,
        earlier: list[dict[str, Any]] | None = None,
        request: gr.Request = None,
    ) -> Iterator[dict[str, Any]]:
        """Ask about pictures, clips or nothing but the words; reports as the answer grows, the last with "over": true.

        files: uploaded files (gradio_client's handle_file). settings: fields of demo.models.Settings, such as
        {"temperature": 0.6, "max_new_tokens": 256, "thinking_budget": 64, "seed": 1, "system": "...", "profile":
        "k2_6"}; what is left out has its default. model: a name that the page offers; left out, the first. tools: some
        of "calculator", "crop", "python". earlier: OpenAI-style messages of text that came before, oldest first.

        A report has text, thinking, calls (name, arguments, result, ok, seconds) and over; the last one also usage,
        finish_reason, files (what each of them is), model and settings.
        """
        visitor = visitor_of(request)
        with told():
            parts, notes = asked({"text": question, "files": files or []}, visitor, desk.caps)
            messages = [*texts(earlier), {"role": "user", "content": parts}]
            try:
                yield from reports(desk, model, settings_named(settings), tool_names(tools), messages, notes)
            finally:
                desk.history(visitor).forget(messages)

    gr.api(chat, api_name="chat", concurrency_id="model", concurrency_limit=AT_ONCE)


def settings_named(given: Any) -> Settings:
    """Settings from a mapping of their names. Raises ValueError for an unknown one."""
    if given is None:
        return Settings()
    known = list(Settings.__dataclass_fields__)
    if not isinstance(given, dict):
        raise ValueError(f"settings must be a mapping with some of {', '.join(known)}")
    unknown = sorted(set(map(str, given)) - set(known))
    if unknown:
        raise ValueError(f"no setting is called {', '.join(unknown)[:200]}; there are: {', '.join(known)}")
    return Settings(**given)


def tool_names(given: Any) -> list[str]:
    """Names of tools. Raises ValueError for an unknown one."""
    from demo.chat import TOOLS

    wanted = given if isinstance(given, list) else [given] if given else []
    unknown = [str(name)[:80] for name in wanted if name not in TOOLS.values()]
    if unknown:
        raise ValueError(f"no tool is called {', '.join(unknown)}; there are: {', '.join(TOOLS.values())}")
    return list(dict.fromkeys(wanted))


def texts(earlier: Any) -> list[dict[str, Any]]:
    """Earlier turns. Raises ValueError for what is no list of messages of text."""
    if not earlier:
        return []
    if not isinstance(earlier, list):
        raise ValueError("earlier must be a list of messages, each with a role and content")
    out = []
    for number, message in enumerate(earlier):
        content = message.get("content") if isinstance(message, dict) else None
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system") or not isinstance(content, str):
            raise ValueError(f"message {number} of earlier needs a role (user, assistant, system) and text as content")
        kept = {"role": role, "content": content}
        if role == "assistant" and isinstance(message.get("reasoning_content"), str):
            kept["reasoning_content"] = message["reasoning_content"]
        out.append(kept)
    return out


def reports(
    desk: "Desk",
    model: str,
    settings: Settings,
    tools: Sequence[str],
    messages: list[dict[str, Any]],
    notes: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """The answer as it grows. Closing the iterator ends the model's work and that of its tools."""
    from agent.converse import converse

    model = model or desk.models.names[0]
    stop = threading.Event()
    said: dict[str, Any] = {"text": "", "thinking": "", "over": False}
    calls: list[dict[str, Any]] = []

    def stream(messages: list[dict[str, Any]], specifications: list[dict[str, Any]]) -> Iterator[Any]:
        yield from desk.models.stream(model, messages, specifications or None, settings, stop)

    try:
        for event in converse(stream, messages, desk.tools(model, tools, messages), stop=stop):
            if event.kind in ("text", "thinking"):
                said[event.kind] += event.delta
            elif event.call is not None and event.kind == "call":
                calls.append({"name": event.call.name, "arguments": event.call.arguments})
                said["text"] = ""  # what was said before a call is no answer yet
            elif event.kind == "result":
                text = event.result if isinstance(event.result, str) else parts_of({"content": event.result})[1]
                calls[-1] |= {"result": text, "ok": event.ok, "seconds": round(event.seconds, 3)}
            elif event.kind == "end":
                reason = event.reply.finish_reason if event.reply is not None else event.finish_reason
                about = {"usage": event.usage, "finish_reason": reason, "files": list(notes), "model": model}
                yield said | {"calls": calls, "over": True, "settings": asdict(settings)} | about
                return
            yield said | {"calls": [dict(call) for call in calls]}
    finally:
        stop.set()
