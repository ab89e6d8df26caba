"""Pictures and texts to read: answers found again from the scene and its pixels, splits, balance.

pytest tests/world/test_picture.py
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

import world
from world.check import check, overlap
from world.picture import Scene, Thing, asks, caption, draw_scene, paint
from world.sample import Image, Pixels, Sample, Split, Turn, held_out, rng_of
from world.scene import COLOURS, SHAPES

FAMILIES = ("picture", "caption", "point", "reading")


def things_in(pixels: np.ndarray, colour: str) -> int:
    """Connected blobs close to a colour: counted with a flood fill of our own."""
    near = np.abs(pixels.astype(int) - np.array(COLOURS[colour])).sum(2) < 60
    seen = np.zeros_like(near)
    blobs = 0
    for y, x in zip(*near.nonzero(), strict=True):
        if seen[y, x]:
            continue
        stack, size = [(y, x)], 0
        seen[y, x] = True
        while stack:
            i, j = stack.pop()
            size += 1
            for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if 0 <= a < near.shape[0] and 0 <= b < near.shape[1] and near[a, b] and not seen[a, b]:
                    seen[a, b] = True
                    stack.append((a, b))
        blobs += size >= 25
    return blobs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_a_function_of_its_number(family: str) -> None:
    for split in ("train", "heldout"):
        a, b = world.sample(family, 3, split, 1, 2), world.sample(family, 3, split, 1, 2)
        assert a.turns == b.turns
        first, second = a.media[0], b.media[0]
        assert isinstance(first, Image) and isinstance(second, Image) and np.array_equal(first.pixels, second.pixels)
        assert a.turns != world.sample(family, 4, split, 1, 2).turns


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_composition(family: str) -> None:
    of = {
        split: {t.composition for i in range(150) for t in world.sample(family, i, split, 0, 1 + i % 3).turns}
        for split in ("train", "seen", "heldout")
    }
    assert not any(map(held_out, of["train"] | of["seen"])) and all(map(held_out, of["heldout"]))
    assert not of["heldout"] & (of["train"] | of["seen"])


def test_training_never_shows_a_held_out_pair() -> None:
    for i in range(100):
        for fact in world.sample("caption", i, "train").turns[0].check.data["facts"]:
            assert not held_out(f"{fact[0]}|{fact[1]}")
    shown = [world.sample("caption", i, "heldout").turns[0].check.data["facts"] for i in range(50)]
    assert all(any(held_out(f"{c}|{s}") for c, s, _ in facts) for facts in shown)


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_is_right_and_silence_is_wrong(family: str) -> None:
    for i in range(40):
        for turn in world.sample(family, i, "heldout", 5, 1 + i % 3).turns:
            assert check(turn, turn.answer) and not check(turn, "") and not check(turn, "qq zz 0 0 0 0 0")


def seen(
    monkeypatch: pytest.MonkeyPatch, family: str, split: Split, numbers: range
) -> Iterator[tuple[Sample, Scene, Pixels]]:
    """Samples with the scene each was drawn from, and the ground of it with nothing on it."""
    scenes: list[tuple[Scene, Pixels]] = []

    def remember(rng: random.Random, scene: Scene, level: int) -> Pixels:
        again = random.Random()
        again.setstate(rng.getstate())
        scenes.append((scene, paint(again, replace(scene, things=(), inside=None), level)))
        return paint(rng, scene, level)

    monkeypatch.setattr("world.picture.paint", remember)
    for i in numbers:
        made = world.sample(family, i, split, 9, 1 + i % 3)
        yield made, *scenes[-1]


def pixels_of(sample: Sample) -> np.ndarray:
    medium = sample.media[0]
    assert isinstance(medium, Image)
    return medium.pixels


def one_shape(word: str) -> str:
    """crosses, stars -> cross, star; other words stay what they are."""
    return next((s for s in SHAPES if word in (s, s + "s", s + "es")), word)


def answer_again(turn: Turn, things: Sequence[Thing]) -> set[str]:
    """The answers that a question, read as words, has in a scene: more than one would leave it open."""
    kind = turn.tests.removeprefix("picture/")
    words = [one_shape(word) for word in re.findall("[a-z]+", turn.question)]
    colours, shapes = [w for w in words if w in COLOURS], [w for w in words if w in SHAPES]
    named = [t for t in things if t.colour in colours[:1] and t.shape in shapes[:1]]
    if kind.startswith("count"):
        fits = [t for t in things if t.colour in (colours or COLOURS) and t.shape in (shapes or SHAPES)]
        return {str(len(fits))}
    if kind == "exists":
        return {"yes" if named else "no"}
    if kind == "colour":
        return {t.colour for t in things if t.shape == shapes[0]}
    if kind == "shape":
        return {t.shape for t in things if t.colour == colours[0]}
    if kind in ("largest", "smallest"):
        edge = (max if kind == "largest" else min)(t.size for t in things)
        return {t.colour for t in things if t.size == edge}
    if kind == "overlap":
        pairs = [(a, b) for i, a in enumerate(things) for b in things[:i]]
        return {"yes" if any(meet(a, b) for a, b in pairs) else "no"}
    if kind == "inside":
        rings = [t for t in things if t.shape == "ring"]
        held = [t for r in rings for t in things if max(map(abs, np.subtract(t.centre, r.centre))) < 7 and t is not r]
        return {t.shape for t in held}
    if kind == "more":
        asked = [w for w in words if w in COLOURS or w in SHAPES]
        counts = [sum(w in (t.colour, t.shape) for t in things) for w in asked]
        return {w for w, n in zip(asked, counts, strict=True) if n == max(counts)}
    if kind == "nearest":
        gaps = {t: np.hypot(*np.subtract(t.centre, named[0].centre)) for t in things if t is not named[0]}
        return {t.colour for t, gap in gaps.items() if gap == min(gaps.values())}
    if kind == "beside":
        ahead = [t for t in things if t is not named[0] and way_to(t, named[0], words)]
        return {t.colour for t in ahead}
    other = [t for t in things if t.colour == colours[1] and t.shape == shapes[1]]
    assert kind in ("relation", "side") and len(named) == len(other) == 1
    if kind == "side":
        return {"left" if named[0].centre[0] < other[0].centre[0] else "right"}
    return {"yes" if way_to(named[0], other[0], words) else "no"}


def meet(a: Thing, b: Thing) -> bool:
    """Whether the cells of two things share a pixel."""
    across = min(a.x + a.size, b.x + b.size) - max(a.x, b.x)
    down = min(a.y + a.size, b.y + b.size) - max(a.y, b.y)
    return across > 0 and down > 0


def way_to(a: Thing, b: Thing, words: list[str]) -> bool:
    """Whether a is left of, right of, above or below b, whichever the words say. Never in doubt."""
    way = next(w for w in words if w in ("left", "right", "above", "below"))
    axis = 0 if way in ("left", "right") else 1
    gap = a.centre[axis] - b.centre[axis]
    assert abs(gap) >= 14
    return (gap < 0) == (way in ("left", "above"))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_found_again_from_question_and_scene(monkeypatch: pytest.MonkeyPatch, split: Split) -> None:
    kinds: Counter[str] = Counter()
    for made, shown, _ in seen(monkeypatch, "picture", split, range(200)):
        for turn in made.turns:
            found = answer_again(turn, shown.all)
            assert found == {one_shape(turn.answer)}, (turn, shown)
            assert not turn.choices or turn.answer in turn.choices
            kinds[turn.tests] += 1
    assert len(kinds) == 16


def test_counts_are_found_again_in_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    for made, shown, _ in seen(monkeypatch, "picture", "train", range(100)):
        if shown.inside is None and not shown.overlap:  # a thing over another may split it into two blobs
            blobs = {colour: things_in(pixels_of(made), colour) for colour in COLOURS}
            assert sum(blobs.values()) == len(shown.things)
            for turn in made.turns:
                if turn.tests == "picture/count_colour":
                    colour = next(w for w in re.findall("[a-z]+", turn.question) if w in COLOURS)
                    assert str(blobs[colour]) == turn.answer
                    compared += 1
    assert compared >= 40


def scene() -> Scene:
    return Scene(
        100,
        100,
        (
            Thing("red", "circle", 5, 10, 20),
            Thing("red", "square", 70, 12, 24),
            Thing("blue", "star", 40, 70, 16),
        ),
    )


def test_answers_of_a_scene_made_by_hand() -> None:
    answers: dict[str, set[str]] = {}
    for seed in range(200):
        for ask in asks(random.Random(seed), scene()):
            words = " ".join(ask.words.values())
            answers.setdefault(f"{ask.kind} {words}".strip(), set()).add(ask.answer)
    assert all(len(given) == 1 for given in answers.values()), "one question, one answer"
    expected = {
        "count": "3",
        "count_colour red": "2",
        "count_colour blue": "1",
        "count_shape star": "1",
        "count_both red circle": "1",
        "colour star": "blue",
        "shape blue": "star",
        "exists red circle": "yes",
        "exists blue circle": "no",
        "largest": "red",
        "smallest": "blue",
        "more red blue": "red",
        "relation red circle red square left of": "yes",
        "relation red circle red square right of": "no",
        "relation blue star red circle below": "yes",
        "side red square blue star left right": "right",
        "nearest blue star": "red",
    }
    for question, answer in expected.items():
        if question in answers:
            assert answers[question] == {answer}, question
    assert len(expected.keys() & answers.keys()) >= 14


def test_a_caption_goes_from_top_to_bottom() -> None:
    text, facts = caption(scene())
    assert text == "red circle top left, red square top right, blue star bottom center"
    assert facts[2] == ["blue", "star", "bottom center"]


def test_boxes_hold_what_they_name_in_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    for made, shown, ground in seen(monkeypatch, "point", "train", range(60)):
        height, width = ground.shape[:2]
        if len(shown.all) > 1:  # alone, every pixel that differs from the ground is the thing's
            continue
        rows, columns = (pixels_of(made) != ground).any(2).nonzero()
        around = [100 * columns.min() / width, 100 * rows.min() / height]
        around += [100 * (columns.max() + 1) / width, 100 * (rows.max() + 1) / height]
        for turn in made.turns:
            box = turn.check.data["box"]
            # a box is that of the cell a shape is drawn in, wider than what is seen of a square or a diamond
            assert overlap(box, around) >= 0.6, (turn, around)
            assert all(b <= a + 1 for b, a in zip(box[:2], around[:2], strict=True)), (turn, around)
            assert all(b >= a - 1 for b, a in zip(box[2:], around[2:], strict=True)), (turn, around)
            if turn.check.kind == "point":
                x, y = map(int, turn.answer.split())
                assert abs(x - (around[0] + around[2]) / 2) < 5 and abs(y - (around[1] + around[3]) / 2) < 5
            else:
                assert turn.answer == " ".join(map(str, box)) and min(box) >= 0 and max(box) <= 99
            compared += 1
    assert compared >= 10


def test_things_keep_clear_and_inside() -> None:
    for seed in range(100):
        for level in (1, 2, 3):
            made = draw_scene(rng_of("clear", seed), level)
            if made is None:
                continue
            for thing in made.things:
                assert thing.x >= 0 and thing.y >= 0 and thing.size >= 14
                assert thing.x + thing.size <= made.width and thing.y + thing.size <= made.height
            assert paint(rng_of(seed), made, level).shape == (made.height, made.width, 3)


def test_yes_and_no_are_balanced() -> None:
    given: Counter[str] = Counter()
    for i in range(800):
        for turn in world.sample("picture", i, "train", 3, 1 + i % 2).turns:
            if turn.tests == "picture/relation":
                given[turn.answer] += 1
    assert 0.42 < given["yes"] / sum(given.values()) < 0.58


def test_levels_are_checked() -> None:
    for family in FAMILIES:
        with pytest.raises(ValueError, match="levels 1 to 3"):
            world.sample(family, 0, level=4)


def test_things_are_single_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "heldout"):
        for made, shown, _ in seen(monkeypatch, "thing", split, range(100)):
            (thing,) = shown.things
            assert made.turns[0].answer == thing.name
            assert held_out(f"{thing.colour}|{thing.shape}") == (split == "heldout")


def test_counts_are_worked_by_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = set()
    for made, _, _ in seen(monkeypatch, "picture", "train", range(150)):
        for turn in made.turns:
            if turn.tests.startswith("picture/count"):
                kinds.add(turn.tests)
                listed = turn.thinking.removesuffix(".").split(", ")
                if turn.tests == "picture/count_both":  # the colours of all that have the shape
                    listed = [word for word in listed if word in turn.question.split()]
                assert (0 if listed == ["none"] else len(listed)) == int(turn.answer)
    assert len(kinds) == 4


def test_thoughts_lead_to_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relations: the tenths decide, found by colour and shape. Existence: the shape is among those of its colour."""
    kinds: Counter[str] = Counter()
    for split in ("train", "heldout"):
        for made, _, _ in seen(monkeypatch, "picture", split, range(200)):
            for turn in made.turns:
                said = turn.thinking.removesuffix(".").split(", ")
                words = turn.question.replace("?", "").replace(".", "").replace(",", "").split()
                if turn.tests in ("picture/relation", "picture/side"):
                    groups = dict(part.split(": ") for part in re.findall(r"\w+: [^.]+", turn.thinking))
                    last = turn.thinking.removesuffix(".").split(". ")[-1]
                    named = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", turn.question)
                    assert list(groups) == list(dict.fromkeys(colour for colour, _ in named))
                    places = {
                        (colour, shape): place
                        for colour, told in groups.items()
                        for shape, place in (each.split() for each in told.split(", "))
                    }
                    one, two = (places[pair] for pair in named)
                    assert last == ", ".join(f"{pair[1]} {places[pair]}" for pair in named)
                    first_less = any(word in words for word in ("above", "left")) and turn.tests == "picture/relation"
                    if int(one) == int(two):
                        continue
                    kinds[turn.tests] += 1
                    if turn.tests == "picture/side":
                        assert turn.answer == ("left" if int(one) < int(two) else "right")
                    else:
                        assert (turn.answer == "yes") == (first_less == (int(one) < int(two)))
                elif turn.tests == "picture/exists":
                    shape = next(word for word in words if word in SHAPES)
                    kinds[turn.tests] += 1
                    listed, last = turn.thinking.split(". ")
                    assert last == f"{shape}?" and (turn.answer == "yes") == (shape in listed.split(", "))
                elif turn.tests == "picture/beside":
                    kinds[turn.tests] += 1
                    assert said[1] == turn.answer and said[0] in COLOURS
    assert len(kinds) == 4 and min(kinds.values()) > 10, kinds


def test_captions_leave_no_doubt_about_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for _, shown, _ in seen(monkeypatch, "caption", "train", range(100)):
        for thing in shown.all:
            for at, side in zip(thing.centre, (shown.width, shown.height), strict=True):
                assert min(abs(at - side / 3), abs(at - 2 * side / 3)) >= 3
