"""The tab "Chat": pictures, clips and words in, a thought and an answer out, piece by piece.

    box ─ take ─ guard.admit ─ history (disk) ─ answer ─ converse(Models.stream, tools) ─ rows of the chat
                                   ^                                        │
                                   └────────── what was said so far ────────┘   also when stopped, failed or left

    build(desk)  inside gr.Blocks; the button `see` of its result is for the tab "What the model sees"

What a conversation is stands on disk. The browser sends the id of one, never its messages.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.examples import EXAMPLES, PHOTOS, Example
from demo.examples import FOLDER as EXAMPLE_FOLDER
from demo.guard import Caps, admit, check_room, escape, uploads, visitor_folder, visitor_of
from demo.history import Conversation, History, title_of
from demo.models import PROFILES, Models, Settings
from demo.pieces import asked, sentence
from demo.shown import Row, note, parts_of, rows_of, shown_file, thinking, tool_call, tool_result, typed

if TYPE_CHECKING:
    import gradio as gr

    from agent.tools import Tool
    from evals.snippets import Outcome

log = logging.getLogger(__name__)

AT_ONCE = 4  # answers that take turns; more wait in the queue
PIECES_PER_SECOND = 15.0  # how often the page hears of an answer that grows
PUBLIC = (EXAMPLE_FOLDER, PHOTOS)  # folders of examples
TOOLS = {"calculator": "calculator", "crop a picture": "crop", "Python (sandbox)": "python"}
ALWAYS_THINKS = ("k2_7_code",)
NEVER_THINKS = ("k2", "kimi_vl")

# on a phone the settings lie below everything: folded, so that the page is not five screens long
ON_LOAD = """() => {
  if (window.innerWidth < 700)
    document.querySelectorAll('#chat-settings button.label-wrap.open').forEach((button) => button.click());
  return [location.hash.slice(1)];
}"""

EMPTY = """### Show it a picture or a clip, and ask

Drop, paste or choose files below, or begin with one of these:"""


# ---- an answer, as it comes ------------------------------------------------------------------------------------------


@dataclass
class Block:
    """One part of an answer: a thought, words, or a call with what came of it."""

    kind: str  # "thinking", "text" or "call"
    text: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    round: int = 0
    tokens: int | None = None
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None


class Reading:
    """What came of an answer so far; its rows for the page, and its messages for the disk.

    Feed it the events of agent.converse; `heard` with each reply of the model tells it the exact numbers.
    """

    def __init__(self, visitor: str, caps: Caps) -> None:
        self.visitor, self.caps = visitor, caps
        self.blocks: list[Block] = []
        self.replies: list[Any] = []
        self.ended: Sequence[dict[str, Any]] = ()
        self.note = ""
        self.finish = ""
        self.began = time.monotonic()

    def heard(self, reply: Any) -> None:
        """A reply of the model is whole; more may follow after its tool calls."""
        for block in self.blocks:
            if block.round == len(self.replies) and block.kind == "thinking":
                block.tokens = reply.usage.thinking_tokens
        self._close()
        self.replies.append(reply)

    def feed(self, event: Any) -> None:
        if event.kind in ("thinking", "text"):
            last = self.blocks[-1] if self.blocks else None
            if last is None or last.kind != event.kind or last.round != len(self.replies):
                self._close()
                self.blocks.append(Block(event.kind, round=len(self.replies)))
            self.blocks[-1].text += event.delta
        elif event.kind == "call":
            self._close()
            function = {"name": event.call.name, "arguments": event.call.arguments}
            call = {"id": event.call.id, "type": "function", "function": function}
            # the reply that made the call has been heard already
            self.blocks.append(Block("call", call=call, round=len(self.replies) - 1))
        elif event.kind == "result":
            block = next(b for b in reversed(self.blocks) if b.kind == "call" and b.call["id"] == event.call.id)
            content = _kept(event.result, self.visitor, self.caps)
            about = {"ok": event.ok, "seconds": round(event.seconds, 2)}
            block.result = {"role": "tool", "tool_call_id": event.call.id, "content": content, "moonkit": about}
            block.seconds = event.seconds
        elif event.kind == "end":
            self._close()
            self.ended, self.finish = event.messages, event.finish_reason or ""

    def _close(self) -> None:
        if self.blocks and self.blocks[-1].kind == "thinking" and self.blocks[-1].seconds is None:
            self.blocks[-1].seconds = time.monotonic() - self.blocks[-1].began

    def rows(self) -> list[Row]:
        """What the page shows while the answer grows."""
        from demo.shown import answer

        out: list[Row] = []
        for block in self.blocks:
            if block.kind == "thinking" and block.text.strip():
                out.append(thinking(block.text, block.tokens, block.seconds))
            elif block.kind == "text" and block.text.strip():
                out.append({"role": "assistant", "content": answer(block.text)})
            elif block.kind == "call":
                out.append(tool_call(block.call, pending=block.result is None))
                if block.result is not None:
                    out += tool_result(block.result, self.visitor)
        if not out:
            about = {"title": "Reading the prompt", "status": "pending"}
            out.append({"role": "assistant", "content": "", "metadata": about})
        return out

    def messages(self) -> list[dict[str, Any]]:
        """What is kept: one assistant message for each round, and the results of its calls."""
        rounds = max((block.round for block in self.blocks), default=0) + 1
        out: list[dict[str, Any]] = []
        for number in range(max(rounds, len(self.replies))):
            mine = [block for block in self.blocks if block.round == number]
            message: dict[str, Any] = {
                "role": "assistant",
                "content": "".join(block.text for block in mine if block.kind == "text"),
                "reasoning_content": "".join(block.text for block in mine if block.kind == "thinking"),
            }
            about: dict[str, Any] = {}
            thoughts = [block for block in mine if block.kind == "thinking"]
            if thoughts:
                about["thinking_seconds"] = round(sum(b.seconds or time.monotonic() - b.began for b in thoughts), 2)
                about["thinking_tokens"] = thoughts[-1].tokens
            if number < len(self.replies):
                reply = self.replies[number]
                about |= {"ids": list(reply.ids), "usage": asdict(reply.usage), "finish": reply.finish_reason}
            # a call without its result would be a question that nobody answers
            calls = [block for block in mine if block.kind == "call" and block.result is not None]
            if calls:
                message["tool_calls"] = [block.call for block in calls]
            out.append(message | {"moonkit": about})
            out += [block.result for block in calls if block.result is not None]
        if self.note:
            if out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": "", "moonkit": {}})
            out[-1]["moonkit"]["note"] = self.note
        return out


def _kept(content: Any, visitor: str, caps: Caps) -> Any:
    """A tool's result with its pictures as files of the visitor."""
    if isinstance(content, str):
        return content
    out = []
    for part in content:
        source = part.get("image_url")
        source = source.get("url") if isinstance(source, dict) else source
        if isinstance(source, str) and source.startswith("data:"):
            import base64

            passing = uploads() / f"tool-{secrets.token_hex(8)}.png"
            passing.write_bytes(base64.b64decode(source.partition(",")[2]))
            try:
                part = {"type": "image_url", "image_url": {"url": str(admit(passing, visitor, caps).path)}}
            finally:
                passing.unlink(missing_ok=True)
        out.append(part)
    return out


def for_model(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a model reads them. Raises ValueError when a picture or clip of theirs is gone."""
    out = []
    for message in messages:
        media, text = parts_of(message)
        for kind, path in media:
            if not Path(path).is_file():
                what = "picture" if kind == "image" else "clip"
                raise ValueError(
                    f"a {what} of this conversation is gone from the disk, so the model cannot read on; "
                    "edit the message that showed it, or start a new conversation"
                )
        if message["role"] == "assistant" and not text and not message.get("tool_calls"):
            continue  # stopped before its first word
        out.append({key: value for key, value in message.items() if key != "moonkit"})
    return out


def last_question(messages: Sequence[dict[str, Any]]) -> int | None:
    """Index of the last message of the user, or None."""
    return next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "user"), None)


# ---- the page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """What the rest of the page may use of this tab.

    see: the button "See what the model saw"; current: the id of the open conversation; remark: where a sentence can
    stand. on_load: wires what happens when the page is opened.
    """

    see: "gr.Button"
    current: "gr.Textbox"
    remark: "gr.HTML"
    on_load: Callable[["gr.Blocks"], None]


@dataclass
class Answering:
    """An answer that is being written. stop: set it to end it; done: set when it has ended and is on disk.

    keep: writes what was said so far, with a note; for a server that ends while it is being written.
    """

    keep: Callable[[str], Conversation]
    stop: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class Desk:
    """Who is answered now, and whose conversations lie where. No component of the page is known here."""

    def __init__(self, models: Models, caps: Caps) -> None:
        self.models, self.caps = models, caps
        self._mutex = threading.Lock()
        self._answering: dict[tuple[str, str], Answering] = {}

    def history(self, visitor: str) -> History:
        return History(visitor_folder(visitor))

    def begin(self, visitor: str, id: str, keep: Callable[[str], Conversation]) -> Answering:
        """Raises ValueError when this conversation is being answered already, perhaps in another tab."""
        with self._mutex:
            if (visitor, id) in self._answering:
                raise ValueError("an answer is still being written here; wait for its end or stop it")
            return self._answering.setdefault((visitor, id), Answering(keep))

    def end(self, visitor: str, id: str) -> None:
        with self._mutex:
            answering = self._answering.pop((visitor, id), None)
        if answering:
            answering.done.set()

    def busy(self, visitor: str, id: str) -> bool:
        with self._mutex:
            return (visitor, id) in self._answering

    def halt(self, visitor: str, id: str, seconds: float = 15.0) -> bool:
        """Stop an answer, and wait until what it said is on disk; whether there was one."""
        with self._mutex:
            answering = self._answering.get((visitor, id))
        if answering is None:
            return False
        answering.stop.set()
        answering.done.wait(seconds)
        return True

    def close(self) -> None:
        """Keep what is being said in all conversations, and end it: the server goes down."""
        with self._mutex:
            left = list(self._answering.values())
        for answering in left:
            answering.stop.set()
            try:
                answering.keep("stopped: the server was closed")
            except (ValueError, OSError) as error:
                log.warning("an answer was not kept: %s", error)

    # ---- turns -------------------------------------------------------------------------------------------------------

    def take(self, message: Any, visitor: str, id: str) -> Conversation:
        """Add what a visitor says to a conversation, or begin one. Raises ValueError with one sentence."""
        parts, _ = asked(message, visitor, self.caps)
        check_room(visitor, 100_000, self.caps)
        history = self.history(visitor)
        conversation = history.read(id) if id else Conversation()
        if self.busy(visitor, conversation.id):
            raise ValueError("an answer is still being written here; wait for its end or stop it")
        content: Any = parts if len(parts) > 1 else parts[0]["text"]
        messages = (*conversation.messages, {"role": "user", "content": content})
        title = conversation.title if conversation.messages else title_of(messages)
        return history.write(replace(conversation, messages=messages, title=title))

    def answer(
        self, visitor: str, conversation: Conversation, model: str, settings: Settings, tools: Sequence[str]
    ) -> Iterator[tuple[list[Row], Conversation | None]]:
        """Answer the last question of a conversation; its rows as they grow, and at the end the conversation kept.

        What was said so far is kept however it ends: stopped, failed, or the generator closed by a client that left.
        """
        from agent.converse import converse

        reading = Reading(visitor, self.caps)
        about = {"model": model, **asdict(settings), "tools": list(tools)}
        closing = threading.Event()

        def keep(note: str = "") -> Conversation:
            if closing.is_set():
                return conversation
            if note:
                closing.set()
                reading.note = note
            messages = (*conversation.messages, *reading.messages())
            return self.history(visitor).write(replace(conversation, messages=messages, settings=about))

        answering = self.begin(visitor, conversation.id, keep)
        kept = conversation
        before = rows_of(conversation.messages, visitor).rows
        try:
            yield [*before, *reading.rows()], None
            try:
                messages = for_model(conversation.messages)
                known = self.tools(model, tools, messages)

                def stream(messages: list[dict[str, Any]], specifications: list[dict[str, Any]]) -> Iterator[Any]:
                    events = self.models.stream(model, messages, specifications or None, settings, answering.stop)
                    for event in events:
                        if event.kind == "end":
                            reading.heard(event.reply)
                            if answering.stop.is_set():
                                over.set()
                        yield event

                shown = 0.0
                # the model ends by itself when told to stop, with numbers; its tools end by `over`
                over = threading.Event()
                for event in converse(stream, messages, known, stop=over):
                    if event.kind in ("call", "wait", "result") and answering.stop.is_set():
                        over.set()
                    reading.feed(event)
                    now = time.monotonic()
                    if event.kind in ("call", "result") or now - shown > 1 / PIECES_PER_SECOND:
                        shown = now
                        yield [*before, *reading.rows()], None
                reading.note = self._note(reading, answering)
            except ValueError as error:
                reading.note = sentence(error)
            except (RuntimeError, MemoryError, OSError) as error:  # of torch, most often: too little memory
                log.exception("an answer of %s failed", model)
                reading.note = f"the model failed: {sentence(error)}"
        except GeneratorExit:
            reading.note = "stopped: the page was left, or another conversation opened"
            raise
        finally:
            try:
                kept = keep()
                failure = ""
            except (ValueError, OSError) as error:
                failure = sentence(error)
            finally:
                self.end(visitor, conversation.id)
        rows = rows_of([*conversation.messages, *reading.messages()], visitor).rows
        if failure:
            rows.append(note(f"This answer is not kept: {failure}"))
        yield rows, kept

    def _note(self, reading: Reading, answering: Answering) -> str:
        reply = reading.replies[-1] if reading.replies else None
        if answering.stop.is_set():
            return "stopped"
        if reply is not None and reply.finish_reason == "halted":
            return f"stopped: an answer may take {self.models.wall_s:g} s here"
        if reading.finish == "length":
            return "cut off: the answer reached its number of tokens, or the end of the model's context"
        if reading.finish == "rounds":
            return "stopped: the model went on calling tools"
        return ""

    def tools(self, model: str, names: Sequence[str], messages: Sequence[dict[str, Any]]) -> "list[Tool]":
        from agent import tools

        made: list[Tool] = []
        if "calculator" in names:
            made.append(tools.calculator())
        if "crop" in names:
            from moonvit.image import load_image

            made.append(tools.crop(tools.pictures(messages), load_image))
        if "python" in names:
            made.append(tools.python())
        if made and self.models.kimi(model).config.text.vocab_size < 10_000:
            # small models of our own recipe were trained on specifications without descriptions, and know no others
            made = [replace(tool, specification=_bare(tool.specification)) for tool in made]
        return made

    def last_seen(self, visitor: str, id: str) -> dict[str, Any]:
        """The last answer, for the tab that shows what the model saw. Raises ValueError when there is none."""
        conversation = self.history(visitor).read(id) if id else Conversation()
        for index in range(len(conversation.messages) - 1, -1, -1):
            message = conversation.messages[index]
            ids = (message.get("moonkit") or {}).get("ids")
            if message["role"] == "assistant" and ids:
                model = str(conversation.settings.get("model") or "")
                settings, tools = settings_from(conversation.settings)
                before = for_model(conversation.messages[:index])
                specifications = [tool.specification for tool in self.tools(model, tools, before)]
                return {
                    "messages": before,
                    "reply_ids": list(ids),
                    "model": model,
                    "settings": settings,
                    "tools": specifications or None,
                }
        raise ValueError("there is no answer yet: ask something first, then look at what the model saw")

    def test(self, visitor: str, id: str) -> "Outcome":
        """Run the tests of the last answer's program. Raises ValueError when there is no answer."""
        from evals.snippets import run_tests, tests_of

        conversation = self.history(visitor).read(id) if id else Conversation()
        at = last_question(conversation.messages)
        if at is None or at + 1 == len(conversation.messages):
            raise ValueError("there is no answer yet whose program could be tested")
        _, question = parts_of(conversation.messages[at])
        said = [parts_of(message)[1] for message in conversation.messages[at + 1 :] if message["role"] == "assistant"]
        tests = tests_of(question)
        if not len(tests):
            known = next(
                (e for e in EXAMPLES if e.question == question and e.source and e.source[0] == "function"), None
            )
            if known and known.source:
                tests = tests_of(question, "world/{}/{}/heldout/7/1/{}".format(*known.source))
        return run_tests("\n".join(said), tests)


def _bare(specification: dict[str, Any]) -> dict[str, Any]:
    function = specification["function"] | {"description": ""}
    properties = {
        name: {key: value for key, value in schema.items() if key != "description"}
        for name, schema in function["parameters"]["properties"].items()
    }
    function["parameters"] = function["parameters"] | {"properties": properties}
    return specification | {"function": function}


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_of(
    profile: str,
    thinks: bool,
    preserve: bool,
    budget: float | None,
    system: str,
    temperature: float,
    top_p: float,
    max_new_tokens: float,
    seed: float,
) -> Settings:
    """What the page's controls say. Raises ValueError with one sentence for what is no number or no format."""
    if profile not in PROFILES:
        raise ValueError(f"no chat format {profile!r}; there are: {', '.join(PROFILES)}")
    form = PROFILES[profile]
    whole = {"thinking budget": budget or 0, "longest answer": max_new_tokens, "seed": seed}
    for name, value in whole.items():
        if value is None or isinstance(value, bool) or value != int(value):
            raise ValueError(f"the {name} must be a whole number, got {value!r}")
    return Settings(
        temperature=float(temperature),
        top_p=float(top_p),
        max_new_tokens=int(max_new_tokens),
        thinking_budget=int(budget) if budget else None,
        seed=int(seed),
        thinking=True if form in ALWAYS_THINKS else bool(thinks),
        preserve_thinking=bool(preserve) if form == "k2_6" else None,
        system=system.strip(),
        profile=form,
    )


def settings_from(values: dict[str, Any]) -> tuple[Settings, list[str]]:
    """Settings and names of tools, from what a conversation keeps. Unknown values are left out."""
    known = {name: values[name] for name in Settings.__dataclass_fields__ if name in values}
    tools = values.get("tools")
    return Settings(**known), [name for name in tools if name in TOOLS.values()] if isinstance(tools, list) else []


def outcome_html(outcome: "Outcome") -> str:
    """What came of the tests, as a small table. Everything in it is escaped."""
    from html import escape

    rows = "".join(
        f'<tr class="{"ok" if t.ok else "no" if t.ok is False else "left"}">'
        f"<td>{'passed' if t.ok else 'failed' if t.ok is False else 'not run'}</td>"
        f"<td><code>{escape(t.source)}</code></td>"
        f"<td>{escape(t.what) if not t.ok else ''}</td><td>{t.seconds:.2f} s</td></tr>"
        for t in outcome.tests
    )
    table = f"<table><tbody>{rows}</tbody></table>" if rows else ""
    output = f"<pre>{escape(outcome.output)}</pre>" if outcome.output else ""
    where = f" Run in a sandbox ({escape(outcome.isolation)})." if outcome.isolation else ""
    state = "ok" if outcome.right else "no" if outcome.total and outcome.isolation else ""
    return f'<div class="mk mk-tests {state}" role="status"><p>{escape(outcome.note)}{where}</p>{table}{output}</div>'


# ---- components and events -------------------------------------------------------------------------------------------


def build(desk: Desk) -> Chat:
    """The tab, inside gr.Blocks."""
    import gradio as gr

    models, caps = desk.models, desk.caps
    with gr.Row(elem_id="chat-page", equal_height=False):
        with gr.Column(scale=1, min_width=230, elem_id="chat-side"):
            new = gr.Button("New conversation", elem_id="chat-new", variant="secondary", size="md")
            listed = gr.Radio([], label="Conversations", elem_id="chat-history", container=False)
            # Gradio would refuse every choice of a page that was opened before the server was started again
            listed.preprocess = lambda payload: payload if isinstance(payload, str) else ""
            nothing = gr.HTML(
                '<p class="mk-quiet">No conversation yet. They are kept on the machine that serves this page.</p>',
                elem_id="chat-none",
                padding=False,
            )
            with gr.Accordion("Rename or delete", open=False, elem_id="chat-manage"):
                title = gr.Textbox(label="Title of the open conversation", max_lines=1, max_length=200)
                with gr.Row():
                    rename = gr.Button("Rename", size="sm")
                    delete = gr.Button("Delete", size="sm", variant="stop", elem_id="chat-delete")
        with gr.Column(scale=4, min_width=320, elem_id="chat-main"):
            box = gr.Chatbot(
                elem_id="chat-box",
                label="Conversation",
                show_label=False,
                height="62vh",
                min_height=360,
                editable="user",
                buttons=["copy"],
                feedback_options=None,
                layout="bubble",
                # grouped, Gradio could edit no message that has a file beside it; the style sheet joins them
                group_consecutive_messages=False,
                allow_tags=False,
                sanitize_html=True,
                placeholder=EMPTY,
                examples=[_shown_example(example) for example in EXAMPLES],
                autoscroll=True,
            )
            entry = gr.MultimodalTextbox(
                elem_id="chat-input",
                label="Your message",
                show_label=False,
                file_types=["image", "video"],
                file_count="multiple",
                sources=["upload"],
                placeholder="Ask; add pictures or clips",
                lines=1,
                max_lines=12,
                max_plain_text_length=caps.text_chars,
                autofocus=True,
                html_attributes=gr.InputHTMLAttributes(autocorrect="off", autocapitalize="off"),
            )
            with gr.Row(elem_id="chat-buttons"):
                idle: dict[str, Any] = {"size": "sm", "interactive": False}
                stop = gr.Button("Stop", elem_id="chat-stop", variant="stop", min_width=80, **idle)
                retry = gr.Button("Retry", elem_id="chat-retry", min_width=80, **idle)
                undo = gr.Button("Undo", elem_id="chat-undo", min_width=80, **idle)
                test = gr.Button("Run the tests", elem_id="chat-run-tests", min_width=120, **idle)
                see = gr.Button("See what the model saw", elem_id="chat-see", min_width=180, **idle)
            # below what is pressed: a sentence that comes and goes moves nothing that is in use
            remark = gr.HTML(elem_id="chat-remark", padding=False)
            tested = gr.HTML(elem_id="chat-tests", padding=False)
            with gr.Accordion("Camera", open=False, elem_id="chat-camera"):
                camera = gr.Image(
                    sources=["webcam"], label="Take a picture; it joins your message", height=260, buttons=[]
                )
                # Gradio would decode the picture in this process; here it is only handed on, and examined with the rest
                camera.preprocess = lambda payload: payload.path if payload is not None else None
        with gr.Column(scale=1, min_width=270, elem_id="chat-settings"):
            controls = _controls(models)
    current = gr.Textbox(visible=False, elem_id="chat-current", label="id of the open conversation")
    go = gr.Textbox(visible=False, elem_id="chat-go", label="whether a question waits")

    # ---- what they do

    def shelf(visitor: str, id: str) -> tuple[Any, Any, str]:
        """The list of conversations, whether it is empty, and what could not be read."""
        kept, notes = desk.history(visitor).listed()
        choices = [(f"{c.title}", c.id) for c in kept]
        value = id if any(c.id == id for c in kept) else None
        return gr.update(choices=choices, value=value), gr.update(visible=not kept), " ".join(map(sentence, notes))

    def shown(visitor: str, conversation: Conversation | None) -> list[Row]:
        return rows_of(conversation.messages, visitor).rows if conversation else []

    buttons = [stop, retry, undo, test, see]

    def usable(conversation: Conversation | None, busy: bool = False) -> list[Any]:
        """The buttons, each to be pressed only when it would do something."""
        messages = conversation.messages if conversation else ()
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        states = [busy, bool(messages) and not busy, bool(messages) and not busy, answered, answered]
        return [gr.update(interactive=state) for state in states]

    opened = [box, current, listed, nothing, title, remark, tested, *buttons, *controls]

    def open_one(id: str, request: gr.Request) -> list[Any]:
        visitor = visitor_of(request)
        desk.history(visitor).sweep(visitor_folder(visitor) / "media")
        conversation, said = None, ""
        if id:
            try:
                conversation = desk.history(visitor).read(id)
            except ValueError as error:
                said = sentence(error)
        choices, none, notes = shelf(visitor, conversation.id if conversation else "")
        return [
            shown(visitor, conversation),
            conversation.id if conversation else "",
            choices,
            none,
            conversation.title if conversation else "",
            remark_of(" ".join(filter(None, (said, notes)))),
            "",
            *usable(conversation, conversation is not None and desk.busy(visitor, conversation.id)),
            *(_restored(conversation.settings, models) if conversation else [gr.skip()] * len(controls)),
        ]

    def open_none(request: gr.Request) -> list[Any]:
        return open_one("", request)

    def take(message: Any, id: str, model: str, request: gr.Request) -> list[Any]:
        visitor = visitor_of(request)
        try:
            conversation = desk.take(message, visitor, id)
        except ValueError as error:
            return [
                gr.skip(),
                gr.skip(),
                id,
                "",
                gr.skip(),
                gr.skip(),
                gr.skip(),
                remark_of(sentence(error)),
                gr.skip(),
            ]
        choices, none, notes = shelf(visitor, conversation.id)
        said = notes
        if models.path(model).startswith("untrained:"):
            said = f"{model} has random weights, so its answers mean nothing. {notes}".strip()
        elif not models.loaded(model):
            said = f"The model {model} is being loaded; the answer follows. {notes}".strip()
        rows = shown(visitor, conversation)
        empty = {"text": "", "files": []}
        keys = usable(conversation, True)
        return [rows, empty, conversation.id, "go", choices, none, conversation.title, remark_of(said), "", *keys]

    taken = [box, entry, current, go, listed, nothing, title, remark, tested, *buttons]

    def respond(
        id: str,
        go: str,
        model: str,
        tools: list[str],
        profile: str,
        thinks: bool,
        preserve: bool,
        budget: float,
        system: str,
        temperature: float,
        top_p: float,
        most: float,
        seed: float,
        request: gr.Request,
    ) -> Iterator[Any]:
        visitor = visitor_of(request)
        conversation = None
        still = [gr.skip()] * 9
        if not go or not id:
            yield still
            return
        try:
            conversation = desk.history(visitor).read(id)
            settings = settings_of(profile, thinks, preserve, budget, system, temperature, top_p, most, seed)
            models.path(model)
            answers = desk.answer(visitor, conversation, model, settings, [TOOLS[name] for name in tools or ()])
            for rows, kept in answers:
                if kept is None:
                    yield [rows, *still[1:]]
                    continue
                choices, _, notes = shelf(visitor, kept.id)
                yield [rows, kept.id, choices, remark_of(notes), *usable(kept)]
        except ValueError as error:
            keys = [gr.skip()] * 5 if desk.busy(visitor, id) else usable(conversation)
            yield [*still[:3], remark_of(sentence(error)), *keys]

    def back(id: str, visitor: str, keep: Callable[[Conversation, int], Conversation]) -> Conversation:
        """The open conversation, cut at its last question by `keep`. Raises ValueError when there is none."""
        conversation = desk.history(visitor).read(id) if id else Conversation()
        at = last_question(conversation.messages)
        if at is None:
            raise ValueError("nothing has been asked yet")
        if desk.busy(visitor, id):
            raise ValueError("an answer is still being written here; wait for its end or stop it")
        return desk.history(visitor).write(keep(conversation, at))

    def again(id: str, request: gr.Request) -> list[Any]:
        visitor = visitor_of(request)
        try:
            conversation = back(id, visitor, lambda c, at: replace(c, messages=c.messages[: at + 1]))
        except ValueError as error:
            return [gr.skip(), gr.skip(), "", remark_of(sentence(error)), *[gr.skip()] * 6]
        return [shown(visitor, conversation), conversation.id, "go", remark_of(""), "", *usable(conversation, True)]

    def edited(id: str, change: gr.EditData, request: gr.Request) -> list[Any]:
        visitor = visitor_of(request)
        text = typed(str(change.value)).strip()
        index: Any = change.index[0] if isinstance(change.index, list | tuple) else change.index

        def keep(conversation: Conversation, _: int) -> Conversation:
            origin = rows_of(conversation.messages, visitor).origin
            if not isinstance(index, int) or not 0 <= index < len(origin):
                raise ValueError("this message is not here any more; reload the page")
            at = origin[index]
            message = conversation.messages[at]
            if message["role"] != "user":
                raise ValueError("only your own messages can be changed")
            if not text:
                raise ValueError("a message needs words; use Undo to take it back")
            if len(text) > caps.text_chars:
                raise ValueError(f"the message has {len(text):,} characters; at most {caps.text_chars:,} are read")
            media = parts_of(message)[0]
            parts = [part for part in message["content"] if part.get("type") != "text"] if media else []
            content = [*parts, {"type": "text", "text": text}] if parts else text
            return replace(conversation, messages=(*conversation.messages[:at], message | {"content": content}))

        try:
            conversation = back(id, visitor, keep)
        except ValueError as error:
            rows = shown(visitor, desk.history(visitor).read(id)) if id else []
            return [rows, gr.skip(), "", remark_of(sentence(error)), *[gr.skip()] * 6]
        return [shown(visitor, conversation), conversation.id, "go", remark_of(""), "", *usable(conversation, True)]

    def taken_back(id: str, request: gr.Request) -> list[Any]:
        visitor = visitor_of(request)
        undone: dict[str, Any] = {}

        def keep(conversation: Conversation, at: int) -> Conversation:
            media, text = parts_of(conversation.messages[at])
            files = [shown_file(path, visitor) for _, path in media]
            undone.update(text=text, files=[file for file in files if file])
            return replace(conversation, messages=conversation.messages[:at])

        try:
            conversation = back(id, visitor, keep)
            if not conversation.messages:
                desk.history(visitor).delete(conversation.id)
        except ValueError as error:
            return [*[gr.skip()] * 5, remark_of(sentence(error)), *[gr.skip()] * 6]
        left = conversation.id if conversation.messages else ""
        choices, none, notes = shelf(visitor, left)
        rows, keys = shown(visitor, conversation), usable(conversation)
        return [rows, left, choices, none, undone, remark_of(notes), "", *keys]

    def halted(id: str, request: gr.Request) -> list[Any]:
        visitor = visitor_of(request)
        if not id:
            return [gr.skip(), remark_of("Nothing is being answered."), *usable(None)]
        ran = desk.halt(visitor, id)
        try:
            conversation = desk.history(visitor).read(id)
        except ValueError as error:
            return [gr.skip(), remark_of(sentence(error)), *usable(None)]
        said = "" if ran else "It had not begun to answer; Retry asks again."
        return [shown(visitor, conversation), remark_of(said), *usable(conversation)]

    def begin_example(picked: gr.SelectData) -> list[Any]:
        index = picked.index if isinstance(picked.index, int) else -1
        if not 0 <= index < len(EXAMPLES):
            return [gr.skip(), gr.skip()]
        example = EXAMPLES[index]
        files = [str(example.file)] if example.file else []
        names = [name for name, tool in TOOLS.items() if tool in example.tools]
        return [{"text": example.question, "files": files}, names]

    def run_them(id: str, request: gr.Request) -> Iterator[Any]:
        yield '<div class="mk mk-tests" role="status"><p>Running the tests in the sandbox ...</p></div>'
        try:
            yield outcome_html(desk.test(visitor_of(request), id))
        except (ValueError, OSError) as error:
            yield f'<div class="mk mk-tests" role="status"><p>{escape(sentence(error))}</p></div>'

    def renamed(id: str, title: str, request: gr.Request) -> list[Any]:
        visitor = visitor_of(request)
        try:
            desk.history(visitor).rename(id, title)
            said = ""
        except ValueError as error:
            said = sentence(error)
        choices, none, notes = shelf(visitor, id)
        return [choices, none, remark_of(said or notes)]

    def deleted(id: str, request: gr.Request) -> list[Any]:
        visitor = visitor_of(request)
        said = "There is no open conversation to delete."
        if id:
            desk.halt(visitor, id)
            try:
                desk.history(visitor).delete(id)
                said = "Deleted, with its pictures and clips."
            except ValueError as error:
                said = sentence(error)
        out = open_one("", request)
        out[5] = remark_of(said)
        return out

    def photographed(picture: str | None, message: Any) -> list[Any]:
        if not picture:
            return [gr.skip(), gr.skip()]
        message = message or {}
        return [{"text": message.get("text") or "", "files": [*(message.get("files") or ()), picture]}, None]

    model, tools, *numbers = controls
    asking = [current, go, model, tools, *numbers]
    answered = [box, current, listed, remark, *buttons]
    slow: dict[str, Any] = {
        "concurrency_id": "model",
        "concurrency_limit": AT_ONCE,
        "show_progress": "minimal",
        "show_progress_on": [box],
        "api_visibility": "private",
    }
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}

    def then_answer(event: Any) -> Any:
        return event.then(respond, asking, answered, **slow)

    address = "(...all) => { history.replaceState(null, '', all[0] ? '#' + all[0] : location.pathname); }"
    asked_again = [box, current, go, remark, tested, *buttons]
    answers = [
        then_answer(entry.submit(take, [entry, current, model], taken, **quick)),
        then_answer(retry.click(again, [current], asked_again, **quick)),
        then_answer(box.edit(edited, [current], asked_again, **quick)),
        then_answer(
            box.example_select(begin_example, None, [entry, tools], **quick).then(
                take, [entry, current, model], taken, **quick
            )
        ),
    ]
    current.change(None, [current], None, js=address, api_visibility="private")
    undo.click(taken_back, [current], [box, current, listed, nothing, entry, remark, tested, *buttons], **quick)
    stop.click(halted, [current], [box, remark, *buttons], cancels=answers, **quick)
    new.click(open_none, None, opened, cancels=answers, **quick)
    listed.input(open_one, [listed], opened, cancels=answers, **quick)
    rename.click(renamed, [current, title], [listed, nothing, remark], **quick)
    delete.click(deleted, [current], opened, cancels=answers, **quick)
    test.click(run_them, [current], [tested], show_progress="hidden", api_visibility="private", concurrency_limit=2)
    camera.input(photographed, [camera, entry], [entry, camera], **quick)

    def on_load(page: "gr.Blocks") -> None:
        page.load(open_one, [current], opened, js=ON_LOAD, **quick)

    return Chat(see, current, remark, on_load)


def _controls(models: Models) -> "list[Any]":
    """Model, tools, and the numbers, in the order of `settings_of`."""
    import gradio as gr

    with gr.Accordion("Model and thinking", open=True):
        model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="chat-model")
        profile = gr.Dropdown(
            list(PROFILES), value=next(iter(PROFILES)), label="Chat format", info="Whose way of writing a conversation"
        )
        thinks = gr.Checkbox(True, label="Think first", info="K2.7-Code always does")
        preserve = gr.Checkbox(
            False, label="Keep earlier thoughts", info="A choice in K2.6; K2.7-Code always keeps them"
        )
        budget = gr.Number(
            0,
            label="Thinking budget",
            info="Tokens after which a thought is closed; 0: no limit",
            precision=0,
            minimum=0,
        )
    with gr.Accordion("Tools and system prompt", open=True):
        tools = gr.CheckboxGroup(list(TOOLS), value=[], label="Tools the model may call", elem_id="chat-tools")
        system = gr.Textbox(label="System prompt", lines=2, max_lines=8, max_length=20_000, elem_id="chat-system")
    with gr.Accordion("Sampling", open=False):
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest token")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Draw from the likeliest that hold this share")
        most = gr.Slider(1, 8192, 512, step=1, label="Longest answer, tokens", info="Thinking included")
        seed = gr.Number(0, label="Seed", precision=0, info="The same seed draws the same answer")

    def follow(profile: str) -> list[Any]:
        form = PROFILES.get(profile)
        fixed = form in (*ALWAYS_THINKS, *NEVER_THINKS)
        shown = {"value": form not in NEVER_THINKS} if fixed else {}
        return [
            gr.update(interactive=not fixed, **shown),
            gr.update(interactive=form == "k2_6", value=form in ALWAYS_THINKS),
        ]

    profile.input(follow, [profile], [thinks, preserve], show_progress="hidden", api_visibility="private")
    return [model, tools, profile, thinks, preserve, budget, system, temperature, top_p, most, seed]


def _restored(values: dict[str, Any], models: Models) -> list[Any]:
    """Values of the controls, from what a conversation keeps; nothing changes where it keeps none."""
    import gradio as gr

    if not values:
        return [gr.skip()] * 11
    settings, tools = settings_from(values)
    form = next((label for label, profile in PROFILES.items() if profile == settings.profile), next(iter(PROFILES)))
    return [
        values.get("model") if values.get("model") in models.names else gr.skip(),
        [name for name, tool in TOOLS.items() if tool in tools],
        form,
        settings.thinking,
        bool(settings.preserve_thinking) or settings.profile in ALWAYS_THINKS,
        settings.thinking_budget or 0,
        settings.system,
        settings.temperature,
        settings.top_p,
        settings.max_new_tokens,
        settings.seed,
    ]


def _shown_example(example: Example) -> dict[str, Any]:
    # only its picture and name: the server knows the rest by its number
    return {"text": example.question, "display_text": example.label, "icon": str(example.icon)}


def remark_of(text: str) -> str:
    return f'<p class="mk-remark" role="status">{escape(text)}</p>' if text else ""
