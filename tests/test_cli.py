"""The command line as people meet it: help, wrong words, one-line errors, every verb once.

pytest tests/test_cli.py
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moonkit
from fusion import Kimi
from fusion.stages import bundled


def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moonkit", *arguments]
    environment = os.environ | {"COLUMNS": "80"} | env
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, env=environment)


def test_help_is_quick_and_lists_every_verb() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        out = run("--help")
        seconds.append(time.perf_counter() - started)
    assert out.returncode == 0 and all(verb in out.stdout for verb in moonkit.VERBS)
    print(f"\nmoonkit --help: {min(seconds):.2f} s")
    assert min(seconds) < 1


@pytest.mark.parametrize("verb", moonkit.VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    out = run(verb, "--help")
    assert out.returncode == 0 and f"moonkit {verb}" in out.stdout and not out.stderr


def test_a_wrong_verb_is_answered_with_the_nearest() -> None:
    out = run("aks")
    assert out.returncode == 2 and "did you mean 'ask'" in out.stderr and not out.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("moonkit ")


def test_ask_about_a_picture_and_a_clip() -> None:
    media = ("-i", str(bundled("photo.jpg")), "-v", str(bundled("clip.mp4")))
    arguments = ("ask", "--model", "untrained:tiny", *media, "--max-new-tokens", "3")
    out = run(*arguments, "what", "is this?")
    assert out.returncode == 0
    assert "random weights" in out.stderr and "3 written" in out.stderr
    answer = json.loads(run(*arguments, "--json", stdin="what is this?").stdout)
    assert answer["usage"]["completion_tokens"] == 3 and answer["usage"]["media_tokens"] > 100


def test_ask_a_checkpoint_folder(tmp_path: Path) -> None:
    Kimi.untrained("tiny").save_pretrained(tmp_path / "model")
    out = run("ask", "--model", str(tmp_path / "model"), "--max-new-tokens", "2", "hi")
    assert out.returncode == 0 and "2 written" in out.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask"], "no question"),
        (["ask", "-i", "gone.png", "hi"], "no such file: gone.png"),
        (["ask", "--model", "/gone", "hi"], "no such folder: /gone"),
        (["ask", "--model", "nano-typo", "hi"], "no such folder: nano-typo"),
        (["ask", "--model", "untrained:k2", "hi"], "only the small presets"),
        (["ask", "--temperature", "-1", "hi"], "temperature must be"),
        (["ask", "--device", "quantum", "hi"], "quantum"),
        (["ask", "--no-thinking", "hi"], "always thinks"),
        (["ask", "-i", __file__, "hi"], "not an image"),
        (["ask", "-v", __file__, "hi"], "cannot be decoded"),
        (["sizes", "--model", "/gone"], "neither a preset"),
        (["tokenizer", "/gone", "--out", "x"], "no such file or folder: /gone"),
        (["tokenizer", __file__, "--out", "x", "--vocab-size", "9"], "at least 512"),
        (["stages", "--image", "gone.jpg"], "no such image: gone.jpg"),
    ],
)
def test_errors_are_one_line_without_a_traceback(arguments: list[str], message: str) -> None:
    out = run(*arguments)
    assert out.returncode == 1, out
    errors = [line for line in out.stderr.splitlines() if line]
    assert message in errors[-1] and errors[-1].startswith(f"moonkit {arguments[0]}: ")
    assert "Traceback" not in out.stderr
    assert "Traceback" in run(*arguments, MOONKIT_TRACEBACK="1").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "--tempratur", "1", "hi"],
        ["ask", "--max-new-tokens", "x", "hi"],
        ["bench", "--rounds", "0"],
        ["bench", "--contexts", "0"],
    ],
)
def test_wrong_flags_are_explained(arguments: list[str]) -> None:
    out = run(*arguments)
    assert out.returncode == 2 and "Traceback" not in out.stderr


def test_stages_walk_through_all(tmp_path: Path) -> None:
    out = run("stages", "--model", "untrained:nano", "--picture", str(tmp_path / "tour.png"))
    assert out.returncode == 0, out.stderr
    for stage in ("moonvit/image.py", "moonvit/video.py", "moonvit/encoder.py", "fusion/projector.py", "lm/model.py"):
        assert stage in out.stdout
    assert "untrained" in out.stdout or "random weights" in out.stdout
    assert (tmp_path / "tour.png").stat().st_size > 10_000


def test_sizes_of_every_preset_and_of_one() -> None:
    out = run("sizes").stdout
    assert "1,026,408,232,448" in out and "32,861,477,888" in out and "…" not in out
    one = run("sizes", "--model", "k2_6").stdout
    assert "54,277,888" in one and "416,866,032" in one
