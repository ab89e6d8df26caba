"""Muon for matrices, AdamW for the rest, in one optimizer with one learning rate.

    gradient G -> M = momentum * M + G -> (Nesterov) G + momentum * M -> Newton-Schulz: nearest orthogonal matrix O
    W <- (1 - lr * decay) W - lr * 0.2 * sqrt(max(rows, columns)) * O

Every 2-D matrix on its own: each expert, gate and up apart, all heads of a projection together. Matrices of one shape
are orthogonalised in one batched product. Embeddings, head, norms and biases take AdamW at the same learning rate.
Source: Kimi K2 report, algorithm 1; Moonlight (arXiv 2502.16982) for Nesterov, bfloat16 and the factor 0.2.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic: steep at 0, so that 5 steps are enough; lands in about 0.7 .. 1.15
# Elements that one batched Newton-Schulz may hold; bounds the copy, not the result. On a CPU all steps of a batch stay
# in the cache: 576 matrices of 96x160 take 293 ms of a core so, and 368 ms in one batch.
_BATCH, _CPU_BATCH = 2**25, 2**19


def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies matrices in it faster than in float32, else float32.

    On CPUs that is AMX alone: AVX-512's bfloat16 product is slower than float32 (0.21 against 0.37 TFLOP/s on two
    cores), and where there is neither, bfloat16 is emulated (50 times slower on an AVX2 machine).
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Newton-Schulz: (batch, rows, columns) of any dtype to about their nearest orthogonal ones, in `dtype`.

    A matrix of zeros stays zero. dtype None: see `newton_schulz_dtype`.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype or newton_schulz_dtype(matrices.device))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Matrices that map one space to another. Tables that are looked up (embedding, positions) and the head do not."""
    looked_up = ("embed_tokens.weight", "lm_head.weight", "pos_emb.weight")
    return parameter.ndim in (2, 4) and not name.endswith(looked_up)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Groups for `Muon` out of model.named_parameters(). Frozen parameters are left out; a tied one comes once."""
    groups: dict[str, dict[str, Any]] = {
        "muon": {"kind": "muon", "params": [], "names": []},
        "adamw": {"kind": "adamw", "params": [], "names": []},
    }
    for name, parameter in named:
        if parameter.requires_grad:
            group = groups["muon" if takes_muon(name, parameter) else "adamw"]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


class Muon(torch.optim.Optimizer):
    """See the module. Groups are those of `parameter_groups`; a group's `lr` may be changed between steps.

    `newton_schulz_calls` counts orthogonalised matrices. A parameter without a gradient (an expert that no token
    chose) keeps its weight and its momentum. dtype: of Newton-Schulz; None asks `newton_schulz_dtype`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0 or not 0 <= momentum < 1 or steps < 1:
            raise ValueError(f"lr {lr}, weight_decay {weight_decay}, momentum {momentum}, steps {steps}: out of range")
        groups = list(groups)
        for group in groups:
            if group.get("kind") not in ("muon", "adamw"):
                raise ValueError(f"a parameter group needs kind 'muon' or 'adamw', got {group.get('kind')!r}")
            flat = [tuple(p.shape) for p in group["params"] if p.ndim < 2]
            if group["kind"] == "muon" and flat:
                raise ValueError(f"Muon orthogonalises matrices; a parameter of shape {flat[0]} belongs to AdamW")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
            "steps": steps,
        }
        super().__init__(groups, defaults)
        self.newton_schulz_calls, self.dtype = 0, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if present:
                (self._muon if group["kind"] == "muon" else self._adamw)(group, present)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for same in _same_shapes(parameters):
            gradients = [p.grad for p in same if p.grad is not None]
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in same]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            stack = torch.stack([buffer.flatten(1) for buffer in buffers])  # (batch, rows, columns)
            if group["nesterov"]:
                stack = torch.stack([gradient.flatten(1) for gradient in gradients]).add_(stack, alpha=momentum)
            scale = 0.2 * max(stack.shape[1:]) ** 0.5  # an update of root mean square 0.2, as AdamW's
            updates = orthogonalize(stack, group["steps"], self.dtype).to(same[0].dtype)
            self.newton_schulz_calls += len(same)
            torch._foreach_mul_(same, 1 - lr * group["weight_decay"])
            torch._foreach_add_(same, list(updates.view(-1, *same[0].shape).unbind()), alpha=-lr * scale)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def table(self) -> str:
        """One line per group: how many tensors and parameters go where."""
        lines = []
        for group in self.param_groups:
            count = sum(parameter.numel() for parameter in group["params"])
            shapes = len({tuple(p.shape) for p in group["params"]})
            lines.append(
                f"{group['kind']:<6} {len(group['params']):>6} tensors of {shapes:>3} shapes {count:>15,} parameters  "
                f"lr {group['lr']:g}, decay {group['weight_decay']:g}"
            )
        return "\n".join(lines)


def _same_shapes(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of equal shape together, in batches of bounded size."""
    by_shape: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
    for same in by_shape.values():
        limit = _CPU_BATCH if same[0].device.type == "cpu" else _BATCH
        most = max(1, limit // same[0].numel())
        for start in range(0, len(same), most):
            yield same[start : start + most]
