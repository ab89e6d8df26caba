"""moonkit score: how well a model answers the world's held-out questions, beside chance, majority and blindness.

    moonkit score --model nano                          every family, 100 questions each
    moonkit score --model nano --families picture clip --n 400 --out scores.json

    families -- one question of each sample --> prompts -- greedy replies --> world.check --> share right, 95 % interval

Four numbers stand beside each score: what guessing among the possible answers gives (chance), what always giving the
commonest answer of this set gives (majority), what the same model says without the picture (blind), and, for clips,
with one frame in place of all (one frame).
"""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from world.sample import Clip, Sample, Split, Turn

if TYPE_CHECKING:
    from fusion.model import Kimi


ASPECTS = {
    "objects": ("colour", "shape", "exists"),
    "counts": ("count", "count_colour", "count_shape", "count_both", "more"),
    "relations": ("relation", "side", "beside", "nearest", "largest", "smallest", "inside", "overlap"),
}
"""Kinds of questions about a picture, together where one kind alone is too few to tell."""


@dataclass(frozen=True)
class Score:
    """Right answers among `n`, of one family or one kind of question. Intervals are Wilson's, 95 %."""

    name: str
    n: int
    right: int
    chance: float | None  # None where the answers are not a short list
    majority: float
    blind: float | None = None
    one_frame: float | None = None
    truncated: int = 0  # replies that ran into the token limit; they count as wrong

    @property
    def share(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)


@dataclass(frozen=True)
class Asked:
    """One question, and what came back."""

    sample: Sample
    turn: Turn
    reply: str
    thinking: str
    right: bool
    truncated: bool


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share. Raises ValueError for n = 0."""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"{right} right of {n} is not a share")
    return wilson_of(right / n, n, z)


def wilson_of(p: float, n: float, z: float) -> tuple[float, float]:
    """`wilson` of a share and a number of items that need not be whole."""
    spread = z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    # at the ends the formula gives p itself, up to rounding
    return (0.0 if p == 0 else max(0.0, centre - half)), (1.0 if p == 1 else min(1.0, centre + half))


def questions(family: str, n: int, split: Split, seed: int, level: int | None = None) -> list[tuple[Sample, int]]:
    """One turn of each of n samples: (sample, number of the turn). Turns take turns, levels 1 and 2 alternate."""
    from world import sample

    out = []
    for index in range(n):
        made = sample(family, index, split, seed, level or 1 + index % 2)
        out.append((made, index % len(made.turns)))
    return out


def answer(
    kimi: "Kimi",
    asked: Sequence[tuple[Sample, int]],
    *,
    max_new_tokens: int = 256,
    batch: int = 32,
    blind: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Asked]:
    """Greedy replies, checked. Tool rounds: a call equal to the gold one gets the gold result, any other is wrong.

    blind: the same words without the media.
    """
    from fusion.generate import Sampling, complete
    from world.check import check

    sampling = Sampling(max_new_tokens=max_new_tokens)
    done: list[Asked] = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        conversations = [_messages(sample, number, blind) for sample, number in part]
        texts: list[tuple[str, str, bool] | None] = [None] * len(part)
        open_, rounds = list(range(len(part))), 0
        while open_:
            prompts = [kimi.prepare(conversations[i], tools=[dict(t) for t in part[i][0].tools] or None) for i in open_]
            replies = complete(kimi, prompts, sampling)
            going = []
            for i, reply in zip(open_, replies, strict=True):
                turn = part[i][0].turns[part[i][1]]
                step = turn.steps[2 * rounds : 2 * rounds + 2]
                if reply.tool_calls and len(step) == 2 and same_call(reply.tool_calls, step[0]):
                    conversations[i] = [*conversations[i], dict(step[0]), dict(step[1])]
                    going.append(i)
                else:
                    texts[i] = (reply.text, reply.thinking, reply.finish_reason == "length")
            open_, rounds = going, rounds + 1
        for (sample, number), text in zip(part, texts, strict=True):
            assert text is not None, "every conversation has ended"
            turn = sample.turns[number]
            said, thinking, truncated = text
            done.append(Asked(sample, turn, said, thinking, not truncated and check(turn, said), truncated))
        if progress:
            progress(len(done))
    return done


def _messages(sample: Sample, number: int, blind: bool) -> list[dict[str, Any]]:
    return (replace(sample, media=()) if blind else sample).ask(number)


def same_call(calls: Sequence[Any], step: Any) -> bool:
    """Whether a reply's calls are those of the right step: an assistant message with tool_calls."""
    wanted = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in step["tool_calls"]]
    try:
        return [(call.name, call.parsed()) for call in calls] == wanted
    except ValueError:
        return False


def summarize(name: str, asked: Sequence[Asked], blind: Sequence[Asked] = (), frame: Sequence[Asked] = ()) -> Score:
    """The score of one set of questions."""
    right = sum(a.right for a in asked)
    golds = Counter((a.turn.tests, a.turn.answer.strip().lower()) for a in asked)
    best: dict[str, int] = defaultdict(int)
    for (tests, _), count in golds.items():
        best[tests] = max(best[tests], count)
    listed = [1 / len(a.turn.choices) for a in asked if a.turn.choices]
    return Score(
        name,
        len(asked),
        right,
        sum(listed) / len(listed) if len(listed) == len(asked) else None,
        sum(best.values()) / len(asked),
        sum(a.right for a in blind) / len(blind) if blind else None,
        sum(a.right for a in frame) / len(frame) if frame else None,
        sum(a.truncated for a in asked),
    )


def parts(asked: Sequence[Asked]) -> list[tuple[str, list[int]]]:
    """Names and question numbers of the aspects of a family, then of its kinds; nothing where all are of one kind."""
    kinds = defaultdict(list)
    for index, a in enumerate(asked):
        kinds[a.turn.tests].append(index)
    found = []
    for aspect, names in ASPECTS.items():
        at = sorted(index for name in names for index in kinds.get(f"picture/{name}", ()))
        if at:
            found.append((f"picture: {aspect}", at))
    return found + sorted(kinds.items()) if len(kinds) > 1 else []


@dataclass(frozen=True)
class Arguments:
    """Score a model on held-out compositions of the world's families."""

    model: str = "nano"
    """Folder or hub id of a checkpoint, or "nano"."""
    families: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FAMILY")] = ()
    """Which families; none named: all."""
    n: int = 100
    """Questions of each family, one per sample."""
    split: Split = "heldout"
    """heldout: compositions that training never sees. seen: compositions of training, other seeds."""
    level: int | None = None
    """Difficulty, 1 to 3; left out: 1 and 2 by turns."""
    seed: int = 7
    """Seed of the questions."""
    ablations: bool = True
    """Also ask without the picture and, for clips, with one frame."""
    max_new_tokens: int = 256
    """Longest reply, thinking included."""
    out: Path | None = None
    """Write scores and every question with its reply into this JSON file."""
    card: Path | None = None
    """Write the table as Markdown into this file."""
    misses: int = 0
    """Print this many wrong answers of each family."""


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Arguments, prog="moonkit score")
    if arguments.n < 1:
        raise ValueError(f"--n must be at least 1, got {arguments.n}")
    from rich.console import Console

    from fusion.model import Kimi
    from world import MAKERS

    unknown = sorted(set(arguments.families) - set(MAKERS))
    if unknown:
        raise ValueError(f"no family {', '.join(unknown)}; known: {', '.join(sorted(MAKERS))}")
    kimi = Kimi.from_pretrained(arguments.model, dtype="float32", experts="dense").eval()
    console = Console(highlight=False)
    console.print(f"[bold]{arguments.model}[/], split {arguments.split}, seed {arguments.seed}, greedy\n")
    console.print(HEADER)
    records, scores = [], []
    for family in arguments.families or tuple(MAKERS):
        started = time.perf_counter()
        asked = questions(family, arguments.n, arguments.split, arguments.seed, arguments.level)
        options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
        right = answer(kimi, asked, **options)
        blind: list[Asked] = []
        frame: list[Asked] = []
        if arguments.ablations and asked[0][0].media:
            blind = answer(kimi, asked, blind=True, **options)
        if arguments.ablations and isinstance(asked[0][0].media[0] if asked[0][0].media else None, Clip):
            from world.clip import single_frame

            frame = answer(kimi, [(single_frame(s), number) for s, number in asked], **options)
        score = summarize(family, right, blind, frame)
        scores.append(score)
        console.print(row(score) + f"  [dim]{time.perf_counter() - started:.0f} s[/]")
        for name, at in parts(right):
            pick = [[group[i] for i in at] if group else [] for group in (right, blind, frame)]
            scores.append(summarize(name, *pick))
            console.print(f"[dim]{row(scores[-1])}[/]")
        for a in [a for a in right if not a.right][: arguments.misses]:
            console.print(f"    {a.turn.question!r}: said {a.reply!r}, right is {a.turn.answer!r}", markup=False)
        records += [
            {
                "family": family,
                "index": a.sample.index,
                "level": a.sample.level,
                "tests": a.turn.tests,
                "composition": a.turn.composition,
                "question": a.turn.question,
                "gold": a.turn.answer,
                "reply": a.reply,
                "thinking": a.thinking,
                "right": a.right,
            }
            for a in right
        ]
    if arguments.out:
        settings = asdict(replace(arguments, out=None, card=None))
        text = {"settings": settings, "scores": [asdict(s) | {"share": s.share} for s in scores], "answers": records}
        arguments.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    if arguments.card:
        arguments.card.write_text("\n".join(markdown(scores)) + "\n", encoding="utf-8")


HEADER = f"{'':<28}{'n':>5}{'right':>8}{'95 % interval':>16}{'chance':>8}{'majority':>9}{'blind':>7}{'1 frame':>8}"


def row(score: Score) -> str:
    """One line of the table, under HEADER."""
    low, high = score.interval

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    return (
        f"{score.name:<28}{score.n:>5}{percent(score.share):>8}{f'{100 * low:.1f} - {100 * high:.1f}':>16}"
        f"{percent(score.chance):>8}{percent(score.majority):>9}{percent(score.blind):>7}{percent(score.one_frame):>8}"
    )


def markdown(scores: Sequence[Score]) -> Iterator[str]:
    """The same table for a model card."""
    yield "| | n | right, % | 95 % interval | chance | majority | blind | one frame |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for score in scores:
        low, high = score.interval
        cells = [score.share, score.chance, score.majority, score.blind, score.one_frame]
        text = ["-" if c is None else f"{100 * c:.1f}" for c in cells]
        yield (
            f"| {score.name} | {score.n} | {text[0]} | {100 * low:.1f} - {100 * high:.1f} | "
            + " | ".join(text[1:])
            + " |"
        )


if __name__ == "__main__":
    main()
