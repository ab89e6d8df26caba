"""The tab "What the model sees": a question about pictures and clips, taken apart on its way through the model.

    python -m demo.app        then the tab; or through gradio_client: api_name="/see"

    question, media -- models.stream --> the answer, as it is written
                    -- fusion.look ----> 1 pictures cut into tokens     2 the tokens of the whole conversation
                                         3 where a token looked         4 which experts worked

A token of the second panel is picked by a click, or by the arrow keys and Enter; the third panel follows. What was
looked at stays on the server, the latest KEPT of all visitors; a page holds only its name. Everything that is shown is
made by fusion/look.py and fusion/drawing.py.
"""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from demo.models import Settings
from demo.panels import (
    answer_card,
    experts_panel,
    first_choice,
    grid_panel,
    heat_panel,
    panel,
    reading_of,
    tokens_panel,
)
from demo.pieces import KEEP_OPEN, asked, examples, notice, question_box, sentence, told

if TYPE_CHECKING:
    import gradio as gr

    from demo.guard import Caps
    from demo.models import Models
    from fusion.generate import Reply, StreamEvent
    from fusion.look import Look

PACE = 0.06  # seconds between two pictures of a growing answer
KEPT = 16  # conversations of all visitors that can still be asked about
MEAN = "mean of all"
PARTS = {"the whole conversation": "all", "the question": "prompt", "the reply": "reply"}

EMPTY = {
    "answer": "Ask something about a picture or a clip. The answer comes first, then what went into it.",
    "grid": "Here the picture appears as the model gets it, cut into squares.",
    "tokens": "Here the question and the answer appear token by token.",
    "heat": "Here you see where the model looked when it wrote a token that you pick.",
    "experts": "Here you see which experts of each layer were chosen.",
}
GONE = "This conversation is no longer kept in memory. Ask again, and it can be looked into."

# a click or Enter on a token picks it; arrow keys move; what a token is stands in the line below
PICK = """
const line = () => element.querySelector('.mk-said');
const all = () => [...element.querySelectorAll('button.mk-token')].filter((one) => one.offsetParent !== null);
const tell = (one) => { if (line()) line().textContent = one.dataset.say; };
const into = (one) => {
  all().forEach((other) => { other.tabIndex = -1; });
  one.tabIndex = 0;
};
element.addEventListener('click', (event) => {
  const one = event.target.closest('button.mk-token');
  if (!one) return;
  into(one);
  tell(one);
  if (one.dataset.position === undefined) return;
  element.querySelectorAll('[aria-pressed="true"]').forEach((other) => other.setAttribute('aria-pressed', 'false'));
  one.setAttribute('aria-pressed', 'true');
  trigger('select', { position: Number(one.dataset.position) });
});
element.addEventListener('mouseover', (event) => {
  const one = event.target.closest('button.mk-token');
  if (one) tell(one);
});
element.addEventListener('focusin', (event) => {
  const one = event.target.closest('button.mk-token');
  if (one) tell(one);
});
element.addEventListener('keydown', (event) => {
  const one = event.target.closest('button.mk-token');
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!one || !(step || event.key === 'Home' || event.key === 'End')) return;
  event.preventDefault();
  const row = all();
  const at = step ? row.indexOf(one) + step : event.key === 'Home' ? 0 : row.length - 1;
  const next = row[Math.max(0, Math.min(row.length - 1, at))];
  into(next);
  next.focus();
});
"""


@dataclass(frozen=True)
class Sees:
    """Components of the tab. taken: set it to {"messages", "reply_ids", "model"} and the panels fill.

    Also read where they are there: "tools", and "settings" (demo.models.Settings), as the reply was made with.
    """

    box: "gr.MultimodalTextbox"
    go: "gr.Button"
    answer: "gr.HTML"
    grid: "gr.HTML"
    tokens: "gr.HTML"
    heat: "gr.HTML"
    experts: "gr.HTML"
    taken: "gr.State"


class Kept:
    """What was looked at, by random names; the oldest goes when there are too many."""

    def __init__(self, most: int = KEPT) -> None:
        self.most = most
        self._looks: OrderedDict[str, Look] = OrderedDict()
        self._mutex = threading.Lock()

    def add(self, look: "Look") -> str:
        name = secrets.token_hex(16)
        with self._mutex:
            self._looks[name] = look
            while len(self._looks) > self.most:
                self._looks.popitem(last=False)
        return name

    def get(self, name: str | None) -> "Look | None":
        with self._mutex:
            found = self._looks.get(name or "")
            if found is not None and name:
                self._looks.move_to_end(name)
            return found

    def drop(self, name: str | None) -> None:
        with self._mutex:
            self._looks.pop(name or "", None)


def build(models: "Models", caps: "Caps") -> Sees:
    """The tab's components, inside the Blocks that is open."""
    import gradio as gr

    kept = Kept()
    gr.HTML(
        '<div class="mk"><h3>What goes into an answer</h3><p>Ask about a picture or a clip of yours. You see what the '
        "model gets of it, how the question becomes tokens, where the model looked for each token of its answer, and "
        "which of its experts worked on it. Each panel names the files that do it.</p></div>",
        apply_default_css=False,
        elem_classes="mk-flush",
    )
    box = question_box("Ask about a picture or a clip. Add it here, paste it or drag it.", "Question", "see-input")
    examples(box, media=True)
    with gr.Accordion("Settings", open=False), gr.Row():
        model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="see-model", min_width=160)
        longest = gr.Slider(16, 2048, 256, step=16, label="Longest reply, in tokens", min_width=220)
        budget = gr.Slider(
            -1, 2048, -1, step=1, label="Thinking budget, in tokens", info="-1: as long as it likes.", min_width=220
        )
    with gr.Row():
        go = gr.Button("Ask and look", variant="primary", elem_id="see-go", scale=0, min_width=130)
        stop = gr.Button("Stop", interactive=False, elem_id="see-stop", scale=0, min_width=130)
    answer = gr.HTML(
        notice(EMPTY["answer"]),
        elem_id="see-answer",
        apply_default_css=False,
        elem_classes="mk-flush",
        js_on_load=KEEP_OPEN,
    )
    grid = gr.HTML(
        panel("grid", notice(EMPTY["grid"])), elem_id="see-grid", apply_default_css=False, elem_classes="mk-flush"
    )
    tokens = gr.HTML(
        panel("tokens", notice(EMPTY["tokens"])),
        elem_id="see-tokens",
        apply_default_css=False,
        elem_classes="mk-flush",
        js_on_load=PICK,
    )
    with gr.Row(equal_height=False):
        layer = gr.Dropdown(
            [MEAN],
            value=MEAN,
            label="Layer, for “Where it looked”",
            elem_id="see-layer",
            interactive=True,
            min_width=140,
        )
        head = gr.Dropdown(
            [MEAN], value=MEAN, label="Head, for “Where it looked”", elem_id="see-head", interactive=True, min_width=140
        )
    heat = gr.HTML(
        panel("heat", notice(EMPTY["heat"])), elem_id="see-heat", apply_default_css=False, elem_classes="mk-flush"
    )
    part = gr.Radio(
        list(PARTS),
        value=next(iter(PARTS)),
        label="Tokens that are counted, for “Which experts worked”",
        elem_id="see-part",
    )
    experts = gr.HTML(
        panel("experts", notice(EMPTY["experts"])),
        elem_id="see-experts",
        apply_default_css=False,
        elem_classes="mk-flush",
    )
    name, position = gr.State(None), gr.State(None)
    taken = gr.State(None)
    outputs = [answer, grid, tokens, heat, experts, layer, head, name, position, go, stop]

    def shown(pages: "Generator[Page, None, None]", last: str | None) -> Iterator[tuple[Any, ...]]:
        with closing(pages):
            for page in pages:
                blank = [
                    gr.skip() if one is None else one
                    for one in (page.answer, page.grid, page.tokens, page.heat, page.experts)
                ]
                pickers, key, place = [gr.skip(), gr.skip()], gr.skip(), gr.skip()
                if page.look is not None:
                    kept.drop(last)
                    key, place = kept.add(page.look), first_choice(page.look)
                    pickers = [
                        gr.Dropdown([MEAN, *map(str, range(count))], value=MEAN)
                        for count in (page.look.layers, page.look.heads)
                    ]
                buttons = (gr.Button(interactive=page.over), gr.Button(interactive=not page.over))
                yield (*blank, *pickers, key, place, *buttons)

    def start(
        request: gr.Request, message: Any, which: str, most: float, thoughts: float, counted: str, last: str | None
    ) -> Iterator[tuple[Any, ...]]:
        from demo.guard import visitor_of

        settings = Settings(max_new_tokens=int(most or 0), thinking_budget=limit(thoughts))
        pages = watch(models, caps, visitor_of(request), message, which, settings, PARTS.get(counted, "all"))
        yield from shown(pages, last)

    def take(found: Any, counted: str, last: str | None) -> Iterator[tuple[Any, ...]]:
        if found:
            yield from shown(watch_taken(models, found, PARTS.get(counted, "all")), last)

    queued: dict[str, Any] = {
        "concurrency_id": "model",
        "concurrency_limit": 4,
        "show_progress_on": [answer],
        "show_progress": "minimal",
        "api_visibility": "private",
    }
    running = gr.on(
        [go.click, box.submit], start, [box, model, longest, budget, part, name], outputs, trigger_mode="once", **queued
    )
    taking = taken.change(take, [taken, part, name], outputs, **queued)

    def ready() -> tuple[Any, ...]:
        return gr.Button(interactive=True), gr.Button(interactive=False)

    for event in (running, taking):  # also after a fault of ours, so that nobody is locked out
        event.then(ready, None, [go, stop], queue=False, show_progress="hidden", api_visibility="private")
    stop.click(
        ready,
        None,
        [go, stop],
        cancels=[running, taking],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def picked(key: str | None, lay: str, hea: str, event: gr.EventData) -> tuple[Any, Any]:
        where = getattr(event, "position", None)
        found = kept.get(key)
        if not isinstance(where, int) or (found is not None and not 0 <= where < len(found.tokens)):
            return gr.skip(), gr.skip()
        return where, look_again(models, found, where, lay, hea)

    def again(key: str | None, where: int | None, lay: str, hea: str) -> Any:
        found = kept.get(key)
        if key is None or where is None:
            return gr.skip()
        return look_again(models, found, where, lay, hea)

    def counted_again(key: str | None, counted: str) -> Any:
        found = kept.get(key)
        if key is None:
            return gr.skip()
        if found is None:
            return panel("experts", notice(GONE))
        return experts_panel(found, PARTS.get(counted, "all"))

    quick: dict[str, Any] = {
        "concurrency_id": "look",
        "concurrency_limit": 4,
        "show_progress": "hidden",
        "api_visibility": "private",
        "trigger_mode": "always_last",
    }
    tokens.select(picked, [name, layer, head], [position, heat], **quick)
    gr.on([layer.input, head.input], again, [name, position, layer, head], heat, **quick)
    part.input(counted_again, [name, part], experts, **quick)

    def see(
        question: str,
        files: list[dict[str, Any]] | None = None,
        model: str = "",
        position: int = -1,
        layer: int = -1,
        head: int = -1,
        max_new_tokens: int = 256,
        request: gr.Request = None,
    ) -> Iterator[dict[str, Any]]:
        """Ask, and give back what the model saw: answer, items, tokens, attention of one token, load of the experts.

        Before that, the answer as it grows; the last report has "over": true.

        files: uploaded files (gradio_client's handle_file). position: a token of the conversation; -1 is the first of
        the answer. layer, head: -1 is the mean of all.
        """
        from demo.guard import visitor_of

        settings = Settings(max_new_tokens=max_new_tokens)
        message = {"text": question, "files": files or []}
        # below zero is left out
        where, lay, hea = (None if number < 0 else number for number in (position, layer, head))
        with told():
            visitor = visitor_of(request)
            yield from reports(models, caps, visitor, message, model or models.names[0], settings, where, lay, hea)

    gr.api(see, api_name="see", concurrency_id="model", concurrency_limit=4)
    return Sees(box, go, answer, grid, tokens, heat, experts, taken)


# ---- asking and looking ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """What the tab shows; None leaves a part as it is. look: what the panels were made from, when it is there."""

    answer: str | None = None
    grid: str | None = None
    tokens: str | None = None
    heat: str | None = None
    experts: str | None = None
    look: "Look | None" = None
    over: bool = False


def limit(budget: float | None) -> int | None:
    """A slider's thinking budget: below zero is none."""
    return None if budget is None or budget < 0 else int(budget)


def written(
    models: "Models", which: str, messages: list[dict[str, Any]], settings: Settings
) -> "Generator[tuple[str, str, Reply | None], None, None]":
    """Thought and text of an answer as they grow, at most once a PACE; the last piece carries the reply."""
    thinking, text, drawn, reply = "", "", time.monotonic(), None
    events = models.stream(which, messages, None, settings)
    with closing(cast("Generator[StreamEvent, None, None]", events)) as stream:
        for event in stream:
            thinking += event.delta if event.kind == "thinking" else ""
            text += event.delta if event.kind == "text" else ""
            reply = event.reply or reply
            if reply is None and time.monotonic() - drawn > PACE:
                drawn = time.monotonic()
                yield thinking, text, None
    yield thinking, text, reply


def watch(
    models: "Models", caps: "Caps", visitor: str, message: Any, which: str, settings: Settings, part: str = "all"
) -> "Generator[Page, None, None]":
    """The answer as it is written, then the panels one after the other."""
    try:
        content, notes = asked(message, visitor, caps)
        messages = [{"role": "user", "content": content}]
        yield replace(WAITING, answer=answer_card(which, "", "", notes=notes))
        with closing(written(models, which, messages, settings)) as pieces:
            for thinking, text, reply in pieces:
                if reply is None:
                    yield Page(answer_card(which, thinking, text, notes=notes))
        assert reply is not None, "the last piece carries the reply"
        yield Page(answer_card(which, reply.thinking, reply.text, reply, notes))
        yield from panels(models, which, messages, reply.ids, None, settings, part)
    except ValueError as error:
        yield Page(notice(sentence(error), "error"), over=True)


def watch_taken(models: "Models", found: Mapping[str, Any], part: str = "all") -> "Generator[Page, None, None]":
    """The panels of an answer that was given elsewhere: a chat's."""
    try:
        which, messages = str(found["model"]), list(found["messages"])
        ids = [int(each) for each in found["reply_ids"]]
        settings = found.get("settings") or Settings()
        yield replace(WAITING, answer=notice("Reading the conversation of the chat once more ...", "wait"))
        for page in panels(models, which, messages, ids, found.get("tools"), settings, part):
            if page.look is not None:
                thinking = _said(page.look, "thinking")
                yield Page(answer_card(which, thinking, _said(page.look, "answer"), notes=[TAKEN], writing=False))
            yield page
    except ValueError as error:
        yield Page(notice(sentence(error), "error"), over=True)


TAKEN = "Taken from the chat."


FOLLOWS = notice("The answer comes first; this follows.", "wait")
WAITING = Page(
    grid=panel("grid", FOLLOWS),
    tokens=panel("tokens", FOLLOWS),
    heat=panel("heat", FOLLOWS),
    experts=panel("experts", FOLLOWS),
)


def panels(
    models: "Models",
    which: str,
    messages: Sequence[dict[str, Any]],
    ids: Sequence[int],
    tools: Any,
    settings: Settings,
    part: str,
) -> "Generator[Page, None, None]":
    """The panels, each as soon as it is drawn."""
    found = looked(models, which, messages, ids, tools, settings)
    yield Page(grid=grid_panel(found), look=found)
    where = first_choice(found)
    yield Page(tokens=tokens_panel(found, where))
    yield Page(heat=look_again(models, found, where))
    yield Page(experts=experts_panel(found, part), over=True)


def looked(
    models: "Models",
    which: str,
    messages: Sequence[dict[str, Any]],
    ids: Sequence[int],
    tools: Any = None,
    settings: Settings | None = None,
) -> "Look":
    """fusion.look with the settings that the reply was made with. Raises ValueError as it does."""
    from fusion.look import look

    settings = settings or Settings()
    if settings.system and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": settings.system}, *messages]
    kimi = models.kimi(which)
    with models.alone():
        return look(
            kimi,
            messages,
            ids,
            tools=tools or None,
            thinking=settings.thinking,
            preserve_thinking=settings.preserve_thinking,
            max_frames=models.max_frames,
            profile=settings.profile,
        )


def number_of(choice: str | None, count: int) -> int | None:
    """A layer or head as picked; None for the mean. A page may send anything, so what is not there is the mean."""
    return int(choice) if choice and choice.isdecimal() and int(choice) < count else None


def look_again(models: "Models", found: "Look | None", place: int, layer: str = MEAN, head: str = MEAN) -> str:
    """The third panel for another token, layer or head."""
    if found is None:
        return panel("heat", notice(GONE))
    with models.alone():
        found.shares(reading_of(found, place))  # the model's part; the rest is arithmetic and drawing
    return heat_panel(found, place, number_of(layer, found.layers), number_of(head, found.heads))


def reports(
    models: "Models",
    caps: "Caps",
    visitor: str,
    message: Any,
    which: str,
    settings: Settings,
    position: int | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The answer as it grows, then everything, as plain JSON. Raises ValueError as asking and looking do."""
    content, notes = asked(message, visitor, caps)
    messages = [{"role": "user", "content": content}]
    with closing(written(models, which, messages, settings)) as pieces:
        for thinking, text, reply in pieces:
            if reply is None:
                yield {"answer": text, "thinking": thinking, "over": False}
    assert reply is not None, "the last piece carries the reply"
    found = looked(models, which, messages, reply.ids, None, settings)
    place = first_choice(found) if position is None else position
    if not 0 <= place < len(found.tokens):
        raise ValueError(f"position must lie in 0..{len(found.tokens) - 1}, got {place}")
    reading = reading_of(found, place)
    with models.alone():
        found.shares(reading)
    yield {
        "answer": reply.text,
        "thinking": reply.thinking,
        "over": True,
        "finish_reason": reply.finish_reason,
        "notes": notes,
        "items": [
            {
                "kind": item.kind,
                "size": item.size,
                "resized": item.resized,
                "padding": item.padding,
                "patches": item.grid,
                "cells": item.cells,
                "tokens": item.tokens,
                "frames": len(item.frames),
                "timestamp": item.timestamp,
            }
            for item in found.items
        ],
        "tokens": [{"id": each.id, "text": each.text, "kind": each.kind, "item": each.item} for each in found.tokens],
        "prompt_tokens": found.prompt_tokens,
        "position": place,
        "attention": [weights.round(6).tolist() for weights in found.attention(reading, layer, head)],
        "attention_by_kind": found.attention_by_kind(reading, layer, head),
        "layers": found.layers,
        "heads": found.heads,
        "expert_layers": found.expert_layers,
        "experts": [load.round(6).tolist() for load in found.experts],
    }


def _said(found: "Look", kind: str) -> str:
    """The reply's thought or answer, put together from its tokens."""
    raw = b"".join(each.raw for each in found.tokens[found.prompt_tokens :] if each.kind == kind)
    return raw.decode("utf-8", "replace")
