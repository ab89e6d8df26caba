"""moonkit bench train: a training step of the language model, beside transformers' DeepSeek-V3 of the same shape.

    moonkit bench train                      the nano shape, 8,192 tokens
    moonkit bench train --shape 69M --dtype bfloat16 --workload sequences
    moonkit bench train --shape tiny --tokens 2048 --json

    sequences   all of one length: no side pads
    documents   40 to 300 tokens long: packed here, padded to the longest there

Same weights (all rates are 0, so weights and losses stay), same tokens, same number format, steps taken in turn; a
ratio is the median of the rounds' ratios. Our step is the whole of MuonClip: forward with the largest logits, loss,
backward, Muon, QK-Clip and the router's bias. Theirs is forward, loss, backward and fused AdamW. "transformers" runs in
our process and keeps freed memory as we do (train/memory.py); "transformers, stock" is a process of its own without
that. A second table says where our time goes. transformers is optional: without it only our side is measured.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import lm.config
import train.muon
from fusion.config import PRESETS
from lm.attention import Attention
from lm.config import TextConfig
from lm.model import LanguageModel
from lm.moe import MoE
from lm.taps import Taps
from train.loop import autocast_dtype
from train.loss import token_losses
from train.memory import keep_memory
from train.muon import Muon, parameter_groups
from train.qk_clip import PeakLogits, clip_heads
from train.router import RouterBalance


@dataclass(frozen=True)
class Bench:
    """Tokens/s of a training step beside transformers, and the time of each part."""

    shape: Literal["tiny", "nano", "69M"] = "nano"
    """Whose language model: a preset, or one of 69M parameters (8 layers, 384 wide, 32 experts, 16,384 words)."""
    tokens: int = 8192
    """Tokens of a step."""
    length: int = 1024
    """Tokens of each sequence, in the workload of equal ones."""
    workload: Literal["both", "sequences", "documents"] = "both"
    """What is measured. Padded documents of the 69M shape need more than 24 GB on the other side."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of the products, on both sides; auto: what training takes here, float32."""
    rounds: int = 5
    """Interleaved rounds; medians are shown."""
    threads: int | None = None
    """Threads; default: torch's."""
    json: bool = False
    """Print JSON only."""
    stock: bool = False
    """Be the process of stock transformers: a step for each line that comes in (used by the bench itself)."""

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 (a token and the next one), got {self.length}")
        if self.tokens < self.length:
            raise ValueError(f"tokens must be at least one sequence of {self.length}, got {self.tokens}")

    @property
    def precision(self) -> torch.dtype:
        if self.dtype == "auto":
            return autocast_dtype(torch.device("cpu"))
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def text_config(shape: str) -> TextConfig:
    if shape != "69M":
        return PRESETS[shape]().text
    return replace(
        lm.config.nano(),
        vocab_size=16_384,
        hidden_size=384,
        intermediate_size=1024,
        moe_intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=6,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_shared_experts=1,
        kv_lora_rank=128,
        q_lora_rank=None,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
    )


def workloads(arguments: Bench) -> dict[str, list[Tensor]]:
    """The sequences of each workload, token ids."""
    draw = random.Random(0)
    words = text_config(arguments.shape).vocab_size - 256
    documents: list[int] = []
    while (left := arguments.tokens - sum(documents)) > 1:
        # most are short, a third may be long
        documents.append(min(left, draw.randint(40, 300 if draw.random() < 1 / 3 else 160)))
    lengths = {"sequences": [arguments.length] * (arguments.tokens // arguments.length), "documents": documents}
    if arguments.workload != "both":
        lengths = {arguments.workload: lengths[arguments.workload]}
    generator = torch.Generator().manual_seed(0)
    return {n: [torch.randint(0, words, (each,), generator=generator) for each in lengths[n]] for n in lengths}


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

    def __init__(self, model: LanguageModel, precision: torch.dtype) -> None:
        self.model = model
        self.model.stack_experts()
        self.optimizer = Muon(parameter_groups(self.model.named_parameters()), lr=0.0)
        self.peaks, self.balance = PeakLogits(), RouterBalance(self.model)
        self.precision = precision

    def step(self, sequences: list[Tensor], watch: Stopwatch | None = None) -> float:
        """The loss."""
        part: Callable[[str], AbstractContextManager[None]] = watch.part if watch else lambda name: nullcontext()
        ids = torch.cat(sequences)
        targets = torch.cat([F.pad(each[1:], (0, 1), value=-1) for each in sequences])
        taps = Taps(want_max_logits=True)
        with part("other"), _autocast(self.precision):
            hidden = self.model(self.model.embed(ids), [len(each) for each in sequences], taps=taps)
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
                self.balance.step(0.0)
        self.optimizer.zero_grad()
        return float(loss.detach())


class Theirs:
    """transformers' model with our weights."""

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
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, betas=(0.9, 0.95), fused=True)
        self.precision = precision

    def step(self, sequences: list[Tensor]) -> float:
        ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-100)
        mask = (labels >= 0).long() if bool((labels < 0).any()) else None
        with _autocast(self.precision):
            loss = self.model(input_ids=ids, labels=labels, attention_mask=mask).loss
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


class Stock:
    """transformers in a process of its own, which waits while others step."""

    def __init__(self, arguments: Bench) -> None:
        command = [
            sys.executable,
            "-m",
            "train.bench",
            "--stock",
            "--shape",
            arguments.shape,
            "--workload",
            arguments.workload,
        ]
        command += ["--dtype", arguments.dtype, "--tokens", str(arguments.tokens), "--length", str(arguments.length)]
        command += ["--threads", str(torch.get_num_threads())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def seconds(self, workload: str) -> float:
        """How long a step on a workload takes there."""
        assert self.process.stdin and self.process.stdout
        print(workload, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def serve_stock(arguments: Bench) -> None:
    """Be the other end of `Stock`."""
    loads = workloads(arguments)
    theirs = Theirs(_model(arguments), arguments.precision)
    for line in sys.stdin:
        began = time.perf_counter()
        theirs.step(loads[line.strip()])
        print(time.perf_counter() - began, flush=True)


def _model(arguments: Bench) -> LanguageModel:
    text = text_config(arguments.shape)
    if arguments.length > text.max_position_embeddings:
        raise ValueError(f"length must be at most {text.max_position_embeddings}, got {arguments.length}")
    torch.manual_seed(0)
    return LanguageModel(text).train()


def measure(arguments: Bench, note: Callable[[str], None]) -> dict[str, Any]:
    loads = workloads(arguments)
    model = _model(arguments)
    stock = Stock(arguments) if find_spec("transformers") else None
    kept = keep_memory()
    ours = Ours(model, arguments.precision)
    sides: dict[str, Callable[[list[Tensor]], float]] = {"ours": ours.step}
    peer = "transformers is not installed: our side only"
    if stock:
        sides["transformers"] = Theirs(model, arguments.precision).step
        peer = f"transformers {version('transformers')}"
    rows = []
    for name, load in loads.items():
        first = {side: step(load) for side, step in sides.items()}  # also the warm-up
        if stock:
            stock.seconds(name)
        note(f"{name}, loss: {first}")
        seconds: dict[str, list[float]] = defaultdict(list)
        for number in range(arguments.rounds):
            for side, step in sides.items():
                began = time.perf_counter()
                step(load)
                seconds[side].append(time.perf_counter() - began)
            if stock:
                seconds["transformers, stock"].append(stock.seconds(name))
            note(f"{name}, round {number + 1}: " + ", ".join(f"{side} {t[-1]:.2f} s" for side, t in seconds.items()))
        tokens = sum(len(each) for each in load)
        rows.append(
            {
                "workload": name,
                "sequences": len(load),
                "tokens": tokens,
                "loss": first,
                "seconds": {side: round(statistics.median(times), 3) for side, times in seconds.items()},
                "tokens_per_second": {side: round(tokens / statistics.median(t), 1) for side, t in seconds.items()},
                "times_faster": {
                    side: round(statistics.median(b / a for a, b in zip(seconds["ours"], times, strict=True)), 2)
                    for side, times in seconds.items()
                    if side != "ours"
                },
                "parts": parts(ours, load, arguments.rounds),
            }
        )
    if stock:
        stock.close()
    return {
        "shape": arguments.shape,
        "dtype": str(arguments.precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "keeps_memory": kept,
        "torch": torch.__version__,
        "peer": peer,
        "rows": rows,
    }


def parts(ours: Ours, sequences: list[Tensor], rounds: int) -> dict[str, float]:
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
            ours.step(sequences, watch)
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
    if arguments.stock:
        serve_stock(arguments)
        return
    from rich.console import Console
    from rich.table import Table

    notes = Console(stderr=True, highlight=False)
    result = measure(arguments, lambda line: notes.print(f"[dim]{line}[/]"))
    if not arguments.json:
        speeds = Table(title=f"{result['shape']}, {result['dtype']}, {result['threads']} threads; {result['peer']}")
        for column in ("training step", "side", "seconds", "tokens/s", "ours is faster"):
            speeds.add_column(column, justify="left" if column in ("training step", "side") else "right")
        shares = Table(title="where our step spends its time, ms")
        shares.add_column("part")
        for row in result["rows"]:
            for side, rate in row["tokens_per_second"].items():
                what = f"{row['sequences']} {row['workload']}, {row['tokens']:,} tokens" if side == "ours" else ""
                faster = row["times_faster"].get(side)
                speeds.add_row(
                    what, side, f"{row['seconds'][side]:.2f}", f"{rate:,.0f}", f"{faster}x" if faster else ""
                )
            shares.add_column(row["workload"], justify="right")
        for part in result["rows"][0]["parts"]:
            values = [(row["parts"].get(part, 0.0), sum(row["parts"].values())) for row in result["rows"]]
            shares.add_row(part, *(f"{value:,.0f}  {value / total:5.1%}" for value, total in values))
        notes.print(speeds, shares)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
