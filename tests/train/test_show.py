"""moonkit data show: every token is shown, learned ones apart, and what is asked wrongly is one line.

pytest tests/train/test_show.py
"""

import io
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from rich.console import Console

import world
from fusion.checkpoint import bundled_tokenizer
from fusion.config import tiny
from train.data import Encoded, encode
from train.show import SHADES, Show, contact_sheet, main, show, tokens_in_colour
from world.sample import Clip, Image, Sample, Split, Turn

PAD = tiny().media_placeholder_token_id


def make_star(rng: random.Random, split: Split, level: int) -> Sample:
    pixels = np.full((40, 60, 3), rng.randrange(256), np.uint8)
    turns = (Turn("how many?", "3", "fake/count", "red|star", "one. two."), Turn("what?", "é", "fake/what", "x"))
    return Sample("star", turns, (Image(pixels),))


def make_move(rng: random.Random, split: Split, level: int) -> Sample:
    return Sample("move", (Turn("where?", "left", "fake/way", "y"),), (Clip(np.zeros((6, 30, 30, 3), np.uint8)),))


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    makers = {"star": make_star, "move": make_move}
    monkeypatch.setattr(world, "MAKERS", makers)
    monkeypatch.setattr(world, "group_of", lambda family: "clip" if family == "move" else "vision")


def printed(**options: Any) -> str:
    out = io.StringIO()
    show(Show(model="tiny", **options), Console(file=out, width=100))
    return out.getvalue()


def encoded(maker: Any) -> Encoded:
    return encode(maker(random.Random(0), "train", 1), bundled_tokenizer(), tiny())


def test_all_is_shown_and_learned_text_stands_apart() -> None:
    text = printed(family="star", n=1)
    assert "star document 0 (star, level 1, train, seed 0): vision" in text
    assert "6 vision; " in text and "patches in 1 item (56x84 pixels)" in text
    assert "turn 1 tests fake/count, composition red|star" in text
    assert "[6 vision tokens]" in text and "how many?" in text
    assert "<think>«one. two.</think>3<|im_end|>»<|im_user|>" in text
    assert "<think>«</think>é<|im_end|>»" in text.replace("\\xc3\\xa9", "é")


def test_colours_are_the_loss_mask() -> None:
    document = encoded(make_star)
    text = tokens_in_colour(document, bundled_tokenizer(), PAD)
    styles = [str(span.style).removeprefix("bold ") for span in text.spans]
    mask = document.loss_mask[document.ids != PAD].tolist()
    assert [style in SHADES[True] for style in styles if style != "cyan"] == mask
    assert all(one != other for one, other in pairwise(styles))  # token by token


def test_sources_take_turns(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from train.data import Mixture, Source\n"
        "from types import SimpleNamespace\n"
        "SOURCES = (Source('stars', 'vision', 3.0, {'star': 1.0}), Source('moves', 'clip', 1.0, {'move': 1.0}))\n"
        "from recipes.nano import run as nano\n"
        "from dataclasses import replace\n"
        "def run():\n"
        "    return replace(nano(), mixture=Mixture(SOURCES), seed=7)\n"
    )
    text = printed(recipe=recipe, n=3)
    heads = [text.index(head) for head in ("stars document 0", "moves document 0", "stars document 1")]
    assert heads == sorted(heads) and "75% of all tokens" in text and "25% of all tokens" in text
    assert "seed 7)" in text and "seed 2)" in printed(recipe=recipe, seed=2)
    only = printed(recipe=recipe, source="moves", n=2, index=5, level=2)
    assert "moves document 5 (move, level 2" in only and "moves document 6" in only and "stars" not in only
    recipe.write_text(recipe.read_text().replace("{'star': 1.0}", "{'star': 1.0}, plain=1.0"))
    assert "how many?↵\n«<think>one. two.</think>3↵" in printed(recipe=recipe, source="stars", n=1)
    with pytest.raises(ValueError, match="no source 'movs'; known: moves"):
        printed(recipe=recipe, source="movs")


def test_a_corpus_is_shown_with_what_is_skipped(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    lines = [json.dumps(good), json.dumps({"text": "plain words"}), json.dumps({"text": 5})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    text = printed(corpus=str(tmp_path / "rows.jsonl"), n=3)
    assert "«</think>hello<|im_end|>»" in text
    assert "«[BOS]plain words[EOS]»" in text
    assert "skipped, wrong type: text must be a str, got int" in text


def test_a_contact_sheet_has_every_frame(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    text = printed(n=2, picture=path)  # both families
    assert "pictures saved to" in text
    with Picture.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.width == 6 * (2 * 56 + 8) + 8
    star = encoded(make_star)
    pixels = np.asarray(contact_sheet([("star", star)], scale=1))
    frame = star.frames[0][0]
    height, width, _ = frame.shape
    assert (pixels[22 : 22 + height, 8 : 8 + width] == frame).all()
    words = encode("only words", bundled_tokenizer(), tiny())
    with pytest.raises(ValueError, match="has a picture"):
        contact_sheet([("words", words)])


@pytest.mark.parametrize(
    "options",
    [
        {"family": "star", "corpus": "python"},
        {"source": "stars"},
        {"family": "star", "n": 0},
        {"family": "star", "index": -1},
        {"corpus": "/no/such/file"},
    ],
)
def test_what_is_asked_wrongly_is_one_line(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        printed(**options)
    assert "\n" not in str(caught.value)


def test_the_verb_needs_its_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["moonkit data"])
    with pytest.raises(ValueError, match="moonkit data show"):
        main()
    monkeypatch.setattr("sys.argv", ["moonkit data", "show", "--family", "star", "--model", "tiny", "-n", "1"])
    main()
    assert "star document 0" in capsys.readouterr().out
