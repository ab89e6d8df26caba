"""The vision tower on pictures of mixed native sizes: rows of the group vision.

    224x224  448x336  448x448  476x644  672x896  1036x1400      256 to 7,400 patches, 14,084 together
       ours: packed as Kimi.see packs on a CPU, by the kernels and in plain torch
       transformers: one packed call (its attention splits by picture), with the stock allocator and a tuned one
       timm NaFlex: one picture at a time, and all of them padded to the largest; patches of 16 pixels, so fewer

A few of the 27 layers run; all of them are alike, so the shown rates are scaled: rate * run / 27.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import torch

from bench import peers, shapes
from bench.language import STOCK, TUNED
from bench.machine import Gemm, Stock, forks
from bench.rows import Ceiling, Goal, Row
from bench.settings import Settings
from bench.timing import Side, take_turns
from kernels import wide
from moonvit.config import VisionConfig
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches, in_packs
from train.memory import keep_memory

GRIDS: tuple[tuple[int, int], ...] = ((16, 16), (24, 32), (32, 32), (34, 46), (48, 64), (74, 100))
_RUN = 3  # layers


def vision_rows(settings: Settings) -> Iterator[Row]:
    """The tower."""
    whole = VisionConfig()
    run, grids = _RUN, GRIDS
    if settings.tiny:
        whole = replace(whole, hidden_size=64, num_heads=4, intermediate_size=128, num_layers=2)
        run, grids = 1, ((4, 4), (4, 6))
    sizes = replace(whole, num_layers=run)
    dtype = torch.bfloat16
    torch.manual_seed(0)
    tower = MoonViT(sizes).to(dtype).eval().requires_grad_(False)
    count = sum(h * w for h, w in grids)
    pixels = torch.randn(count, 3, sizes.patch_size, sizes.patch_size).to(dtype)
    media = PackedPatches(pixels, torch.tensor([(1, h, w) for h, w in grids]))
    theirs: Callable[[], None] | None = None
    try:
        theirs = peers.tower_call(peers.transformers_tower(tower), media)
    except ImportError as missing:
        settings.note(f"transformers is not installed ({missing}): left out")
    naflex = None
    try:
        naflex = peers.timm_naflex(sizes, run, grids, dtype)
    except ImportError as missing:
        settings.note(f"timm is not installed ({missing}): left out")
    stock = Stock({"packed": theirs}, settings.threads) if theirs and forks() else None
    torch.set_num_threads(settings.threads)
    keep_memory()
    gemm = Gemm()
    sides: dict[str, Side] = {"ours": lambda: _see(tower, media), "ours, plain torch": lambda: _plainly(tower, media)}
    works: dict[str, float] = {}
    scaled = run / whole.num_layers
    if theirs:
        sides[TUNED] = theirs
    if stock:
        sides[STOCK] = stock.side("packed")
    if naflex:
        real, sides["timm NaFlex, one by one"], sides["timm NaFlex, padded"] = naflex
        works = dict.fromkeys(("timm NaFlex, one by one", "timm NaFlex, padded"), real * scaled)
    sides["GEMM"] = gemm
    with torch.inference_mode():
        kernels = wide.fits(pixels)
        times = take_turns(sides, settings.rounds, 4 * settings.budget, [stock.process] if stock else [])
    if stock:
        stock.close()
    flops = shapes.tower_flops(sizes.hidden_size, sizes.intermediate_size, run, [h * w for h, w in grids])
    note = f"{run} of {whole.num_layers} layers run, rates scaled to all; timm's patches are 16 pixels wide, ours 14"
    ceiling = Ceiling("GEMM", "GEMM", gemm.amount, flops)
    work = count * scaled
    with_kernels = "" if kernels else ", no kernel on this machine"
    yield Row.of(
        f"{len(grids)} pictures, {count:,} patches{with_kernels}",
        "patches/s",
        times,
        work,
        peers=["ours, plain torch", TUNED, STOCK, "timm NaFlex, one by one", "timm NaFlex, padded"],
        ceiling=ceiling,
        goals=[
            Goal("times", 2.5, TUNED),
            Goal("times", 1.2, "timm NaFlex, one by one"),
            Goal("times", 4.0, "timm NaFlex, padded"),
        ],
        note=note,
        works=works,
    )
    yield Row.of(
        "the same in plain torch",
        "patches/s",
        times,
        work,
        ours="ours, plain torch",
        peers=[TUNED, STOCK],
        ceiling=ceiling,
        goals=[Goal("times", 1.4, TUNED), Goal("times", 1.8, STOCK)],
        note=note,
    )


def _see(tower: MoonViT, media: PackedPatches) -> None:
    """As Kimi.see does on a CPU: packs of a few small pictures, or one large one."""
    in_packs(media.split(), max(1024, *media.lengths), tower)


def _plainly(tower: MoonViT, media: PackedPatches) -> None:
    with patch.object(wide, "fits", lambda *tensors: False):
        _see(tower, media)
