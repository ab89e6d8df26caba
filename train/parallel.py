"""Several processes train one model: every rank has its own lanes, gradients are summed, the update is the same.

    torchrun --nproc-per-node 2 -m train.pretrain recipes/nano.py

    ddp     every rank holds the whole model; gradients are summed once per step
    fsdp    every rank holds a slice of each parameter, gradient and momentum (FSDP2, one unit per layer)

Two ranks give what one gives, to the rounding of float32: the loss is divided by the target tokens of all ranks before
the backward, so that sums need no weights. gloo on CPUs, nccl on GPUs. Expert and pipeline parallelism would enter
here too: as further meshes in `shard`, and as further axes over which `total` and `reduce_gradients` sum.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusion.model import Kimi
from lm.moe import MoE
from train.muon import Muon, orthogonalize
from train.qk_clip import clip_qk

Mode = Literal["ddp", "fsdp"]
_BUCKET = 2**24  # elements of one summed bucket: bounds the copy


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mode: Mode = "ddp"

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0


def start(mode: Mode = "ddp", device: str | None = None) -> Ranks:
    """Join the ranks that torchrun started; alone, one rank. device None: the rank's GPU where there is one."""
    if mode not in ("ddp", "fsdp"):
        raise ValueError(f"parallel mode {mode!r} is unknown (known: ddp, fsdp)")
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if "RANK" not in os.environ:
        if mode == "fsdp":
            raise ValueError(
                "parallel mode fsdp needs several processes: torchrun --nproc-per-node N -m train.pretrain"
            )
        return Ranks(device=place, mode=mode)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), place, mode)


def total(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def from_first(value: float) -> float:
    """Rank 0's number, on every rank: for whatever a clock decides."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    there = torch.tensor([value], dtype=torch.float64)
    if dist.get_backend() == "nccl":
        there = there.cuda()
    dist.broadcast(there, 0)
    return float(there)


def any_rank(flag: int, device: torch.device) -> int:
    """The largest of all ranks' flags: a signal that one rank received stops them all at the same step."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    there = torch.tensor([flag], device=device)
    dist.all_reduce(there, op=dist.ReduceOp.MAX)
    return int(there)


# ---- gradients -------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def reduce_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Sum gradients over the ranks of "ddp", after the last micro-batch. FSDP has already done so in its backward.

    Not DistributedDataParallel: an expert that no token of this rank chose has no gradient here but may have one
    elsewhere, and the wrapper pays for that with a search through the graph in every pass; it also divides by the
    ranks, where the loss is already divided by all target tokens.
    """
    if ranks.world_size == 1 or ranks.mode == "fsdp":
        return
    for bucket in _buckets(parameters):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, in groups of one dtype and bounded size."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.numel() > _BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def gradient_norm(parameters: list[nn.Parameter], ranks: Ranks) -> Tensor:
    """Norm of all gradients together, over all slices; a scalar on the device.

    A gradient that is zero everywhere is taken away: its parameter took no part in this step (an expert without
    tokens, the tower in a step of text), and whether a rank then holds zeros or nothing depends on the ranks.
    """
    present = [parameter for parameter in parameters if parameter.grad is not None]
    if not present:
        return torch.zeros((), device=ranks.device)
    norms = torch.stack(torch._foreach_norm([local(p.grad) for p in present if p.grad is not None]))
    squares = norms.double() ** 2
    if ranks.mode == "fsdp" and ranks.world_size > 1:
        total(squares)
    for parameter, square in zip(present, squares.tolist(), strict=True):
        if square == 0:
            parameter.grad = None
    return squares.sum().sqrt()


@torch.no_grad()
def scale_gradients(parameters: list[nn.Parameter], factor: float) -> None:
    """Multiply every gradient by one factor."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


# ---- sharding --------------------------------------------------------------------------------------------------------


def shard(objective: nn.Module, kimi: Kimi, ranks: Ranks) -> None:
    """Slice every parameter over the ranks with FSDP2: one unit per layer and block, the rest in one.

    `objective` is the module whose forward ends in the loss, so that the head is whole while the loss reads it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in kimi.modules():
        if isinstance(module, MoE):
            module.register_forward_hook(_touch_experts)
    units: list[nn.Module] = list(kimi.language_model.model.layers)
    if kimi.config.vision:
        units += list(kimi.vision_tower.encoder.blocks)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def _touch_experts(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Zeros as gradient for an expert without tokens: FSDP sums whole layers, so ranks must agree on what is there."""
    assert isinstance(module, MoE)
    return output + 0 * torch.stack([p.flatten()[0] for p in module.experts.parameters()]).sum().to(output.dtype)


class ShardedMuon(Muon):
    """Muon on sliced parameters: momentum stays sliced; a matrix is gathered, orthogonalised and sliced again.

    UNSURE: every rank orthogonalises every matrix; dealing them out would save compute and cost a second gather. A run
    on several GPUs would settle which is faster.
    """

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        from torch.distributed.tensor import distribute_tensor

        lr, momentum = group["lr"], group["momentum"]
        for parameter in parameters:
            gradient: Any = parameter.grad
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
            direction: Any = gradient + momentum * buffer if group["nesterov"] else buffer
            whole = direction.full_tensor() if hasattr(direction, "full_tensor") else direction
            rows = whole.flatten(1)
            scale = 0.2 * max(rows.shape) ** 0.5
            update = orthogonalize(rows[None], group["steps"], self.dtype)[0].reshape(whole.shape).to(parameter.dtype)
            self.newton_schulz_calls += 1
            mesh, placements = getattr(parameter, "device_mesh", None), getattr(parameter, "placements", None)
            if mesh is not None:
                update = distribute_tensor(update, mesh, placements, src_data_rank=None)
            parameter.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * scale)


@torch.no_grad()
def clip_sharded_heads(kimi: Kimi, peaks: Tensor, tau: float) -> int:
    """`train.qk_clip.clip_heads` for sliced weights: gathers a layer's two matrices only where a head is over tau."""
    from torch.distributed.tensor import distribute_tensor

    clipped = 0
    for layer, peak in zip(kimi.language_model.model.layers, peaks, strict=True):
        attention: Any = layer.self_attn
        name = "q_proj" if attention.config.q_lora_rank is None else "q_b_proj"
        sliced = {part: getattr(attention, part).weight for part in (name, "kv_b_proj")}
        if not bool((peak > tau).any() | peak.isnan().any()):
            continue
        whole = {part: weight.full_tensor() for part, weight in sliced.items()}
        twin: Any = SimpleNamespace(
            config=attention.config, **{part: SimpleNamespace(weight=weight) for part, weight in whole.items()}
        )
        clipped += clip_qk(twin, peak, tau)
        for part, weight in sliced.items():
            back = distribute_tensor(whole[part], weight.device_mesh, weight.placements, src_data_rank=None)
            weight.to_local().copy_(back.to_local())
    return clipped


def full_state(kimi: Kimi) -> dict[str, Tensor]:
    """All tensors of the model, whole, on the CPU of rank 0; empty elsewhere. A collective call."""
    state: dict[str, Tensor] = {}
    for name, tensor in kimi.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            state[name] = whole.detach().cpu()
    return state
