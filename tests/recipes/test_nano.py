"""The model in the box, and the recipes: what ships is there, loads fast, answers, and fits.

pytest tests/recipes/test_nano.py -s
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

import world
from evals.world import answer, questions
from fusion.checkpoint import bundled_tokenizer
from fusion.config import nano
from fusion.model import Kimi
from recipes.k2_7 import run as k2_7
from recipes.nano import (
    ALL,
    LETTERS,
    MIXTURE,
    MOMENTS,
    MOTION,
    NAMES,
    SHARPEN,
    WORDS_OF_NOBODY,
    ZERO_VISION,
    anneal,
    finish,
    letters,
    moments,
    names,
    run,
    sft,
    sharpen,
    spelling,
)
from train.plan import describe_run

BOX = Path(str(files("fusion") / "assets" / "nano"))


@pytest.fixture(scope="module")
def kimi() -> Kimi:
    return Kimi.from_pretrained("nano")


def test_what_ships_fits_and_says_how_it_was_made() -> None:
    assert sum(file.stat().st_size for file in BOX.iterdir()) <= 12e6
    story = json.loads((BOX / "training.json").read_text())
    assert story[-1]["log"][-1]["tokens"] > 0 and "seed" in story[0]["config"]
    assert "/root" not in (BOX / "training.json").read_text() and "/home" not in (BOX / "training.json").read_text()


def test_shape_of_the_family(kimi: Kimi) -> None:
    config = kimi.config
    total = sum(parameter.numel() for parameter in kimi.parameters())
    assert 10e6 <= total <= 40e6
    assert config.text == nano().text and config.vision == nano().vision and config.profile == "k2_7_code"
    assert config.text.n_routed_experts >= 32 and config.text.n_shared_experts == 1
    assert not config.text.is_moe(0) and all(config.text.is_moe(i) for i in range(1, config.text.num_hidden_layers))


def test_every_digit_is_a_token() -> None:
    tokenizer = bundled_tokenizer("nano")
    assert tokenizer.vocab_size == 2048
    assert len(tokenizer.encode("1234567890")) == 10 and len(tokenizer.encode("x = 42")) == len("42") + 3
    for word in ("user", "assistant", "system", "tool", "image", "video"):
        assert len(tokenizer.encode(word)) == 1, "a role costs one token in every turn"


def test_first_answer_comes_quickly() -> None:
    code = (
        "import time; began = time.perf_counter()\n"
        "from fusion import Kimi\n"
        "kimi = Kimi.from_pretrained('nano'); loaded = time.perf_counter()\n"
        "kimi.chat('12+5=?', max_new_tokens=40)\n"
        "print(loaded - began, time.perf_counter() - loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    load, first = map(float, done.stdout.split())
    print(f"\nimport and load {load:.2f} s, first answer after another {first:.2f} s")
    assert load + first < 12  # 3 s on a quiet machine; a test machine may be busy


def test_it_writes_programs_that_pass(kimi: Kimi) -> None:
    asked = questions("function", 16, "heldout", 11, level=1)
    replies = answer(kimi, asked, max_new_tokens=80)
    right = sum(reply.right for reply in replies)
    print(f"\nheld-out functions: {right} of 16")
    assert right >= 8  # far above nothing, and below what the card says, so that chance does not fail it


def test_recipes_name_families_that_exist() -> None:
    for mixture in (MIXTURE, LETTERS, MOTION, WORDS_OF_NOBODY, MOMENTS, SHARPEN, ALL, NAMES, ZERO_VISION):
        assert sum(source.weight for source in mixture.sources) == pytest.approx(1)
        for source in mixture.sources:
            assert set(source.families) <= set(world.MAKERS)
    shown = [f for source in ZERO_VISION.sources for f in source.families if world.sample(f, 0).media]
    assert not shown, f"zero-vision SFT sees no picture, but {shown} show one"
    assert sft().frozen == ("vision_tower.", "mm_projector.")
    assert run().config() == nano()


def test_parts_differ_in_data_and_rate_alone() -> None:
    first, last = run(), anneal()
    for part in (letters(), last, spelling(), moments(), sharpen(), finish(), names()):
        assert replace(part, mixture=first.mixture, schedule=first.schedule, seed=first.seed) == first
    assert first.schedule.stages[-1].end == last.schedule.stages[0].end > 10 * last.schedule.stages[-1].end
    parts = (first, letters(), last, spelling(), moments(), sharpen(), finish(), names(), sft())
    assert len({part.seed for part in parts}) == len(parts), "no part reads another's documents again"


def test_k2s_plan_has_the_reports_numbers() -> None:
    began = time.perf_counter()
    plan = describe_run(k2_7(), 2048)
    assert time.perf_counter() - began < 60
    for number in ("9,966,500,000,000", "5,500,000,000,000", "32,861,477,888", "894", "QK-Clip at 100"):
        assert number in plan
