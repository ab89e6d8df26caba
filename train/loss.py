"""Next-token loss without a full logits tensor.

    hidden (tokens, dim) - chunks - logits (chunk, vocab) - loss per token;   each chunk is recomputed in the backward

Where all logits together are small, they are kept instead of computed twice.

A vocabulary of 163,840 in float32 costs 655 KB per token: at 4,096 tokens more than the model's activations together.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_KEEP = 2**26  # logits that may be kept for the backward: 256 MB


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """float32 loss of each token, (tokens); 0 where the target is below 0 (masked).

    hidden: (tokens, dim), after the final norm. head: (vocab, dim). targets: int64 (tokens), the next token of each.
    Raises ValueError when the lengths differ or a target lies outside the vocabulary.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{len(hidden)} hidden states but targets of shape {tuple(targets.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if len(targets) == 0:
        return hidden.new_zeros(0, dtype=torch.float32)
    if int(targets.max()) >= len(head):
        raise ValueError(f"target {int(targets.max())} lies outside the vocabulary of {len(head)}")
    losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
    kept = (targets >= 0).nonzero()[:, 0]  # masked tokens never reach the head
    keep = len(kept) * len(head) <= _KEEP
    parts = []
    for some, target in zip(hidden.index_select(0, kept).split(chunk), targets[kept].split(chunk), strict=True):
        part = _losses(some, head, target) if keep else checkpoint(_losses, some, head, target, use_reentrant=False)
        parts.append(part)
    return losses.index_put((kept,), torch.cat(parts)) if len(kept) else losses + 0 * hidden.sum()


def _losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
