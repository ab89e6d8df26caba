"""moonkit quantize: a checkpoint whose experts are stored in 4 bits, all else in bfloat16, as the releases are.

    moonkit quantize --model runs/nano/model --out nano-int4

Groups of 32 weights share a bfloat16 scale, symmetric, largest magnitude to 7: the released rule (compressed-tensors,
pack-quantized). Attention, shared experts, dense layers, tower, projector, embeddings and head stay in bfloat16.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Quantize:
    """Write a checkpoint with INT4 experts, in the released layout."""

    model: str
    """Folder or hub id of the checkpoint to read."""
    out: Path
    """Folder to write."""
    overwrite: bool = False
    """Replace the checkpoint that is in the folder."""


def quantize(model: str, out: Path, overwrite: bool = False) -> tuple[int, int]:
    """Write `model` into `out`; (matrices packed, bytes on disk). Raises ValueError for a model without experts."""
    import torch

    from fusion.model import Kimi
    from lm.int4 import pack_experts

    kimi = Kimi.from_pretrained(model, dtype="float32", device="cpu", experts="dense")
    packed = pack_experts(kimi)  # from float32: the scales are rounded once
    if not packed:
        raise ValueError(f"{model} has no routed experts, so there is nothing to pack into 4 bits")
    kimi = kimi.to(torch.bfloat16)
    kimi.save_pretrained(out, overwrite=overwrite)
    return packed, sum(file.stat().st_size for file in out.iterdir())


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Quantize, prog="moonkit quantize")
    packed, size = quantize(arguments.model, arguments.out, arguments.overwrite)
    print(f"{arguments.out}: {packed:,} expert matrices in 4 bits, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
