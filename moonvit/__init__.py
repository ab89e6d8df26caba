"""moonvit: pixels to vision features."""

from moonvit.config import MediaConfig, VisionConfig
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches, pack, plan_packs

__all__ = ["MediaConfig", "MoonViT", "PackedPatches", "VisionConfig", "pack", "plan_packs"]
