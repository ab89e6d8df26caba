"""The tab "Compare": one prompt, two models or two settings, both answers side by side as they are written.

    python -m demo.app        then the tab; or through gradio_client: api_name="/compare"

    question, media --+-- models.stream(left)  --> thinking, text ... tokens, seconds --+--> what differs
                      +-- models.stream(right) --> thinking, text ... tokens, seconds --+

The two take turns, token by token, so both are seen from the start. Each side's clock runs only while its own steps do,
and counts the reading of the question, but not the loading of a model.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields
from html import escape
from typing import TYPE_CHECKING, Any, cast

from demo.models import PROFILES, Settings
from demo.pieces import KEEP_OPEN, asked, examples, facts, notice, question_box, sentence, thought, told, words

if TYPE_CHECKING:
    import gradio as gr

    from demo.guard import Caps
    from demo.models import Models
    from fusion.generate import Reply, StreamEvent

PACE = 0.06  # seconds between two pictures of a growing answer
SIDES = ("Left", "Right")
EMPTY = "The answer appears here. Ask above: both sides get the same question, pictures and clips."
AS_IT_STANDS = " As it stands, the left side thinks as long as it likes and the right side answers at once."
STOPPED = "Stopped. What had been written stays."
NAMES = {
    "model": "model",
    "temperature": "temperature",
    "top_p": "top-p",
    "max_new_tokens": "longest reply",
    "thinking_budget": "thinking budget",
    "seed": "seed",
    "thinking": "thinks first",
    "preserve_thinking": "keeps earlier thoughts",
    "system": "system prompt",
    "profile": "chat format",
}
NO_BUDGET = -1  # of the slider: no limit


@dataclass(frozen=True)
class Compare:
    """Components of the tab."""

    box: "gr.MultimodalTextbox"
    go: "gr.Button"
    stop: "gr.Button"
    left: "gr.HTML"
    right: "gr.HTML"
    differences: "gr.HTML"


def build(models: "Models", caps: "Caps") -> Compare:
    """The tab's components, inside the Blocks that is open."""
    import gradio as gr

    gr.HTML(
        '<div class="mk"><h3>The same question, twice</h3><p>Two models, or one model with two settings, answer side '
        f"by side.{AS_IT_STANDS if len(models.names) == 1 else ''}</p></div>",
        apply_default_css=False,
        elem_classes="mk-flush",
    )
    box = question_box("Ask both. Add pictures or clips, paste or drag them here.", "Question for both", "cmp-input")
    examples(box, media=False)
    with gr.Row():
        go = gr.Button("Ask both", variant="primary", elem_id="cmp-go", scale=0, min_width=130)
        stop = gr.Button("Stop", interactive=False, elem_id="cmp-stop", scale=0, min_width=130)
    sides = [first(models, 0), first(models, 1)]
    table = gr.HTML(
        difference_table(sides), elem_id="cmp-differences", apply_default_css=False, elem_classes="mk-flush"
    )
    inputs: list[Any] = [box]
    shown: list[gr.HTML] = []
    with gr.Row(equal_height=False):
        for number, name in enumerate(SIDES):
            with gr.Column(min_width=300):
                inputs += _controls(models, number, sides[number])
                shown.append(
                    gr.HTML(
                        notice(EMPTY),
                        elem_id=("cmp-left", "cmp-right")[number],
                        label=name,
                        apply_default_css=False,
                        elem_classes="mk-flush",
                        js_on_load=KEEP_OPEN,
                    )
                )
    outputs = [*shown, table, go, stop]

    def start(request: gr.Request, message: Any, *controls: Any) -> Iterator[tuple[Any, ...]]:
        from demo.guard import visitor_of

        half = len(controls) // 2
        pages = watch(models, caps, visitor_of(request), message, controls[:half], controls[half:])
        with closing(pages):
            for left, right, named, over in pages:
                parts = [gr.skip() if part is None else part for part in (left, right, named)]
                yield (*parts, gr.Button(interactive=over), gr.Button(interactive=not over))

    running = gr.on(
        [go.click, box.submit],
        start,
        inputs,
        outputs,
        concurrency_id="model",
        concurrency_limit=4,
        show_progress="minimal",
        show_progress_on=[table],
        api_visibility="private",
        trigger_mode="once",
    )

    def ready() -> tuple[Any, ...]:
        return gr.Button(interactive=True), gr.Button(interactive=False)

    # also after a fault of ours, so that nobody is locked out
    running.then(ready, None, [go, stop], queue=False, show_progress="hidden", api_visibility="private")
    stop.click(
        lambda: (notice(STOPPED), *ready()),
        None,
        [table, go, stop],
        cancels=[running],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def compare(
        question: str,
        files: list[dict[str, Any]] | None = None,
        left: dict[str, Any] | None = None,
        right: dict[str, Any] | None = None,
        request: gr.Request = None,
    ) -> Iterator[dict[str, Any]]:
        """Ask one question twice; reports as both answers grow, the last with "over": true.

        files: uploaded files (gradio_client's handle_file). left, right: {"model": ..., and fields of
        demo.models.Settings}; what is left out has its default.
        """
        from demo.guard import visitor_of

        message = {"text": question, "files": files or []}
        with told():
            yield from reports(models, caps, visitor_of(request), message, left, right)

    gr.api(compare, api_name="compare", concurrency_id="model", concurrency_limit=4)
    return Compare(box, go, stop, shown[0], shown[1], table)


def first(models: "Models", number: int) -> "Side":
    """How a side stands at first: with two models they differ, with one model the thinking does."""
    name = models.names[min(number, len(models.names) - 1)]
    return Side(name, Settings(thinking_budget=0 if number and len(models.names) == 1 else None))


def _controls(models: "Models", number: int, side: "Side") -> list[Any]:
    """Controls of one side, in the order that `chosen` reads them."""
    import gradio as gr

    where, given = SIDES[number].lower(), side.settings
    budget = NO_BUDGET if given.thinking_budget is None else given.thinking_budget
    with gr.Accordion(f"Settings of the {where} side", open=False, elem_id=f"cmp-{where}-settings"):
        model = gr.Dropdown(models.names, value=side.model, label="Model", elem_id=f"cmp-{where}-model")
        thinking = gr.Slider(
            NO_BUDGET,
            2048,
            budget,
            step=1,
            label="Thinking budget, in tokens",
            info="-1: as long as it likes. 0: it answers at once.",
            elem_id=f"cmp-{where}-budget",
        )
        temperature = gr.Slider(
            0,
            2,
            given.temperature,
            step=0.05,
            label="Temperature",
            info="0: always the likeliest token. Higher: more varied.",
        )
        top_p = gr.Slider(
            0.05, 1, given.top_p, step=0.05, label="Top-p", info="Draw from the likeliest tokens that hold this share."
        )
        longest = gr.Slider(16, 4096, given.max_new_tokens, step=16, label="Longest reply, in tokens")
        seed = gr.Number(given.seed, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        profile = gr.Dropdown(list(PROFILES), value=next(iter(PROFILES)), label="Chat format")
        thinks = gr.Checkbox(
            given.thinking, label="Thinks first", info="K2.7-Code always does; other formats can go without."
        )
        system = gr.Textbox(given.system, label="System prompt", lines=2, max_lines=6)
    return [model, thinking, temperature, top_p, longest, seed, profile, thinks, system]


# ---- asking both -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One side: which model, with which settings."""

    model: str
    settings: Settings = field(default_factory=Settings)


@dataclass
class Written:
    """What one side has written so far, and how long its own steps took."""

    thinking: str = ""
    text: str = ""
    reply: "Reply | None" = None
    error: str = ""
    first_s: float = 0.0  # until its first word
    spent_s: float = 0.0
    calls: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.reply is not None or bool(self.error)

    @property
    def rate(self) -> float | None:
        """Tokens written per second of its own time, reading the question included; None before the end.

        Some tokens show no piece of text, so when the first token came is not known here, only the first word.
        """
        return self.reply.usage.completion_tokens / self.spent_s if self.reply and self.spent_s else None


def chosen(values: Sequence[Any]) -> Side:
    """The controls of one side as settings, with empty boxes as their defaults."""
    model, budget, temperature, top_p, longest, seed, profile, thinks, system = values
    if profile not in PROFILES:
        raise ValueError(f"There is no chat format {profile!r}; pick one of the list.")
    return Side(
        str(model),
        Settings(
            temperature=float(temperature or 0),
            top_p=float(top_p or 1),
            max_new_tokens=int(longest or 0),
            thinking_budget=None if budget is None or budget < 0 else int(budget),
            seed=int(seed or 0),
            thinking=bool(thinks),
            system=str(system or "").strip(),
            profile=PROFILES[profile],
        ),
    )


def named(values: "Mapping[str, Any] | None", models: "Models") -> Side:
    """The same from a mapping, for programs. Raises ValueError that lists the fields there are."""
    if not isinstance(values, dict | None):
        raise ValueError(f"The settings of a side are names and values, not a {type(values).__name__}.")
    given = dict(values or {})
    model = given.pop("model", None) or models.names[0]
    known = [each.name for each in fields(Settings)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"No setting is called {', '.join(unknown)}; there are: model, {', '.join(known)}.")
    return Side(str(model), Settings(**given))


def side_by_side(
    models: "Models", content: list[dict[str, Any]], sides: Sequence[Side]
) -> Generator[tuple[int, Written], None, None]:
    """Both answers, a piece of one and a piece of the other: (which side, what it has written by now).

    A side that fails says why in its Written; the other goes on. Closing the iterator closes both streams.
    """
    written = [Written() for _ in sides]
    with ExitStack() as stack:
        streams: list[Generator[StreamEvent, None, None] | None] = []
        for number, side in enumerate(sides):
            try:
                models.kimi(side.model)  # its loading is on no clock
            except ValueError as error:
                written[number].error = sentence(error)
                streams.append(None)
                yield number, written[number]
                continue
            events = models.stream(side.model, [{"role": "user", "content": content}], None, side.settings)
            streams.append(stack.enter_context(closing(cast("Generator[StreamEvent, None, None]", events))))
        while any(stream is not None for stream in streams):
            for number, stream in enumerate(streams):
                if stream is None:
                    continue
                one, began = written[number], time.perf_counter()
                try:
                    event = next(stream, None)
                except ValueError as error:
                    one.error, event = sentence(error), None
                one.spent_s += time.perf_counter() - began
                one.first_s = one.first_s or one.spent_s
                if event is None or event.kind == "end":
                    streams[number] = None
                    one.reply = event.reply if event else None
                elif event.kind == "thinking":
                    one.thinking += event.delta
                elif event.kind == "text":
                    one.text += event.delta
                elif event.tool_call is not None:
                    one.calls.append(f"{event.tool_call.name}({event.tool_call.arguments})")
                yield number, one


def differences(sides: Sequence[Side]) -> list[tuple[str, str, str]]:
    """(what, left, right) of everything in which the two sides differ."""
    left, right = ({"model": side.model} | vars(side.settings) for side in sides)
    return [(NAMES[key], _said(key, left[key]), _said(key, right[key])) for key in NAMES if left[key] != right[key]]


def _said(key: str, value: Any) -> str:
    if key == "thinking_budget":
        return "no limit" if value is None else "0 tokens: answers at once" if value == 0 else f"{value:,} tokens"
    if key == "profile":
        return next(label for label, profile in PROFILES.items() if profile == value)
    if key == "max_new_tokens":
        return f"{value:,} tokens"
    if key == "preserve_thinking":
        return "the format's own rule" if value is None else "yes" if value else "no"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "system":
        return (value if len(value) <= 80 else value[:79] + "…") or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def watch(
    models: "Models", caps: "Caps", visitor: str, message: Any, left: Sequence[Any], right: Sequence[Any]
) -> Generator[tuple[str | None, str | None, str | None, bool], None, None]:
    """Pages: left, right, differences (None leaves a part as it is), and whether it is over."""
    try:
        sides = [chosen(left), chosen(right)]
        content, notes = asked(message, visitor, caps)
    except ValueError as error:
        yield None, None, notice(sentence(error), "error"), True
        return
    head = difference_table(sides, notes)
    waiting = [reply_card(SIDES[number], side, Written()) for number, side in enumerate(sides)]
    yield waiting[0], waiting[1], head, False
    latest: dict[int, Written] = {}
    changed: set[int] = set()
    drawn = time.monotonic()
    pieces = side_by_side(models, content, sides)
    with closing(pieces):
        for number, one in pieces:
            latest[number] = one
            changed.add(number)
            if one.over or time.monotonic() - drawn > PACE:
                drawn = time.monotonic()
                cards = [reply_card(SIDES[n], sides[n], latest[n]) if n in changed else None for n in (0, 1)]
                changed.clear()
                yield cards[0], cards[1], None, False
    yield None, None, head, True


def reports(
    models: "Models",
    caps: "Caps",
    visitor: str,
    message: Any,
    left: "Mapping[str, Any] | None",
    right: "Mapping[str, Any] | None",
) -> Iterator[dict[str, Any]]:
    """The same for programs: plain dicts."""
    sides = [named(left, models), named(right, models)]
    content, notes = asked(message, visitor, caps)
    latest = [Written(), Written()]
    drawn = 0.0
    made = differences(sides)

    def report(over: bool) -> dict[str, Any]:
        shown = {name.lower(): as_dict(sides[n], latest[n]) for n, name in enumerate(SIDES)}
        told = [{"what": what, "left": a, "right": b} for what, a, b in made]
        return {**shown, "differences": told, "notes": notes, "over": over}

    pieces = side_by_side(models, content, sides)
    with closing(pieces):
        for number, one in pieces:
            latest[number] = one
            if time.monotonic() - drawn > PACE:
                drawn = time.monotonic()
                yield report(False)
    yield report(True)


def as_dict(side: Side, one: Written) -> dict[str, Any]:
    """One side as plain JSON."""
    usage = one.reply.usage if one.reply else None
    return {
        "model": side.model,
        "settings": dict(vars(side.settings)),
        "thinking": one.thinking,
        "text": one.text,
        "tool_calls": one.calls,
        "error": one.error or None,
        "finish_reason": one.reply.finish_reason if one.reply else None,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "media_tokens": usage.media_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
        "thinking_tokens": usage.thinking_tokens if usage else None,
        "first_word_s": one.first_s,
        "seconds": one.spent_s,
        "tokens_per_second": one.rate,
    }


# ---- showing ---------------------------------------------------------------------------------------------------------

ENDS = {
    "stop": "finished",
    "length": "cut off at the longest length",
    "tool_calls": "ended with a call of a tool",
    "halted": "stopped: the time for one answer ran out",
}


def difference_table(sides: Sequence[Side], notes: Sequence[str] = ()) -> str:
    """What is not the same on both sides, as a table; and remarks on the files."""
    made = differences(sides)
    if not made:
        told = notice("Both sides have the same model and settings, so the same answer twice is to be expected.")
    else:
        rows = "".join(
            f'<tr><th scope="row">{escape(what)}</th><td>{escape(left)}</td><td>{escape(right)}</td></tr>'
            for what, left, right in made
        )
        told = (
            '<table class="mk-differences"><thead><tr><th scope="col">What differs</th><th scope="col">Left</th>'
            f'<th scope="col">Right</th></tr></thead><tbody>{rows}</tbody></table>'
        )
    remarks = "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)
    return f'<div class="mk">{told}{remarks}</div>'


def reply_card(name: str, side: Side, one: Written) -> str:
    """One answer: thought, words, and below them what it took."""
    if one.error:
        return f'<section class="mk mk-card mk-reply" aria-label="{name}">{notice(one.error, "error")}</section>'
    usage = one.reply.usage if one.reply else None
    said = f"{usage.thinking_tokens} tokens" if usage else ""
    parts = [thought(one.thinking, said, key=name, follow=usage is None)]
    parts += [f'<div class="mk-answered">{words(one.text)}</div>'] if one.text else []
    parts += [f"<p>Calls <code>{escape(call)}</code></p>" for call in one.calls]
    if usage and not one.text and not one.calls:
        parts.append('<p class="mk-quiet">Nothing was said after the thought.</p>')
    if usage is None:
        state = "writing ..." if one.thinking or one.text else "reading the question ..."
        parts.append(f'<footer><small role="note">{name}, {escape(side.model)}: {state}</small></footer>')
    else:
        assert one.reply is not None, "usage is the reply's"
        seen = f" ({usage.media_tokens:,} of pictures)" if usage.media_tokens else ""
        shown = [
            ("Read", f"{usage.prompt_tokens:,} tokens{seen}"),
            ("Wrote", f"{usage.completion_tokens:,} tokens ({usage.thinking_tokens:,} thinking)"),
            ("First word after", f"{one.first_s:.2f} s"),
        ]
        shown += [("In all", f"{one.spent_s:.2f} s, {one.rate:.0f} tokens/s")] if one.rate else []
        shown += [("Ended", ENDS[one.reply.finish_reason])]
        parts.append(f"<footer><small>{name}, {escape(side.model)}</small>{facts(shown)}</footer>")
    return f'<section class="mk mk-card mk-reply" aria-label="{name}">{"".join(parts)}</section>'
