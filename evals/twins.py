"""Perturbed twins of the world's questions: the same form of question with other contents and a newly made answer.

    twins("sum", 100)                     ->   100 pairs: "47+86=?" and "31+59=?"
    twins("function", 50, renamed=True)   ->   the same program under another name: f(xs) and total(items)
    score_twins(kimi, "sum", 100)         ->   Gap: both scores and their paired difference

    question --> its form "#2+#2=?" <-- a question of the same family, level and split, from other seeds

A model that knows the questions by heart does well on them and worse on their twins; one that can do them does equally
well. What a twin may change is what the family's own maker draws: constants, colours, names, words, programs, pictures.
Three grades of likeness are tried in turn: form (numbers of equally many digits), template (any number, any count of
listed words), kind (what the question tests).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evals.statistics import Estimate, Paired, estimate, paired
from world.sample import Sample, Split, Turn

if TYPE_CHECKING:
    from fusion.model import Kimi

Likeness = Literal["form", "template", "kind", "renamed"]
SEARCH = 40  # samples that are made for each question while its twin is looked for
AWAY = 1_000_003  # between the seeds of questions and of their twins


@dataclass(frozen=True)
class Twin:
    """A question, (sample, number of the turn), and another one like it."""

    original: tuple[Sample, int]
    twin: tuple[Sample, int]
    likeness: Likeness


@lru_cache(maxsize=1)
def _classes() -> tuple[re.Pattern[str], dict[str, str]]:
    """What questions differ in: a pattern that finds such a word or phrase, and each one's class."""
    from world import chart, clip, code, scene, text, words

    classes: dict[str, Sequence[str]] = {
        "colour": tuple(scene.COLOURS),
        "shape": (*scene.SHAPES, *(f"{shape}s" for shape in scene.SHAPES), "crosses"),
        "name": text.NAMES,
        "day": text.DAYS,
        "month": text.MONTHS,
        "way": tuple(clip.WAYS),
        "pen": tuple(chart.PEN),
        "word": (*words.WORDS, *text.THINGS, *text.LOOKS, *text.OBJECTS),
    }
    for name, parts in (
        ("keep", code.KEEP),
        ("change", code.CHANGE),
        ("gather", code.GATHER),
        ("keep", code.WORD_KEEP),
        ("change", code.WORD_CHANGE),
        ("gather", code.WORD_GATHER),
    ):
        classes[name] = (*classes.get(name, ()), *(part.words.strip() for part in parts.values()))
    classes["recursion"] = tuple(words_ for words_, *_ in code.RECURSE.values())
    of: dict[str, str] = {}
    for name, members in classes.items():
        for member in members:
            if member:
                of.setdefault(member, name)
    longest = sorted(of, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest))})\b"), of


def form(question: str) -> str:
    """The question without its contents: "what is 47 plus 86?" is "what is #2 plus #2?"."""
    pattern, of = _classes()
    masked = pattern.sub(lambda found: f"<{of[found[0]]}>", question.lower())
    masked = re.sub(r"\b[a-z](?:, [a-z])+\b", "<letters>", masked)
    return re.sub(r"\d+", lambda found: f"#{len(found[0])}", masked)


def template(question: str) -> str:
    """Coarser: numbers of any length, lists of any length."""
    masked = re.sub(r"#\d+", "#", form(question))
    return re.sub(r"(<\w+>|#)(?:[ ,;]+(?:and )?\1)+", r"\1+", masked)


def twins(
    family: str,
    n: int,
    *,
    split: Split = "heldout",
    seed: int = 7,
    level: int | None = None,
    renamed: bool = False,
    search: int = SEARCH,
) -> list[Twin]:
    """Pairs for the first n questions of a family, as `moonkit score` asks them. One without a like is left out.

    renamed: the same program under other names, for the families that ask for one. Raises ValueError for an unknown
    family, for n < 1, and where no question of the family can be renamed.
    """
    from evals.world import questions

    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    asked = questions(family, n, split, seed, level)
    if renamed:
        pairs = [Twin(one, again, "renamed") for one in asked if (again := _renamed(*one)) is not None]
        if not pairs:
            raise ValueError(f"no question of {family} asks for a program, so there is no name to change")
        return pairs
    matched: dict[int, tuple[tuple[Sample, int], Likeness]] = {}
    wanted: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    for at, (sample, number) in enumerate(asked):
        for likeness, key in _keys(sample, sample.turns[number]):
            wanted[sample.level, likeness, key].append(at)
    spare: dict[int, dict[Likeness, tuple[Sample, int]]] = defaultdict(dict)
    used: set[tuple[int, int]] = set()
    for sample in _candidates(family, asked, split, seed, search):
        if len(matched) == len(asked):
            break
        for number, turn in enumerate(sample.turns):
            keys = _keys(sample, turn)
            best = next((a for a in wanted[sample.level, "form", keys[0][1]] if a not in matched), None)
            if best is not None and _differs(asked[best], (sample, number)):
                matched[best] = (sample, number), "form"
                used.add((sample.level, sample.index))
                break
            for likeness, key in keys[1:]:
                for at in wanted[sample.level, likeness, key]:
                    if at not in matched and likeness not in spare[at] and _differs(asked[at], (sample, number)):
                        spare[at][likeness] = (sample, number)
                        break
    for at in range(len(asked)):
        for likeness in ("template", "kind"):
            found = spare[at].get(likeness) if at not in matched else None
            if found and (found[0].level, found[0].index) not in used:
                used.add((found[0].level, found[0].index))
                matched[at] = found, likeness
    return [Twin(asked[at], *matched[at]) for at in sorted(matched)]


def _keys(sample: Sample, turn: Turn) -> list[tuple[Likeness, str]]:
    return [
        ("form", f"{turn.tests}|{form(turn.question)}"),
        ("template", f"{turn.tests}|{template(turn.question)}"),
        ("kind", turn.tests),
    ]


def _candidates(
    family: str, asked: Sequence[tuple[Sample, int]], split: Split, seed: int, search: int
) -> Iterator[Sample]:
    """Samples of the family from another seed, of the levels that were asked, in turns."""
    import world

    levels = [level for level, _ in Counter(sample.level for sample, _ in asked).most_common()]
    for index in range(search * len(asked)):
        yield world.sample(family, index, split, seed + AWAY, levels[index % len(levels)])


def _differs(one: tuple[Sample, int], other: tuple[Sample, int]) -> bool:
    """Whether two questions are not the same: other words, or another picture."""
    (a, i), (b, j) = one, other
    if a.turns[i].question != b.turns[j].question:
        return True
    pixels = [
        [medium.frames if hasattr(medium, "frames") else medium.pixels for medium in sample.media] for sample in (a, b)
    ]
    return bool(pixels[0]) and not all(map(np.array_equal, *pixels))


NAMES = (("total", "items"), ("pick", "values"), ("solve", "given"), ("work", "data"), ("answer", "entries"))


def _renamed(sample: Sample, number: int) -> tuple[Sample, int] | None:
    """The same program under other names; None where the question asks for none."""
    turn = sample.turns[number]
    if turn.check.kind != "program":
        return None
    function, argument = NAMES[sample.index % len(NAMES)]

    def new(text: str) -> str:
        text = re.sub(r"\bf\b", function, text)
        return re.sub(r"\b(xs|ws|d)\b", argument, text)

    data = {**turn.check.data, "name": function}
    again = replace(turn, question=new(turn.question), answer=new(turn.answer), check=replace(turn.check, data=data))
    turns = (*sample.turns[:number], again, *sample.turns[number + 1 :])
    return replace(sample, turns=turns), number


# ---- scores


@dataclass(frozen=True)
class Gap:
    """How a model does on questions and on their twins. difference: twins less questions, pair by pair.

    likeness: how many pairs of each grade; left_out: questions that no twin was found for.
    """

    family: str
    original: Estimate
    twin: Estimate
    difference: Paired
    likeness: dict[str, int]
    left_out: int

    def text(self) -> str:
        """For people."""

        def shown(made: Estimate) -> str:
            low, high = made.low or 0.0, made.high or 0.0
            return f"{100 * made.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"

        d = self.difference.difference
        ends = "" if d.low is None or d.high is None else f" ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
        grades = ", ".join(f"{count} {name}" for name, count in self.likeness.items())
        return "\n".join(
            (
                f"world:{self.family}, {self.difference.n} pairs ({grades}; {self.left_out} questions without a twin)",
                f"    questions   {shown(self.original)}",
                f"    twins       {shown(self.twin)}",
                f"    gap         {100 * d.value:+.1f}{ends}, p {self.difference.p:.3f}",
            )
        )


def gap(family: str, pairs: Sequence[Twin], original: Sequence[float], twin: Sequence[float], asked: int) -> Gap:
    """The gap between scores of questions and of their twins, in the order of `pairs`. Raises ValueError for none."""
    if not (len(pairs) == len(original) == len(twin) and pairs):
        raise ValueError(f"{len(pairs)} pairs, {len(original)} and {len(twin)} scores must match one to one")
    rows: list[list[dict[str, Any]]] = [
        [{"item_id": str(at), "cluster": f"{pair.original[0].index}", "score": float(s)} for at, (pair, s) in both]
        for both in (enumerate(zip(pairs, scores, strict=True)) for scores in (original, twin))
    ]
    difference = paired(rows[0], rows[1], family)
    assert difference is not None, "all items are common"
    clusters = [row["cluster"] for row in rows[0]]
    kinds: Counter[str] = Counter(pair.likeness for pair in pairs)
    return Gap(
        family,
        estimate(list(map(float, original)), clusters),
        estimate(list(map(float, twin)), clusters),
        difference,
        dict(kinds),
        asked - len(pairs),
    )


def score_twins(
    kimi: "Kimi",
    family: str,
    n: int = 100,
    *,
    split: Split = "heldout",
    seed: int = 7,
    level: int | None = None,
    renamed: bool = False,
    max_new_tokens: int = 256,
) -> Gap:
    """Ask a model a family's questions and their twins, greedy, and compare. ValueError where none has a twin."""
    from evals.world import answer

    pairs = twins(family, n, split=split, seed=seed, level=level, renamed=renamed)
    if not pairs:
        raise ValueError(f"no question of {family} has a twin")
    scores = [
        [float(one.right) for one in answer(kimi, asked, max_new_tokens=max_new_tokens)]
        for asked in ([pair.original for pair in pairs], [pair.twin for pair in pairs])
    ]
    return gap(family, pairs, scores[0], scores[1], n)
