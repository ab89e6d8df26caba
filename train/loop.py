"""The one training step, and the loop around it, that pre-training and fine-tuning share.

    packs of this rank - micro-batches - forward, loss / target tokens of all ranks, backward   (for each micro-batch)
      - sum over ranks - clip by global norm - MuonClip at the schedule's rate - QK-Clip - router biases - log, save

A step is a function of the weights, the optimizer and the data's position alone, so a run that was killed continues
from its last checkpoint bitwise as if it never stopped: also a run by the clock, whose decisions are written down.
"""

import json
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion.checkpoint import bundled_tokenizer
from fusion.config import PRESETS, KimiConfig
from fusion.model import Kimi
from lm.config import Yarn
from lm.moe import sequence_balance_loss
from lm.taps import Taps
from lm.tokenizer import Tokenizer
from moonvit.packing import PackedPatches
from train import parallel
from train.batch import Batch
from train.checkpoint import Checkpoints
from train.console import Console, step_flops
from train.data import Loader, Mixture, Pack, collate
from train.loss import token_losses
from train.memory import keep_memory
from train.muon import Muon, parameter_groups
from train.parallel import Mode, Ranks
from train.qk_clip import PeakLogits, clip_heads
from train.router import RouterBalance
from train.schedule import Schedule, Stage

log = logging.getLogger(__name__)

# ---- what a run is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchSize:
    """One step: `lanes` sequences over all ranks, a few at a time. The stage says how long a sequence is.

    Later stages with longer sequences have fewer of them, and more patches in each: a step holds as many tokens.
    """

    lanes: int = 16
    lanes_per_micro_batch: int = 4
    patch_budget: int = 4096  # patches of one lane

    def __post_init__(self) -> None:
        if min(self.lanes, self.lanes_per_micro_batch, self.patch_budget) < 1:
            raise ValueError(f"batch: every size must be at least 1, got {self}")


@dataclass(frozen=True)
class Optimization:
    """How weights move. K2's values, but for the gradient's norm, which the report does not give."""

    kind: Literal["muon", "adamw"] = "muon"  # "adamw": all parameters, for comparison
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float = 1.0  # of all gradients together
    tau: float | None = 100.0  # QK-Clip; None: heads are left alone
    balance: float | None = None  # weight of the sequence balance loss; None: the model config's aux_loss_alpha
    router_speed: float = 1e-3  # of the correction bias
    router_still: tuple[str, ...] = ()  # stages in which the biases rest (Moonlight: the last)

    def __post_init__(self) -> None:
        if self.kind not in ("muon", "adamw"):
            raise ValueError(f"optimizer {self.kind!r} is unknown (known: muon, adamw)")
        if not self.max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {self.max_norm}")
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau must be positive or None, got {self.tau}")


@dataclass(frozen=True)
class Guard:
    """When a step is thrown away, and which losses are worth a look."""

    most_bad: int = 3  # steps in a row without a finite loss or gradient, after which the run stops
    spike: float = 1.3  # a loss this many times the groups' running medians is written down with its documents
    window: int = 64  # steps of those medians


@dataclass(frozen=True)
class Saving:
    """When to write. None of it changes the weights, so a run may be continued with other values."""

    minutes: float = 10.0
    steps: int | None = None  # also every so many steps
    keep: int = 2
    export_steps: int | None = None  # a checkpoint folder that Kimi.from_pretrained reads, RUN/export-STEP
    log_seconds: float = 10.0  # between plain lines, where there is no terminal
    tensorboard: bool = False


Evaluate = Callable[[Kimi, int], Mapping[str, float]]
"""(model, step) to numbers for the log."""


@dataclass(frozen=True)
class Run:
    """A whole run: what recipes make. Everything but `saving`, `workers` and `parallel` decides the weights."""

    model: str | KimiConfig  # a preset's name or a config
    mixture: Mixture
    schedule: Schedule
    batch: BatchSize = BatchSize()
    optimization: Optimization = Optimization()
    guard: Guard = Guard()
    saving: Saving = Saving()
    start: str | None = None  # checkpoint folder to start from; None: random weights
    tokenizer: str | None = None  # a folder; None: the start's own, or the one that ships for the preset
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    frozen: tuple[str, ...] = ()  # beginnings of parameter names that do not train, such as "vision_tower."
    seed: int = 0
    steps: int | None = None  # the schedule in so many steps, instead of in its own tokens
    minutes: float | None = None  # the schedule in so much training time
    recompute: bool = False  # layers' activations, in the backward: less memory, a third more compute
    evaluate: Evaluate | None = None
    evaluate_steps: int = 500
    parallel: Mode = "ddp"
    workers: int = 1

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision {self.precision!r} is unknown (known: auto, float32, bfloat16)")
        if self.steps is not None and self.minutes is not None:
            raise ValueError("a run is as long as its steps or as its minutes: give one of them")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if isinstance(self.model, str) and self.model not in PRESETS:
            raise ValueError(f"preset {self.model!r} is unknown (known: {', '.join(PRESETS)})")

    def lanes_of(self, stage: Stage, ranks: int = 1) -> int:
        """Sequences of one step in a stage: as many tokens as in the first one, shared evenly by the ranks."""
        lanes = self.batch.lanes * self.schedule.stages[0].sequence // stage.sequence
        return min(self.batch.lanes, max(ranks, lanes - lanes % ranks))

    def patch_budget_of(self, stage: Stage) -> int:
        """Patches of one sequence in a stage: in proportion to its tokens."""
        first = self.schedule.stages[0].sequence
        return max(self.batch.patch_budget, self.batch.patch_budget * stage.sequence // first)

    def config(self) -> KimiConfig:
        """The model's config, also where it comes with the weights that the run starts from."""
        if self.start is not None:
            from fusion.checkpoint import locate, read_config

            return read_config(locate(self.start))
        return PRESETS[self.model]() if isinstance(self.model, str) else self.model


def load_tokenizer(run: Run) -> Tokenizer:
    """The run's tokenizer. Raises ValueError where none belongs to the model."""
    if run.tokenizer is not None or run.start is not None:
        from fusion.checkpoint import locate

        return Tokenizer.from_folder(locate(run.tokenizer or run.start or ""))
    if run.model not in ("tiny", "nano"):
        raise ValueError("tokenizer: name a folder with tiktoken.model; only the presets tiny and nano ship with one")
    return bundled_tokenizer(str(run.model))


def make_model(run: Run) -> Kimi:
    """The model in float32: random weights that depend on the seed alone, or those of the folder it starts from."""
    if run.start is not None:
        kimi = Kimi.from_pretrained(run.start, dtype=torch.float32, device="cpu", experts="dense")
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            kimi = Kimi(run.config())
    if kimi.tokenizer is None:
        kimi.tokenizer = load_tokenizer(run)
    for name, parameter in kimi.named_parameters():
        parameter.requires_grad_(not name.startswith(run.frozen) if run.frozen else True)
    unused = [start for start in run.frozen if not any(n.startswith(start) for n, _ in kimi.named_parameters())]
    if unused:
        raise ValueError(f"frozen: no parameter's name starts with {unused[0]!r}")
    return kimi.train()


def set_yarn(kimi: Kimi, yarn: Yarn) -> None:
    """Extend the context: from the next forward on, positions are rotated as this YaRN says."""
    longest = round(yarn.factor * yarn.original_max_position_embeddings)
    text = replace(kimi.config.text, yarn=yarn, max_position_embeddings=longest)
    kimi.config = replace(kimi.config, text=text)
    kimi.language_model.config = text
    for layer in kimi.language_model.model.layers:
        attention: Any = layer.self_attn
        attention.config = text


# ---- one step --------------------------------------------------------------------------------------------------------


def autocast_dtype(device: torch.device) -> torch.dtype:
    """What "auto" is: bfloat16 on GPUs that have it, float32 elsewhere.

    A CPU's library builds a bfloat16 kernel for each new number of rows, and packs differ in their tokens and patches:
    where AMX multiplies bfloat16 several times as fast, a step of the nano recipe still took 3.0 s instead of 0.58 s.
    """
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if gpu else torch.float32


class Objective(nn.Module):
    """The model and its loss in one forward, so that sharded weights are whole wherever they are read."""

    def __init__(self, kimi: Kimi, always_sees: bool = False, chunk: int = 1024) -> None:
        """always_sees: run the tower without pictures too, on an empty one that counts for nothing."""
        super().__init__()
        self.kimi, self.always_sees, self.chunk = kimi, always_sees, chunk

    def forward(self, batch: Batch, taps: Taps) -> Tensor:
        """float32 loss of each token, (tokens); 0 where there is no target."""
        hidden = self.kimi(batch.ids, batch.media, batch.lengths, taps=taps)
        if self.always_sees and batch.media is None and self.kimi.config.vision is not None:
            size = self.kimi.config.vision.patch_size
            empty = PackedPatches(torch.zeros(4, 3, size, size, device=batch.ids.device), torch.tensor([[1, 2, 2]]))
            hidden = hidden + 0 * self.kimi.see(empty).sum().to(hidden.dtype)
        return token_losses(hidden, self.kimi.language_model.lm_head.weight, batch.targets, self.chunk)


@dataclass(frozen=True)
class StepReport:
    """What one step did, over all ranks."""

    loss: float  # mean over the targets
    losses: dict[str, float]  # the same, per group
    counts: dict[str, int]  # targets per group
    targets: int
    tokens: int
    patches: int
    flops: float
    grad_norm: float
    max_logit: float
    clipped: int  # heads
    load: float  # of the busiest expert over the mean
    idle: float  # share of experts without a token
    balance: float  # sequence balance loss over its weight; 1 per MoE layer is even
    applied: bool  # False: not finite, thrown away
    model_seconds: float
    optimizer_seconds: float


class Trainer:
    """A model, its optimizer and the step. Deterministic for the same number of threads."""

    def __init__(self, kimi: Kimi, run: Run, ranks: Ranks) -> None:
        self.kimi, self.run, self.ranks = kimi.to(ranks.device), run, ranks
        named = {"auto": autocast_dtype(ranks.device), "float32": torch.float32, "bfloat16": torch.bfloat16}
        self.precision = named[run.precision]
        plan = run.optimization
        text = kimi.config.text
        self.alpha = text.aux_loss_alpha if plan.balance is None else plan.balance
        self.sharded = ranks.mode == "fsdp" and ranks.world_size > 1
        # ranks gather the tower's slices together, so all of them run it or none
        self.objective = Objective(kimi, always_sees=self.sharded)
        if run.recompute:
            recompute_layers(kimi)
        if self.sharded:
            parallel.shard(self.objective, kimi, ranks)
        else:
            kimi.language_model.stack_experts()  # side by side in memory: all of a layer run in one product
        self.named = [(name, p) for name, p in kimi.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in self.named]
        groups = parameter_groups(self.named)
        if plan.kind == "adamw":
            for group in groups:
                group["kind"] = "adamw"
        optimizer = parallel.ShardedMuon if self.sharded else Muon
        self.optimizer = optimizer(
            groups,
            lr=0.0,
            weight_decay=plan.weight_decay,
            momentum=plan.momentum,
            nesterov=plan.nesterov,
            betas=plan.betas,
            eps=plan.eps,
            # "auto" lets it be in bfloat16 also where the products are not: its shapes never change
            dtype=None if run.precision == "auto" else named[run.precision],
        )
        self.peaks, self.balance = PeakLogits(), RouterBalance(kimi.language_model)

    def step(self, packs: list[Pack], lr: float, router_speed: float, names: tuple[str, ...]) -> StepReport:
        """One update from this rank's packs. names: all groups, in the log's order."""
        began = time.perf_counter()
        device, size = self.ranks.device, self.run.batch.lanes_per_micro_batch
        batches = [collate(packs[i : i + size]) for i in range(0, len(packs), size)]
        local = [
            sum(batch.target_count for batch in batches),
            sum(len(batch) for batch in batches),
            sum(len(batch.media.pixels) for batch in batches if batch.media),
            sum(step_flops(self.kimi.config, batch) for batch in batches),
            len(packs),
        ]
        counts = parallel.total(torch.tensor(local, dtype=torch.float64, device=device)).tolist()
        targets, tokens, patches, flops, sequences = counts
        if not targets:
            raise ValueError("a step without a single target token: the mixture masks everything")
        sums = torch.zeros(2 * len(names) + 1, dtype=torch.float64, device=device)  # losses, counts, balance
        shares = self.ranks.world_size if self.sharded else 1  # FSDP averages over ranks
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            lengths = [pack.tokens for pack in packs[number * size : (number + 1) * size]]
            taps = Taps(want_max_logits=True)
            with self._autocast():
                losses = self.objective(batch, taps)
            balance = losses.new_zeros(())
            for routing in taps.routing:
                balance = balance + sequence_balance_loss(routing, lengths, 1.0)
            balance = balance * (len(lengths) / sequences)
            self.peaks.add(taps.max_logits)
            self.balance.add(taps.routing)
            ((losses.sum() / targets + self.alpha * balance) * shares).backward()
            group = batch.group_of_token(names).long()
            sums[: len(names)].index_add_(0, group, losses.detach().double())
            sums[len(names) : -1].index_add_(0, group, (batch.targets >= 0).double())
            sums[-1] += balance.detach()
        model_done = time.perf_counter()
        numbers = parallel.total(sums).tolist()
        by_group, counted = numbers[: len(names)], numbers[len(names) : -1]
        loss = sum(by_group) / targets
        parallel.reduce_gradients(self.parameters, self.ranks)
        norm = float(parallel.gradient_norm(self.parameters, self.ranks))
        peaks = self.peaks.take()
        applied = math.isfinite(loss) and math.isfinite(norm) and bool(peaks.isfinite().all())
        clipped, load, idle = 0, 0.0, 0.0
        if applied:
            if norm > self.run.optimization.max_norm:
                parallel.scale_gradients(self.parameters, self.run.optimization.max_norm / norm)
            clipped = self._update(lr, peaks)
            if self.balance.layers:
                spread = self.balance.step(router_speed)
                load, idle = spread.largest, spread.idle
        self.balance.loads = None
        for parameter in self.parameters:
            parameter.grad = None
        return StepReport(
            loss=loss,
            losses={n: s / c for n, s, c in zip(names, by_group, counted, strict=True) if c},
            counts={n: int(c) for n, c in zip(names, counted, strict=True) if c},
            targets=int(targets),
            tokens=int(tokens),
            patches=int(patches),
            flops=flops,
            grad_norm=norm,
            max_logit=float(peaks.max()),
            clipped=clipped,
            load=load,
            idle=idle,
            balance=numbers[-1],
            applied=applied,
            model_seconds=model_done - began,
            optimizer_seconds=time.perf_counter() - model_done,
        )

    def _update(self, lr: float, peaks: Tensor) -> int:
        """Optimizer, then QK-Clip with the maxima of this step's own forward passes; the number of clipped heads."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        tau = self.run.optimization.tau
        if tau is None:
            return 0
        if self.sharded:
            return parallel.clip_sharded_heads(self.kimi, peaks, tau)
        return clip_heads(self.kimi.language_model, peaks, tau)

    def _autocast(self) -> Any:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, self.precision)


def recompute_layers(kimi: Kimi) -> None:
    """Keep only the inputs of layers and tower blocks, and run their forward again in the backward."""
    layers: list[nn.Module] = list(kimi.language_model.model.layers)
    if kimi.config.vision:
        layers += list(kimi.vision_tower.encoder.blocks)
    for layer in layers:
        # taps that the second pass fills again have been read by then
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# ---- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside weights, optimizer and the data's position."""

    step: int = 0
    tokens: int = 0
    position: float = 0.0  # on the schedule, in its tokens
    stretch: float = 1.0  # schedule tokens per token seen: other than 1 when the clock decides
    decided: float = 0.0  # share of the time at which the stretch was last decided
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)  # losses of each group, for the medians


class Clock:
    """Fits the schedule into a time: how far a token moves along it is decided anew as the speed is measured.

    Decisions depend on the clock, so each is written to RUN/clock.jsonl with its step, and a run that replays steps
    after a kill takes them from there: weights stay bitwise the same.
    """

    def __init__(self, run: Run, folder: Path, ranks: Ranks) -> None:
        self.schedule, self.ranks = run.schedule, ranks
        self.limit = run.minutes * 60 if run.minutes else None
        self.path = folder / "clock.jsonl"
        self.known: dict[int, float] = {}
        self.recent: deque[tuple[float, int]] = deque(maxlen=64)  # seconds and tokens after recent steps
        if self.limit and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the run was killed while it wrote this line
                self.known[entry["step"]] = entry["stretch"]
            if ranks.first:
                lines = [json.dumps({"step": step, "stretch": stretch}) for step, stretch in self.known.items()]
                self.path.write_text("".join(line + "\n" for line in lines))

    def decide(self, progress: Progress) -> None:
        """After a step: set progress.stretch."""
        if self.limit is None:
            return
        self.recent.append((progress.seconds, progress.tokens))
        share = progress.seconds / self.limit
        if progress.step in self.known:
            progress.stretch, progress.decided = self.known[progress.step], share
            return
        if self.known and progress.step < max(self.known):
            return  # a replayed step at which nothing was decided
        late = share > 0.96  # near the end at every step, so that schedule and time end together
        due = len(self.recent) > 3 and (progress.decided == 0 or share - progress.decided > 0.02 or late)
        if parallel.any_rank(int(due and self.ranks.first), self.ranks.device):
            (then, before), (now, tokens) = self.recent[0], self.recent[-1]
            left = max(self.limit - progress.seconds, 1e-3) * (tokens - before) / max(now - then, 1e-9)
            stretch = parallel.from_first(max(self.schedule.tokens - progress.position, 0.0) / max(left, 1.0))
            progress.stretch, progress.decided = stretch, share
            self.known[progress.step] = stretch
            if self.ranks.first:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": progress.step, "stretch": stretch}) + "\n")
                    file.flush()

    def advance(self, progress: Progress, tokens: float) -> float:
        """How far a step of so many tokens moves along the schedule. Before the first decision, little."""
        left = self.schedule.tokens - progress.position
        first = self.schedule.tokens / 1000 if self.limit and not progress.decided else left
        return min(tokens * progress.stretch, first, left)


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    step: int
    loss: float
    signal: int | None  # that stopped it; None: the schedule is done (or `stop_at` was reached)


def train(run: Run, folder: str | Path, ranks: Ranks | None = None, stop_at: int | None = None) -> Outcome:
    """Train from where `folder` stands to the end of the schedule. stop_at: save and leave after so many steps."""
    ranks = ranks or parallel.start(run.parallel)
    folder = Path(folder)
    keep_memory()
    # without it, CPU kernels let several threads add to the same rows in any order
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    checkpoints = Checkpoints(folder, run, ranks)
    kimi = make_model(run)
    tokenizer = kimi.tokenizer
    assert tokenizer is not None, "make_model gives every model a tokenizer"
    trainer = Trainer(kimi, run, ranks)
    progress = Progress()
    data_state = checkpoints.load(trainer, progress)
    clock = Clock(run, folder, ranks)
    stage, _ = run.schedule.at(progress.position)
    if stage.yarn is not None:
        set_yarn(kimi, stage.yarn)
    loader = Loader(
        run.mixture,
        tokenizer,
        kimi.config,
        sequence=stage.sequence,
        lanes=run.batch.lanes,
        active=run.lanes_of(stage, ranks.world_size),
        patch_budget=run.patch_budget_of(stage),
        seed=run.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=run.workers,
        state=data_state,
    )
    names = tuple(dict.fromkeys(source.group for source in run.mixture.sources))
    console = Console(folder, run, ranks, progress.step)
    console.start(trainer.optimizer.table(), trainer.precision)
    loss, caught = math.nan, _Signals()
    saved_step, saved_at, resumed = progress.step, time.monotonic(), progress.seconds
    began = time.monotonic()

    def save() -> None:
        nonlocal saved_step, saved_at
        checkpoints.save(trainer, progress, loader.state())
        console.data(loader.report())
        saved_step, saved_at = progress.step, time.monotonic()

    with caught, console, loader:
        while progress.position < run.schedule.tokens * (1 - 1e-9) and (stop_at is None or progress.step < stop_at):
            waited = time.perf_counter()
            packs = loader.next_step()
            waited = time.perf_counter() - waited
            tokens = parallel.total(
                torch.tensor([sum(pack.tokens for pack in packs)], dtype=torch.int64, device=ranks.device)
            )
            if run.steps is not None:
                moved = run.schedule.tokens / run.steps
            else:
                moved = clock.advance(progress, float(tokens))
            _, lr = run.schedule.at(min(progress.position + moved / 2, run.schedule.tokens))  # of the step's middle
            speed = 0.0 if stage.name in run.optimization.router_still else run.optimization.router_speed
            report = trainer.step(packs, lr, speed, names)
            progress.step += 1
            progress.tokens += report.tokens
            progress.position += moved
            progress.seconds = parallel.from_first(resumed + time.monotonic() - began)
            loss = report.loss
            _watch(run, progress, report, packs, console)
            clock.decide(progress)
            console.step(progress, report, stage.name, lr, waited, loader.report())
            after, _ = run.schedule.at(progress.position)
            if after.sequence != stage.sequence:
                loader.set_sequence(after.sequence, run.patch_budget_of(after), run.lanes_of(after, ranks.world_size))
            if after.yarn is not None and after.yarn != stage.yarn:
                set_yarn(kimi, after.yarn)
            stage = after
            if run.evaluate is not None and progress.step % run.evaluate_steps == 0:
                console.evaluation(progress.step, _evaluate(run.evaluate, kimi, progress.step))
            number = parallel.any_rank(caught.number or 0, ranks.device)
            minutes = (time.monotonic() - saved_at) / 60 >= run.saving.minutes
            due = run.saving.steps is not None and progress.step % run.saving.steps == 0
            if parallel.any_rank(int(minutes), ranks.device) or due or number:
                save()
            if run.saving.export_steps and progress.step % run.saving.export_steps == 0:
                checkpoints.export(kimi, folder / f"export-{progress.step:06d}")
            if number:
                console.say(f"stopped by {signal.Signals(number).name} after step {progress.step}; saved")
                return Outcome(progress.step, loss, number)
        if saved_step != progress.step:
            save()
        if progress.position >= run.schedule.tokens * (1 - 1e-9):
            checkpoints.export(kimi, folder / "model")
            console.say(f"done: {progress.step:,} steps, {progress.tokens:,} tokens; model in {folder / 'model'}")
    return Outcome(progress.step, loss, None)


def _watch(run: Run, progress: Progress, report: StepReport, packs: list[Pack], console: Console) -> None:
    """Count steps that were thrown away, stop after too many, and write down spikes."""
    if not report.applied:
        progress.skipped += 1
        progress.bad_in_a_row += 1
        console.event("skipped", progress.step, report, packs)
        if progress.bad_in_a_row >= run.guard.most_bad:
            raise ValueError(
                f"{progress.bad_in_a_row} steps in a row had no finite loss or gradient (last: loss {report.loss}, "
                f"gradient norm {report.grad_norm}, step {progress.step}): the model has diverged; lower the peak "
                "rate or max_norm, and look at the documents of these steps in log.jsonl"
            )
        return
    progress.bad_in_a_row = 0
    # what this step's mixture of groups would cost at their medians: steps of hard groups are no spikes
    known = {name: median(losses) for name, losses in progress.recent.items() if len(losses) >= 8}
    if report.counts.keys() <= known.keys():
        expected = sum(count * known[name] for name, count in report.counts.items()) / report.targets
        if report.loss > run.guard.spike * expected:
            console.event("spike", progress.step, report, packs)
    for name, loss in report.losses.items():
        progress.recent[name] = [*progress.recent.get(name, []), loss][-run.guard.window :]


def _evaluate(evaluate: Evaluate, kimi: Kimi, step: int) -> dict[str, float]:
    kimi.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return {name: float(value) for name, value in evaluate(kimi, step).items()}
    finally:
        kimi.train()


class _Signals:
    """Notes SIGINT and SIGTERM, so that the step that runs can end and be saved. A second one ends at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                log.info("not in the main thread: %s will not be waited for", signal.Signals(number).name)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self.number = number
