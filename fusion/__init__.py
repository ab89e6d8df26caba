"""fusion: images, video and text to text. Start with `Kimi`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.config import KimiConfig
    from fusion.generate import Reply, StreamEvent
    from fusion.model import Kimi
    from fusion.prompt import Prompt

__all__ = ["Kimi", "KimiConfig", "Prompt", "Reply", "StreamEvent"]

_HOME = {
    "Kimi": "fusion.model",
    "KimiConfig": "fusion.config",
    "Prompt": "fusion.prompt",
    "Reply": "fusion.generate",
    "StreamEvent": "fusion.generate",
}


def __getattr__(name: str) -> Any:
    # lazily: `import fusion` must not cost the import of torch
    if name not in _HOME:
        raise AttributeError(f"module 'fusion' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
