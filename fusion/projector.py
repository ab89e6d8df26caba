"""Vision features to the language model's width: four neighbouring patches become one token.

    (tokens, 4, vision dim) - pre_norm on each patch - flatten - proj.0 - exact GELU - proj.2 - (tokens, text dim)

K2.5's `patchmerger` and Kimi-VL's projector are the same maths; only the checkpoint names differ (linear_1 and
linear_2 there), which the loader maps. Source: released PatchMergerMLP and KimiVLMultiModalProjector.
"""

from torch import Tensor, nn

from fusion.config import ProjectorConfig
from moonvit.config import VisionConfig


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, vision: VisionConfig, text_dim: int) -> None:
        super().__init__()
        wide = vision.hidden_size * vision.merge**2
        self.pre_norm = nn.LayerNorm(vision.hidden_size, config.norm_eps)
        # erf GELU here, tanh GELU in the tower
        self.proj = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, text_dim))

    def forward(self, features: Tensor) -> Tensor:
        """(tokens, 4, vision dim) to (tokens, text dim)."""
        return self.proj(self.pre_norm(features).flatten(1))
