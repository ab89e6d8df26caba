"""The whole model's config: tower, projector, language model, and the ids that tie them to the tokenizer.

In: the config.json of any supported checkpoint. Out: one frozen KimiConfig. Source: the released config files.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import lm.config as text_presets
import moonvit.config as vision_presets
from lm.config import TextConfig
from moonvit.config import MediaConfig, VisionConfig

Profile = Literal["k2", "k2_thinking", "k2_5", "k2_6", "k2_7_code", "kimi_vl"]


@dataclass(frozen=True)
class ProjectorConfig:
    """Vision features to text width. `patchmerger` is K2.5's, `kimi_vl` the same maths under Kimi-VL's names."""

    kind: Literal["patchmerger", "kimi_vl"] = "patchmerger"
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class KimiConfig:
    """Everything that config.json says. `vision` is None for a text-only checkpoint (K2, Moonlight)."""

    text: TextConfig
    vision: VisionConfig | None = None
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    profile: Profile = "k2_7_code"  # which chat format: see fusion/prompt.py
    bos_token_id: int = 163_584
    eos_token_id: int = 163_586
    pad_token_id: int = 163_839
    media_placeholder_token_id: int = 163_605
    quantization: dict[str, Any] | None = field(default=None, hash=False)  # quantization_config as read

    def __post_init__(self) -> None:
        if self.vision and self.media_placeholder_token_id >= self.text.vocab_size:
            raise ValueError(
                f"media_placeholder_token_id {self.media_placeholder_token_id} lies outside the vocabulary of "
                f"{self.text.vocab_size}"
            )


def _own_ids(text: TextConfig) -> dict[str, Any]:
    """Special ids of moonkit's own tokenizers: the same names at the same offsets, in the last 256 ids."""
    base = text.vocab_size - 256
    return {
        "bos_token_id": base,
        "eos_token_id": base + 2,
        "pad_token_id": base + 255,
        "media_placeholder_token_id": base + 21,
    }


def k2() -> KimiConfig:
    """Kimi-K2-Base / Instruct, text only."""
    return KimiConfig(text_presets.k2(), profile="k2", eos_token_id=163_585)


def k2_0905() -> KimiConfig:
    """Kimi-K2-Instruct-0905, text only."""
    return KimiConfig(text_presets.k2_0905(), profile="k2", eos_token_id=163_585)


def k2_thinking() -> KimiConfig:
    """Kimi-K2-Thinking, text only."""
    return KimiConfig(text_presets.k2_thinking(), profile="k2_thinking")


def k2_5() -> KimiConfig:
    """Kimi-K2.5."""
    return KimiConfig(text_presets.k2_5(), vision_presets.so400m(), profile="k2_5", eos_token_id=163_585)


def k2_6() -> KimiConfig:
    """Kimi-K2.6."""
    return KimiConfig(text_presets.k2_6(), vision_presets.so400m(), profile="k2_6")


def k2_7_code() -> KimiConfig:
    """Kimi-K2.7-Code."""
    return KimiConfig(text_presets.k2_7_code(), vision_presets.so400m(), profile="k2_7_code")


def moonlight() -> KimiConfig:
    """Moonlight-16B-A3B(-Instruct), text only."""
    return KimiConfig(text_presets.moonlight(), profile="k2")


def kimi_vl_a3b() -> KimiConfig:
    """Kimi-VL-A3B."""
    return KimiConfig(
        text_presets.kimi_vl_a3b(),
        vision_presets.so400m(),
        ProjectorConfig(kind="kimi_vl"),
        MediaConfig(in_patch_limit=4096, in_patch_limit_each_frame=None, rule="kimi_vl"),
        profile="kimi_vl",
        eos_token_id=163_585,
    )


def nano() -> KimiConfig:
    """Kimi-K2.7-Code in small, with a tokenizer of its own; the model that ships with moonkit has this shape."""
    text = text_presets.nano()
    # short stamps: every digit is a token; the limits keep photos near the sizes it was trained on
    media = MediaConfig(in_patch_limit=1024, in_patch_limit_each_frame=256, timestamp_mode="mm:ss")
    return KimiConfig(text, vision_presets.nano(), media=media, profile="k2_7_code", **_own_ids(text))


def tiny() -> KimiConfig:
    """For tests and first looks, with moonkit's own tokenizer."""
    text = text_presets.tiny()
    return KimiConfig(text, vision_presets.tiny(), **_own_ids(text))


PRESETS = {
    preset.__name__: preset
    for preset in (k2, k2_0905, k2_thinking, k2_5, k2_6, k2_7_code, moonlight, kimi_vl_a3b, nano, tiny)
}
