"""Sizes of the vision tower, and the rules by which media become patches.

In: the `vision_config` of a config.json and the preprocessor_config.json beside it. Out: two frozen dataclasses.
Source: the released config files of MoonViT-SO-400M, Kimi-VL-A3B and Kimi-K2.5 / K2.6 / K2.7-Code.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a MoonViT-3D tower. The defaults are the released 400M tower (416,866,032 parameters)."""

    hidden_size: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    intermediate_size: int = 4304
    patch_size: int = 14
    pos_emb_height: int = 64  # rows of the learned table, resized bicubically to each item
    pos_emb_width: int = 64
    pos_emb_time: int = 4  # most frames in one chunk; the time embedding is fixed, not learned
    merge: int = 2  # merge x merge patches become one token
    norm_eps: float = 1e-5  # not in config.json: nn.LayerNorm's default in the released code
    rope_theta: float = 10_000.0  # not in config.json
    max_grid: int = 512  # not in config.json: the released RoPE table is 512 x 512 patches

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"vision config: {field.name} must be positive, got {getattr(self, field.name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"vision config: hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        if self.head_dim % 4:
            raise ValueError(
                f"vision config: head_dim {self.head_dim} must be a multiple of 4 (two axes, two numbers per rotation)"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "VisionConfig":
        """Read `vision_config` with either family of keys: `vt_*` (K2.5 and later) or bare (Kimi-VL, MoonViT, native).

        Raises ValueError for a missing size and for any architecture switch this tower does not implement.
        """

        def read(*names: str, default: Any = None) -> Any:
            for name in names:
                if raw.get(name) is not None:
                    return raw[name]
            if default is None:
                raise ValueError(f"vision config: none of {', '.join(names)} is present, so the size is unknown")
            return default

        for key, supported in _SWITCHES.items():
            if raw.get(key, supported[0]) not in supported:
                raise ValueError(
                    f"vision config: {key}={raw[key]!r} is not implemented (known: {', '.join(supported)})"
                )
        merge = read("merge_kernel_size", default=2)
        if isinstance(merge, list | tuple):
            if len(merge) != 2 or merge[0] != merge[1]:
                raise ValueError(f"vision config: merge_kernel_size must be square, got {merge}")
            merge = merge[0]
        return cls(
            hidden_size=read("vt_hidden_size", "hidden_size"),
            num_layers=read("vt_num_hidden_layers", "num_hidden_layers"),
            num_heads=read("vt_num_attention_heads", "num_attention_heads"),
            intermediate_size=read("vt_intermediate_size", "intermediate_size"),
            patch_size=read("patch_size"),
            pos_emb_height=read("init_pos_emb_height", "pos_emb_height"),
            pos_emb_width=read("init_pos_emb_width", "pos_emb_width"),
            pos_emb_time=read("init_pos_emb_time", "pos_emb_time", default=4),
            merge=merge,
        )

    def to_dict(self) -> dict[str, Any]:
        """The tower's part of `vision_config` with the released (`vt_*`) keys."""
        return {
            "init_pos_emb_height": self.pos_emb_height,
            "init_pos_emb_time": self.pos_emb_time,
            "init_pos_emb_width": self.pos_emb_width,
            "merge_kernel_size": [self.merge, self.merge],
            "merge_type": "sd2_tpool",
            "patch_size": self.patch_size,
            "pos_emb_type": "divided_fixed",
            "video_attn_type": "spatial_temporal",
            "vt_hidden_size": self.hidden_size,
            "vt_intermediate_size": self.intermediate_size,
            "vt_num_attention_heads": self.num_heads,
            "vt_num_hidden_layers": self.num_layers,
        }


# Switches of the released configs. Only these values occur in released checkpoints.
_SWITCHES: dict[str, tuple[str, ...]] = {
    "pos_emb_type": ("divided_fixed",),
    "merge_type": ("sd2_tpool",),
    "video_attn_type": ("spatial_temporal",),
    "hidden_act": ("gelu_pytorch_tanh",),
}


@dataclass(frozen=True)
class MediaConfig:
    """How images and clips are resized, padded, sampled and cut. The defaults are K2.5's preprocessor_config.json."""

    in_patch_limit: int = 16_384  # patches of one image, before padding
    in_patch_limit_each_frame: int | None = 4_096  # patches of one frame; None means in_patch_limit
    in_patch_limit_video: int | None = None  # patches of all frames of one chunk together
    patch_limit_on_one_side: int = 512
    fixed_output_tokens: int | None = None
    patch_size: int = 14
    merge_kernel_size: int = 2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    sample_fps: float = 2.0
    max_num_frames_each_video: int | None = None  # the released code reads this but does not enforce it
    temporal_merge_kernel_size: int = 4  # frames in one chunk
    timestamp_mode: Literal["hh:mm:ss.fff", "mm:ss.fff", "mm:ss"] = "hh:mm:ss.fff"
    rule: Literal["k2_5", "kimi_vl"] = "k2_5"  # kimi_vl: the older rescale of Kimi-VL and MoonViT-SO-400M

    def __post_init__(self) -> None:
        positive = (
            "in_patch_limit",
            "in_patch_limit_each_frame",
            "in_patch_limit_video",
            "patch_limit_on_one_side",
            "patch_size",
            "merge_kernel_size",
            "sample_fps",
            "temporal_merge_kernel_size",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"media config: {name} must be positive, got {value}")
        if self.timestamp_mode not in ("hh:mm:ss.fff", "mm:ss.fff", "mm:ss"):
            raise ValueError(f"media config: unknown timestamp_mode {self.timestamp_mode!r}")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"media config: {name} needs three numbers, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "MediaConfig":
        """Read a preprocessor_config.json, K2.5's (`media_proc_cfg`) or Kimi-VL's (`in_token_limit`).

        Unknown keys of `media_proc_cfg` raise ValueError: a rule we do not know would silently change the pixels.
        """
        if "media_proc_cfg" in raw:
            values = dict(raw["media_proc_cfg"])
            values.pop("config_type", None)
            merge = values.get("merge_kernel_size", 2)
            values["merge_kernel_size"] = merge[0] if isinstance(merge, list) else merge
            for name in ("image_mean", "image_std"):
                if name in values:
                    values[name] = tuple(values[name])
            unknown = sorted(set(values) - {field.name for field in fields(cls)})
            if unknown:
                raise ValueError(f"preprocessor_config.json: unknown media_proc_cfg keys {', '.join(unknown)}")
            return cls(**values)
        if "in_token_limit" in raw:
            # The limit is in patches, despite its name. pad_input=False (centre crop) is in no released checkpoint.
            if not raw.get("pad_input", False):
                raise ValueError("preprocessor_config.json: pad_input=false (centre crop) is not implemented")
            return cls(
                in_patch_limit=raw["in_token_limit"],
                in_patch_limit_each_frame=None,
                patch_size=raw.get("patch_size", 14),
                merge_kernel_size=raw.get("merge_kernel_size", [2, 2])[0],
                image_mean=tuple(raw["image_mean"]),
                image_std=tuple(raw["image_std"]),
                rule="kimi_vl",
            )
        raise ValueError(
            "preprocessor_config.json has neither media_proc_cfg (K2.5 and later) nor in_token_limit (Kimi-VL)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The preprocessor_config.json that `from_dict` reads back to an equal config."""
        if self.rule == "kimi_vl":
            return {
                "image_processor_type": "KimiVLImageProcessor",
                "in_token_limit": self.in_patch_limit,
                "patch_size": self.patch_size,
                "pad_input": True,
                "image_mean": list(self.image_mean),
                "image_std": list(self.image_std),
                "merge_kernel_size": [self.merge_kernel_size, self.merge_kernel_size],
            }
        values = asdict(self)
        values.pop("rule")
        values["image_mean"], values["image_std"] = list(self.image_mean), list(self.image_std)
        return {"media_proc_cfg": values}


def so400m() -> VisionConfig:
    """The released tower: MoonViT-SO-400M, Kimi-VL, K2.5, K2.6 and K2.7-Code share these sizes."""
    return VisionConfig()


def nano() -> VisionConfig:
    """The tower of the model that trains on two CPU cores."""
    return VisionConfig(
        hidden_size=128, num_layers=5, num_heads=4, intermediate_size=512, pos_emb_height=16, pos_emb_width=16
    )


def tiny() -> VisionConfig:
    """For tests and first looks: every part present, nothing learned."""
    return VisionConfig(
        hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, pos_emb_height=8, pos_emb_width=8
    )
