"""What lm-eval asks becomes questions with keys, and what a model says goes to the store and back to lm-eval.

    Instances (one, repeated)  -- questions() -->  Question(context, media, options, key, seed), each asked once
        known to the store?    -- yes --> its Answer
                               -- no  --> the model's `produce(questions)`, each Answer kept as it comes

Shared by the models of evals/adapter.py and evals/endpoint.py. A repeat of a sampled request is another seed index and
so another key; repeats of a greedy one are one question.
"""

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol

from evals.media import PLACE, Video, check, digest
from evals.store import Store, key_of, seed_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)


class Rendered(str):
    """A prompt from the chat template. It reads as text; the conversation itself goes with it.

    So control tokens come from the template alone: their spelling inside a document stays text.
    """

    messages: list[dict[str, Any]]
    open: bool  # the model's turn begins; False: the last message is the beginning of its answer

    def __new__(cls, text: str, messages: Sequence[Mapping[str, Any]], open: bool = True) -> "Rendered":
        rendered = super().__new__(cls, text)
        rendered.messages = [dict(message) for message in messages]
        rendered.open = open
        return rendered

    def __reduce__(self) -> Any:
        return Rendered, (str(self), self.messages, self.open)

    def __deepcopy__(self, memo: Any) -> "Rendered":
        return self


class Said(str):
    """A reply as lm-eval gets it; a grader may ask how it ended."""

    finish_reason: str

    def __new__(cls, text: str, finish_reason: str = "stop") -> "Said":
        said = super().__new__(cls, text)
        said.finish_reason = finish_reason
        return said

    def __reduce__(self) -> Any:
        return Said, (str(self), self.finish_reason)


@dataclass(frozen=True)
class Options:
    """How one reply is made. temperature 0 is greedy. until: strings that end the visible text and are cut off."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model said. text: without its thoughts, cut at the first `until`. error: why there is no answer."""

    text: str
    thinking: str = ""
    finish_reason: str = "stop"
    tokens: Mapping[str, int] = field(default_factory=dict)  # prompt, completion, thinking, media
    seconds: float = 0.0
    error: str | None = None


@dataclass
class Question:
    """One thing to ask, and where among the requests its answer goes."""

    request: "Instance"
    context: str
    media: tuple[Any, ...]
    digests: tuple[str, ...]
    options: Options
    key: str
    seed: int
    repeat: int
    places: list[int] = field(default_factory=list)

    @property
    def where(self) -> str:
        """For messages: the task and row it comes from."""
        return place_of(self.request)


Heard = Callable[["Instance", int, Question, Answer], "str | None"]


def place_of(request: "Instance") -> str:
    row = request.doc.get("id", request.doc_id) if isinstance(request.doc, dict) else request.doc_id
    return f"{request.task_name}, row {row}" if request.task_name else f"row {row}"


def check_names(model: str, unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError for model arguments that nobody reads, with the nearest that somebody does."""
    for name in unknown:
        near = get_close_matches(name, list(known), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"--model {model} has no argument {name!r}; {hint}")


def options_of(gen_kwargs: Mapping[str, Any], given: Mapping[str, Any], max_tokens: int) -> Options:
    """A task's gen_kwargs as Options. given: the model's own arguments, which win; max_tokens: where nobody says."""
    task = dict(gen_kwargs)
    until = task.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    sample = task.pop("do_sample", None)
    limits = [
        task.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    ]
    limit = next((value for value in limits if value is not None), max_tokens)
    temperature = float(task.pop("temperature", None) or 0.0)
    if sample is False:
        temperature = 0.0
    elif sample and not temperature:
        temperature = 1.0
    top_p, top_k = task.pop("top_p", 1.0), task.pop("top_k", 0)
    for name, value in task.items():
        _say_once(f"generation option {name}={value!r} is not known here and changes nothing")
    chosen = {"max_tokens": limit, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    chosen |= {name: value for name, value in given.items() if value is not None}
    options = Options(
        int(chosen["max_tokens"]),
        float(chosen["temperature"]),
        float(chosen["top_p"]),
        int(chosen["top_k"]),
        tuple(stop for stop in until if stop),
    )
    return replace(options, top_p=1.0, top_k=0) if options.temperature == 0 else options


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning(text)


def cut(text: str, until: Sequence[str]) -> str | None:
    """The text before the first of the strings; None if none is in it."""
    places = [at for at in (text.find(stop) for stop in until) if at >= 0]
    return text[: min(places)] if places else None


def conversation(context: str, media: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI-style messages, the media in the places of "<image>". Plain text is one user message.

    Raises ValueError when there are not as many places as media.
    """
    messages = context.messages if isinstance(context, Rendered) else [{"role": "user", "content": str(context)}]
    if not media:
        return [dict(message) for message in messages]
    places = sum(message["content"].count(PLACE) for message in messages)
    if places != len(media):
        raise ValueError(f"the text has {places} {PLACE} but {len(media)} images and clips came with it")
    left = iter(media)
    out = []
    for message in messages:
        texts = message["content"].split(PLACE)
        if len(texts) > 1:
            parts: list[dict[str, Any]] = []
            for index, text in enumerate(texts):
                if index:
                    medium = next(left)
                    kind = "video" if isinstance(medium, Video) else "image"
                    parts.append({"type": kind, kind: medium})
                if text:
                    parts.append({"type": "text", "text": text})
            message = message | {"content": parts}
        out.append(dict(message))
    return out


def media_of(request: "Instance") -> tuple[Any, ...]:
    """The media of a request. Raises ValueError for sound, and for what is neither image nor Video."""
    more = request.args[2] if len(request.args) > 2 else {}
    if more.get("audio"):
        raise ValueError(f"{place_of(request)}: it needs hearing, and Kimi models have none")
    visual = more.get("visual") or ()
    try:
        return check(visual if isinstance(visual, list | tuple) else [visual])
    except ValueError as error:
        raise ValueError(f"{place_of(request)}: {error}") from None


def questions(
    requests: Sequence["Instance"],
    identity: Mapping[str, Any],
    given: Mapping[str, Any],
    max_tokens: int,
    seed: int,
) -> list[Question]:
    """generate_until requests as questions, equal ones together, in order of first appearance."""
    found: dict[str, Question] = {}
    times: dict[int, int] = defaultdict(int)
    seen: dict[int, tuple[str, ...]] = {}
    for place, request in enumerate(requests):
        context, gen_kwargs = request.args[0], request.args[1]
        repeat, times[id(request)] = times[id(request)], times[id(request)] + 1
        media = media_of(request)
        if id(request) not in seen:
            seen[id(request)] = tuple(digest(medium) for medium in media)
        options = options_of(gen_kwargs, given, max_tokens)
        asked: dict[str, Any] = {"kind": "reply", "model": identity, "text": str(context), "media": seen[id(request)]}
        if isinstance(context, Rendered):
            asked |= {"messages": context.messages, "open": context.open}
        asked |= {"options": asdict(options)}
        if options.temperature:
            asked |= {"seed": seed, "repeat": repeat}
        key = key_of(asked)
        if key not in found:
            found[key] = Question(request, context, media, seen[id(request)], options, key, seed_of(key), repeat)
        found[key].places.append(place)
    return list(found.values())


class Speaker(Protocol):
    """What both of our models have."""

    given: dict[str, Any]
    max_gen_toks: int
    seed: int
    store: Store | None
    heard: Heard | None
    cache_hook: Any

    @property
    def identity(self) -> dict[str, Any]: ...
    def produce(self, asked: list[Question]) -> Iterator[tuple[Question, Answer]]: ...


def replies(model: Speaker, requests: Sequence["Instance"], quiet: bool = False) -> list[str]:
    """generate_until: the visible text of each reply, cut at the first `until`; lm-eval's own cache is told of each."""

    def heard(request: "Instance", repeat: int, question: Question, answer: Answer) -> str | None:
        model.cache_hook.add_partial("generate_until", request.args, answer.text)
        return model.heard(request, repeat, question, answer) if model.heard is not None else None

    asked = questions(requests, model.identity, model.given, model.max_gen_toks, model.seed)
    answers = ask(requests, asked, model.store, model.produce, heard, quiet)
    return [Said(answer.text, answer.finish_reason) for answer in answers]


def ask(
    requests: Sequence["Instance"],
    asked: Sequence[Question],
    store: Store | None,
    produce: Callable[[list[Question]], Iterator[tuple[Question, Answer]]],
    heard: Heard | None = None,
    quiet: bool = False,
) -> list[Answer]:
    """Answers in the order of the requests: from the store where it has them, else from the model.

    Every answer is in the store before the next is waited for. Raises ValueError in one sentence when the model fails.
    """
    from tqdm import tqdm

    answers: list[Answer | None] = [None] * len(requests)
    times: dict[int, int] = defaultdict(int)
    repeats = []
    for request in requests:
        repeats.append(times[id(request)])
        times[id(request)] += 1
    bar = tqdm(total=len(requests), desc="answers", disable=quiet, file=sys.stderr, mininterval=0.5, smoothing=0.05)

    def take(question: Question, answer: Answer) -> None:
        for place in question.places:
            answers[place] = answer
            if heard is not None:
                said = heard(requests[place], repeats[place], question, answer)
                if said:
                    bar.set_postfix_str(str(said), refresh=False)
            bar.update()

    missing = []
    for question in asked:
        known = store.get(question.key) if store is not None else None
        if known is None:
            missing.append(question)
        else:
            take(question, Answer(**known))
    if store is not None and len(missing) < len(asked):
        log.info("%d of %d answers are in the store %s", len(asked) - len(missing), len(asked), store.folder)
    done = 0
    try:
        for question, answer in produce(missing):
            if store is not None and answer.error is None:
                store.add(question.key, asdict(answer))
            take(question, answer)
            done += 1
    except (RuntimeError, ValueError, OSError) as error:
        kept = (
            f"{done} of {len(missing)} new answers are kept in {store.folder}"
            if store is not None
            else "nothing is kept"
        )
        again = " (no store)" if store is None else "; the same command goes on from there"
        bar.close()
        raise ValueError(f"the model failed: {_one_line(error)}. {kept}{again}") from error
    bar.close()
    whole = [answer for answer in answers if answer is not None]
    assert len(whole) == len(requests), "every request has an answer"
    return whole


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:400]


def likelihoods(
    requests: Sequence[tuple[str, Any]],
    store: Store | None,
    score: Callable[[list[int]], Iterator[tuple[int, Any]]],
    quiet: bool = False,
    keep_every: float = 5.0,
) -> list[Any]:
    """Values of keyed requests, from the store where it has them.

    requests: (key, anything); score(places) yields (place, value). Values are numbers and lists of them.
    Values are kept every `keep_every` seconds, for one write costs more than one of them.
    """
    from tqdm import tqdm

    values: list[Any] = [None] * len(requests)
    first: dict[str, int] = {}
    for place, (key, _) in enumerate(requests):
        first.setdefault(key, place)
    bar = tqdm(total=len(first), desc="likelihoods", disable=quiet, file=sys.stderr, mininterval=0.5)
    missing = []
    for key, place in first.items():
        known = store.get(key) if store is not None else None
        if known is None:
            missing.append(place)
        else:
            values[place] = known["value"]
            bar.update()
    waiting: list[tuple[str, dict[str, Any]]] = []
    last = time.monotonic()
    try:
        for place, value in score(missing):
            values[place] = value
            waiting.append((requests[place][0], {"value": value}))
            bar.update()
            if store is not None and time.monotonic() - last > keep_every:
                store.add_all(waiting)
                waiting, last = [], time.monotonic()
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"the model failed: {_one_line(error)}") from error
    finally:
        if store is not None and waiting:
            store.add_all(waiting)
        bar.close()
    return [values[first[key]] for key, _ in requests]
