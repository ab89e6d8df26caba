"""Sizes of the language model, the presets of the family, and how config.json spells them.

In: the (text part of the) config.json of K2, Moonlight, Kimi-VL, K2.5 and later. Out: one frozen TextConfig.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071) as DeepSeek-V3 applies it: at every length, not only past the original.

    beta_fast is 1 in K2, K2-0905 and K2-Thinking and 32 in K2.5 and later: a hard step against a 12-step blend.
    """

    factor: float = 64.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    @property
    def rotation_scale(self) -> float:
        """Factor on cos and sin. 1.0 in every released config."""
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    @property
    def softmax_scale(self) -> float:
        """Factor on the softmax scale: m^2, 2.0047... at factor 64."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class TextConfig:
    """Shape of a DeepSeek-V3-style language model: MLA attention and fine-grained experts.

    The field names are those of config.json. The defaults are K2.5's text model.
    """

    vocab_size: int = 163_840
    hidden_size: int = 7168
    intermediate_size: int = 18_432  # of the first, dense layers
    moe_intermediate_size: int = 2048  # of one expert
    num_hidden_layers: int = 61
    num_attention_heads: int = 64
    n_routed_experts: int = 384
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    q_lora_rank: int | None = 1536  # None: one full q_proj (Moonlight, Kimi-VL)
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 2.827
    norm_topk_prob: bool = True
    aux_loss_alpha: float = 0.001  # weight of the sequence balance loss; inert outside training
    rope_theta: float = 50_000.0
    yarn: Yarn | None = Yarn()
    max_position_embeddings: int = 262_144
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-6  # q_a/kv_a layernorms: always 1e-6 in the released code, whatever rms_norm_eps says
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        may_be_zero = {"n_shared_experts", "first_k_dense_replace", "aux_loss_alpha"}
        for field in fields(self):
            value = getattr(self, field.name)
            kind = getattr(field.type, "__name__", str(field.type))
            if field.name == "yarn" or (value is None and "None" in kind):
                continue
            kinds = {"bool": (bool,), "float": (int, float)}.get(kind, (int,))
            if not isinstance(value, kinds) or (isinstance(value, bool) and kind != "bool"):
                raise ValueError(f"text config: {field.name} must be {kind}, got {value!r}")
            if kind != "bool" and not (0 < value < math.inf or (value == 0 and field.name in may_be_zero)):
                raise ValueError(f"text config: {field.name} must be positive, got {value}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"text config: qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"text config: {self.n_routed_experts} experts do not split into n_group={self.n_group} equal groups"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"text config: topk_group {self.topk_group} is more than n_group {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"text config: num_experts_per_tok {self.num_experts_per_tok} is more than the {reachable} experts "
                f"that {self.topk_group} of {self.n_group} groups hold"
            )
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError("text config: a group's score is the sum of its top two experts, so it needs at least two")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Numbers cached per token and layer: the latent and one shared rotary key (576 in every released model)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.qk_head_dim**-0.5 * (self.yarn.softmax_scale if self.yarn else 1.0)

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "TextConfig":
        """Read config.json (or its text_config). Raises ValueError for what this model does not implement."""
        for key, supported in _SWITCHES.items():
            if key in raw and raw[key] not in supported:
                raise ValueError(f"text config: {key}={raw[key]!r} is not implemented (known: {list(supported)})")
        kv_heads = raw.get("num_key_value_heads")
        if kv_heads not in (None, raw.get("num_attention_heads")):
            raise ValueError(
                f"text config: num_key_value_heads={kv_heads} but {raw.get('num_attention_heads')} attention heads; "
                "MLA has one key per query head"
            )
        names = {field.name for field in fields(cls)} - {"yarn", "latent_norm_eps"}
        values = {name: raw[name] for name in names if name in raw}
        required = names - _OPTIONAL
        missing = sorted(required - set(values))
        if missing:
            raise ValueError(f"text config: missing {', '.join(missing)}")
        # transformers >= 5 writes rope_parameters with rope_theta inside
        rope = raw.get("rope_parameters") or raw.get("rope_scaling")
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"text config: rope_scaling must be an object, got {rope!r}")
        if rope and "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        if "rope_theta" not in values:
            raise ValueError("text config: missing rope_theta")
        return cls(yarn=_read_yarn(rope), **values)

    def to_dict(self) -> dict[str, Any]:
        """The released spelling, with the constants of the family that released code reads."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("yarn", "latent_norm_eps")}
        rope = None
        if self.yarn:
            rope = {f.name: getattr(self.yarn, f.name) for f in fields(self.yarn)} | {"type": "yarn"}
        return values | {
            "rope_scaling": rope,
            "num_key_value_heads": self.num_attention_heads,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "seq_aux": True,
            "num_nextn_predict_layers": 0,
            "ep_size": 1,
            "pretraining_tp": 1,
            "use_cache": True,
        }


# Not in every released config.json; the class defaults of TextConfig's family apply when absent.
_OPTIONAL = {
    "moe_layer_freq",
    "aux_loss_alpha",
    "initializer_range",
    "tie_word_embeddings",
    "q_lora_rank",
    "rope_theta",
}

_SWITCHES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "rope_interleave": (True,),
}


def _read_yarn(rope: dict[str, Any] | None) -> Yarn | None:
    kind = (rope or {}).get("type") or (rope or {}).get("rope_type") or "default"
    if not rope or kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"text config: rope_scaling type {kind!r} is not implemented (known: yarn)")
    known = {field.name for field in fields(Yarn)}
    inert = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "max_position_embeddings"}
    unknown = sorted(set(rope) - known - inert)
    if unknown:
        raise ValueError(f"text config: unknown rope_scaling keys {', '.join(unknown)}")
    return Yarn(**{name: rope[name] for name in known if rope.get(name) is not None})


def k2() -> TextConfig:
    """Kimi-K2-Base and K2-Instruct: 1,026,408,232,448 parameters, 32,861,477,888 activated."""
    return TextConfig(max_position_embeddings=131_072, yarn=Yarn(factor=32.0, beta_fast=1.0), rms_norm_eps=1e-6)


def k2_0905() -> TextConfig:
    """Kimi-K2-Instruct-0905."""
    return TextConfig(yarn=Yarn(beta_fast=1.0))


def k2_thinking() -> TextConfig:
    """Kimi-K2-Thinking: 0905's shape, INT4 experts."""
    return k2_0905()


def k2_5() -> TextConfig:
    """The text model of Kimi-K2.5."""
    return TextConfig()


def k2_6() -> TextConfig:
    """The text model of Kimi-K2.6: K2.5's shape."""
    return k2_5()


def k2_7_code() -> TextConfig:
    """The text model of Kimi-K2.7-Code: K2.5's shape."""
    return k2_5()


def moonlight() -> TextConfig:
    """Moonlight-16B-A3B: 15,960,108,544 parameters and 1,664 correction biases."""
    return TextConfig(
        hidden_size=2048,
        intermediate_size=11_264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        q_lora_rank=None,
        routed_scaling_factor=2.446,
        yarn=None,
        max_position_embeddings=8192,
    )


def kimi_vl_a3b() -> TextConfig:
    """The text model of Kimi-VL-A3B: Moonlight with a longer rotary base."""
    return replace(moonlight(), rope_theta=800_000.0, max_position_embeddings=131_072)


def nano() -> TextConfig:
    """The K2.7 family in small: trains on two CPU cores. Its vocabulary is moonkit's own."""
    return TextConfig(
        vocab_size=2048,
        hidden_size=160,
        intermediate_size=320,
        moe_intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        n_routed_experts=48,
        num_experts_per_tok=4,
        q_lora_rank=96,
        kv_lora_rank=48,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=24,
        routed_scaling_factor=1.998,  # E[1 / norm of the chosen shares] for 48 experts, top 4; 2.827 is K2's 384, top 8
        yarn=None,
        max_position_embeddings=4096,
        initializer_range=0.04,
    )


def tiny() -> TextConfig:
    """For tests and first looks: every part present (YaRN, latent queries, a dense layer, experts), nothing learned."""
    return TextConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        yarn=Yarn(original_max_position_embeddings=512),
        max_position_embeddings=32_768,
    )
