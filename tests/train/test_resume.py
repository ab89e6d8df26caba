"""A run that is killed and started again continues bitwise as if it had never stopped.

pytest tests/train/test_resume.py                 three random moments
pytest tests/train/test_resume.py -m slow         twenty more
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny_run import children, tiny_run, train_in
from train import checkpoint
from train.loop import Clock, Optimization, Progress, Run, Saving, train
from train.parallel import Ranks
from train.schedule import wsd

pytestmark = pytest.mark.usefixtures("one_thread")
MINUTES = Saving(steps=2, log_seconds=1e9)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = children().Process(target=train_in, args=(folder, {}, {"saving": MINUTES}))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


def same(one: Path, other: Path) -> None:
    """Weights and every logged loss are equal, bit for bit."""
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in steps_of(f)] for f in (one, other)]
    assert losses[0] == losses[1]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "event" not in record]


def killed_at(folder: Path, moment: float) -> None:
    """Start the run, kill -9 after `moment` seconds (or let it end), start it again."""
    context = children()
    process = context.Process(target=train_in, args=(folder, {}, {"saving": MINUTES}))
    process.start()
    process.join(moment)
    process.kill()
    process.join()
    process = context.Process(target=train_in, args=(folder, {}, {"saving": MINUTES}))
    process.start()
    process.join()
    assert process.exitcode == 0, f"killed after {moment:.3f} s, the run did not start again"


def length_of(folder: Path) -> float:
    """Seconds that a whole run takes here, with its start."""
    began = time.monotonic()
    process = children().Process(target=train_in, args=(folder, {}, {"saving": MINUTES}))
    process.start()
    process.join()
    return time.monotonic() - began


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_moments(uninterrupted: Path, tmp_path: Path, moments: int) -> None:
    whole = length_of(tmp_path / "measured")
    draw = random.Random(moments)
    for number in range(moments):
        folder = tmp_path / str(number)
        killed_at(folder, draw.uniform(0.05, 1.0) * whole)
        same(uninterrupted, folder)
        shutil.rmtree(folder)


# the calls of a save, in order; a kill just before or just after any of them must not cost more than that save
def _die_in_a_save(folder: Path, name: str, call: int) -> None:
    """Body of a child process: it ends, without a word, in the call-th call of a function while it saves."""
    module: Any = {"replace": os, "fsync": os, "rmtree": shutil}[name]
    real: Callable[..., Any] = getattr(module, name)
    calls = 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if name == "rmtree" and Path(arguments[0]).is_dir():  # half of the folder is gone
                for file in sorted(Path(arguments[0]).iterdir())[:1]:
                    file.unlink()
            os._exit(9)
        return real(*arguments, **options)

    setattr(module, name, dying)
    train_in(folder, {}, {"saving": MINUTES})


@pytest.mark.parametrize(
    ("name", "call"), [("replace", 2), ("replace", 4), ("replace", 9), ("fsync", 3), ("fsync", 10), ("rmtree", 4)]
)
def test_a_kill_while_saving_leaves_the_last_good_one(
    uninterrupted: Path, tmp_path: Path, name: str, call: int
) -> None:
    context = children()
    process = context.Process(target=_die_in_a_save, args=(tmp_path / "run", name, call))
    process.start()
    process.join()
    assert process.exitcode == 9, "the run never came to that call: the test tests nothing"
    process = context.Process(target=train_in, args=(tmp_path / "run", {}, {"saving": MINUTES}))
    process.start()
    process.join()
    assert process.exitcode == 0
    same(uninterrupted, tmp_path / "run")
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert [name for name in left if name.startswith(".")] == []
    assert len([name for name in left if name.startswith("step-")]) == 2


RECIPE = """
from dataclasses import replace
from tests.train.tiny_run import tiny_run

def run():
    return replace(tiny_run(1e9), steps=100_000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_shows_in_the_status(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "-m", "moonkit", "pretrain", str(tmp_path / "recipe.py"), "--out", str(tmp_path / "run")]
    log = tmp_path / "run" / "log.jsonl"
    reached = []
    for _ in range(2):  # the second continues
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ahead = (reached[-1] if reached else 0) + 3
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.is_file() and log.read_text().count("\n") > 1 and steps_of(tmp_path / "run")[-1]["step"] >= ahead:
                break
            time.sleep(0.05)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, said
        reached.append(steps_of(tmp_path / "run")[-1]["step"])
        assert f"stopped by {number.name} after step {reached[-1]}; saved" in said
    assert (tmp_path / "run" / f"step-{reached[-1]:06d}").is_dir()


def test_another_config_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    train(tiny_run(), tmp_path / "run", stop_at=1)
    with pytest.raises(ValueError, match=r"optimization.tau was 0.5, is 7.0.*--out"):
        train(tiny_run(optimization=Optimization(tau=7.0)), tmp_path / "run", stop_at=2)
    with pytest.raises(ValueError, match=r"schedule.stages\[0\].tokens was 256.0, is 300.0"):
        train(tiny_run(tokens=3000), tmp_path / "run", stop_at=2)
    # how often it is saved is no part of what it computes
    assert train(tiny_run(saving=Saving(steps=1)), tmp_path / "run", stop_at=2).step == 2


def test_the_stable_stage_may_become_shorter_or_longer(tmp_path: Path) -> None:
    """Until the decay begins its length is open: what was planned before leaves no trace in the weights."""

    def planned(tokens: float) -> Run:
        return tiny_run(schedule=wsd(1e-2, tokens, 256, 768, sequence=64), saving=MINUTES)

    train(planned(2560), tmp_path / "as planned")
    for name, before in (("shorter", 5120), ("longer", 1792)):
        train(planned(before), tmp_path / name, stop_at=3)
        train(planned(2560), tmp_path / name)
        same(tmp_path / "as planned", tmp_path / name)
    train(planned(2560), tmp_path / "late", stop_at=9)
    with pytest.raises(ValueError, match=r"schedule.stages\[1\].tokens was 1536, is 768"):
        train(planned(1792), tmp_path / "late")
    train(replace(planned(2560), steps=20), tmp_path / "counted", stop_at=3)
    with pytest.raises(ValueError, match=r"schedule.stages\[1\].tokens"):
        train(replace(planned(5120), steps=20), tmp_path / "counted")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(tiny_run(), tmp_path / "run", stop_at=2)
    for file in (tmp_path / "run" / "step-000002").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-000002 cannot be read.*move it away"):
        train(tiny_run(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-000002")
    assert checkpoint.Checkpoints(tmp_path / "run", tiny_run(), Ranks()).latest() is None


def drive(clock: Clock, progress: Progress, until: float, speed: Callable[[float], float]) -> list[float]:
    """Steps of 1,000 tokens at a speed (tokens/s) that depends on the time; positions after each."""
    positions = []
    while progress.position < clock.schedule.tokens * (1 - 1e-9) and progress.seconds < until:
        moved = clock.advance(progress, 1000)
        progress.step += 1
        progress.tokens += 1000
        progress.position += moved
        progress.seconds += 1000 / speed(progress.seconds)
        clock.decide(progress)
        positions.append(progress.position)
    return positions


@pytest.mark.parametrize("speed", [lambda t: 2000.0, lambda t: 2000.0 if t < 300 else 700.0, lambda t: 300 + 5 * t])
def test_a_schedule_in_minutes_ends_with_the_clock(tmp_path: Path, speed: Callable[[float], float]) -> None:
    run = tiny_run(tokens=50_000, minutes=10.0)
    progress = Progress()
    positions = drive(Clock(run, tmp_path, Ranks()), progress, 2000, speed)
    assert progress.position == pytest.approx(run.schedule.tokens)
    assert progress.seconds == pytest.approx(600, rel=0.02)
    assert all(a <= b for a, b in pairwise(positions))


def test_decisions_of_the_clock_are_replayed(tmp_path: Path) -> None:
    """Killed after its decisions, a run takes the same ones again, though everything is slower then."""
    run = tiny_run(tokens=50_000, minutes=10.0)
    straight = Progress()
    positions = drive(Clock(run, tmp_path, Ranks()), straight, 400, lambda t: 2000.0)
    shared = max(json.loads(line)["step"] for line in (tmp_path / "clock.jsonl").read_text().splitlines())
    with (tmp_path / "clock.jsonl").open("a") as file:
        file.write('{"step": 9')  # a line cut short by the kill
    again = Progress()
    replayed = drive(Clock(run, tmp_path, Ranks()), again, 1600, lambda t: 500.0)
    assert shared > 100 and replayed[:shared] == positions[:shared]
