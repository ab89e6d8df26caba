"""Reading prompts and writing tokens: rows of the groups prefill, decode and int4.

    prefill   a prompt of 512 / 2k / 8k tokens, 2,048 at a time        beside transformers and llama.cpp
    decode    one more token after 128 / 2k / 8k, of 1 or 8 sequences  beside transformers
    int4      the same with experts, or all linear layers, in 4 bits   beside bfloat16 and llama.cpp Q4_0

Ours are the calls of fusion/generate.py. Caches are filled with random latents on both sides, and grow alike.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gguf, peers, shapes
from bench.machine import Gemm, Reads, Stock, forks, peak_growth
from bench.rows import Ceiling, Goal, Row
from bench.settings import Settings
from bench.timing import Side, take_turns
from fusion.generate import decode, prefill
from fusion.model import Kimi
from fusion.prompt import Prompt
from lm.config import TextConfig
from train.memory import keep_memory

STOCK, TUNED = "transformers, stock allocator", "transformers, allocator tuned"
_DIFFERENT = "experts as transformers picks them (grouped_mm); the language model called directly, without generate()"


def _twin(kimi: Kimi, settings: Settings) -> Any:
    """transformers over the same memory, or None and a note."""
    try:
        return peers.transformers_language(kimi)
    except ImportError as missing:
        settings.note(f"transformers is not installed ({missing}): our side only")
        return None


def _llama(settings: Settings, room: int) -> peers.Llama | None:
    """llama.cpp on a Q4_0 file of the Moon-6 shape, which is written here unless --gguf names one."""
    if settings.tiny:
        return None
    missing = [name for name in ("llama_cpp", "gguf") if not peers.installed(name)]
    if missing:
        settings.note(f"llama.cpp is not measured: {' and '.join(missing)} not installed")
        return None
    file = settings.gguf
    if file is None:
        file = Path(tempfile.gettempdir()) / "moonkit-bench-moon6-q4_0.gguf"
        if not file.exists():
            settings.note(f"writing {file} (2.2 GB) ...")
            unfinished = file.with_suffix(".part")
            gguf.write(unfinished, shapes.moon())
            unfinished.rename(file)
    return peers.Llama(file, settings.threads, room)


def _random_ids(config: TextConfig, *shape: int) -> Tensor:
    return torch.randint(0, config.vocab_size, shape)


# ---- prefill ---------------------------------------------------------------------------------------------------------


def prefill_rows(settings: Settings) -> Iterator[Row]:
    """Reading prompts."""
    moon = ("Moon-6", shapes.moon(), (512, 2048, 8192), 2048)
    nano = ("nano", shapes.nano(), (512, 2048), 2048)
    cases = [("tiny", shapes.tiny(), (64, 96), 96)] if settings.tiny else [moon, nano]
    models = [shapes.random_model(config) for _, config, _, _ in cases]
    twins = [_twin(kimi, settings) for kimi in models]
    calls: dict[str, Callable[[], float | None]] = {}
    prompts: dict[tuple[int, int], Tensor] = {}
    for n, (_, config, lengths, most) in enumerate(cases):
        for length in lengths:
            prompts[n, length] = ids = _random_ids(config, length)
            calls[f"memory {n} {length}"] = _memory(models[n], ids)
            if twins[n] is not None and length <= most:
                calls[f"{n} {length}"] = _theirs(twins[n], ids)
                calls[f"their memory {n} {length}"] = _their_memory(twins[n], ids)
    stock = Stock(calls, settings.threads) if forks() else None  # shares the weights
    torch.set_num_threads(settings.threads)
    keep_memory()
    gemm = Gemm()
    with torch.inference_mode():
        for n, (name, config, lengths, most) in enumerate(cases):
            llama = _llama(settings, max(lengths) + 64) if name == "Moon-6" else None
            for length in lengths:
                sides: dict[str, Side] = {"ours": _ours(models[n], prompts[n, length]), "GEMM": gemm}
                if twins[n] is not None and length <= most:
                    sides[TUNED] = _theirs(twins[n], prompts[n, length])
                    if stock:
                        sides[STOCK] = stock.side(f"{n} {length}")
                if llama is not None and length <= most:
                    sides["llama.cpp Q4_0"] = _reads(llama, length)
                times = take_turns(sides, settings.rounds, 1.5 * settings.budget, [stock.process] if stock else [])
                goals = []
                if name == "Moon-6" and length == 2048:
                    goals = [Goal("share", 0.5)]
                if name == "Moon-6" and length <= most:
                    goals.append(Goal("times", 4, "llama.cpp Q4_0"))
                yield Row.of(
                    f"{name}, prompt of {length:,}",
                    "tokens/s",
                    times,
                    length,
                    peers=[TUNED, STOCK, "llama.cpp Q4_0"],
                    ceiling=Ceiling("GEMM", "GEMM", gemm.amount, shapes.prompt_flops(config, length)),
                    goals=goals,
                    note=_DIFFERENT if length <= most else "others are left out: minutes for a prompt",
                )
            del llama
            if stock is None:
                continue
            peaks = {length: stock.run(f"memory {n} {length}") for length in lengths[-2:]}
            shorter, longer = peaks
            yield Row.single(
                f"{name}, memory while reading {longer:,} over that of {shorter:,}",
                "times",
                peaks[longer] / peaks[shorter],
                [Goal("at most", 2.0)] if name == "Moon-6" else [],
                note=f"peak beyond weights and cache: {peaks[shorter]:,.0f} and {peaks[longer]:,.0f} MiB; a chunk "
                "bounds it, but for the keys and values of the past",
            )
            if twins[n] is not None:
                theirs = stock.run(f"their memory {n} {most}")
                yield Row(
                    f"{name}, memory while reading {most:,}",
                    "MiB",
                    {"ours": stock.run(f"memory {n} {most}"), "transformers": theirs},
                    note="the peak beyond weights, and beyond the cache on our side",
                )
    if stock:
        stock.close()


def _ours(kimi: Kimi, ids: Tensor) -> Callable[[], None]:
    prompt = Prompt(ids)

    def run() -> None:
        prefill(kimi, prompt, kimi.language_model.new_cache(1, len(ids) + 1))

    return run


def _theirs(twin: Any, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        peers.transformers_prompt(twin, ids)

    return run


def _reads(llama: peers.Llama, length: int) -> Callable[[], None]:
    return lambda: llama.prompt(length)


def _memory(kimi: Kimi, ids: Tensor) -> Callable[[], float]:
    def run() -> float:
        cache = kimi.language_model.new_cache(1, len(ids) + 1)
        prefill(kimi, Prompt(ids[:16]), kimi.language_model.new_cache(1, 17))  # whatever is made once
        return peak_growth(lambda: prefill(kimi, Prompt(ids), cache))

    return run


def _their_memory(twin: Any, ids: Tensor) -> Callable[[], float]:
    def run() -> float:
        peers.transformers_prompt(twin, ids[:16])
        return peak_growth(lambda: peers.transformers_prompt(twin, ids))

    return run


# ---- decode ----------------------------------------------------------------------------------------------------------

# (sequences, context) -> goals
_MOON_GOALS: dict[tuple[int, int], list[Goal]] = {
    (1, 128): [Goal("share", 0.7), Goal("times", 1.1, "transformers")],
    (1, 2048): [Goal("share", 0.7), Goal("times", 3, "transformers")],
    (1, 8192): [Goal("share", 0.6), Goal("times", 9, "transformers")],
    (8, 2048): [Goal("times", 15, "transformers")],
    (8, 8192): [Goal("times", 25, "transformers")],
}
_NANO_GOALS: dict[tuple[int, int], list[Goal]] = {
    (1, 128): [Goal("at least", 250), Goal("times", 4, "transformers")],
    (1, 2048): [],
    (8, 128): [],
}


def decode_rows(settings: Settings) -> Iterator[Row]:
    """Writing tokens in bfloat16."""
    torch.set_num_threads(settings.threads)
    keep_memory()
    cases = [("Moon-6", shapes.moon(), _MOON_GOALS), ("nano", shapes.nano(), _NANO_GOALS)]
    if settings.tiny:
        cases = [("tiny", shapes.tiny(), {(1, 32): [Goal("share", 0.0)], (2, 32): []})]
    for name, config, goals in cases:
        kimi = shapes.random_model(config)
        twin = _twin(kimi, settings)
        yield _cache_row(name, kimi, twin)
        # as many bytes as a token reads: a small model lies in the caches, and so does what it is compared with
        need = shapes.step_bytes(config, 1, 128)
        memory = Reads(int(min(need, 2**30)))
        with torch.inference_mode():
            for (sequences, context), wanted in goals.items():
                sides: dict[str, Side] = {"ours": _steps(kimi, sequences, context), "memory": memory}
                if twin is not None:
                    sides["transformers"] = _their_steps(twin, sequences, context)
                yield Row.of(
                    f"{name}, {sequences} sequence{'s' * (sequences > 1)} after {context:,}",
                    "tokens/s",
                    take_turns(sides, settings.rounds, settings.budget),
                    sequences,
                    peers=["transformers"],
                    ceiling=Ceiling(
                        "memory reads", "memory", memory.amount, shapes.step_bytes(config, sequences, context)
                    ),
                    goals=wanted,
                    note=_DIFFERENT,
                )
        del kimi, twin


def _cache_row(name: str, kimi: Kimi, twin: Any) -> Row:
    rates = {"ours": float(kimi.language_model.new_cache(1).bytes_per_token)}
    if twin is not None:
        layers = peers.transformers_cache(twin, 1, 16).layers
        rates["transformers"] = sum(each.nbytes for layer in layers for each in (layer.keys, layer.values)) / 16
    return Row(f"{name}, cache", "bytes/token", rates)


def _steps(kimi: Kimi, sequences: int, context: int) -> Callable[[], None]:
    # dozens of calls of a fraction of a millisecond each make a round: the cache starts again before it is full
    cache = shapes.filled_cache(kimi, sequences, context)
    words = _random_ids(kimi.config.text, 64, sequences).tolist()
    count = 0

    def run() -> None:
        nonlocal count
        if count % 64 == 0:
            cache.lengths = [context] * sequences
        # other words in every sequence and step: equal ones would all go to the same few experts
        decode(kimi, words[count % 64], cache)
        count += 1

    return run


def _their_steps(twin: Any, sequences: int, context: int) -> Callable[[], None]:
    cache = peers.transformers_cache(twin, sequences, context)
    words = torch.randint(0, twin.config.vocab_size, (64, sequences))
    count = 0

    def run() -> None:
        nonlocal count
        if count and count % 64 == 0:
            cache.crop(context)
        peers.transformers_step(twin, words[count % 64], cache)
        count += 1

    return run


# ---- int4 ------------------------------------------------------------------------------------------------------------

_INT4 = "groups of 32, a bfloat16 scale each: 4.5 bits a weight; kv_b, routers and embedding stay in bfloat16"


def int4_rows(settings: Settings) -> Iterator[Row]:
    """Writing tokens with weights in 4 bits."""
    torch.set_num_threads(settings.threads)
    keep_memory()
    config = shapes.tiny() if settings.tiny else shapes.moon()
    name = "tiny" if settings.tiny else "Moon-6"
    contexts = (32,) if settings.tiny else (128, 2048, 8192)
    plain = shapes.random_model(config)
    experts, everything = shapes.in_int4(plain, "experts"), shapes.in_int4(plain, "all")
    memory = Reads(int(min(shapes.step_bytes(config, 1, 128, "int4 all"), 2**30)))
    llama = _llama(settings, max(contexts) + 512)
    with torch.inference_mode():
        for context in contexts:
            sides: dict[str, Side] = {
                "INT4 experts": _steps(experts, 1, context),
                "INT4 all linear": _steps(everything, 1, context),
                "ours, bfloat16": _steps(plain, 1, context),
                "memory": memory,
            }
            if llama is not None:
                llama.extend(context)
                sides["llama.cpp Q4_0"] = llama.step
            times = take_turns(sides, settings.rounds, settings.budget)
            for side, bits in (("INT4 experts", "int4 experts"), ("INT4 all linear", "int4 all")):
                goals = [Goal("times", 1.5, "llama.cpp Q4_0")]
                if context == contexts[0]:
                    goals.append(Goal("times", 2.0, "ours, bfloat16"))
                need = shapes.step_bytes(config, 1, context, bits)  # type: ignore[arg-type]
                yield Row.of(
                    f"{name}, {side}, 1 sequence after {context:,}",
                    "tokens/s",
                    times,
                    1,
                    ours=side,
                    peers=["ours, bfloat16", "llama.cpp Q4_0"],
                    ceiling=Ceiling("memory reads", "memory", memory.amount, need),
                    goals=goals,
                    note=_INT4,
                )
        del llama
        for rows in (1, 4, 16, 64):
            sides = {
                "INT4 experts": _steps(experts, rows, contexts[0]),
                "INT4 all linear": _steps(everything, rows, contexts[0]),
                "ours, bfloat16": _steps(plain, rows, contexts[0]),
                "memory": memory,
            }
            times = take_turns(sides, settings.rounds, settings.budget)
            for side, bits in (("INT4 experts", "int4 experts"), ("INT4 all linear", "int4 all")):
                need = shapes.step_bytes(config, rows, contexts[0], bits)  # type: ignore[arg-type]
                yield Row.of(
                    f"{name}, {side}, {rows} row{'s' * (rows > 1)} a step",
                    "tokens/s",
                    times,
                    rows,
                    ours=side,
                    peers=["ours, bfloat16"],
                    ceiling=Ceiling("memory reads", "memory", memory.amount, need),
                    goals=[Goal("times", 1.0, "ours, bfloat16")],
                    note=_INT4,
                )
