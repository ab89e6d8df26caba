"""What a forward pass can be asked to show or to take over, besides its result.

taps = Taps(want_max_logits=True)
hidden = language_model(x, lengths, taps=taps)
taps.max_logits[layer]        # float32 (heads): what QK-Clip needs
taps.routing[n].chosen        # the experts of the n-th MoE layer
taps.shares[layer][0]         # float32 (heads, keys), with want_shares: where the last token of sequence 0 looked
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The router's decision in one MoE layer."""

    scores: Tensor  # float32 (tokens, experts), sigmoid, without the correction bias; carries gradient
    chosen: Tensor  # int64 (tokens, chosen)
    weights: Tensor  # float32 (tokens, chosen), normalised and scaled


@dataclass
class Taps:
    """Filled by one forward pass, layer by layer. Make a new one for each pass."""

    want_max_logits: bool = False  # costs one more q k^T per layer
    pinned: Sequence[Tensor] | None = None  # chosen experts of each MoE layer, instead of the router's own top-k
    want_shares: bool = False  # costs nothing in a decoding step, else one row of q k^T per sequence and layer
    max_logits: list[Tensor] = field(default_factory=list)
    shares: list[list[Tensor]] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)

    def next_pinned(self) -> Tensor | None:
        """Experts pinned for the MoE layer that runs now."""
        if self.pinned is None:
            return None
        if len(self.routing) >= len(self.pinned):
            raise ValueError(f"routing is pinned for {len(self.pinned)} MoE layers but the model has more")
        return self.pinned[len(self.routing)]
