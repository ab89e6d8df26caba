"""What one forward pass of training reads: documents end to end, their next tokens, their pictures.

    ids      [user] ... x x x ... Paris [end] | def f ( ... [EOS]        x: <|media_pad|>, one per vision token
    targets    -1   -1 ...    Paris [end] -1  | f   ( ...   [EOS] -1     -1: no loss here
    lengths              9                    |       7                  documents attend only to themselves

The target of a token is the next token of its document where the loss mask keeps that one, so none crosses a bar.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moonvit.packing import PackedPatches


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Checks itself when made.

    ids: int64 (tokens). targets: int64 (tokens), the next token of each or -1. lengths: tokens of each document.
    media: all pictures and chunks in the order of their pads, or None. groups: of each document, "vision" or the like.
    Raises ValueError when these do not describe the same documents.
    """

    ids: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    groups: tuple[str, ...]
    media: PackedPatches | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "targets"):
            value = getattr(self, name)
            if value.dtype != torch.int64 or value.ndim != 1 or len(value) == 0:
                raise ValueError(f"{name} must be a non-empty int64 vector, got {value.dtype} {tuple(value.shape)}")
        if len(self.ids) != len(self.targets):
            raise ValueError(f"{len(self.ids)} ids but {len(self.targets)} targets; they must match one to one")
        if min(self.lengths, default=0) < 1 or sum(self.lengths) != len(self.ids):
            raise ValueError(f"documents of {self.lengths} tokens do not make up the {len(self.ids)} ids of the batch")
        if len(self.groups) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} documents but {len(self.groups)} groups")
        ends = torch.tensor(self.lengths).cumsum(0) - 1
        if bool((self.targets[ends.to(self.targets.device)] >= 0).any()):
            raise ValueError("the last token of a document has a target: it would be the next document's first token")
        if int(self.targets.min()) < -1:
            raise ValueError(f"targets are token ids or -1, got {int(self.targets.min())}")

    def __len__(self) -> int:
        """Number of tokens, vision tokens included."""
        return len(self.ids)

    @property
    def target_count(self) -> int:
        """Tokens that carry loss."""
        return int((self.targets >= 0).sum())

    @property
    def vision_tokens(self) -> int:
        return sum(self.media.tokens) if self.media else 0

    def group_of_token(self, names: Sequence[str]) -> Tensor:
        """int8 (tokens): the place of each token's group in `names`. Raises ValueError for any other group."""
        unknown = sorted(set(self.groups) - set(names))
        if unknown:
            raise ValueError(f"the batch has groups {', '.join(unknown)}; known: {', '.join(names)}")
        numbers = torch.tensor([names.index(group) for group in self.groups], dtype=torch.int8)
        return numbers.repeat_interleave(torch.tensor(self.lengths)).to(self.ids.device)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; the grid of the pictures stays on the CPU."""
        media = self.media.to(device) if self.media else None
        return Batch(self.ids.to(device), self.targets.to(device), self.lengths, self.groups, media)
