"""lm: embeddings to logits."""

from lm.cache import LatentCache
from lm.config import TextConfig, Yarn
from lm.model import LanguageModel, count_parameters
from lm.taps import Routing, Taps

__all__ = ["LanguageModel", "LatentCache", "Routing", "Taps", "TextConfig", "Yarn", "count_parameters"]
