"""The chat: what is kept, what is shown, how answers end; without a browser (test_browser.py has one).

python -m pytest tests/demo/test_chat.py
"""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from demo import chat, looks
from demo.api import reports, settings_named, texts, tool_names
from demo.app import Demo, build, has_screen, listen
from demo.chat import Desk, for_model, outcome_html, settings_of
from demo.examples import EXAMPLES, sample_of
from demo.guard import Caps, visitor_folder
from demo.history import Conversation
from demo.models import PROFILES, Models, Settings
from demo.shown import answer, fenced, plain, rows_of, typed
from fusion.generate import Reply, StreamEvent, Usage
from fusion.parse import ToolCall

VISITOR = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOONKIT_STATE", str(tmp_path / "state"))
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    return tmp_path


@dataclass
class Scripted:
    """In place of Models: says what it is told to, and remembers what it was asked. Stops as the real one does."""

    script: list[Any]
    asked: list[Any] = field(default_factory=list)
    closed: int = 0
    wall_s: float = 60.0
    names: tuple[str, ...] = ("scripted",)

    def path(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"no model {name!r} here")
        return name

    def kimi(self, name: str) -> Any:
        config = type("Config", (), {"text": type("Text", (), {"vocab_size": 163_840})()})()
        return type("Kimi", (), {"config": config})()

    def stream(
        self, name: str, messages: Any, tools: Any, settings: Settings, stop: threading.Event | None = None
    ) -> Iterator[StreamEvent]:
        self.asked.append((messages, tools))
        text, thinking, calls = "", "", []
        reason: Any = "stop"
        try:
            number = 0
            for step in self.script[len(self.asked) - 1]:
                number += 1
                if stop is not None and stop.is_set():
                    reason = "halted"
                    break
                if isinstance(step, Exception):
                    raise step
                if callable(step):
                    step()
                elif isinstance(step, ToolCall):
                    calls.append(step)
                    reason = "tool_calls"
                    yield StreamEvent("tool_call", tool_call=step)
                else:
                    kind, delta = step
                    thinking, text = (thinking + delta, text) if kind == "thinking" else (thinking, text + delta)
                    yield StreamEvent(kind, delta)
            usage = Usage(10, number, 0, len(thinking.split()))
            yield StreamEvent("end", reply=Reply(text, thinking, tuple(calls), usage, reason, tuple(range(number))))
        finally:
            self.closed += 1


def desk_of(*script: Any) -> tuple[Desk, Scripted]:
    models = Scripted(list(script))
    return Desk(models, Caps()), models  # type: ignore[arg-type]


def upload(state: Path, name: str = "a.png") -> str:
    path = state / "uploads" / name
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(path)
    return str(path)


def ask(desk: Desk, text: str, files: list[str] | None = None, id: str = "") -> Conversation:
    return desk.take({"text": text, "files": files or []}, VISITOR, id)


def answered(desk: Desk, conversation: Conversation, tools: tuple[str, ...] = ()) -> tuple[list[Any], Conversation]:
    steps = list(desk.answer(VISITOR, conversation, "scripted", Settings(), tools))
    kept = steps[-1][1]
    assert kept is not None and all(step[1] is None for step in steps[:-1])
    return [step[0] for step in steps], kept


THOUGHT = [("thinking", "one two "), ("thinking", "three"), ("text", "the "), ("text", "answer")]


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_a_question_with_a_picture_is_kept_answered_and_kept(state: Path) -> None:
    desk, models = desk_of(THOUGHT)
    conversation = ask(desk, "what is it?", [upload(state)])
    assert desk.history(VISITOR).read(conversation.id) == conversation  # before the answer
    rows, kept = answered(desk, conversation)
    assert rows[0][-1]["metadata"] == {"title": "Reading the prompt", "status": "pending"}
    last = rows[-1]
    assert [row["role"] for row in last] == ["user", "user", "assistant", "assistant"]
    about = last[2]["metadata"]
    assert (about["title"], about["status"], about["log"]) == ("Thinking", "done", "3 tokens") and about["duration"] > 0
    assert last[3]["content"] == "the answer" and "metadata" not in last[3]
    assert desk.history(VISITOR).read(kept.id) == kept
    message = kept.messages[-1]
    assert message["reasoning_content"] == "one two three" and message["moonkit"]["ids"] == [0, 1, 2, 3]
    picture = models.asked[0][0][0]["content"][0]["image_url"]["url"]
    assert Path(picture).is_relative_to(visitor_folder(VISITOR)) and "moonkit" not in str(models.asked[0][0][0].keys())
    assert rows_of(kept.messages, VISITOR).rows == last  # a reload shows what was shown


def test_while_it_thinks_the_block_is_pending(state: Path) -> None:
    seen: list[Any] = []
    desk, _ = desk_of([("thinking", "hm"), lambda: time.sleep(0.1), ("thinking", " well"), ("text", "yes")])
    for rows, _ in desk.answer(VISITOR, ask(desk, "so?"), "scripted", Settings(), ()):
        seen += [row["metadata"] for row in rows if row.get("metadata", {}).get("title") == "Thinking"]
    assert seen[0]["status"] == "pending" and "duration" not in seen[0]
    assert seen[-1]["status"] == "done" and seen[-1]["duration"] >= 0.1


def test_a_tool_is_a_step_with_its_result_nested(state: Path) -> None:
    call = ToolCall("functions.calculator:0", "calculator", '{"expression": "6*7"}', 0)
    desk, models = desk_of([("thinking", "a sum"), call], [("text", "it is 42")])
    rows, kept = answered(desk, ask(desk, "6*7?"), ("calculator",))
    shown = rows[-1]
    titles = [row.get("metadata", {}).get("title") for row in shown]
    assert titles == [None, "Thinking", "Tool: calculator", "Result", None]
    assert shown[3]["metadata"]["parent_id"] == shown[2]["metadata"]["id"] and "42" in shown[3]["content"]
    assert [message["role"] for message in kept.messages] == ["user", "assistant", "tool", "assistant"]
    second = models.asked[1][0]
    assert second[-1] == {"role": "tool", "tool_call_id": "functions.calculator:0", "content": "42"}
    assert models.asked[0][1][0]["function"]["name"] == "calculator"
    assert rows_of(kept.messages, VISITOR).rows == shown


def test_a_cropped_picture_becomes_a_file_of_the_visitor(state: Path) -> None:
    call = ToolCall("functions.crop:0", "crop", '{"x1": 0, "y1": 0, "x2": 500, "y2": 500}', 0)
    desk, models = desk_of([call], [("text", "grey")])
    _, kept = answered(desk, ask(desk, "look closer", [upload(state)]), ("crop",))
    part = kept.messages[2]["content"][1]["image_url"]["url"]
    assert Path(part).is_relative_to(visitor_folder(VISITOR)) and Path(part).is_file()
    assert len(json.dumps(kept.messages)) < 5000  # no picture inside the text
    desk.models.script.append([("text", "again")])  # type: ignore[attr-defined]
    answered(desk, ask(desk, "and now?", id=kept.id), ("crop",))
    assert len(models.asked) == 3


def test_without_tools_none_are_offered(state: Path) -> None:
    desk, models = desk_of([("text", "x")])
    answered(desk, ask(desk, "hi"))
    assert models.asked[0][1] is None


def test_stop_keeps_what_was_said(state: Path) -> None:
    desk, _ = desk_of([("thinking", "a b"), ("text", "some")] + [lambda: time.sleep(0.002), ("text", " more")] * 5000)
    conversation = ask(desk, "go on")
    steps = desk.answer(VISITOR, conversation, "scripted", Settings(), ())
    next(steps)
    next(steps)
    assert desk.busy(VISITOR, conversation.id)
    with pytest.raises(ValueError, match="still being written"):
        ask(desk, "and?", id=conversation.id)
    threading.Timer(0.05, lambda: desk.halt(VISITOR, conversation.id)).start()
    rows = list(steps)[-1][0]
    assert rows[-1]["content"] == "*Stopped.*"
    kept = desk.history(VISITOR).read(conversation.id)
    assert kept.messages[-1]["moonkit"]["note"] == "stopped" and kept.messages[-1]["moonkit"]["usage"]
    assert not desk.busy(VISITOR, conversation.id) and not desk.halt(VISITOR, conversation.id)


def test_a_client_that_leaves_ends_the_model_and_keeps_the_words(state: Path) -> None:
    desk, models = desk_of([("thinking", "hm"), ("text", "some"), lambda: time.sleep(0.1)] + [("text", " more")] * 1000)
    conversation = ask(desk, "go on")
    steps = desk.answer(VISITOR, conversation, "scripted", Settings(), ())
    for _ in range(3):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert models.closed == 1 and not desk.busy(VISITOR, conversation.id)
    message = desk.history(VISITOR).read(conversation.id).messages[-1]
    assert message["reasoning_content"] == "hm" and message["moonkit"]["note"].startswith("stopped")


def test_a_server_that_ends_keeps_what_was_said(state: Path) -> None:
    desk, _ = desk_of([("text", "some"), lambda: time.sleep(0.1), ("text", " more"), ("text", " lost")])
    conversation = ask(desk, "go on")
    steps = desk.answer(VISITOR, conversation, "scripted", Settings(), ())
    for _ in range(3):
        next(steps)
    desk.close()
    message = desk.history(VISITOR).read(conversation.id).messages[-1]
    assert message["content"] == "some more" and "closed" in message["moonkit"]["note"]
    steps.close()  # type: ignore[attr-defined]
    assert len(desk.history(VISITOR).listed()[0]) == 1


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (ValueError("the prompt has 9 tokens and the context is 8"), "The prompt has 9 tokens and the context is 8."),
        (RuntimeError("out of memory\nsomewhere"), "The model failed: Out of memory somewhere."),
    ],
)
def test_an_error_in_the_middle_is_a_sentence_in_the_page(state: Path, error: Exception, note: str) -> None:
    desk, _ = desk_of([("text", "half"), error])
    rows, kept = answered(desk, ask(desk, "x"))
    assert rows[-1][-2]["content"] == "half" and rows[-1][-1]["content"] == f"*{note}*"
    assert kept.messages[-1]["content"] == "half"


def test_a_picture_whose_file_is_gone_is_said(state: Path) -> None:
    desk, models = desk_of([("text", "x")])
    conversation = ask(desk, "what?", [upload(state)])
    for path in (visitor_folder(VISITOR) / "media").iterdir():
        path.unlink()
    rows, _ = answered(desk, conversation)
    assert "file is gone" in rows[-1][0]["content"] and "gone from the disk" in rows[-1][-1]["content"]
    assert not models.asked


def test_an_answer_without_words_is_said_and_not_read_again(state: Path) -> None:
    desk, models = desk_of([("thinking", "hm")], [("text", "y")])
    rows, kept = answered(desk, ask(desk, "x"))
    assert "without a word" in rows[-1][-1]["content"]
    answered(desk, ask(desk, "again", id=kept.id))
    assert [message["role"] for message in models.asked[1][0]] == ["user", "user"]


def test_an_answer_that_cannot_be_kept_is_shown_all_the_same(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk, _ = desk_of([("text", "hello")])
    conversation = ask(desk, "x")
    monkeypatch.setattr("demo.history.MAX_BYTES", 10)
    monkeypatch.setattr(desk, "history", lambda visitor: chat.History(visitor_folder(visitor), max_bytes=10))
    rows = list(desk.answer(VISITOR, conversation, "scripted", Settings(), ()))[-1][0]
    assert rows[-2]["content"] == "hello" and "not kept" in rows[-1]["content"]


@pytest.mark.parametrize(
    "message", [None, "", {}, {"text": "  "}, {"text": None, "files": None}, {"text": "x" * 200_000}, 7, []]
)
def test_what_is_no_question_is_a_sentence(state: Path, message: Any) -> None:
    desk, _ = desk_of()
    with pytest.raises(ValueError, match=r"[A-Z].*\."):
        desk.take(message, VISITOR, "")
    assert desk.history(VISITOR).listed() == ([], [])


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "http://localhost/a.png", "a.png", ""])
def test_files_from_elsewhere_are_refused(state: Path, path: str) -> None:
    desk, _ = desk_of()
    with pytest.raises(ValueError, match=r"file|network"):
        ask(desk, "what?", [path])


def test_conversations_of_others_are_not_there(state: Path) -> None:
    desk, _ = desk_of([("text", "x")])
    conversation = ask(desk, "mine")
    with pytest.raises(ValueError, match="not here"):
        desk.take({"text": "theirs"}, "f" * 32, conversation.id)
    with pytest.raises(ValueError, match="not the name"):
        desk.take({"text": "theirs"}, VISITOR, f"../../{VISITOR}/conversations/{conversation.id}")


def test_what_the_model_saw_is_that_of_the_last_answer(state: Path) -> None:
    desk, _ = desk_of(THOUGHT, [("text", "b")])
    with pytest.raises(ValueError, match="no answer yet"):
        desk.last_seen(VISITOR, "")
    _, kept = answered(desk, ask(desk, "a"))
    _, kept = answered(desk, ask(desk, "b", id=kept.id))
    seen = desk.last_seen(VISITOR, kept.id)
    assert seen["reply_ids"] == [0] and seen["model"] == "scripted" and seen["tools"] is None
    assert [message["role"] for message in seen["messages"]] == ["user", "assistant", "user"]
    assert seen["settings"] == Settings()


def test_the_tests_of_a_question_are_run(state: Path) -> None:
    desk, _ = desk_of([("text", "```python\ndef f(x):\n    return x + 1\n```")])
    with pytest.raises(ValueError, match="no answer"):
        desk.test(VISITOR, "")
    _, kept = answered(desk, ask(desk, "write f.\nassert f(1) == 2\nassert f(2) == 4"))
    outcome = desk.test(VISITOR, kept.id)
    assert outcome.total == 2
    if outcome.isolation:  # where a sandbox works
        assert outcome.passed == 1


def test_outcomes_are_escaped() -> None:
    from evals.snippets import Outcome, Tried

    tried = (Tried("f('<b>') == 1", False, "gave <img src=x>", 0.1), Tried("g()", None, "not run"))
    shown = outcome_html(Outcome(0, 2, tried, "<i>", "0 of <2>", "<script>"))
    assert not re.search(r"<(b|img|i|script|2)>?", shown.replace("<br", "")) and "&lt;img" in shown


# ---- settings --------------------------------------------------------------------------------------------------------


def test_controls_become_settings() -> None:
    names = {profile: label for label, profile in PROFILES.items()}
    numbers = (0, " be brief ", 0.5, 0.9, 100, 7)
    own = settings_of(names[None], True, True, *numbers)
    assert own == Settings(0.5, 0.9, 100, None, 7, True, None, "be brief", None)
    assert settings_of(names["k2_7_code"], False, False, *numbers).thinking  # always
    assert settings_of(names["k2_6"], False, True, *numbers).preserve_thinking is True
    for wrong in ((0.5, "", 0, 1, 10, 1), (0, "", 0, 1, None, 1), (0, "", 0, 1, 10, 1.5)):
        with pytest.raises(ValueError, match="whole number"):
            settings_of(names[None], True, True, *wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chat format"):
        settings_of("nope", True, True, *numbers)


# ---- words -----------------------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.sampled_from("ab 1\n\\*_~<>[]()!&#;$`|-+=.:@/é\t"), max_size=60))
def test_what_was_typed_comes_back_from_an_edit(text: str) -> None:
    assert typed(plain(text)) == text.replace("\t", "    ")


@pytest.mark.parametrize(
    "text",
    ["<img src=x onerror=alert(1)>", "a <b>bold</b>", "<script>", "</div>", "<!-- x -->", "![x](http://a/b.png)"],
)
def test_nothing_typed_or_answered_becomes_html_or_a_picture(text: str) -> None:
    for shown in (plain(text), answer(text), answer(f"`code` {text}\n\n{text}"), answer(f"```\nx\n```\n{text}")):
        unescaped = re.sub(r"\\[<!\]\[]|&lt;", "", re.sub(r"`[^`]*`", "", shown))
        assert "<" not in unescaped and not re.search(r"!\[[^\]]*\]\(", unescaped)


def test_code_keeps_its_signs() -> None:
    block = "```python\nif a < b and c[0]: x = '&lt;'\n```"
    assert answer(block) == block and answer(block[:-4]) == block[:-4]  # also while it grows
    assert answer("use `a<b`") == "use `a<b`"
    assert answer("def f(x):\n    return x * x").startswith("```python\n")
    assert answer("<svg width='3'/>").startswith("```xml")
    assert fenced("``` inside").startswith("````")


def test_names_of_tools_are_escaped() -> None:
    call = {"id": "1", "function": {"name": "<b>*x*", "arguments": "{"}}
    title = rows_of([{"role": "assistant", "content": "", "tool_calls": [call]}], VISITOR).rows[0]["metadata"]["title"]
    assert "<" not in title and "*" not in title


def test_each_row_knows_its_message(state: Path) -> None:
    desk, _ = desk_of(THOUGHT)
    _, kept = answered(desk, ask(desk, "what is it?", [upload(state)]))
    page = rows_of(kept.messages, VISITOR)
    assert page.origin == [0, 0, 1, 1] and len(page.rows) == 4
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert [row["role"] for row in rows_of(twice, VISITOR).rows] == ["user", "assistant", "user"]
    assert for_model(kept.messages)[1].keys() == {"role", "content", "reasoning_content"}


# ---- the endpoint ----------------------------------------------------------------------------------------------------


def test_the_endpoint_reports_as_the_answer_grows() -> None:
    call = ToolCall("functions.calculator:0", "calculator", '{"expression": "6*7"}', 0)
    desk, _ = desk_of([("text", "let me see"), call], [("thinking", "so"), ("text", "4"), ("text", "2")])
    question = [{"role": "user", "content": "6*7?"}]
    made = list(reports(desk, "", Settings(), ["calculator"], question, ["a note"]))
    assert [report["over"] for report in made] == [False] * (len(made) - 1) + [True]
    final = made[-1]
    assert (final["text"], final["thinking"], final["model"], final["files"]) == ("42", "so", "scripted", ["a note"])
    assert final["calls"][0]["result"] == "42" and final["usage"]["rounds"] == 2
    json.dumps(made)


def test_arguments_of_the_endpoint_are_checked() -> None:
    assert settings_named({"seed": 3}) == Settings(seed=3) and settings_named(None) == Settings()
    assert texts([{"role": "user", "content": "x"}]) == [{"role": "user", "content": "x"}] and texts(None) == []
    assert tool_names(["crop"]) == ["crop"]
    for call, wrong in (
        (settings_named, {"sed": 3}),
        (settings_named, [1]),
        (texts, "x"),
        (texts, [{"role": "tool", "content": "x"}]),
        (texts, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]),
        (tool_names, ["shell"]),
    ):
        with pytest.raises(ValueError, match=r"\w+ must|needs|is called"):
            call(wrong)  # type: ignore[operator]


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_its_parts_and_names_nothing_elsewhere() -> None:
    page = build(Desk(Models(["nano", "untrained:tiny"]), Caps()))
    config = page.get_config_file()
    ids = {component["props"].get("elem_id") for component in config["components"]}
    wanted = "box input stop retry undo new history run-tests see settings".split()
    assert {f"chat-{name}" for name in wanted} <= ids
    public = {d["api_name"] for d in config["dependencies"] if d.get("api_visibility") == "public"}
    assert public == {"chat", "see", "compare", "benchmark"}
    queued = {d["api_name"]: d for d in config["dependencies"]}
    assert queued["chat"]["queue"] is not False
    theme = looks.theme()
    foreign = re.findall(r"https?://(?!www\.w3\.org)[^\s\"')]+", looks.css() + looks.HEAD + str(theme._stylesheets))
    assert not foreign and "@import" not in looks.css() and "@font-face" not in str(theme._font_css)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.source], ids=lambda e: e.label)
def test_nano_answers_the_examples_right(example: Any, models: Models) -> None:
    made = sample_of(example)
    turn = made.turns[example.source[2]]
    assert (turn.question, turn.answer) == (example.question, example.right) and made.split == "heldout"
    assert example.icon.is_file() and (example.file is None or example.file.is_file())
    if example.file and example.file.suffix == ".png":
        assert np.array_equal(np.asarray(Image.open(example.file).convert("RGB")), made.media[0].pixels)  # type: ignore[union-attr]
    desk = Desk(models, Caps())
    kind = "video_url" if example.file and example.file.suffix == ".mp4" else "image_url"
    parts: list[Any] = [{"type": kind, kind: {"url": str(example.file)}}] if example.file else []
    content = [*parts, {"type": "text", "text": example.question}] if parts else example.question
    final = list(reports(desk, "", Settings(), list(example.tools), [{"role": "user", "content": content}], []))[-1]
    assert final["text"].strip() == example.right


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["nano"])


def test_the_photo_promises_nothing() -> None:
    photo = next(example for example in EXAMPLES if example.file and example.file.suffix == ".jpg")
    assert photo.right is None and "noise" in photo.label and photo.icon.is_file()


# ---- the server ------------------------------------------------------------------------------------------------------


def test_a_taken_port_gives_the_next() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with listen("127.0.0.1", port) as second:
            assert port < second.getsockname()[1] <= port + 50
    with pytest.raises(ValueError, match="65535"):
        listen("127.0.0.1", 70_000)
    with pytest.raises(ValueError, match=r"no address|no free port"):
        listen("203.0.113.7", 8123)


def test_the_page_is_for_this_machine_alone_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Demo()
    assert settings.host == "127.0.0.1" and not settings.share
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not has_screen()
    with listen(settings.host, 0) as listening:
        assert listening.family == socket.AF_INET and listening.getsockname()[0] == "127.0.0.1"
    assert replace(settings, share=True).share
