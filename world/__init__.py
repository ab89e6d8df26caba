"""world: procedural pictures, clips, programs and sums with exact answers. No torch, no downloads.

sample("picture/count", index=7)   ->   Sample, a pure function of its arguments
MAKERS                                  family name -> maker, of all modules below
families("picture")                     the families of one module and their shares of its documents
"""

import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

from world.sample import Maker, Sample, Split, rng_of

# module -> the group under which its loss is reported
MODULES = {
    "picture": "vision",
    "reading": "vision",
    "chart": "vision",
    "digits": "vision",
    "clip": "clip",
    "code": "code",
    "text": "text",
}


@cache
def _makers() -> dict[str, Maker]:
    """Merged on first use: drawing needs numpy and Pillow, asking for a name does not."""
    merged: dict[str, Maker] = {}
    for module in _present():
        for family, maker in import_module(f"world.{module}").MAKERS.items():
            if family in merged:
                raise ValueError(f"two modules of the world make the family {family!r}")
            merged[family] = maker
    return merged


@cache
def _present() -> tuple[str, ...]:
    return tuple(module for module in MODULES if find_spec(f"world.{module}"))


class _Makers(Mapping[str, Maker]):
    """All families. Looks like a dict; an unknown name is a ValueError that says what is near."""

    def __getitem__(self, family: str) -> Maker:
        makers = _makers()
        if family not in makers:
            near = get_close_matches(str(family), makers, 3, 0.4)
            raise ValueError(f"no family {family!r} in the world; known: {', '.join(near or makers)}")
        return makers[family]

    def __iter__(self) -> Iterator[str]:
        return iter(_makers())

    def __len__(self) -> int:
        return len(_makers())

    def __contains__(self, family: object) -> bool:
        return family in _makers()


MAKERS: Mapping[str, Maker] = _Makers()


def families(module: str) -> dict[str, float]:
    """Families of one module and their shares of its documents. Raises ValueError for an unknown module."""
    if module not in _present():
        near = get_close_matches(str(module), _present(), 3, 0.4)
        raise ValueError(f"no module {module!r} in the world; known: {', '.join(near or _present())}")
    return dict(import_module(f"world.{module}").WEIGHTS)


def group_of(family: str) -> str:
    """Under which group the family's loss is reported. Raises ValueError for an unknown family."""
    _ = MAKERS[family]
    return next(MODULES[module] for module in _present() if family in import_module(f"world.{module}").MAKERS)


@cache
def fingerprint(folder: Path = Path(__file__).parent) -> str:
    """Changes when the code that makes samples does, so that a resumed run notices; comments do not count."""
    crc = 0
    for path in sorted(folder.glob("*.py")):
        before = tokenize.NEWLINE
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
                    continue
                documentation = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
                before = token.type
                if not documentation:
                    crc = crc32(token.string.strip().encode(), crc)
    return f"{crc:08x}"


def sample(family: str, index: int, split: Split = "train", seed: int = 0, level: int = 1) -> Sample:
    """One sample; the same arguments give the same sample on every machine. Raises ValueError for an unknown family."""
    if split not in ("train", "seen", "heldout"):
        raise ValueError(f"unknown split {split!r}; known: train, seen, heldout")
    made = MAKERS[family](rng_of(family, split, seed, index), split, level)
    return replace(made, split=split, seed=seed, index=index, level=level)


__all__ = ["MAKERS", "MODULES", "Maker", "Sample", "Split", "families", "fingerprint", "group_of", "sample"]
