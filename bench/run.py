"""moonkit bench: how fast this machine runs a Kimi, beside its peers and beside what the machine can do.

    moonkit bench                                 everything, under 30 minutes on two cores
    moonkit bench decode int4 --rounds 9          some groups
    moonkit bench --markdown docs/performance.md  the page

Every group runs in a child process, so that its memory is free again when the next one starts; a group that fails or
runs out of time keeps the rows that it has. Peers (transformers, timm, llama-cpp-python with gguf) are optional.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from bench.rows import Row

Group = Literal["vision", "prefill", "decode", "int4", "batching", "train", "load", "media"]
# module and function that gives the rows, and the seconds after which a group must end: 29 minutes together
GROUPS: dict[str, tuple[str, str, int]] = {
    "vision": ("bench.vision", "vision_rows", 220),
    "prefill": ("bench.language", "prefill_rows", 330),
    "decode": ("bench.language", "decode_rows", 310),
    "int4": ("bench.language", "int4_rows", 290),
    "batching": ("bench.serving", "batching_rows", 80),
    "train": ("bench.training", "train_rows", 310),
    "load": ("bench.files", "load_rows", 140),
    "media": ("bench.files", "media_rows", 60),
}


@dataclass(frozen=True)
class Bench:
    """Vision, prefill, decoding, INT4, batching, training, loading and media: rates, ratios, ceilings and goals."""

    what: Annotated[tuple[Literal[Group, "all"], ...], tyro.conf.Positional] = ("all",)
    """Groups to measure."""
    rounds: int = 5
    """Rounds in which all sides take turns; disturbed ones are repeated, at most as many again."""
    threads: int | None = None
    """Threads; default: the cores that this process may use."""
    tiny: bool = False
    """Try-out shapes: a minute for everything, and numbers that mean nothing."""
    json: Path | None = None
    """Write everything into this file too, as JSON."""
    markdown: Path | None = None
    """Write the table into this file too, as a page."""
    gguf: Path | None = None
    """A Q4_0 file for llama.cpp (python -m bench.gguf); default: written when llama.cpp is installed."""
    folder: Path | None = None
    """Where checkpoints of 3 GB are written for a moment; default: the system's place for such files."""
    child: bool = False
    """Be the process of one group, and print rows as JSON lines (used by the bench itself)."""

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.what:
            raise ValueError(f"nothing to measure; groups: {', '.join(GROUPS)}, all")
        for name in ("json", "markdown"):
            path = getattr(self, name)
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"--{name} {path}: no such folder: {path.absolute().parent}")
        if self.gguf is not None and not self.gguf.is_file():
            raise ValueError(f"--gguf {self.gguf}: no such file")

    @property
    def groups(self) -> list[str]:
        return list(GROUPS) if "all" in self.what else list(dict.fromkeys(self.what))

    @property
    def cores(self) -> int:
        if self.threads:
            return self.threads
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Outcome:
    """The rows of a group, and why it ended early when it did."""

    group: str
    rows: "list[Row]" = field(default_factory=list)
    seconds: float = 0.0
    failure: str = ""


def measure(arguments: Bench, group: str, note: Callable[[str], None]) -> Outcome:
    """One group in a process of its own; never raises for what goes wrong there."""
    from bench.rows import Row

    module, _, limit = GROUPS[group]
    command = [sys.executable, "-m", "bench.run", group, "--child", "--rounds", str(arguments.rounds)]
    command += ["--threads", str(arguments.cores), *(["--tiny"] if arguments.tiny else [])]
    for flag in ("gguf", "folder"):
        if (value := getattr(arguments, flag)) is not None:
            command += [f"--{flag}", str(value.absolute())]
    outcome = Outcome(group)
    began = time.perf_counter()
    # its own session: a process that it forked ends with it
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[1],
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(child)

    watchdog = threading.Timer(limit, stop)
    watchdog.daemon = True
    watchdog.start()
    complaints: list[str] = []

    def listen() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            complaints.append(line.rstrip())
            if line.startswith(": "):
                note(line[2:].rstrip())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    assert child.stdout is not None
    try:
        for line in child.stdout:
            if not line.startswith("{"):
                continue  # a library that talks
            outcome.rows.append(Row.from_dict(json.loads(line) | {"group": group}))
            note(f"{outcome.rows[-1].what}: {outcome.rows[-1].rates}")
        code = child.wait()
    finally:
        watchdog.cancel()
        if child.poll() is None:  # we are being interrupted
            _kill(child)
            child.wait()
    listener.join(timeout=5)
    outcome.seconds = time.perf_counter() - began
    if late.is_set():
        outcome.failure = f"stopped after its {limit} s; the rows before that stand"
    elif code:
        said = [line for line in complaints if line and not line.startswith(": ")]
        outcome.failure = f"{module} ended with {code}: {said[-1] if said else 'no message'}"
    return outcome


def _kill(child: "subprocess.Popen[str]") -> None:
    """End a group, and what it forked."""
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()


def serve(arguments: Bench) -> None:
    """Be the child: print each row as it is known."""
    import torch

    from bench.settings import Settings

    torch.set_num_threads(1)  # a group may fork before it computes; it takes its threads then
    torch.manual_seed(0)
    settings = Settings(
        arguments.rounds,
        arguments.cores,
        arguments.tiny,
        lambda line: print(f": {line}", file=sys.stderr, flush=True),
        arguments.gguf,
        arguments.folder,
    )
    module, function, _ = GROUPS[arguments.what[0]]
    rows: Iterator[Row] = getattr(import_module(module), function)(settings)
    for row in rows:
        print(json.dumps(row.to_dict()), flush=True)


# ---- what comes out --------------------------------------------------------------------------------------------------


def report(arguments: Bench, outcomes: Sequence[Outcome], machine: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON."""
    goals = [goal for outcome in outcomes for row in outcome.rows for goal in row.goals]
    return {
        "date": date.today().isoformat(),
        "command": _command(arguments),
        "machine": machine,
        "tiny": arguments.tiny,
        "goals": {
            "met": sum(goal.met is True for goal in goals),
            "not met": sum(goal.met is False for goal in goals),
            "not measured": sum(goal.met is None for goal in goals),
        },
        "groups": [
            {
                "group": outcome.group,
                "seconds": round(outcome.seconds, 1),
                "failure": outcome.failure,
                "rows": [row.to_dict() for row in outcome.rows],
            }
            for outcome in outcomes
        ],
    }


def _command(arguments: Bench) -> str:
    words = ["moonkit", "bench", *arguments.what, "--rounds", str(arguments.rounds)]
    words += ["--threads", str(arguments.cores), *(["--tiny"] if arguments.tiny else [])]
    return shlex.join(words)


def page(result: dict[str, Any], outcomes: Sequence[Outcome], reasons: bool = False) -> str:
    """docs/performance.md: the machine, the command, the tables, what failed.

    reasons: beside the page lies speed.md, which says why goals are not met.
    """
    from bench.rows import markdown

    machine, counts = result["machine"], result["goals"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    kernels = "; ".join(f"{name}: {what}" for name, what in machine["kernels"].items())
    lines = [
        "# Performance",
        "",
        f"Written by `{result['command']} --markdown docs/performance.md` on {result['date']}. "
        f"Goals: {counts['met']} met, {counts['not met']} not met, {counts['not measured']} not measured.",
        "",
        f"- processor: {machine['processor']}, {machine['cores']} cores, threads used: {machine['threads']}, "
        f"{machine['memory GiB']} GiB",
        f"- system: {machine['system']}, Python {machine['python']}",
        f"- packages: {packages}",
        f"- kernels in use: {kernels}",
        "",
        "All sides of a row run in turns, once a round, beside a probe of the machine: a bfloat16 product of two "
        "2048x2048 matrices (GEMM), one row times a matrix (memory reads), or plain reads (disk). Rates and ratios are "
        "medians over rounds. A round in which other processes had more than a tenth of the machine is disturbed: it "
        "is repeated, and counts only when fewer than two rounds were quiet. Both sides keep freed memory "
        "(train/memory.py), except where a column says stock allocator.",
        "",
    ]
    if reasons:
        lines += ["Why some goals are not met, what was tried and what could be next: [speed.md](speed.md).", ""]
    if result["tiny"]:
        lines += ["**Try-out shapes: these numbers mean nothing.**", ""]
    lines.append(markdown([row for outcome in outcomes for row in outcome.rows]))
    failures = [f"- {outcome.group}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    if failures:
        lines += ["## What did not finish", "", *failures, ""]
    return "\n".join(lines)


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Bench, prog="moonkit bench")
    if arguments.child:
        serve(arguments)
        return
    import torch
    from rich.console import Console
    from rich.table import Table

    from bench.machine import about
    from bench.rows import COLUMNS, cells

    torch.set_num_threads(arguments.cores)
    notes = Console(stderr=True, highlight=False)
    outcomes = []
    for group in arguments.groups:
        notes.print(f"[bold]{group}[/]")
        outcomes.append(measure(arguments, group, lambda line: notes.print(f"  {line}", style="dim", markup=False)))
        if outcomes[-1].failure:
            notes.print(f"  {outcomes[-1].failure}", style="red", markup=False)
    result = report(arguments, outcomes, about())
    for outcome in outcomes:
        table = Table(title=f"{outcome.group}, {outcome.seconds:.0f} s", title_justify="left")
        for column in COLUMNS:
            table.add_column(column)
        for row in outcome.rows:
            for line in cells(row):
                table.add_row(*line)
        notes.print(table)
    counts = result["goals"]
    notes.print(", ".join(f"{count} goals {name}" for name, count in counts.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.markdown:
        reasons = arguments.markdown.with_name("speed.md").is_file()
        arguments.markdown.write_text(page(result, outcomes, reasons))
    print(json.dumps(result))
    if all(outcome.failure and not outcome.rows for outcome in outcomes):
        raise ValueError("no group could be measured")


if __name__ == "__main__":
    main()
