"""Every group runs, in small; the verb survives what fails; the page says what was measured.

pytest tests/bench/test_groups.py
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import bench.run
from bench.files import drop_pages, photo, plain_photo, read_all, write_clip
from bench.machine import Gemm, Reads, Stock, peak_growth
from bench.rows import Row
from bench.run import GROUPS, Bench, Outcome, measure, page, report
from bench.settings import Settings
from bench.timing import take_turns
from bench.training import rows_of
from moonvit.config import MediaConfig
from moonvit.image import see_image
from moonvit.video import read_video


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # what a group starts with; a fork has no other threads
    yield
    torch.set_num_threads(before)


def rows_in_process(group: str, notes: list[str]) -> list[Row]:
    module, function, _ = GROUPS[group]
    settings = Settings(1, 1, True, notes.append)
    return list(getattr(import_module(module), function)(settings))


# load starts whole programs, and train has tests of its own; both run in test_everything_at_once
@pytest.mark.parametrize("group", ["vision", "prefill", "decode", "int4", "batching", "media"])
def test_a_group_in_small(group: str) -> None:
    pytest.importorskip("transformers")
    notes: list[str] = []
    rows = rows_in_process(group, notes)
    assert rows and not [note for note in notes if "llama" not in note]
    assert group == "prefill" or any(row.goals for row in rows)  # its goals are those of the large model
    for row in rows:
        assert min(row.rates.values()) > 0 and "ours" in row.rates
        assert set(row.times) < set(row.rates)
        assert row.ceiling is None or row.ceiling["share"] > 0
        assert all((goal.met is None) == (goal.value is None) for goal in row.goals)
    peers = {peer for row in rows for peer in row.rates} - {"ours"}
    expected = {
        "vision": {"transformers, stock allocator", "transformers, allocator tuned", "timm NaFlex, padded"},
        "prefill": {"transformers, stock allocator", "transformers, allocator tuned"},
        "decode": {"transformers"},
        "int4": {"ours, bfloat16"},
        "batching": {"one by one"},
        "media": {"decord, plain", "Pillow, plain"},
    }
    assert expected[group] <= peers


def test_missing_peers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    for group in ("vision", "decode"):
        notes: list[str] = []
        rows = rows_in_process(group, notes)
        assert any("transformers is not installed" in note for note in notes)
        assert all("transformers" not in peer for row in rows for peer in row.rates)
        missing = [goal for row in rows for goal in row.goals if goal.kind == "times"]
        assert all(goal.met is None and goal.told == "not measured" for goal in missing)


@pytest.mark.slow
def test_everything_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moonkit", "bench", "all", "--tiny", "--rounds", "1"]
    command += ["--json", str(tmp_path / "all.json"), "--markdown", str(tmp_path / "all.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [group["group"] for group in result["groups"]] == list(GROUPS)
    assert not [group["failure"] for group in result["groups"] if group["failure"]]
    assert json.loads((tmp_path / "all.json").read_text()) == result
    assert all(f"## {group}" in (tmp_path / "all.md").read_text() for group in GROUPS)


def test_a_group_that_is_late_or_fails_keeps_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    media = GROUPS["media"]
    monkeypatch.setattr(bench.run, "GROUPS", {"media": (*media[:2], 0.2), "decode": GROUPS["decode"]})
    arguments = Bench(("media",), rounds=1, threads=1, tiny=True)
    late = measure(arguments, "media", lambda line: None)
    assert "stopped after its 0.2 s" in late.failure and not late.rows
    monkeypatch.setattr(Bench, "cores", property(lambda self: 0))  # a child that cannot start
    failed = measure(arguments, "decode", lambda line: None)
    assert "ended with" in failed.failure and not failed.rows
    machine = {"processor": "x", "cores": 2, "threads": 1, "memory GiB": 1, "system": "y", "python": "3"}
    machine |= {"packages": {"torch": "2"}, "kernels": {"a step": "AMX"}}
    fine = Outcome("decode", [Row.single("cache", "bytes/token", 5.0)], 1.0)
    text = page(report(arguments, [late, failed, fine], machine), [late, failed, fine])
    assert "- media: stopped after" in text and "- decode: bench.language ended with" in text
    assert "cache" in text and "numbers mean nothing" in text and "not met" in text


def test_the_groups_end_in_half_an_hour() -> None:
    assert sum(limit for _, _, limit in GROUPS.values()) < 30 * 60
    assert Bench().groups == list(GROUPS) and Bench(("int4", "load", "int4")).groups == ["int4", "load"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"what": ()}, "nothing to measure"),
        ({"markdown": Path("/no/such/folder/x.md")}, "no such folder"),
        ({"gguf": Path("/no/such.gguf")}, "no such file"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bench(**options)


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_probes_say_what_they_do() -> None:
    gemm, reads = Gemm(size=64), Reads(2**20)
    assert gemm.amount == 2 * 64**3 and reads.amount == 2**20
    times = take_turns({"gemm": gemm, "reads": reads}, rounds=1)
    assert all(min(each) > 0 for each in times.seconds.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_that_forks_off() -> None:
    seen = torch.arange(5)

    def number() -> float:
        return float(seen.sum()) + 0.5

    def fails() -> None:
        raise RuntimeError("no memory")

    stock = Stock({"number": number, "nothing": lambda: None, "fails": fails}, 1)
    seen += 1  # here only: the other process has its own
    assert stock.run("number") == 10.5 and stock.side("number")() == 10.5
    assert 0 <= stock.run("nothing") < 5
    with pytest.raises(RuntimeError, match="RuntimeError: no memory"):
        stock.run("fails")
    assert stock.run("number") == 10.5, "it goes on after a failure"
    with pytest.raises(RuntimeError, match="it ended"):
        stock.run("unknown")
    stock.close()
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="1 thread"):
        Stock({}, 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_peak_memory_of_a_call() -> None:
    assert peak_growth(lambda: torch.ones(2**23)) == pytest.approx(32, abs=8)


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_the_plain_photo_and_ours_are_the_same() -> None:
    data, config = photo(300, 200), MediaConfig(in_patch_limit=100)
    ours = see_image(data, config).pixels
    torch.testing.assert_close(plain_photo(data, config), ours, atol=1e-6, rtol=0)


def test_a_clip_is_what_it_should_be(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 64, 48, 45)
    video = read_video(tmp_path / "clip.mp4")
    assert (video.num_frames, video.fps, video.size) == (45, 30, (64, 48))


def test_files_are_read_from_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_001)
    (tmp_path / "b").write_bytes(b"")
    files = [tmp_path / "a", tmp_path / "b"]
    drop_pages(files)
    assert 0 < read_all(files, block=1000) < 5


def test_rows_of_a_training_step() -> None:
    row = {
        "workload": "sequences",
        "sequences": 8,
        "tokens": 8192,
        "tokens_per_second": {"ours": 4000.0, "transformers": 1000.0, "transformers, stock": 800.0},
        "times_faster": {"transformers": 4.0, "transformers, stock": 5.0},
        "parts": {"attention": 70.0, "optimizer, Newton-Schulz": 12.0, "optimizer, rest": 8.0, "loss": 10.0},
    }
    step, optimizer = rows_of(row, "nano", "float32", 3)
    assert [(goal.bound, goal.value, goal.met) for goal in step.goals] == [(4.0, 5.0, True), (2.5, 4.0, True)]
    assert optimizer.rates["ours"] == pytest.approx(20) and optimizer.goals[0].met is False
    alone = row | {"tokens_per_second": {"ours": 4000.0}, "times_faster": {}}
    assert [goal.met for goal in next(rows_of(alone, "nano", "float32", 3)).goals] == [None, None]
