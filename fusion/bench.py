"""moonkit bench: how fast this machine runs a model, beside transformers' model with the same weights.

    moonkit bench                            the nano shape, bfloat16
    moonkit bench --shape tiny --dtype float32 --json

Both sides run interleaved in one process (ours, theirs, ours, theirs, ...); a ratio is the median of the ratios of the
rounds. Peak memory is that of a child process per side which loads the weights, reads the longest prompt and writes a
few tokens. transformers is optional: without it only our side is measured.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import fusion.config as presets
from fusion.model import Kimi
from moonvit.packing import PackedPatches

GRIDS = [(1, 16, 16), (1, 32, 24), (1, 32, 32), (1, 34, 46), (4, 18, 24)]  # 224x224 to 640x476, and one chunk


@dataclass(frozen=True)
class Bench:
    """Vision patches/s, prefill and decode tokens/s, cache bytes and peak memory, beside transformers."""

    shape: Literal["tiny", "nano"] = "nano"
    """Preset whose shape is measured; weights are random."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of weights and activations."""
    contexts: tuple[int, ...] = (128, 2048)
    """Prompt lengths."""
    batch: int = 8
    """Sequences of the batched decoding row."""
    rounds: int = 7
    """Interleaved rounds; medians are shown."""
    threads: int | None = None
    """Threads; default: torch's."""
    json: bool = False
    """Print JSON only."""
    side: Literal["both", "ours", "transformers"] = "both"
    """One side only prints the peak memory of a fresh process (used by the bench itself)."""

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.contexts or min(self.contexts) < 1:
            raise ValueError(f"contexts must be at least 1 token long, got {self.contexts}")


# ---- the other side --------------------------------------------------------------------------------------------------


def transformers_twin(kimi: Kimi) -> nn.Module:
    """transformers' Kimi_K25 with our weights, sharing nothing. Raises ImportError when transformers is missing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig

    transformers.logging.set_verbosity_error()
    text, vision = kimi.config.text, kimi.config.vision
    assert vision is not None, "the bench runs presets that see"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.yarn:
        rope |= {"rope_type": "yarn", **vars(text.yarn)}
    skip = {"rope_theta", "yarn", "latent_norm_eps", "tie_word_embeddings", "aux_loss_alpha", "moe_layer_freq"}
    values = {name: value for name, value in vars(text).items() if name not in skip}
    config = transformers.Kimi_K25Config(
        text_config=transformers.DeepseekV3Config(
            **values,
            num_key_value_heads=text.num_attention_heads,
            rope_parameters=rope,
            tie_word_embeddings=False,
        ),
        vision_config=Kimi_K25VisionConfig(
            pos_emb_height=vision.pos_emb_height,
            pos_emb_width=vision.pos_emb_width,
            num_attention_heads=vision.num_heads,
            num_hidden_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
        ),
        projection_hidden_size=vision.hidden_size,
        image_token_id=kimi.config.media_placeholder_token_id,
        tie_word_embeddings=False,
    )
    twin = transformers.Kimi_K25ForConditionalGeneration(config).to(kimi.dtype).eval()
    state = {}
    ours = kimi.state_dict()
    for name, tensor in twin.state_dict().items():
        state[name] = _ours(name, ours, vision.num_heads).reshape(tensor.shape).to(tensor.dtype)
    twin.load_state_dict(state)
    return twin


def _ours(name: str, ours: dict[str, Tensor], heads: int) -> Tensor:
    """Our tensor for one of transformers' names."""
    import re

    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    name = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
    if match := re.match(r"(.*\.experts)\.(gate_up_proj|down_proj)$", name):
        count = 1 + max(int(key.split(".experts.")[1].split(".")[0]) for key in ours if key.startswith(match[1] + "."))
        kinds = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        each = [torch.cat([ours[f"{match[1]}.{e}.{kind}.weight"] for kind in kinds]) for e in range(count)]
        return torch.stack(each)
    if name.startswith("vision_tower."):
        name = name.replace("vision_tower.layers", "vision_tower.encoder.blocks")
        name = name.replace("vision_tower.final", "vision_tower.encoder.final")
        name = name.replace("pos_emb.position_embeddings", "pos_emb.weight")
        for theirs, mine in ((".norm1.", ".norm0."), (".norm2.", ".norm1."), (".fc1.", ".fc0."), (".fc2.", ".fc1.")):
            if theirs in name:
                name = name.replace(theirs, mine)
                break
        name = name.replace("attn.proj", "wo")
        if match := re.match(r"(.*)\.attn\.([qkv])_proj\.(weight|bias)", name):
            part = ours[f"{match[1]}.wqkv.{match[3]}"].chunk(3)["qkv".index(match[2])]
            # pairs to halves, head by head: the same rotation in another order of rows
            return part if match[2] == "v" else part.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    name = name.replace("mm_projector.in_proj", "mm_projector.proj.0")
    return ours[name.replace("mm_projector.out_proj", "mm_projector.proj.2")]


# ---- what is measured ------------------------------------------------------------------------------------------------


class Ours:
    """Our side: the calls that fusion/generate.py makes."""

    def __init__(self, kimi: Kimi) -> None:
        self.kimi, self.lm = kimi, kimi.language_model

    def vision(self, media: PackedPatches) -> Tensor:
        return self.kimi.see(media)

    def prefill(self, ids: Tensor) -> Tensor:
        from fusion.generate import prefill
        from fusion.prompt import Prompt

        return prefill(self.kimi, Prompt(ids), self.lm.new_cache(1, len(ids) + 1))

    def start(self, prompts: Tensor) -> Any:
        """The cache of prompts (sequences, tokens), read together."""
        batch, context = prompts.shape
        cache = self.lm.new_cache(batch, context + 64)
        self.lm(self.lm.embed(prompts.flatten()), [context] * batch, cache)
        return cache

    def step(self, tokens: list[int], cache: Any) -> Tensor:
        from fusion.generate import decode

        return decode(self.kimi, tokens, cache)

    def cache_bytes(self) -> float:
        return self.lm.new_cache(1).bytes_per_token


class Theirs:
    """transformers' side: the language model and the head called directly, which is less work than generate()."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def vision(self, media: PackedPatches) -> Tensor:
        # one item a call: its tower fails on a mixture of chunk lengths
        parts = []
        for item in media.split():
            pixels = item.pixels.to(self.model.dtype)
            pooled = self.model.model.vision_tower(pixels, grid_thw=item.grid_thw).pooler_output
            parts.append(self.model.model.mm_projector(pooled).squeeze(1))
        return torch.cat(parts)

    def _run(self, ids: Tensor, cache: Any) -> Any:
        out = self.model.model.language_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return self.model.lm_head(out.last_hidden_state[:, -1]).float(), out.past_key_values

    def prefill(self, ids: Tensor) -> Tensor:
        return self._run(ids[None], None)[0][0]

    def start(self, prompts: Tensor) -> Any:
        return self._run(prompts, None)[1]

    def step(self, tokens: list[int], cache: Any) -> Tensor:
        return self._run(torch.tensor(tokens)[:, None], cache)[0]

    def cache_bytes(self) -> float:
        cache = self.start(torch.zeros(1, 16, dtype=torch.int64))
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held) / 16


def _interleave(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], float | None]:
    """Median seconds of each side, and the median over rounds of theirs / ours."""
    for call in sides.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(times["ours"], times["transformers"], strict=True)] if len(sides) == 2 else []
    return {name: statistics.median(each) for name, each in times.items()}, statistics.median(ratios or [0]) or None


def _mixture(patch: int) -> PackedPatches:
    count = sum(t * h * w for t, h, w in GRIDS)
    return PackedPatches(torch.randn(count, 3, patch, patch), torch.tensor(GRIDS))


def measure(arguments: Bench, note: Callable[[str], None]) -> dict[str, Any]:
    """Every row: the work, its rate on each side, and how many times faster ours is."""
    kimi = _model(arguments)
    sides: dict[str, Any] = {"ours": Ours(kimi)}
    try:
        sides["transformers"] = Theirs(transformers_twin(kimi))
        import transformers

        peer = f"transformers {transformers.__version__}"
    except ImportError as missing:
        peer = f"not measured: {missing}"
        note(f"transformers is not installed ({missing}); measuring our side only")
    rows = []

    def row(what: str, unit: str, work: float, calls: dict[str, Callable[[], Any]]) -> None:
        seconds, ratio = _interleave(calls, arguments.rounds)
        rates = {name: round(work / value, 1) for name, value in seconds.items()}
        rows.append({"what": what, "unit": unit, **rates, "times_faster": ratio and round(ratio, 2)})
        note(f"{what}: {rates}" + (f", {ratio:.2f}x" if ratio else ""))

    with torch.inference_mode():
        media = _mixture(kimi.vision_tower.config.patch_size)
        row(
            f"vision, {len(media)} items",
            "patches/s",
            len(media.pixels),
            {n: _call(s.vision, media) for n, s in sides.items()},
        )
        for context in arguments.contexts:
            ids = torch.randint(0, kimi.config.text.vocab_size - 256, (context,))
            row(f"prefill {context}", "tokens/s", context, {n: _call(s.prefill, ids) for n, s in sides.items()})
        for batch in (1, arguments.batch):
            for context in arguments.contexts:
                # other words in every sequence and step: equal ones would all go to the same few experts
                words = torch.randint(0, kimi.config.text.vocab_size - 256, (batch, context + 8))
                calls = {n: _steps(s, words[:, :context], words[:, context:].T.tolist()) for n, s in sides.items()}
                row(f"decode, batch {batch}, context {context}", "tokens/s", batch * 8, calls)
        cache = {name: round(side.cache_bytes(), 1) for name, side in sides.items()}
        rows.append({"what": "cache", "unit": "bytes/token", **cache, "times_faster": None})
    peaks = {}
    for name in sides:
        command = [sys.executable, "-m", "fusion.bench", "--side", name, "--shape", arguments.shape]
        command += ["--dtype", arguments.dtype, "--contexts", *map(str, arguments.contexts)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[name] = json.loads(answer)
    for kind in ("peak memory over the weights", "peak memory of the process"):
        values = {name: peak[kind] for name, peak in peaks.items()}
        rows.append({"what": kind, "unit": "MiB", **values, "times_faster": None})
    return {
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "peer": peer,
        "rows": rows,
    }


def _call(function: Callable[..., Any], *values: Any) -> Callable[[], Any]:
    return lambda: function(*values)


def _steps(side: Any, prompts: Tensor, words: list[list[int]]) -> Callable[[], Any]:
    """Eight decoding steps; every round goes on where the last one ended, on both sides alike."""
    state = side.start(prompts)

    def run() -> None:
        for tokens in words:
            side.step(tokens, state)

    return run


def _model(arguments: Bench) -> Kimi:
    config = presets.PRESETS[arguments.shape]()
    longest = max(arguments.contexts) + 1024
    config = replace(config, text=replace(config.text, max_position_embeddings=max(longest, 4096)))
    torch.manual_seed(0)
    kimi = Kimi(config).to(getattr(torch, arguments.dtype)).eval()
    kimi.language_model.stack_experts()
    return kimi


def peak_memory(arguments: Bench) -> dict[str, float]:
    """Peak resident memory of this process: after loading, and while it sees, reads and writes."""

    def peak() -> float:
        if sys.platform == "linux":  # ru_maxrss would start from the parent's peak
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 2**10
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    kimi = _model(arguments)
    side: Any
    if arguments.side == "ours":
        side = Ours(kimi)
    else:
        side = Theirs(transformers_twin(kimi))
        del kimi
    loaded = peak()
    with torch.inference_mode():
        side.vision(_mixture(14))
        side.prefill(torch.zeros(max(arguments.contexts), dtype=torch.int64))
        state = side.start(torch.zeros(1, max(arguments.contexts), dtype=torch.int64))
        for _ in range(4):
            side.step([5], state)
    return {
        "peak memory over the weights": round(peak() - loaded, 1),
        "peak memory of the process": round(peak(), 1),
    }


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Bench, prog="moonkit bench")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.side != "both":
        print(json.dumps(peak_memory(arguments)))
        return
    from rich.console import Console
    from rich.table import Table

    notes = Console(stderr=True, highlight=False)
    result = measure(arguments, lambda line: notes.print(f"[dim]{line}[/]"))
    if not arguments.json:
        table = Table(title=f"{result['shape']}, {result['dtype']}, {result['threads']} threads; {result['peer']}")
        for column in ("what", "unit", "ours", "transformers", "times faster"):
            table.add_column(column, justify="left" if column in ("what", "unit") else "right")
        for entry in result["rows"]:
            theirs, ratio = entry.get("transformers"), entry["times_faster"]
            numbers = (f"{entry['ours']:,}", "" if theirs is None else f"{theirs:,}", f"{ratio}x" if ratio else "")
            table.add_row(entry["what"], entry["unit"], *numbers)
        notes.print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
