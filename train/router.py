"""Balance without a loss: after each step, the router's bias moves towards the experts that got too few tokens.

    load (experts)  tokens that chose each expert: over all micro-batches and ranks of the step
    e = mean load - load;   bias += speed * (sign(e) - mean of sign(e))

The bias decides who is chosen, never how much of them is used. The mean is taken off so that the biases do not drift
together. Source: DeepSeek-V3 (arXiv 2412.19437) for the sign rule; Moonlight, appendix C, for the mean. Speed there is
0.001, and 0 in the last stage; K2's is unpublished.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lm.model import LanguageModel
from lm.moe import MoE
from lm.taps import Routing


@dataclass(frozen=True)
class Load:
    """How even one step was, over all MoE layers. 1 is even; `experts` is the worst that `largest` can be."""

    largest: float  # load of the busiest expert over the mean load, in the worst layer
    idle: float  # share of experts that no token chose


class RouterBalance:
    """Counts tokens per expert, layer by layer, and moves the biases."""

    def __init__(self, model: LanguageModel) -> None:
        self.layers = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
        self.loads: Tensor | None = None  # int64 (MoE layers, experts)

    @torch.no_grad()
    def add(self, routing: list[Routing]) -> None:
        """`taps.routing` of one forward pass."""
        if len(routing) != len(self.layers):
            raise ValueError(f"routing of {len(routing)} MoE layers, but the model has {len(self.layers)}")
        counts = [
            each.chosen.flatten().bincount(minlength=len(layer.experts))
            for each, layer in zip(routing, self.layers, strict=True)
        ]
        if counts:
            new = torch.stack(counts)
            self.loads = new if self.loads is None else self.loads + new

    @torch.no_grad()
    def step(self, speed: float) -> Load:
        """Move every bias by at most 2 * speed, and start counting again."""
        if not speed >= 0:
            raise ValueError(f"the speed of the router's bias must not be negative, got {speed}")
        if self.loads is None:
            raise ValueError("no forward pass has reported its routing: run it with Taps()")
        loads, self.loads = self.loads, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        mean = loads.float().mean(1, keepdim=True)
        signs = (mean - loads).sign()
        moves = speed * (signs - signs.mean(1, keepdim=True))
        for layer, move in zip(self.layers, moves, strict=True):
            layer.gate.e_score_correction_bias += move
        return Load(float((loads.amax(1) / mean[:, 0]).max()), float((loads == 0).float().mean()))
