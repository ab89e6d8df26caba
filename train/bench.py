"""moonkit bench train: a training step of the language model, beside transformers' DeepSeek-V3 of the same shape.

    moonkit bench train                      the nano shape, 8 sequences of 1,024 tokens
    moonkit bench train --shape tiny --sequences 2 --json

Same weights to begin with, same tokens, same number format, one process, steps taken in turn; a ratio is the median of
the rounds' ratios. Our step is the whole of MuonClip: forward with the largest logits, loss, backward, Muon, QK-Clip
and the router's bias. Theirs is forward, loss, backward and fused AdamW. Both keep freed memory (train/memory.py).
A second table says where our time goes. transformers is optional: without it only our side is measured.
"""

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import train.muon
from fusion.config import PRESETS
from lm.attention import Attention
from lm.config import TextConfig
from lm.model import LanguageModel
from lm.moe import MoE
from lm.taps import Taps
from train.loss import token_losses
from train.memory import keep_memory
from train.muon import Muon, newton_schulz_dtype, parameter_groups
from train.qk_clip import PeakLogits, clip_heads
from train.router import RouterBalance


@dataclass(frozen=True)
class Bench:
    """Tokens/s of a training step beside transformers, and the time of each part."""

    shape: Literal["tiny", "nano"] = "nano"
    """Preset whose language model is measured."""
    sequences: int = 8
    """Sequences of a step."""
    length: int = 1024
    """Tokens of each."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of the products, on both sides; auto: bfloat16 (autocast) where the hardware is faster in it."""
    rounds: int = 5
    """Interleaved rounds; medians are shown."""
    threads: int | None = None
    """Threads; default: torch's."""
    json: bool = False
    """Print JSON only."""

    def __post_init__(self) -> None:
        for name in ("sequences", "rounds", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 (a token and the next one), got {self.length}")

    @property
    def precision(self) -> torch.dtype:
        if self.dtype == "auto":
            return newton_schulz_dtype(torch.device("cpu"))
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


class Stopwatch:
    """Seconds of named parts. A part inside another one counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[tuple[str, float]] = []

    def start(self, part: str) -> None:
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1][0]] += now - self.open[-1][1]
        self.open.append((part, now))

    def stop(self, part: str) -> None:
        now = time.perf_counter()
        name, since = self.open.pop()
        assert name == part, f"{part} ends while {name} is running"
        self.seconds[part] += now - since
        if self.open:
            self.open[-1] = (self.open[-1][0], now)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name)


# ---- the two sides ---------------------------------------------------------------------------------------------------


class Ours:
    """One step as train/loop.py takes it, on a batch that stays the same."""

    def __init__(self, config: TextConfig, precision: torch.dtype) -> None:
        self.model = LanguageModel(config).train()
        self.model.stack_experts()
        self.optimizer = Muon(parameter_groups(self.model.named_parameters()), lr=1e-4)
        self.peaks, self.balance = PeakLogits(), RouterBalance(self.model)
        self.precision = precision

    def step(self, ids: Tensor, watch: Stopwatch | None = None) -> float:
        """ids: (sequences, tokens). The loss."""
        part: Callable[[str], AbstractContextManager[None]] = watch.part if watch else lambda name: nullcontext()
        targets = F.pad(ids[:, 1:], (0, 1), value=-1).flatten()
        taps = Taps(want_max_logits=True)
        with part("other"), _autocast(self.precision):
            hidden = self.model(self.model.embed(ids.flatten()), [ids.shape[1]] * len(ids), taps=taps)
            with part("loss"):
                losses = token_losses(hidden, self.model.lm_head.weight, targets)
        loss = losses.sum() / (targets >= 0).sum()
        with part("backward of the rest"):
            loss.backward()
        with part("QK-Clip and router"):
            self.peaks.add(taps.max_logits)
            self.balance.add(taps.routing)
        with part("optimizer, rest"):
            self.optimizer.step()
        with part("QK-Clip and router"):
            clip_heads(self.model, self.peaks.take(), tau=100.0)
            if self.balance.layers:
                self.balance.step(0.001)
        self.optimizer.zero_grad()
        return float(loss.detach())


class Theirs:
    """transformers' model with our weights. Raises ImportError when transformers is missing."""

    def __init__(self, ours: LanguageModel, precision: torch.dtype) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        transformers.logging.set_verbosity_error()
        text = ours.config
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
        if text.yarn:
            rope |= {"rope_type": "yarn", **vars(text.yarn)}
        skip = {"rope_theta", "yarn", "latent_norm_eps", "aux_loss_alpha", "moe_layer_freq"}
        config = transformers.DeepseekV3Config(
            **{name: value for name, value in vars(text).items() if name not in skip},
            num_key_value_heads=text.num_attention_heads,
            rope_parameters=rope,
            use_cache=False,
        )
        self.model: Any = transformers.DeepseekV3ForCausalLM(config).train()
        state = ours.state_dict()
        weights = {name: _from_ours(name, state).reshape(t.shape) for name, t in self.model.state_dict().items()}
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.precision = precision

    def step(self, ids: Tensor) -> float:
        with _autocast(self.precision):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _from_ours(name: str, ours: dict[str, Tensor]) -> Tensor:
    """Our tensor for one of transformers' names: experts lie in one tensor there, gate and up together."""
    if ".mlp.experts." not in name:
        return ours[name]
    prefix, kind = name.rsplit(".", 1)
    count = sum(key.startswith(prefix) and key.endswith("up_proj.weight") for key in ours)
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return torch.stack([torch.cat([ours[f"{prefix}.{e}.{k}.weight"] for k in kinds]) for e in range(count)])


def _autocast(precision: torch.dtype) -> Any:
    return nullcontext() if precision == torch.float32 else torch.autocast("cpu", precision)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(arguments: Bench, note: Callable[[str], None]) -> dict[str, Any]:
    kept = keep_memory()
    text = PRESETS[arguments.shape]().text
    if arguments.length > text.max_position_embeddings:
        raise ValueError(f"length must be at most {text.max_position_embeddings}, got {arguments.length}")
    torch.manual_seed(0)
    ours = Ours(text, arguments.precision)
    sides: dict[str, Callable[[Tensor], float]] = {"ours": ours.step}
    try:
        theirs = Theirs(ours.model, arguments.precision)
        sides["transformers"] = theirs.step
        import transformers

        peer = f"transformers {transformers.__version__}"
    except ImportError as missing:
        peer = f"not measured: {missing}"
        note(f"transformers is not installed ({missing}); measuring our side only")
    ids = torch.randint(0, text.vocab_size - 256, (arguments.sequences, arguments.length))
    first = {name: step(ids) for name, step in sides.items()}  # also the warm-up
    note(f"first loss: {first}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, step in sides.items():
            began = time.perf_counter()
            step(ids)
            seconds[name].append(time.perf_counter() - began)
        note(f"round {number + 1}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()))
    ratio = None
    if "transformers" in seconds:
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True))
    return {
        "shape": arguments.shape,
        "tokens": ids.numel(),
        "sequences": arguments.sequences,
        "dtype": str(arguments.precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "keeps_memory": kept,
        "torch": torch.__version__,
        "peer": peer,
        "first_loss": first,
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "tokens_per_second": {name: round(ids.numel() / statistics.median(t), 1) for name, t in seconds.items()},
        "times_faster": ratio and round(ratio, 2),
        "parts": parts(ours, ids, arguments.rounds),
    }


def parts(ours: Ours, ids: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part of our step, from steps of their own: watching costs a little."""
    watch = Stopwatch()
    handles = _watch_modules(ours.model, watch)
    before = train.muon.orthogonalize

    def watched(*values: Any) -> Tensor:
        with watch.part("optimizer, Newton-Schulz"):
            return before(*values)

    train.muon.orthogonalize = watched  # type: ignore[assignment]
    steps = []
    try:
        for _ in range(rounds):
            watch.seconds.clear()
            ours.step(ids, watch)
            steps.append(dict(watch.seconds))
    finally:
        train.muon.orthogonalize = before
        for handle in handles:
            handle.remove()
    return {part: round(1e3 * statistics.median(step[part] for step in steps), 1) for part in steps[0]}


def _watch_modules(model: nn.Module, watch: Stopwatch) -> list[Any]:
    """Forward and backward of attention, expert layers and dense layers on the stopwatch."""
    handles: list[Any] = []
    for layer in model.model.layers:  # type: ignore[union-attr]
        for module in (layer.self_attn, layer.mlp):
            name = "attention" if isinstance(module, Attention) else "experts" if isinstance(module, MoE) else "dense"
            back = f"backward of {name}"
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: watch.start(name)),
                module.register_forward_hook(lambda *_, name=name: watch.stop(name)),
                module.register_full_backward_pre_hook(lambda *_, name=back: watch.start(name)),
                module.register_full_backward_hook(lambda *_, name=back: watch.stop(name)),
            ]
    return handles


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Bench, prog="moonkit bench train")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from rich.console import Console
    from rich.table import Table

    notes = Console(stderr=True, highlight=False)
    result = measure(arguments, lambda line: notes.print(f"[dim]{line}[/]"))
    if not arguments.json:
        speeds = Table(
            title=f"{result['shape']}, {result['sequences']} x {arguments.length} tokens, {result['dtype']}, "
            f"{result['threads']} threads; {result['peer']}"
        )
        for column in ("training step", "seconds", "tokens/s", "times faster"):
            speeds.add_column(column, justify="left" if column == "training step" else "right")
        for name, rate in result["tokens_per_second"].items():
            faster = f"{result['times_faster']}x" if name == "ours" and result["times_faster"] else ""
            speeds.add_row(name, f"{result['seconds'][name]:.2f}", f"{rate:,.0f}", faster)
        notes.print(speeds)
        shares = Table(title="where our step spends its time")
        for column in ("part", "ms", "share"):
            shares.add_column(column, justify="left" if column == "part" else "right")
        total = sum(result["parts"].values())
        for part, value in sorted(result["parts"].items(), key=lambda entry: -entry[1]):
            shares.add_row(part, f"{value:,.0f}", f"{value / total:.1%}")
        notes.print(shares)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
