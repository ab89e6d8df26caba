"""Learning rate by tokens: stages one after the other, each constant, linear or cosine.

    lr  |   ____________________
        |  /                    \\__        warm-up, stable, decay (WSD), then annealing on longer sequences
        | /                        \\____
        +--------------------------------> tokens

Counted in tokens, not steps: the same plan holds for any batch size. Source: Kimi K2 report, section 2.5.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from lm.config import Yarn


@dataclass(frozen=True)
class Stage:
    """`tokens` long; from learning rate `start` to `end`. `sequence`: tokens of one training sequence.

    yarn: from this stage on, the model reads positions so (context extension); None leaves it as it is.
    """

    name: str
    tokens: float
    start: float
    end: float
    shape: Literal["constant", "linear", "cosine"] = "constant"
    sequence: int = 4096
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        if not 0 < self.tokens < math.inf or not self.start >= 0 or not self.end >= 0 or self.sequence < 1:
            raise ValueError(f"stage {self.name!r}: tokens and sequence must be positive, rates not negative")
        if self.shape not in ("constant", "linear", "cosine"):
            raise ValueError(f"stage {self.name!r}: shape {self.shape!r} is unknown (known: constant, linear, cosine)")
        if self.shape == "constant" and self.start != self.end:
            raise ValueError(f"stage {self.name!r} is constant but goes from {self.start} to {self.end}")

    def rate(self, done: float) -> float:
        """Learning rate after the share `done` (0 to 1) of this stage."""
        if self.shape == "cosine":
            return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Schedule:
    """Stages in order."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a schedule needs at least one stage")

    @property
    def tokens(self) -> float:
        """Tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)

    def at(self, tokens: float) -> tuple[Stage, float]:
        """The stage and the learning rate after `tokens` tokens; past the end, the last stage's end."""
        if not tokens >= 0:
            raise ValueError(f"tokens must not be negative, got {tokens}")
        for stage in self.stages:
            if tokens < stage.tokens:
                return stage, stage.rate(tokens / stage.tokens)
            tokens -= stage.tokens
        return self.stages[-1], self.stages[-1].end

    def same_until(self, other: "Schedule", tokens: float) -> bool:
        """Whether both are one schedule over the first `tokens` tokens: a run may change from one to the other there.

        What WSD is for: while the rate is stable, the length of the run is still open.
        """
        began = 0.0
        for mine, its in zip(self.stages, other.stages, strict=False):
            if tokens <= began:
                return True
            if mine != its:
                constant = mine.shape == its.shape == "constant"
                alike = constant and replace(mine, tokens=its.tokens) == its
                return alike and tokens <= began + min(mine.tokens, its.tokens)
            began += mine.tokens
        return tokens <= began


def wsd(peak: float, tokens: float, warmup: float, decay: float, end: float = 0.0, sequence: int = 4096) -> Schedule:
    """Warm-up, stable, cosine decay: `tokens` in all, of which `warmup` and `decay` are spent so."""
    if warmup + decay > tokens:
        raise ValueError(f"warm-up ({warmup:,.0f}) and decay ({decay:,.0f}) are longer than all {tokens:,.0f} tokens")
    stages = []
    if warmup:
        stages.append(Stage("warm-up", warmup, 0.0, peak, "linear", sequence))
    if tokens > warmup + decay:
        stages.append(Stage("stable", tokens - warmup - decay, peak, peak, "constant", sequence))
    if decay:
        stages.append(Stage("decay", decay, peak, end, "cosine", sequence))
    return Schedule(tuple(stages))


def cosine(peak: float, tokens: float, warmup: float, end: float = 0.0, sequence: int = 4096) -> Schedule:
    """Warm-up, then cosine decay to the end."""
    return wsd(peak, tokens, warmup, tokens - warmup, end, sequence)


def k2() -> Schedule:
    """Kimi K2: 15.5T tokens at 4,096, batches of 67M tokens, then annealing with 60B tokens at 32,768.

    The report gives the warm-up in steps (500) and counts it in the stable 10T; it gives one rate range for both
    annealing parts, so the boundary between them is ours: where a straight line through both has it.
    """
    batch, peak, low, last = 67e6, 2e-4, 2e-5, 7e-6
    middle = low + (last - low) * 400 / 460
    return Schedule(
        (
            Stage("warm-up", 500 * batch, 0.0, peak, "linear"),
            Stage("stable", 10e12 - 500 * batch, peak, peak),
            Stage("decay", 5.5e12, peak, low, "cosine"),
            Stage("anneal", 400e9, low, middle, "linear"),
            Stage("anneal, long", 60e9, middle, last, "linear", 32_768),
        )
    )
