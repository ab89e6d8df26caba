"""The tab "Benchmarks": pick a kind of question, ask n of them one by one, watch the share and every miss.

    python -m demo.app        then the tab; or through gradio_client: api_name="/benchmark"

    family or suite, n -- evals.live.questions --> evals.live.ask -- models.stream --> thinking, answer, verdict
                                                        |
    [######----] 13 of 20 right, 65 % (43 - 82)   <-----+----->   every miss: picture, thought, answer, right answer

What is asked, how it is judged and what the interval is: evals.live. Here is only how it looks.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from demo.models import Settings
from demo.pieces import KEEP_OPEN, notice, picture, sentence, thought, told, words

if TYPE_CHECKING:
    import gradio as gr

    from demo.guard import Caps
    from demo.models import Models
    from evals.live import Graded, Question, Standing

# families of world/ by what they are about; a test holds them to world.MAKERS
FAMILIES = {
    "picture": "Pictures: what is where, how many, which is larger",
    "thing": "Pictures: name the one thing",
    "caption": "Pictures: say everything that is there",
    "point": "Pictures: where is it, as a box or a point",
    "drawing": "Pictures: write the SVG of a drawing",
    "digits": "Reading: handwritten digits",
    "glyph": "Reading: printed letters and digits",
    "spelling": "Reading: a word that may be misspelt",
    "reading": "Reading: words in places",
    "printout": "Reading: a printed program",
    "table": "Reading: tables",
    "grid": "Reading: a board of signs",
    "chart": "Charts: bars",
    "clock": "Charts: clocks",
    "gauge": "Charts: gauges",
    "clip": "Clips: what changes, how often, which way",
    "story": "Clips: tell what happens",
    "motion": "Clips: which way it moves",
    "moments": "Clips: frame by frame",
    "function": "Programs: write one that passes its tests",
    "repair": "Programs: repair one",
    "output": "Programs: say what one prints",
    "sum": "Text: sums",
    "word": "Text: sums in words",
    "sort": "Text: put in order",
    "date": "Text: days and months",
    "logic": "Text: who is the tallest",
    "follow": "Text: follow an instruction",
    "join": "Text: join letters",
    "told": "Text: told where things are",
    "tool": "Tools: calculate with a tool",
    "proxy": "Tools: ask a tool about a picture",
}
SUITES = {
    "kimi_humaneval": "HumanEval: 164 functions from their docstrings",
    "kimi_gsm8k": "GSM8K: school sums in words",
    "kimi_mnist": "MNIST: handwritten digits",
}
LEVELS = {"1 and 2 by turns": None, "1": 1, "2": 2, "3": 3}
MOST = 200
PACE = 0.08  # seconds between two pictures of a growing answer
EMPTY_SCORE = "Nothing has been asked yet. Pick a kind of question, say how many, and start."
EMPTY_MISSES = "Wrong answers appear here as they happen, with picture, thought, and why they are wrong."
STOPPED = "Stopped. The score counts what was graded until then."
STATES = {
    "right": "right",
    "partly": "partly right",
    "wrong": "wrong",
    "silent": "no answer",
    "truncated": "cut off",
    "failed": "not graded",
}


@dataclass(frozen=True)
class Benchmarks:
    """Components of the tab."""

    family: "gr.Dropdown"
    number: "gr.Slider"
    go: "gr.Button"
    stop: "gr.Button"
    score: "gr.HTML"
    now: "gr.HTML"
    misses: "gr.HTML"


def build(models: "Models", caps: "Caps") -> Benchmarks:
    """The tab's components, inside the Blocks that is open."""
    import gradio as gr

    choices = [(label, name) for name, label in FAMILIES.items()]
    choices += [(f"Suite: {label}", name) for name, label in SUITES.items()]
    gr.HTML(
        '<div class="mk"><h3>How often is it right?</h3><p>Questions that the model was never trained on, asked one '
        "after another. The answer is judged by the same code as <code>moonkit score</code> and <code>moonkit eval"
        "</code>; you see every miss. With few questions the interval is wide: that is how little is known.</p></div>",
        apply_default_css=False,
        elem_classes="mk-flush",
    )
    with gr.Row(equal_height=False):
        family = gr.Dropdown(
            choices, value="picture", label="Questions", elem_id="bench-family", scale=3, min_width=260, filterable=True
        )
        model = gr.Dropdown(models.names, value=models.names[0], label="Model", scale=1, min_width=140)
    with gr.Row(equal_height=False):
        number = gr.Slider(1, MOST, 20, step=1, label="How many", elem_id="bench-n", scale=2, min_width=220)
        level = gr.Radio(list(LEVELS), value=next(iter(LEVELS)), label="Difficulty", scale=2, min_width=220)
    with gr.Accordion("More settings", open=False), gr.Row():
        seed = gr.Number(7, label="Seed of the questions", precision=0, minimum=0, maximum=2**31 - 1, min_width=140)
        longest = gr.Slider(
            16, 2048, 256, step=16, label="Longest reply, in tokens", info="Thinking included.", min_width=220
        )
    remark = gr.HTML("", apply_default_css=False, elem_classes="mk-flush", elem_id="bench-remark")
    with gr.Row():
        go = gr.Button("Start", variant="primary", elem_id="bench-go", scale=0, min_width=130)
        stop = gr.Button("Stop", interactive=False, elem_id="bench-stop", scale=0, min_width=130)
    score = gr.HTML(notice(EMPTY_SCORE), elem_id="bench-score", apply_default_css=False, elem_classes="mk-flush")
    shown = gr.HTML("", elem_id="bench-shown", apply_default_css=False, elem_classes="mk-flush")
    now = gr.HTML("", elem_id="bench-now", apply_default_css=False, elem_classes="mk-flush", js_on_load=KEEP_OPEN)
    misses = gr.HTML(
        notice(EMPTY_MISSES),
        elem_id="bench-misses",
        apply_default_css=False,
        elem_classes="mk-flush",
        js_on_load=KEEP_OPEN,
    )

    def start(
        name: str, model_name: str, n: float, hardness: str, drawn: float, tokens: float
    ) -> Iterator[tuple[Any, ...]]:
        pages = watch(models, name, model_name, int(n or 0), LEVELS.get(hardness), int(drawn or 0), int(tokens or 0))
        with closing(pages):
            for page in pages:
                parts = [
                    gr.skip() if part is None else part for part in (page.score, page.shown, page.now, page.misses)
                ]
                yield (*parts, gr.Button(interactive=page.over), gr.Button(interactive=not page.over))

    running = go.click(
        start,
        [family, model, number, level, seed, longest],
        [score, shown, now, misses, go, stop],
        concurrency_id="model",
        concurrency_limit=4,
        show_progress="minimal",
        show_progress_on=[score],
        api_visibility="private",
    )

    def ready() -> tuple[Any, ...]:
        return gr.Button(interactive=True), gr.Button(interactive=False)

    # also after a fault of ours, so that nobody is locked out
    running.then(ready, None, [go, stop], queue=False, show_progress="hidden", api_visibility="private")
    stop.click(
        lambda: ("", notice(STOPPED), *ready()),
        None,
        [shown, now, go, stop],
        cancels=[running],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    family.change(
        lambda name: (remark_on(name), gr.Radio(visible=name in FAMILIES)),
        family,
        [remark, level],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def benchmark(
        family: str = "picture", n: int = 20, model: str = "", level: int = 0, seed: int = 7, max_new_tokens: int = 256
    ) -> Iterator[dict[str, Any]]:
        """Ask n questions of a family or suite; a report after each: score, interval, and every miss so far.

        level: 1 to 3, or 0 for 1 and 2 by turns. The last report has "over": true.
        """
        with told():
            wanted = Wanted(family, model or models.names[0], n, level or None, seed, max_new_tokens)
            yield from reports(models, wanted)

    gr.api(benchmark, api_name="benchmark", concurrency_id="model", concurrency_limit=4)
    return Benchmarks(family, number, go, stop, score, now, misses)


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What is to be asked, checked when made."""

    name: str
    model: str
    n: int
    level: int | None = None
    seed: int = 7
    tokens: int = 256

    def __post_init__(self) -> None:
        if self.name not in FAMILIES and self.name not in SUITES:
            raise ValueError(f"There are no questions called {self.name!r}; pick one of the list.")
        if not 1 <= self.n <= MOST:
            raise ValueError(
                f"Between 1 and {MOST} questions can be asked here, not {self.n}; moonkit eval takes more."
            )
        if self.level not in LEVELS.values():
            raise ValueError(f"Difficulty is 1, 2 or 3, or 0 for 1 and 2 by turns, not {self.level}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"The seed must lie between 0 and {2**31 - 1}, not {self.seed}.")
        if not 16 <= self.tokens <= 2048:
            raise ValueError(f"The longest reply must lie between 16 and 2,048 tokens, not {self.tokens}.")


@dataclass(frozen=True)
class Page:
    """What the tab shows; None leaves a part as it is."""

    score: str | None = None
    shown: str | None = None
    now: str | None = None
    misses: str | None = None
    over: bool = False


def remark_on(name: str) -> str:
    """Why these questions cannot be asked here, as a box; nothing when they can."""
    from evals.live import missing

    try:
        why = missing(name)
    except ValueError as error:
        why = sentence(error)
    return notice(why, "error") if why else ""


def run(models: "Models", wanted: Wanted) -> "Generator[tuple[int, Question, Any], None, None]":
    """(number, question, event) of every question: fusion's StreamEvents, then a Graded.

    Raises ValueError where the questions cannot be asked, or one cannot be read.
    """
    from evals.live import ask, questions

    settings = Settings(max_new_tokens=wanted.tokens)
    for number, question in enumerate(questions(wanted.name, wanted.n, wanted.seed, wanted.level)):
        events = ask(question, lambda messages, tools: models.stream(wanted.model, messages, tools, settings))
        with closing(events):
            for event in events:
                yield number, question, event


def watch(models: "Models", *what: Any) -> Generator[Page, None, None]:
    """Pages, as often as there is something new to see. what: the fields of Wanted."""
    yield Page(notice("Loading the model and the questions ...", "wait"), "", "", notice(EMPTY_MISSES))
    from evals import live  # slow the first time, so the visitor is told first

    done: list[live.Graded] = []
    try:
        wanted = Wanted(*what)
        missed, drawn, last = "", 0.0, -1
        thinking = text = ""
        began = time.monotonic()
        events = run(models, wanted)
        with closing(events):
            for number, question, event in events:
                if number != last:  # pictures are sent once: the words beside them change many times a second
                    last, thinking, text = number, "", ""
                    yield Page(shown=media(question), now=now_card(question, number + 1, "", ""))
                if isinstance(event, live.Graded):
                    done.append(event)
                    missed += "" if event.right else miss(event, number + 1)
                    score = score_card(live.standing(done), done, wanted, time.monotonic() - began)
                    card = now_card(question, number + 1, event.reply.thinking, event.reply.text, event)
                    yield Page(score, None, card, missed or None)
                    continue
                thinking += event.delta if event.kind == "thinking" else ""
                text += event.delta if event.kind == "text" else ""
                if time.monotonic() - drawn > PACE:
                    drawn = time.monotonic()
                    yield Page(now=now_card(question, number + 1, thinking, text))
    except ValueError as error:
        yield Page(None if done else notice(EMPTY_SCORE), "", notice(sentence(error), "error"), over=True)
        return
    score = score_card(live.standing(done), done, wanted, time.monotonic() - began, over=True)
    end = notice(f"All {wanted.n} were asked." + (" What went wrong is below." if missed else ""))
    yield Page(score, "", end, None if missed else notice("No miss: everything was right."), over=True)


def reports(models: "Models", wanted: Wanted) -> Iterator[dict[str, Any]]:
    """The same for programs: a plain dict after each question."""
    from evals.live import Graded, standing, state_of

    done: list[Graded] = []
    misses: list[dict[str, Any]] = []
    events = run(models, wanted)
    with closing(events):
        for _, question, event in events:
            if not isinstance(event, Graded):
                continue
            done.append(event)
            if not event.right:
                misses.append(
                    {
                        "id": question.id,
                        "question": question.text,
                        "thinking": event.reply.thinking,
                        "answer": event.reply.text,
                        "gold": question.gold,
                        "verdict": state_of(event),
                        "evidence": why(event),
                    }
                )
            made = standing(done)
            yield {
                "asked": len(done),
                "of": wanted.n,
                "over": len(done) == wanted.n,
                "graded": made.n if made else 0,
                "right": made.right if made else 0,
                "share": made.share if made else None,
                "interval": [made.low, made.high] if made else None,
                "chance": made.chance if made else None,
                "majority": made.majority if made else None,
                "truncated": made.truncated if made else 0,
                "not_graded": len(done) - (made.n if made else 0),
                "misses": misses,
            }


# ---- showing ---------------------------------------------------------------------------------------------------------


def score_card(
    made: "Standing | None", done: "list[Graded]", wanted: Wanted, seconds: float, over: bool = False
) -> str:
    """The share with its interval on a scale, a dot for each answer, and how long it will take."""
    from evals.live import state_of

    parts = ['<section class="mk mk-score mk-card" aria-label="Score">']
    if made is None:
        parts.append('<div class="mk-big"><b>-</b><span>nothing graded yet</span></div>')
    else:
        low, high = made.low or 0.0, made.high if made.high is not None else 1.0
        parts.append(
            f'<div class="mk-big"><b>{100 * made.share:.1f} %</b><span>{made.right} of {made.n} right</span>'
            f"<span>95 % interval {100 * low:.1f} to {100 * high:.1f} %</span></div>"
        )
        parts.append(_scale(made, low, high))
    dots = "".join(
        f'<li class="{state_of(one)}" title="{number}: {STATES[state_of(one)]}">{number}: {STATES[state_of(one)]}</li>'
        for number, one in enumerate(done, 1)
    )
    rest = "<li></li>" * max(0, wanted.n - len(done))
    parts.append(f'<ol class="mk-dots" aria-label="Every answer">{dots}{rest}</ol>')
    tokens = sum(one.reply.usage.completion_tokens for one in done)
    each = seconds / len(done) if done else 0.0
    said = [f"{len(done)} of {wanted.n} asked"]
    if over:
        said.append(f"done in {_span(seconds)}")
    elif done:
        said.append(f"about {_span(each * (wanted.n - len(done)))} left")
    if done:
        said += [f"{each:.1f} s and {tokens / len(done):.0f} tokens each"]
    if made and made.truncated:
        said.append(f"{made.truncated} cut off at {wanted.tokens} tokens")
    if done and len(done) - (made.n if made else 0):
        said.append(f"{len(done) - (made.n if made else 0)} not graded and not counted: the sandbox failed")
    parts.append(
        f'<div class="mk-progress" role="progressbar" aria-label="Progress" aria-valuemax="{wanted.n}" '
        f'aria-valuenow="{len(done)}"><span style="width:{100 * len(done) / wanted.n:.1f}%"></span></div>'
    )
    parts.append(f'<small role="{"status" if over else "note"}">{escape(" · ".join(said))}</small></section>')
    return "".join(parts)


FEW = 20  # below, the commonest answer to each kind of question is often the only one, and majority says nothing


def _scale(made: "Standing", low: float, high: float) -> str:
    """0 to 100 %: the interval, the share, and where guessing would stand."""
    ticks, keys = "", ""
    keys += '<li><i style="background:color-mix(in srgb, var(--color-accent) 28%, transparent)"></i>95 % interval</li>'
    for name, value, kind in (("chance", made.chance, ""), ("majority", made.majority, " mk-major")):
        if value is None or (name == "majority" and made.n < FEW):
            continue
        ticks += f'<span class="mk-tick{kind}" style="left:{100 * min(max(value, 0), 0.998):.2f}%"></span>'
        style = "dotted" if kind else "dashed"
        meant = "guessing among the possible answers" if name == "chance" else "always the commonest answer"
        line = f"border-left:2px {style} var(--mk-quiet);width:4px"
        keys += f'<li><i style="{line}"></i>{name} {100 * value:.1f} %: {meant}</li>'
    said = f"{100 * made.share:.1f} percent, interval {100 * low:.1f} to {100 * high:.1f}"
    return (
        f'<div class="mk-scale" role="img" aria-label="{said}">'
        f'<span class="mk-span" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></span>{ticks}'
        f'<span class="mk-at" style="left:calc({100 * made.share:.2f}% - {3 * made.share:.2f}px)"></span></div>'
        f'<div class="mk-ends"><span>0 %</span><span>100 %</span></div><ul class="mk-key">{keys}</ul>'
    )


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def now_card(question: "Question", number: int, thinking: str, text: str, graded: "Graded | None" = None) -> str:
    """The question that is being asked, with what the model says as it says it."""
    mark = _mark(graded) if graded else ""
    said = thought(thinking, key="now", follow=True) + words(text)
    answer = f"<h4>Answer</h4>{said}" if said else ""
    return (
        f'<section class="mk mk-card mk-now" aria-label="The question that is being asked"><h4>Question {number} {mark}'
        f"</h4>{words(question.text)}{answer}</section>"
    )


def miss(graded: "Graded", number: int) -> str:
    """One wrong answer: what was shown and asked, what the model thought and said, what is right, and the verdict."""
    question, reply = graded.question, graded.reply
    figure = media(question)
    rows = [
        ("Question", words(question.text)),
        ("Answer", words(reply.text) or '<span class="mk-quiet">nothing was said</span>'),
        ("Right", words(question.gold)),
        ("Why", escape(why(graded))),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    tokens = f"{reply.usage.thinking_tokens} tokens"
    return (
        f'<article class="mk mk-item{_beside(question)}" aria-label="Miss: question {number}">{figure}<div>'
        f"<h4>Question {number} {_mark(graded)} <small>{escape(question.tests)}</small></h4><dl>{listed}</dl>"
        f"{thought(reply.thinking, tokens, key=f'miss-{number}', opened=False)}</div></article>"
    )


def why(graded: "Graded") -> str:
    """The verdict's ground in one sentence, from its evidence."""
    evidence = graded.verdict.evidence
    if graded.verdict.score is None:
        return f"It could not be graded: {str(evidence.get('error') or 'the sandbox failed')[:300]}"
    if graded.truncated:
        return "The reply ran into its longest length before it was finished."
    if graded.verdict.status == "silent":
        return "The model said nothing after its thought."
    if "passed" in evidence and "of" in evidence:
        error = str(evidence.get("error") or "")[:300]
        return f"{evidence['passed']} of {evidence['of']} tests passed" + (f": {error}" if error else ".")
    if "read" in evidence:
        read = evidence["read"]
        return "No answer could be read from it." if read in (None, "") else f"Read as {read!s:.200}, which is not it."
    return "It is not the right answer."


def _mark(graded: "Graded") -> str:
    from evals.live import state_of

    state = state_of(graded)
    return f'<span class="mk-mark {state}">{STATES[state]}</span>'


def _beside(question: "Question") -> str:
    """Pictures stand beside the words; a clip's frames are wide and stand above them."""
    from PIL import Image

    return " mk-shown" if question.shown and all(isinstance(one, Image.Image) for one in question.shown) else ""


def media(question: "Question") -> str:
    """The question's pictures and clips; of a clip up to eight frames side by side."""
    from PIL import Image

    from evals.media import strip

    parts = []
    for number, medium in enumerate(question.shown, 1):
        if isinstance(medium, Image.Image):
            parts.append(picture(medium, f"picture {number} of the question", longest=640))
        else:
            parts.append(picture(strip(medium), f"frames of clip {number} of the question", longest=1280))
    return f"<figure>{''.join(parts)}</figure>" if parts else ""
