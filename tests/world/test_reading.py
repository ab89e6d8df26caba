"""Texts: answers read again from the pixels by matching glyphs, the words of a split, what the questions name.

pytest tests/world/test_reading.py
"""

import random
import re
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL
from PIL import ImageDraw, ImageFont

import world
from world.reading import PHRASES, make, make_glyph, make_spelling
from world.sample import Image, Sample, Split, held_out, rng_of
from world.scene import COLOURS
from world.words import WORDS

SPLITS: tuple[Split, ...] = ("train", "seen", "heldout")


@lru_cache(maxsize=8)
def samples(split: Split) -> tuple[Sample, ...]:
    return tuple(make(rng_of("test", split, index), split, 1 + index % 3) for index in range(240))


def pixels(sample: Sample) -> Any:
    (picture,) = sample.media
    assert isinstance(picture, Image)
    return picture.pixels


def ink_rows(sample: Sample) -> Any:
    """Ink of a picture without texture, 0..1: how far a pixel is from the ground, which its corner shows."""
    away = np.abs(pixels(sample).astype(float) - pixels(sample)[0, 0]).max(axis=-1)
    return away / away.max()


def cut(mask: Any, level: float = 0.3) -> Any:
    rows, columns = (np.flatnonzero((mask > level).any(axis=axis)) for axis in (1, 0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@lru_cache(maxsize=4096)
def written(text: str, size: int) -> Any:
    """The text in Pillow's own font, drawn here anew."""
    picture = PIL.new("L", (240, 90))
    ImageDraw.Draw(picture).text((5, 5), text, 255, ImageFont.load_default(size=size))
    return cut(np.asarray(picture, float) / 255)


def distance(mask: Any, text: str) -> float:
    """How far a mask is from a text in the size that fits its width best; 1 when no size does."""
    found = [1.0]
    fits = round(30 * mask.shape[1] / written(text, 30).shape[1])
    for size in range(fits - 3, fits + 4):
        glyphs = written(text, size)
        if max(abs(a - b) for a, b in zip(glyphs.shape, mask.shape, strict=True)) <= 1:
            rows, columns = (min(a, b) for a, b in zip(glyphs.shape, mask.shape, strict=True))
            found.append(float(np.abs(glyphs[:rows, :columns] - mask[:rows, :columns]).mean()))
    return min(found)


def test_the_pixels_say_the_answer_and_not_its_neighbour() -> None:
    """Level 1 draws upright texts: the answer's own glyphs fit what is seen, those of a near text fit worse."""
    checked = 0
    for index in range(120):
        sample = make(rng_of("glyphs", index), "train", 1)
        plain = (pixels(sample)[:2] == pixels(sample)[0, 0]).all()
        if len(sample.turns) > 1 or not plain:
            continue
        answer = sample.turns[0].answer
        other = str((int(answer[-1]) + 1) % 10) if answer.isdigit() else "o" if answer[-1] != "o" else "e"
        mask = cut(ink_rows(sample))
        right, wrong = distance(mask, answer), distance(mask, answer[:-1] + other)
        assert right < 0.02, (answer, right)
        assert right < wrong, (answer, right, wrong)
        checked += 1
    assert checked >= 15, f"only {checked} pictures hold one text on plain ground"


@pytest.mark.parametrize("split", SPLITS)
def test_turns_of_one_picture_agree(split: Split) -> None:
    """`all` names the lines; top, bottom and the single number or word are theirs; a colour names one of them."""
    checked = 0
    for sample in samples(split):
        answers = {turn.tests.removeprefix("reading/"): turn.answer for turn in sample.turns}
        lines = answers.get("all", "").split()
        if not lines:
            continue
        checked += 1
        assert 2 <= len(lines) == len(set(lines)) <= 4
        assert answers.get("top", lines[0]) == lines[0]
        assert answers.get("bottom", lines[-1]) == lines[-1]
        assert answers.get("coloured", lines[0]) in lines
        numbers, words = [x for x in lines if x.isdigit()], [x for x in lines if not x.isdigit()]
        assert "number" not in answers or [answers["number"]] == numbers
        assert "word" not in answers or [answers["word"]] == words
    assert checked >= 40


def test_a_colour_in_the_question_is_in_the_picture() -> None:
    """On white ground ink is the named colour times three quarters: as many such pixels as a text has, and more."""
    checked = 0
    for sample in samples("train"):
        for turn in sample.turns:
            if turn.tests != "reading/coloured" or pixels(sample).mean() < 200:
                continue
            (colour,) = (word for word in re.findall(r"\w+", turn.question) if word in COLOURS)
            ink = np.array(COLOURS[colour]) * 0.75
            near = np.abs(pixels(sample).astype(float) - ink).max(axis=-1) < 12
            assert near.sum() >= 4 * len(turn.answer), (colour, turn.answer, near.sum())
            checked += 1
    assert checked >= 8


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_belongs_to_the_split(split: Split) -> None:
    """By the text itself, whatever the turn says of its composition."""
    texts = {text for sample in samples(split) for turn in sample.turns for text in turn.answer.split()}
    assert len(texts) > (150 if split != "heldout" else 50)
    assert {held_out(f"text|{text}") for text in texts} == {split == "heldout"}
    numbers = {text for text in texts if text.isdigit()}
    assert all(1 <= len(text) <= 4 for text in numbers)
    # held out are real words; in training half are invented
    invented = texts - numbers - set(WORDS)
    assert not invented if split == "heldout" else len(invented) > 20 and all(3 <= len(text) <= 6 for text in invented)
    for sample in samples(split):
        assert all(held_out(turn.composition) == (split == "heldout") for turn in sample.turns)


def test_numbers_of_every_length_and_all_phrasings_occur() -> None:
    turns = [turn for sample in samples("train") for turn in sample.turns]
    lengths = {len(turn.answer) for turn in turns if turn.answer.isdigit()}
    assert lengths == {1, 2, 3, 4}
    for kind, phrases in PHRASES.items():
        if kind in ("glyph", "spelling"):
            continue
        asked = {re.sub("|".join(COLOURS), "{colour}", t.question) for t in turns if t.tests == f"reading/{kind}"}
        assert asked == set(phrases), kind


@pytest.mark.parametrize("level", (1, 2, 3))
def test_the_same_seed_gives_the_same_sample(level: int) -> None:
    a, b, c = (make(rng_of("again", seed), "train", level) for seed in (1, 1, 2))
    assert a.turns == b.turns and np.array_equal(pixels(a), pixels(b))
    assert a.turns != c.turns
    assert max(pixels(a).shape) <= 196 and min(pixels(a).shape[:2]) >= 56


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="levels 1 to 3, got 4"):
        make(rng_of("level"), "train", 4)


@pytest.mark.parametrize("split", SPLITS)
def test_glyphs_are_spelled_and_held_out_like_texts(split: Split) -> None:
    lengths = set()
    for index in range(200):
        sample = world.sample("glyph", index, split, 3, 1 + index % 3)
        (turn,), (picture,) = sample.turns, sample.media
        text = turn.answer.replace(" ", "")
        lengths.add(len(text))
        assert turn.answer == " ".join(text) and turn.composition == f"text|{text}"
        assert len(text) == 1 or held_out(turn.composition) == (split == "heldout")
        assert isinstance(picture, Image) and max(picture.pixels.shape[:2]) <= 112
        assert not any(side % 28 for side in picture.pixels.shape[:2])
    assert lengths == ({2, 3} if split == "heldout" else {1, 2, 3})
    with pytest.raises(ValueError, match="levels 1 to 3"):
        make_glyph(random.Random(0), "train", 4)


@pytest.mark.parametrize("split", SPLITS)
def test_invented_words_are_told_by_their_letters_alone(split: Split) -> None:
    texts = []
    for index in range(200):
        sample = world.sample("spelling", index, split, 3, 1 + index % 3)
        (turn,), (picture,) = sample.turns, sample.media
        texts.append(turn.answer)
        assert 3 <= len(turn.answer) <= 6 and turn.answer not in WORDS and turn.thinking == " ".join(turn.answer)
        assert held_out(turn.composition) == (split == "heldout")
        assert isinstance(picture, Image) and max(picture.pixels.shape[:2]) <= 196
    assert len(set(texts)) > 190 and set("".join(texts)) == set("abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(ValueError, match="levels 1 to 3"):
        make_spelling(random.Random(0), "train", 4)


def test_words_are_spelled_before_they_are_read() -> None:
    for sample in samples("train"):
        for turn in sample.turns:
            texts = turn.answer.split()
            worked = ", ".join(" ".join(text) for text in texts)
            thinking = turn.thinking
            if turn.tests == "reading/coloured":
                colours, _, thinking = thinking.partition(".")
                assert sum(colour in turn.question for colour in colours.split(", ")) == 1
            assert thinking.strip() == ("" if all(text.isdigit() for text in texts) else worked)
