"""Questions one at a time, for someone who watches: asked, streamed, graded before the next.

    for question in questions("picture", 20, seed=7):            a family of the world, or a suite with data here
        for event in ask(question, stream):                      stream(messages, tools) -> fusion's StreamEvents
            event                                                a StreamEvent, and at last one Graded
    standing([graded, ...])                                      share, interval, chance, majority, what went wrong

    questions -- ask --> StreamEvent, StreamEvent, ... Graded -- standing --> Standing
                  |  ^
                  v  |  a call of a tool that is the right one gets the right result
                stream

Families: the questions and the rules of `moonkit score` (a reply that is cut off is wrong). Suites: those of `moonkit
eval` with the small profile. Programs run in a sandbox, always; `missing` says why one cannot.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from evals.graders import Verdict, grade
from evals.loaders import program_task
from evals.world import Asked, same_call, summarize
from evals.world import questions as of_family
from world.sample import Image, Sample, Turn

if TYPE_CHECKING:
    from fusion.generate import Reply, StreamEvent

Messages = list[dict[str, Any]]
Stream = Callable[[Messages, list[dict[str, Any]] | None], "Iterator[StreamEvent]"]
RUNS_CODE = ("program",)  # checks of the world that run what the model wrote


@dataclass(frozen=True)
class Question:
    """One question. shown: its pictures (PIL) and clips (evals.media.Video); gold: the right answer, for reading."""

    id: str
    text: str
    gold: str
    tests: str
    messages: Messages
    grade: Callable[["Reply"], Verdict] = field(repr=False)
    shown: tuple[Any, ...] = ()
    tools: list[dict[str, Any]] | None = None
    rounds: tuple[Mapping[str, Any], ...] = ()  # of a tool: the right call, its result, by turns
    origin: tuple[Sample, Turn] | None = None


@dataclass(frozen=True)
class Graded:
    """A question, what came back, and the verdict. verdict.score is None where the machinery failed."""

    question: Question
    reply: "Reply"
    verdict: Verdict
    seconds: float

    @property
    def right(self) -> bool:
        return self.verdict.score == 1

    @property
    def truncated(self) -> bool:
        return self.verdict.status == "truncated"


@dataclass(frozen=True)
class Standing:
    """Where a run stands. low and high: 95 % interval; chance and majority: None where they are not known.

    n counts what was graded; failed: items whose grading failed, which are in no share.
    """

    n: int
    share: float
    low: float | None
    high: float | None
    right: int
    chance: float | None
    majority: float | None
    truncated: int
    failed: int


def missing(name: str) -> str:
    """Why a family or suite cannot be run here, in one sentence; "" when it can."""
    from evals.rows import find_data
    from evals.suites import hub, names
    from world import MAKERS

    if name in MAKERS:
        return _sandbox() if runs_code(name) else ""
    if name not in names():
        return f"There is no family or suite {name!r}."
    folder = hub(name)[1]
    if find_data(folder) is None:
        return f"The data of {name} is not on this machine: put it into $MOONKIT_DATA/{folder} or ./data/{folder}."
    return _sandbox() if runs_code(name) else ""


def runs_code(name: str) -> bool:
    """Whether grading runs programs that the model writes."""
    from evals.suites import load, task_of
    from world import MAKERS, sample

    if name in MAKERS:
        return any(turn.check.kind in RUNS_CODE for turn in sample(name, 0).turns)
    return task_of(load(name, 1, profile="nano")[0]).kind in ("function", "repository")


def _sandbox() -> str:
    from agent.sandbox import SandboxError, backend

    try:
        backend("auto")
    except SandboxError as error:
        return f"Its answers are programs, and this machine has no sandbox to run them in: {error}"
    return ""


def questions(name: str, n: int, seed: int = 7, level: int | None = None) -> list[Question]:
    """So many held-out questions of a family of the world, or so many drawn from a suite.

    level: 1 to 3, of families only; None takes 1 and 2 by turns. Raises ValueError with one sentence for an unknown
    name, for missing data or a broken row, and for programs where there is no sandbox.
    """
    from world import MAKERS

    if n < 1:
        raise ValueError(f"at least one question must be asked, got {n}")
    why = missing(name)
    if why:
        raise ValueError(why)
    if name in MAKERS:
        return [_of_world(sample, number) for sample, number in of_family(name, n, "heldout", seed, level)]
    from evals.suites import load

    return [_of_suite(document) for document in load(name, n, seed, "nano")]


def _of_world(sample: Sample, number: int) -> Question:
    turn = sample.turns[number]

    def judge(reply: "Reply") -> Verdict:
        from world.check import check

        if reply.finish_reason == "length":
            return Verdict(0.0, "truncated")
        if turn.check.kind in RUNS_CODE:
            return grade(program_task(turn), reply.text)
        return Verdict(float(check(turn, reply.text)), "graded" if reply.text.strip() else "silent")

    return Question(
        f"{sample.family}/{sample.split}/{sample.seed}/{sample.index}/{sample.level}",
        turn.question,
        turn.answer,
        turn.tests,
        sample.ask(number),
        judge,
        tuple(_seen(medium) for medium in sample.media),
        [dict(tool) for tool in sample.tools] or None,
        tuple(turn.steps),
        (sample, turn),
    )


def _seen(medium: Any) -> Any:
    from PIL import Image as PIL

    if isinstance(medium, Image):
        return PIL.fromarray(medium.pixels)
    from evals.media import Video

    return Video(frames=tuple(map(PIL.fromarray, medium.frames)), fps=medium.fps)


def _of_suite(document: Mapping[str, Any]) -> Question:
    from evals.media import PLACE, source
    from evals.requests import conversation
    from evals.suites import media, verdict

    shown = media(document)
    messages = conversation(document["question"], shown)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [
                part if part["type"] == "text" else {"type": part["type"], part["type"]: source(part[part["type"]])}
                for part in message["content"]
            ]
    return Question(
        document["id"],
        document["question"].replace(PLACE, "").strip(),
        str(document["answer"]),
        document["tests"],
        messages,
        lambda reply: verdict(document, reply.text, reply.finish_reason == "length"),
        tuple(shown),
    )


def ask(question: Question, stream: Stream) -> "Generator[StreamEvent | Graded, None, None]":
    """One question: the pieces of its reply as they come, then the Graded.

    Tool rounds: a call equal to the right one gets the right result; any other ends the question. Closing the iterator
    closes the stream. A reply that was stopped from outside (finish_reason "halted") says nothing about the model: it
    counts as one that could not be graded.
    """
    began = time.perf_counter()
    messages, done = list(question.messages), 0
    while True:
        reply = None
        events = stream(messages, question.tools)
        try:
            for event in events:
                reply = event.reply or reply
                yield event
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()
        if reply is None:
            raise ValueError("the stream ended without a reply")
        step = question.rounds[done : done + 2]
        if reply.tool_calls and len(step) == 2 and same_call(reply.tool_calls, step[0]):
            messages, done = [*messages, dict(step[0]), dict(step[1])], done + 2
            continue
        yield Graded(question, reply, _verdict(question, reply), time.perf_counter() - began)
        return


def _verdict(question: Question, reply: "Reply") -> Verdict:
    """The verdict; where no program could be run at all, the machinery has failed, and not the model."""
    if reply.finish_reason == "halted":
        return Verdict(None, "infra_error", {"error": "the reply was stopped before it ended"})
    try:
        return question.grade(reply)
    except RuntimeError as error:
        return Verdict(None, "infra_error", {"error": str(error)})


def standing(done: Sequence[Graded]) -> Standing | None:
    """The share that is right so far, with its interval; None before the first graded item."""
    from evals.statistics import estimate

    kept = [one for one in done if one.verdict.score is not None]
    if not kept:
        return None
    made = estimate([float(one.verdict.score or 0) for one in kept], [one.question.id for one in kept])
    chance = majority = None
    if all(one.question.origin for one in kept):
        asked = []
        for one in kept:
            assert one.question.origin is not None, "all have one"
            sample, turn = one.question.origin
            asked.append(Asked(sample, turn, one.reply.text, one.reply.thinking, one.right, one.truncated))
        score = summarize("", asked)
        chance, majority = score.chance, score.majority
    return Standing(
        len(kept),
        made.value,
        made.low,
        made.high,
        sum(one.right for one in kept),
        chance,
        majority,
        sum(one.truncated for one in kept),
        len(done) - len(kept),
    )


def state_of(one: Graded) -> Literal["right", "partly", "wrong", "silent", "truncated", "failed"]:
    """A verdict in one word."""
    if one.verdict.score is None:
        return "failed"
    if one.right:
        return "right"
    if one.truncated:
        return "truncated"
    if one.verdict.status == "silent":
        return "silent"
    return "partly" if one.verdict.score else "wrong"
