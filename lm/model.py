"""The language model: embeddings in, hidden states and logits out.

    x (tokens, dim) - layer 0 (dense) - layers 1..n (experts) - norm - lm_head - logits (tokens, vocab)

Several sequences lie end to end in one flat array; `lengths` says where each ends, and none sees another. With a
cache, `lengths` counts only the new tokens. Modules keep the released checkpoint's names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm.attention import Attention, Layout, RMSNorm, make_layout
from lm.cache import LatentCache
from lm.config import TextConfig
from lm.linear import Embedding, Linear
from lm.moe import MLP, MoE
from lm.step import MOST, Stepper, Unfit
from lm.taps import Taps


class Layer(nn.Module):
    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(index) else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, layout: Layout, cache: LatentCache | None, taps: Taps | None) -> Tensor:
        max_logits = taps.max_logits if taps and taps.want_max_logits else None
        shares = taps.shares if taps and taps.want_shares else None
        x = x + self.self_attn(self.input_layernorm(x), layout, cache, max_logits, shares)
        h = self.post_attention_layernorm(x)
        return x + (self.mlp(h, taps) if isinstance(self.mlp, MoE) else self.mlp(h))


class Decoder(nn.Module):
    def __init__(self, config: TextConfig, layers: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout, cache: LatentCache | None, taps: Taps | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, layout, cache, taps)
        return self.norm(x)


class LanguageModel(nn.Module):
    """DeepSeek-V3-style language model of the Kimi K2 family."""

    def __init__(self, config: TextConfig, layers: int | None = None) -> None:
        """layers: how many of them to make; None means all."""
        super().__init__()
        self.config = config
        self._stepper: Stepper | Unfit | None = None
        self.model = Decoder(config, config.num_hidden_layers if layers is None else layers)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and not weight.is_meta:
            nn.init.normal_(weight, std=self.config.initializer_range)

    def embed(self, ids: Tensor) -> Tensor:
        """(tokens) to (tokens, dim). Raises ValueError for an id outside the vocabulary."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"token ids run from {int(ids.min())} to {int(ids.max())} but the vocabulary has "
                f"{self.config.vocab_size}; the tokenizer belongs to another model"
            )
        return self.model.embed_tokens(ids)

    def forward(
        self,
        x: Tensor,
        lengths: Sequence[int] | None = None,
        cache: LatentCache | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Final hidden states (tokens, dim) of embedded tokens (tokens, dim).

        lengths: (new) tokens of each sequence; None means one sequence. cache: written and advanced when given.
        """
        new = [len(x)] if lengths is None else list(lengths)
        if sum(new) != len(x) or any(count < 1 for count in new):
            raise ValueError(f"lengths {new} must be positive and add up to the {len(x)} tokens given")
        past = [0] * len(new) if cache is None else cache.lengths
        if len(past) != len(new):
            raise ValueError(f"the cache holds {len(past)} sequences but {len(new)} lengths were given")
        if cache is not None:
            cache.reserve(max(p + n for p, n in zip(past, new, strict=True)))
        layout = make_layout(self.config, new, past, x.device, x.dtype)
        x = self.model(x, layout, cache, taps)
        if cache is not None:
            cache.advance(new)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (tokens, vocab)."""
        return self.lm_head(hidden).float()

    def step(self, x: Tensor, cache: LatentCache) -> Tensor:
        """One more token of every sequence of the cache, x (sequences, dim): float32 logits (sequences, vocab).

        In one call of a kernel where there is one for this model and machine (lm/step.py), layer by layer elsewhere.
        """
        stepper = self.stepper() if len(x) <= MOST and not torch.is_grad_enabled() else None
        return stepper(x, cache) if stepper else self.logits(self(x, [1] * len(x), cache))

    def stepper(self) -> Stepper | None:
        """The kernel's view of this model, or None where the plain form runs."""
        if self._stepper is None or (isinstance(self._stepper, Stepper) and not self._stepper.current()):
            try:
                self._stepper = Stepper(self)
            except Unfit as why:
                self._stepper = why
        return self._stepper if isinstance(self._stepper, Stepper) else None

    def stack_experts(self) -> None:
        """Prepare for inference; see MoE.stack_experts."""
        for layer in self.model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.stack_experts()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguageModel":
        self._stepper = None  # weights move, or change their dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_stepper": None}  # addresses mean nothing in a copy

    def new_cache(self, sequences: int, capacity: int = 256) -> LatentCache:
        weight = self.model.embed_tokens.weight
        return LatentCache(self.config, sequences, capacity, weight.device, weight.dtype)


def count_parameters(config: TextConfig) -> dict[str, int]:
    """Parameters of each part, from a model on the meta device: nothing is allocated.

    `total` leaves out the routers' correction biases (`router_biases`), as parameter counts of the family do.
    `activated` counts the chosen experts only, with embedding and head.
    """
    whole = range(config.num_hidden_layers)
    of_kind = {kind: [i for i in whole if config.is_moe(i) == kind] for kind in (False, True)}
    parts = dict.fromkeys(("embedding", "head", "attention", "dense", "shared", "router", "experts", "norms"), 0)
    biases = 0
    with torch.device("meta"):
        # layers of a kind are alike, so one of each is enough: K2 has 70,000 matrices
        modules: list[tuple[nn.Module, int]] = [(Layer(config, at[0]), len(at)) for at in of_kind.values() if at]
        modules.append((LanguageModel(config, layers=0), 1))
    for module, times in modules:
        for name, parameter in module.named_parameters():
            parts[_part(name)] += times * parameter.numel()
        biases += times * sum(buffer.numel() for buffer in module.buffers())
    total = sum(parts.values())
    idle = parts["experts"] * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return parts | {"total": total, "activated": total - idle, "router_biases": biases}


def _part(name: str) -> str:
    """Which part a parameter counts for. "mlp.gate" is the router; "mlp.gate_proj" belongs to a dense layer."""
    marks = {".experts.": "experts", ".shared_experts.": "shared", "mlp.gate.": "router", "self_attn.": "attention"}
    found = next((part for mark, part in marks.items() if mark in name), None)
    if found is None:
        found = "dense" if "mlp." in name else {"embed_tokens": "embedding", "lm_head": "head"}.get(name.split(".")[-2])
    return found or "norms"
