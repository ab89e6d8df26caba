"""The models that are measured, with random weights, and what a call of them needs at least: bytes and operations.

    nano      lm.config.nano             the model in the box
    Moon-6    lm.config.moonlight, 6 of its 27 layers: 3.7 B parameters, 0.8 B of them for a token
    tower     moonvit.config.VisionConfig, the released 400M tower

Values do not change how long a product takes, but routing must be real: weights are a repeated block of normal numbers
at a moving offset, so no two experts are alike and every token has its own.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lm.config
from fusion.config import KimiConfig
from fusion.model import Kimi
from lm.config import TextConfig
from lm.int4 import GROUP, PackedLinear
from lm.model import count_parameters
from lm.moe import MoE

_BLOCK = 2**22 + 17  # numbers of the block; odd, so that rows do not repeat
_INT4_BYTES = 0.5 + 2 / GROUP  # of a weight: its half byte and a share of a bfloat16 scale


def moon() -> TextConfig:
    """Moonlight's layers, six of them, with room for long contexts."""
    return replace(lm.config.moonlight(), num_hidden_layers=6, max_position_embeddings=16_384)


def nano() -> TextConfig:
    return replace(lm.config.nano(), max_position_embeddings=16_384)


def tiny() -> TextConfig:
    """For trying the benches: seconds."""
    return lm.config.tiny()


class _Filler:
    """Cheap random numbers: copies of one block."""

    def __init__(self, block: Tensor) -> None:
        self.block, self.at = block, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        flat = tensor.view(-1)
        done = 0
        while done < len(flat):
            part = self.block[self.at : self.at + len(flat) - done]
            flat[done : done + len(part)] = part
            done += len(part)
            self.at = (self.at + len(part)) % len(self.block)
        return tensor


def _filler(dtype: torch.dtype, std: float = 0.02) -> _Filler:
    return _Filler((torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * std).to(dtype))


def random_model(config: TextConfig, dtype: torch.dtype = torch.bfloat16) -> Kimi:
    """A text-only model. Gate and up of every expert lie together, as transformers keeps them, so one copy serves both.

    The experts of a layer: one tensor (experts, 2 * inner, dim), of whose halves gate and up are views.
    """
    with torch.device("meta"):
        kimi = Kimi(KimiConfig(config, profile="k2")).to(dtype).eval()
    fill = _filler(dtype)
    model = kimi.language_model
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            _lay_experts(layer.mlp, config, dtype, fill)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype)
                value = fill(empty) if parameter.ndim > 1 else empty.fill_(1.0)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.randn(buffer.shape) * 0.01)
    return kimi


def _lay_experts(moe: MoE, config: TextConfig, dtype: torch.dtype, fill: _Filler) -> None:
    inner, dim, count = config.moe_intermediate_size, config.hidden_size, config.n_routed_experts
    both = fill(torch.empty(count, 2 * inner, dim, dtype=dtype))
    down = fill(torch.empty(count, dim, inner, dtype=dtype))
    moe._stacks = (both[:, :inner], both[:, inner:], down)
    for kind, stack in zip(("gate_proj", "up_proj", "down_proj"), moe._stacks, strict=True):
        for expert, matrix in zip(moe.experts, stack, strict=True):
            getattr(expert, kind).weight = nn.Parameter(matrix, requires_grad=False)


def fused_experts(moe: MoE) -> tuple[Tensor, Tensor]:
    """gate_up (experts, 2 * inner, dim) and down (experts, dim, inner) of a `random_model`, in its own memory."""
    assert moe._stacks is not None, "only models of random_model lie so"
    gate, _, down = moe._stacks
    shape = (gate.shape[0], 2 * gate.shape[1], gate.shape[2])
    return gate.as_strided(shape, (gate.stride(0), gate.shape[2], 1)), down


def in_int4(kimi: Kimi, which: Literal["experts", "all"]) -> Kimi:
    """A model that shares what stays in bfloat16 with `kimi`, and has the rest in 4 bits at random.

    "all": every matrix but the embedding, the routers and kv_b_proj, which decoding takes apart.
    """
    packed = _Filler(torch.randint(-(2**31), 2**31, (_BLOCK,), dtype=torch.int32))
    with torch.device("meta"):
        other = Kimi(kimi.config).to(kimi.dtype).eval()
        for path, module in list(other.named_modules()):
            if not isinstance(module, nn.Linear) or path.endswith("kv_b_proj"):
                continue
            if which == "experts" and ".experts." not in path:
                continue
            parent, _, name = path.rpartition(".")
            setattr(other.get_submodule(parent), name, PackedLinear(module.in_features, module.out_features))
    own: dict[str, Tensor] = {}
    for path, module in other.named_modules():
        if isinstance(module, PackedLinear):
            own[f"{path}.weight_packed"] = packed(torch.empty(module.weight_packed.shape, dtype=torch.int32))
            own[f"{path}.weight_scale"] = torch.full(module.weight_scale.shape, 0.004, dtype=torch.bfloat16)
            own[f"{path}.weight_shape"] = torch.tensor([module.out_features, module.in_features], dtype=torch.int32)
    shared = kimi.state_dict()
    other.load_state_dict({n: own[n] if n in own else shared[n] for n in other.state_dict()}, assign=True)
    return other


def filled_cache(kimi: Kimi, sequences: int, context: int, room: int = 256) -> Any:
    """A cache that has read `context` tokens of each sequence: random latents."""
    cache = kimi.language_model.new_cache(sequences, context + room)
    for layer in cache.layers:
        layer.normal_()
    cache.lengths = [context] * sequences
    return cache


# ---- what a call needs -----------------------------------------------------------------------------------------------


def step_bytes(
    config: TextConfig,
    sequences: int,
    context: int,
    bits: Literal["bfloat16", "int4 experts", "int4 all", "float32"] = "bfloat16",
) -> float:
    """Bytes that one token for each sequence must read: every matrix that it uses once, every cached latent once.

    Of the routed experts those that are hit by chance: experts * (1 - (1 - chosen / experts) ^ sequences).
    """
    parts = count_parameters(config)
    plain = 4.0 if bits == "float32" else 2.0
    expert = plain if bits in ("bfloat16", "float32") else _INT4_BYTES
    other = _INT4_BYTES if bits == "int4 all" else plain
    hit = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** sequences
    heads = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    kv_b = config.num_hidden_layers * config.kv_lora_rank * heads
    linear = parts["attention"] - kv_b + parts["dense"] + parts["shared"] + parts["head"]
    weights = parts["experts"] * hit * expert + linear * other + (kv_b + parts["router"]) * plain
    return weights + plain * config.num_hidden_layers * config.cache_dim * context * sequences


def prompt_flops(config: TextConfig, tokens: int) -> float:
    """Operations of reading a prompt: each token's matrices, causal attention with expanded heads, one answer."""
    parts = count_parameters(config)
    used = parts["experts"] * config.num_experts_per_tok / config.n_routed_experts
    matrices = used + parts["attention"] + parts["dense"] + parts["shared"] + parts["router"]
    pairs = tokens * (tokens + 1) / 2
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 2 * matrices * tokens + 2 * config.num_hidden_layers * width * pairs + 2 * parts["head"]


def tower_flops(dim: int, inner: int, layers: int, lengths: list[int]) -> float:
    """Operations of the blocks of a vision tower: four square products and two wide ones, attention inside items."""
    linear = 2 * sum(lengths) * (4 * dim**2 + 2 * dim * inner)
    attention = sum(4 * length**2 * dim for length in lengths)
    return float(layers * (linear + attention))
