"""A few tokens through all layers in one call of kernels/decode.cpp.

    stepper = Stepper(language_model)        describes where every weight lies; copies none
    logits = stepper(x, cache)               x (sequences, dim) -> float32 (sequences, vocab); the cache grows by one
    logits = stepper.rows(x, cache, slots, places)      any rows: of several sequences, or several of one

The plain form is `LanguageModel.forward` with a cache; both are tested equal. What the kernel does not know (another
device or dtype, expert groups, sharded weights, no compiler) is a `Unfit` with the reason, and the plain form runs.
"""

from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p, cast, pointer, sizeof
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.build import library, reason
from lm.cache import LatentCache
from lm.int4 import GROUP, PackedLinear
from lm.moe import MLP, MoE
from lm.rope import rotation

if TYPE_CHECKING:
    from lm.model import LanguageModel

MOST = 64  # rows of one call
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_INT4 = 2


class Unfit(Exception):
    """Why this model or machine steps in the plain form."""


class _Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("kind", c_int64),
    ]


class _Expert(Structure):
    _fields_ = [(name, _Matrix) for name in ("gate", "up", "down")]


class _Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "kv_norm")),
        *((name, _Matrix) for name in ("q_a", "q_b", "kv_a", "kv_b", "o", "router")),
        ("bias", c_void_p),
        ("experts", POINTER(_Expert)),
        ("shared", _Expert),
    ]


_SIZES = ("dim", "heads", "latent", "rope", "nope", "value", "experts", "chosen", "normalize", "layers", "vocab")


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in (*_SIZES, "norm_kind")),
        *((name, c_double) for name in ("eps", "latent_eps", "softmax_scale", "routed_scale")),
        ("layer", POINTER(_Layer)),
        ("norm", c_void_p),
        ("head", _Matrix),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "answered", "capacity", "threads", "cache_kind")),
        *((name, c_void_p) for name in ("x", "cos", "sin", "slots", "places", "caches", "logits")),
    ]


_NONE = _Matrix(None, None, 0, 0, -1)


def kernel(amx: bool = True) -> tuple[Any, int]:
    """The library, and what it uses: 1 AMX, 2 AVX-512, 0 neither. Raises Unfit when it could not be built."""
    code = library("decode")
    if code is None:
        raise Unfit(reason("decode"))
    if not code.moonkit_same(*(c_int64(sizeof(each)) for each in (_Model, _Layer, _Step))):
        raise Unfit("kernels/decode.cpp and lm/step.py are of different versions")
    code.moonkit_decode.argtypes = [POINTER(_Model), POINTER(_Step)]
    return code, int(code.moonkit_level(c_int(amx)))


class Stepper:
    """The weights of a language model as the kernel reads them. Raises Unfit with the reason why it cannot."""

    def __init__(self, model: "LanguageModel") -> None:
        self.code, _ = kernel()
        config = model.config
        embedding = model.model.embed_tokens.weight
        self.dtype = embedding.dtype
        if embedding.device.type != "cpu" or self.dtype not in _KINDS:
            raise Unfit(
                f"weights are {self.dtype} on {embedding.device}; the kernel reads float32 or bfloat16 on a CPU"
            )
        if config.n_group > 1:
            raise Unfit(f"experts in {config.n_group} groups")
        self._held: list[Any] = []  # what the structures point into
        self._watched = [(tensor, tensor.data_ptr()) for tensor in _ends_of(model)]
        layers = (_Layer * len(model.model.layers))(*(self._layer(layer) for layer in model.model.layers))
        self._held.append(layers)
        sizes = {
            "dim": config.hidden_size,
            "heads": config.num_attention_heads,
            "latent": config.kv_lora_rank,
            "rope": config.qk_rope_head_dim,
            "nope": config.qk_nope_head_dim,
            "value": config.v_head_dim,
            "experts": config.n_routed_experts,
            "chosen": config.num_experts_per_tok,
            "normalize": int(config.norm_topk_prob),
            "layers": len(layers),
            "vocab": config.vocab_size,
            "norm_kind": _KINDS[self.dtype],
        }
        self._config = config
        self._cos = self._sin = torch.empty(0, config.qk_rope_head_dim // 2)
        # so small that reading it again for every 64 rows costs less than torch's calls do
        self.small = sum(each.nbytes for each in self._held if isinstance(each, Tensor)) < 2**26
        self._model = _Model(
            **sizes,
            eps=config.rms_norm_eps,
            latent_eps=config.latent_norm_eps,
            softmax_scale=config.softmax_scale,
            routed_scale=config.routed_scaling_factor,
            layer=layers,
            norm=self._vector(model.model.norm.weight),
            head=self._matrix(model.lm_head),
        )

    def current(self) -> bool:
        """Whether the weights still lie where they lay. New values in the same place are read as they are."""
        return all(tensor.data_ptr() == place for tensor, place in self._watched)

    def __call__(self, x: Tensor, cache: LatentCache) -> Tensor:
        """One more token of every sequence: float32 logits (sequences, vocab)."""
        cache.reserve(max(cache.lengths) + 1)
        logits = self.rows(x, cache, range(len(x)), cache.lengths)
        cache.advance([1] * len(x))
        return logits

    def reads(self, tokens: int) -> bool:
        """Whether so many tokens of a prompt are read faster here than by torch's products."""
        return tokens <= (4 * MOST if self.small else MOST)

    def read(self, x: Tensor, cache: LatentCache) -> Tensor:
        """All of x (tokens, dim) behind the one sequence of the cache: float32 logits of the next token, (vocab)."""
        start, count = cache.lengths[0], len(x)
        cache.reserve(start + count)
        for at in range(0, count, MOST):
            part = x[at : at + MOST]
            # the last row first: it alone is answered, and only when it is the last of all
            order = [len(part) - 1, *range(len(part) - 1)]
            places = [start + at + row for row in order]
            logits = self.rows(part[order], cache, [0] * len(part), places, int(at + MOST >= count))
        cache.advance([count])
        return logits[0]

    def rows(
        self, x: Tensor, cache: LatentCache, slots: Sequence[int], places: Sequence[int], answered: int | None = None
    ) -> Tensor:
        """Row r is the token at `places[r]` of sequence `slots[r]`: x (rows, dim), at most `MOST` of them.

        Float32 logits of the first `answered` rows (None: of all), (answered, vocab). A row's logits do not depend, to
        the last bit, on which other rows are in the call, as long as the places before it are filled by this call or
        earlier ones. The cache must have the room; its `lengths` are the caller's to advance.
        """
        count = len(x)
        answered = count if answered is None else answered
        if not 1 <= count <= MOST or max(places) >= cache.capacity or max(slots) >= len(cache.lengths):
            raise ValueError(
                f"{count} rows at places up to {max(places)} of sequences up to {max(slots)}; one call takes {MOST} "
                f"rows, and the cache has {len(cache.lengths)} sequences of {cache.capacity}"
            )
        where = torch.tensor([list(slots), list(places)])
        cos, sin = (table[where[1]] for table in self._rotations(max(places)))
        start = x.to(torch.float32).contiguous()
        logits = torch.empty(answered, self._config.vocab_size)
        layers = (c_void_p * len(cache.layers))(*(layer.data_ptr() for layer in cache.layers))
        step = _Step(
            rows=count,
            answered=answered,
            capacity=cache.layers[0].stride(0) // cache.cache_dim,
            # a small step gains little from a second thread, and loses much where another program has its core
            threads=1 if self.small and count <= 16 else torch.get_num_threads(),
            cache_kind=_KINDS[cache.layers[0].dtype],
            x=start.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            slots=where[0].data_ptr(),
            places=where[1].data_ptr(),
            caches=cast(layers, c_void_p),
            logits=logits.data_ptr(),
        )
        done = self.code.moonkit_decode(pointer(self._model), pointer(step))
        assert done == 0, f"the kernel refused {count} rows"
        return logits

    def _rotations(self, most: int) -> tuple[Tensor, Tensor]:
        """cos and sin of places up to `most` at least, float32 (places, rope / 2).

        Kept, because MKL wakes all threads for the sine of a single number, and they then spin on cores that the
        kernel's own threads want: a step of the model in the box took twice as long.
        """
        done = len(self._cos)
        if most >= done:
            new = rotation(self._config, torch.arange(done, max(2 * done, most + 1, 512)), torch.float32)
            self._cos, self._sin = (torch.cat(pair) for pair in zip((self._cos, self._sin), new, strict=True))
        return self._cos, self._sin

    # ---- where everything lies

    def _vector(self, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
        if tensor.dtype != (dtype or self.dtype) or not tensor.is_contiguous() or type(tensor.data) is not Tensor:
            raise Unfit(f"a vector is {tensor.dtype}, strides {tensor.stride()}")
        self._held.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, module: Any) -> _Matrix:
        if isinstance(module, PackedLinear):
            packed, scale = module.weight_packed, module.weight_scale
            if scale.dtype != torch.bfloat16 or scale.shape[1] * GROUP != module.in_features:
                raise Unfit(f"INT4 scales are {scale.dtype} {tuple(scale.shape)}; groups of {GROUP} are read")
            if packed.device.type != "cpu" or not packed.is_contiguous() or not scale.is_contiguous():
                raise Unfit("INT4 weights are not contiguous on the CPU")
            self._held += [packed, scale]
            return _Matrix(packed.data_ptr(), scale.data_ptr(), module.out_features, module.in_features, _INT4)
        weight = module.weight
        if type(weight.data) is not Tensor or weight.device.type != "cpu" or weight.dtype not in _KINDS:
            raise Unfit(f"a matrix is {type(weight.data).__name__} of {weight.dtype} on {weight.device}")
        if not weight.is_contiguous():
            raise Unfit(f"a matrix has strides {weight.stride()}")
        self._held.append(weight)
        return _Matrix(weight.data_ptr(), None, *weight.shape, _KINDS[weight.dtype])

    def _mlp(self, mlp: Any) -> _Expert:
        return _Expert(*(self._matrix(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")))

    def _layer(self, layer: Any) -> _Layer:
        attention = layer.self_attn
        low = hasattr(attention, "q_a_proj")
        values: dict[str, Any] = {
            "input_norm": self._vector(layer.input_layernorm.weight),
            "post_norm": self._vector(layer.post_attention_layernorm.weight),
            "q_norm": self._vector(attention.q_a_layernorm.weight) if low else None,
            "kv_norm": self._vector(attention.kv_a_layernorm.weight),
            "q_a": self._matrix(attention.q_a_proj) if low else _NONE,
            "q_b": self._matrix(attention.q_b_proj if low else attention.q_proj),
            "kv_a": self._matrix(attention.kv_a_proj_with_mqa),
            "kv_b": self._matrix(attention.kv_b_proj),
            "o": self._matrix(attention.o_proj),
        }
        if isinstance(attention.kv_b_proj, PackedLinear):
            raise Unfit("kv_b_proj is INT4; the kernel takes it apart into float32 or bfloat16 halves")
        if isinstance(layer.mlp, MLP):
            return _Layer(**values, router=_NONE, shared=self._mlp(layer.mlp))
        experts = (_Expert * len(layer.mlp.experts))(*(self._mlp(expert) for expert in layer.mlp.experts))
        self._held.append(experts)
        shared = layer.mlp.shared_experts
        return _Layer(
            **values,
            router=self._matrix(layer.mlp.gate),
            bias=self._vector(layer.mlp.gate.e_score_correction_bias, torch.float32),
            experts=experts,
            shared=_Expert(_NONE, _NONE, _NONE) if shared is None else self._mlp(shared),
        )


def _ends_of(model: "LanguageModel") -> Iterator[Tensor]:
    """A few tensors of each kind: whatever moves weights moves some of these."""
    yield model.model.embed_tokens.weight
    yield from model.lm_head.parameters()
    yield from model.lm_head.buffers()
    for layer in (model.model.layers[0], model.model.layers[-1]):
        mlp: Any = layer.mlp
        last: nn.Module = mlp.experts[-1] if isinstance(mlp, MoE) else mlp
        down: Any = last.down_proj
        attention: Any = layer.self_attn
        for linear in (down, attention.o_proj):
            yield linear.weight_packed if isinstance(linear, PackedLinear) else linear.weight
