"""What decoding keeps of the past: one latent and one rotary key per token and layer, shared by all heads.

In: the latents of new tokens. Out: those of the whole past. 512 + 64 = 576 numbers per token and layer in every
released model; 64 heads of expanded keys and values would be 20,480.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lm.config import TextConfig


class LatentCache:
    """Latents of several sequences of different lengths: per layer one (sequences, capacity, cache_dim) buffer.

    Grows by itself. `lengths[s]` tokens of sequence s are valid. A forward pass writes every layer, then calls
    `advance` once.
    """

    def __init__(
        self,
        config: TextConfig,
        sequences: int,
        capacity: int = 256,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if sequences < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least one sequence and one slot, got {sequences} and {capacity}")
        self.cache_dim = config.cache_dim
        self.lengths = [0] * sequences
        # zeros, not empty: rows past a sequence's end are read (with weight 0) in a batch, and 0 * nan is nan
        self.layers = [
            torch.zeros(sequences, capacity, config.cache_dim, device=device, dtype=dtype)
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def capacity(self) -> int:
        return self.layers[0].shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence costs over all layers."""
        return sum(layer.element_size() * self.cache_dim for layer in self.layers)

    def __repr__(self) -> str:
        return (
            f"LatentCache({len(self.lengths)} sequences of {self.lengths} tokens, {self.cache_dim} elements per token "
            f"and layer, {len(self.layers)} layers, {self.bytes_per_token:,} bytes per token)"
        )

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of at least `tokens` tokens."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, self.capacity * 5 // 4)
        for index, layer in enumerate(self.layers):
            grown = layer.new_zeros(layer.shape[0], capacity, self.cache_dim)
            grown[:, : layer.shape[1]] = layer
            self.layers[index] = grown  # one layer at a time: the peak is the cache plus one layer

    def write(self, layer: int, latents: Tensor, new: Sequence[int]) -> None:
        """Put `latents` (tokens, cache_dim), `new[s]` of them for sequence s, behind what is there."""
        buffer = self.layers[layer]
        if all(count == 1 for count in new):
            rows = torch.arange(len(new), device=buffer.device)
            buffer[rows, torch.tensor(self.lengths, device=buffer.device)] = latents
            return
        for sequence, part in enumerate(latents.split(list(new))):
            start = self.lengths[sequence]
            buffer[sequence, start : start + len(part)] = part

    def advance(self, new: Sequence[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, new, strict=True)]

    def select(self, keep: Sequence[int]) -> "LatentCache":
        """A cache of the sequences `keep` alone, in that order, cut to their longest."""
        chosen = object.__new__(LatentCache)
        chosen.cache_dim = self.cache_dim
        chosen.lengths = [self.lengths[s] for s in keep]
        end = max(chosen.lengths) + 1
        chosen.layers = [layer[list(keep), :end].contiguous() for layer in self.layers]
        return chosen

    def widen(self, sequences: int) -> None:
        """Make room for `sequences` sequences; the new ones are empty."""
        for index, layer in enumerate(self.layers):
            grown = layer.new_zeros(sequences, *layer.shape[1:])
            grown[: len(layer)] = layer
            self.layers[index] = grown
        self.lengths += [0] * (sequences - len(self.lengths))

    def move(self, source: int, target: int) -> None:
        """Put sequence `source` in the place of `target`; `source` is empty afterwards."""
        length = self.lengths[source]
        for layer in self.layers:
            layer[target, :length] = layer[source, :length]
        self.lengths[target], self.lengths[source] = length, 0

    def first(self, sequences: int) -> "LatentCache":
        """The first sequences alone, in this cache's memory; give it to `take` when it has grown."""
        view = object.__new__(LatentCache)
        view.cache_dim = self.cache_dim
        self.reserve(max(self.lengths[:sequences]) + 1)
        view.lengths = self.lengths[:sequences]
        view.layers = [layer[:sequences] for layer in self.layers]
        return view

    def take(self, view: "LatentCache") -> None:
        """The lengths that a view of the first sequences has now."""
        self.lengths[: len(view.lengths)] = view.lengths

    def row(self, sequence: int) -> "LatentCache":
        """Sequence `sequence` alone, writing into this cache's memory; set `lengths` here when it is filled."""
        view = object.__new__(LatentCache)
        view.cache_dim = self.cache_dim
        view.lengths = [self.lengths[sequence]]
        view.layers = [layer[sequence : sequence + 1] for layer in self.layers]
        return view
