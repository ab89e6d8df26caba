"""What a run says: one live line on a terminal, plain lines elsewhere, and every step in RUN/log.jsonl.

    step 1,240  31 %  loss 1.217 (vision 0.84, clip 1.10, text 1.62, code 1.31)  lr 1.8e-03  5,210 tokens/s  MFU 38 %
      max logit 14.2, 0 heads clipped  load 1.9  bad 3, skipped 0  ETA 0:41:10

The run folder also keeps what the run was made with: versions.json, parameters.txt, data.json.
"""

import json
import platform
import subprocess
import sys
import time
from collections import deque
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusion.config import KimiConfig
from fusion.sizes import count
from train.batch import Batch
from train.parallel import Ranks

if TYPE_CHECKING:
    from train.data import Pack
    from train.loop import Progress, Run, StepReport

_SMOOTH = 20  # steps over which the line's numbers are averaged


# ---- work ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _matrices(config: KimiConfig) -> tuple[int, int, int, int]:
    """Multiplied parameters per token, per target, per patch, per vision token."""
    parts = count(config)
    per_token = parts["activated"] - parts["embedding"] - parts["head"]
    table = 0
    if config.vision:
        table = config.vision.pos_emb_height * config.vision.pos_emb_width * config.vision.hidden_size
    return per_token, parts["head"], max(parts["tower"] - table, 0), parts["projector"]


def step_flops(config: KimiConfig, batch: Batch) -> float:
    """Floating point operations of forward and backward: 6 per multiplied parameter, and attention over visible pairs.

    Recomputed activations are not counted: they are cost, not work.
    """
    per_token, per_target, per_patch, per_merged = _matrices(config)
    text = config.text
    work = 6.0 * (per_token * len(batch) + per_target * batch.target_count)
    pairs = sum(length * (length + 1) / 2 for length in batch.lengths)
    work += 6.0 * text.num_hidden_layers * text.num_attention_heads * (text.qk_head_dim + text.v_head_dim) * pairs
    if batch.media is not None and config.vision is not None:
        work += 6.0 * (per_patch * len(batch.media.pixels) + per_merged * batch.vision_tokens)
        work += 12.0 * config.vision.num_layers * config.vision.hidden_size * sum(n * n for n in batch.media.lengths)
    return work


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3, size: int = 1024) -> float:
    """Operations per second of a large square product here and now: what MFU is measured against."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


# ---- where a run came from -------------------------------------------------------------------------------------------


def versions(ranks: Ranks, precision: torch.dtype, seed: int) -> dict[str, Any]:
    """Everything that a reader needs to make the run again, besides its config."""
    packages = {}
    for name in ("moonkit", "torch", "numpy", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    here = Path(__file__).resolve().parent.parent
    revision = _git(here, "rev-parse", "HEAD")
    changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "git_revision": revision,
        "git_dirty": None if changed is None else bool(changed),
        "seed": seed,
        "precision": str(precision).removeprefix("torch."),
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "world_size": ranks.world_size,
        "parallel": ranks.mode,
    }


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---- the console -----------------------------------------------------------------------------------------------------


class Console:
    """Speaks on rank 0 only; the other ranks' calls do nothing."""

    def __init__(self, folder: Path, run: "Run", ranks: Ranks, step: int) -> None:
        """step: where the run stands. Lines of later steps, made by a process that was killed, leave the log."""
        self.folder, self.run, self.ranks = folder, run, ranks
        self.speaks = ranks.first
        self.path = folder / "log.jsonl"
        self.recent: deque[tuple[float, StepReport]] = deque(maxlen=_SMOOTH)
        self.peak, self.said = 0.0, -1e9
        self.live: Any = None
        self.board: Any = None
        if self.speaks:
            keep_lines(self.path, step)
            if run.saving.tensorboard:
                self.board = _tensorboard(folder)

    def start(self, table: str, precision: torch.dtype) -> None:
        """Say what trains, and write down where the run came from."""
        self.peak = measure_peak(self.ranks.device, precision) * self.ranks.world_size
        if not self.speaks:
            return
        self.say(table)
        where = f"{self.ranks.device.type}, {str(precision).removeprefix('torch.')}"
        several = f", {self.ranks.world_size} ranks ({self.ranks.mode})" if self.ranks.world_size > 1 else ""
        self.say(f"{where}{several}, matrix products at {self.peak / 1e9:,.0f} GFLOP/s, into {self.folder}")
        (self.folder / "parameters.txt").write_text(table + "\n", encoding="utf-8")
        record = versions(self.ranks, precision, self.run.seed) | {"peak_flops": self.peak}
        with (self.folder / "versions.jsonl").open("a", encoding="utf-8") as file:  # one line per start
            file.write(json.dumps(record) + "\n")

    def __enter__(self) -> "Console":
        if self.speaks:
            self.log = self.path.open("a", encoding="utf-8")
            if sys.stdout.isatty():
                from rich.live import Live

                self.live = Live("", refresh_per_second=4)
                self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self.speaks:
            self.log.close()
        if self.board is not None:
            self.board.close()

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.speaks:
            return
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def step(
        self, progress: "Progress", report: "StepReport", stage: str, lr: float, waited: float, data: dict[str, Any]
    ) -> None:
        """Write down one step, and show it when it is time."""
        if not self.speaks:
            return
        now = time.monotonic()
        self.recent.append((now, report))
        speed, mfu = self._speed()
        bad = sum(data["skipped"].values())
        self._write(
            {
                "step": progress.step,
                "stage": stage,
                "tokens": progress.tokens,
                "done": progress.position / self.run.schedule.tokens,
                "seconds": round(progress.seconds, 3),
                "loss": report.loss,
                "losses": report.losses,
                "targets": report.targets,
                "step_tokens": report.tokens,
                "patches": report.patches,
                "lr": lr,
                "grad_norm": report.grad_norm,
                "max_logit": report.max_logit,
                "clipped": report.clipped,
                "load": report.load,
                "idle": report.idle,
                "balance": report.balance,
                "tokens_per_second": speed,
                "mfu": mfu,
                "skipped": progress.skipped,
                "bad": bad,
                "waited": round(waited, 4),
                "model_seconds": round(report.model_seconds, 4),
                "optimizer_seconds": round(report.optimizer_seconds, 4),
            }
        )
        if self.board is not None:
            self._to_board(progress.step, report, lr, speed, mfu)
        if self.live is not None:
            self.live.update(self.line(progress, lr, bad))
        elif now - self.said >= self.run.saving.log_seconds:
            self.said = now
            print(self.line(progress, lr, bad), flush=True)

    def line(self, progress: "Progress", lr: float, bad: int) -> str:
        """The line: losses are means over the last steps, weighted by their targets."""
        reports = [report for _, report in self.recent]
        groups: dict[str, list[float]] = {}
        for report in reports:
            for name, loss in report.losses.items():
                groups.setdefault(name, []).append(loss)
        loss = sum(r.loss * r.targets for r in reports) / max(sum(r.targets for r in reports), 1)
        parts = ", ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in groups.items())
        speed, mfu = self._speed()
        last = reports[-1]
        done = progress.position / self.run.schedule.tokens
        left = progress.seconds * (1 - done) / done if done > 0 else 0.0
        if self.run.minutes:
            left = max(self.run.minutes * 60 - progress.seconds, 0.0)
        hours, minutes, seconds = int(left) // 3600, int(left) // 60 % 60, int(left) % 60
        return (
            f"step {progress.step:,}  {done:.0%}  loss {loss:.3f} ({parts})  lr {lr:.1e}  {speed:,.0f} tokens/s  "
            f"MFU {mfu:.0%}  max logit {max(r.max_logit for r in reports):.1f}, "
            f"{sum(r.clipped for r in reports)} heads clipped  load {last.load:.1f}  "
            f"bad {bad}, skipped {progress.skipped}  ETA {hours}:{minutes:02}:{seconds:02}"
        )

    def event(self, kind: str, step: int, report: "StepReport", packs: "list[Pack]") -> None:
        """Something about a step that a reader will want to look into, with the documents of this rank."""
        documents = [
            {
                "lane": pack.lane,
                "documents": [f"{d.source}: {len(d)} tokens" for d in pack.documents],
                "next": pack.state["next"],  # of each source; the pack's own come shortly before
            }
            for pack in packs
        ]
        if self.speaks:
            self._write(
                {
                    "event": kind,
                    "step": step,
                    "loss": report.loss,
                    "losses": report.losses,
                    "grad_norm": report.grad_norm,
                    "max_logit": report.max_logit,
                    "packs": documents,
                }
            )
            self.say(f"step {step:,}: {kind}, loss {report.loss:.3f}, gradient norm {report.grad_norm:.3g}")

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Numbers of the recipe's own evaluation."""
        if self.speaks:
            self._write({"event": "evaluation", "step": step, "scores": scores})
            self.say(f"step {step:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
            if self.board is not None:
                for name, value in scores.items():
                    self.board.add_scalar(f"evaluation/{name}", value, step)

    def data(self, report: dict[str, Any]) -> None:
        """What was trained on so far, by source, and what was left out: RUN/data.json."""
        if self.speaks:
            (self.folder / "data.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def _speed(self) -> tuple[float, float]:
        """Tokens per second and model FLOPs utilisation over the recent steps."""
        if len(self.recent) < 2:
            return 0.0, 0.0
        elapsed = max(self.recent[-1][0] - self.recent[0][0], 1e-9)
        reports = [report for _, report in list(self.recent)[1:]]
        return sum(r.tokens for r in reports) / elapsed, sum(r.flops for r in reports) / elapsed / max(self.peak, 1.0)

    def _write(self, record: dict[str, Any]) -> None:
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()

    def _to_board(self, step: int, report: "StepReport", lr: float, speed: float, mfu: float) -> None:
        values = {"loss": report.loss, "lr": lr, "grad_norm": report.grad_norm, "max_logit": report.max_logit}
        values |= {"clipped": report.clipped, "load": report.load, "tokens_per_second": speed, "mfu": mfu}
        values |= {f"loss/{name}": loss for name, loss in report.losses.items()}
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def keep_lines(path: Path, step: int) -> None:
    """Keep the log's lines up to a step: those after it, and a line cut short, come from a process that was killed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    draft = path.with_suffix(".writing")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install tensorboard, or leave the flag out") from None
    return SummaryWriter(str(folder / "tensorboard"))
