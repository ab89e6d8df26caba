"""What every group of rows is told."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    rounds: int
    threads: int
    tiny: bool  # try-out shapes: every group in seconds
    note: Callable[[str], None]  # lines for people
    gguf: Path | None = None  # a Q4_0 file of the Moon-6 shape, for llama.cpp
    folder: Path | None = None  # where checkpoints are written for a moment; None: the system's place

    @property
    def budget(self) -> float:
        """Seconds of one row, warm-up included; the round that is running is finished."""
        return 1.0 if self.tiny else 40.0
