"""Products and attention of many rows in bfloat16, by kernels/wide.cpp where the processor has AMX.

    if fits(x):                                       bfloat16 on the CPU, no gradient, AMX, a compiler
        y = linear(x, weight, bias, act="gelu")       act(x w^T + bias) + residual, one rounding
        y = attention(q, k, v, lengths, scale)        inside each item; causal=True for language
        y = weigh(x, rows, weights)                   sums of rows: what experts give to their tokens

Everything else stays with torch: `fits` is False there, and callers run their plain form.
"""

from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.build import library

Act = Literal["none", "gelu", "swiglu"]
_ACTS = {"none": 0, "gelu": 1, "swiglu": 2}


class _Linear(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "w", "w2", "residual", "bias", "which", "y")),
        *((name, c_int64) for name in ("rows", "in_", "out", "x_stride", "y_stride", "act", "y_float")),
    ]


class _Attention(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "cos", "sin", "y", "lengths")),
        *((name, c_int64) for name in ("items", "heads", "wide", "value")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "y_stride")),
        *((name, c_int64) for name in ("q_head", "k_head", "v_head", "causal", "past")),
        ("scale", c_double),
    ]


@cache
def _code() -> Any:
    code = library("wide")
    if code is None or not code.moonkit_wide():
        return None
    code.moonkit_linear.argtypes = [POINTER(_Linear), c_int64, c_int64]
    code.moonkit_attention.argtypes = [POINTER(_Attention), c_int64]
    code.moonkit_weigh.argtypes = [c_void_p] * 4 + [c_int64] * 4
    return code


# Multiplications up to which one thread does them, in about 0.2 ms. After one of torch's operations OpenMP's threads
# spin for milliseconds on the cores that ours want: on two cores a small tower took 16 ms with two threads, 2 with one.
_SMALL = 10**8


def _threads(work: int) -> int:
    return 1 if work < _SMALL else torch.get_num_threads()


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether x and what it meets can go through the kernels."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    plain = all(w.dtype == x.dtype and w.device == x.device and type(w.data) is Tensor for w in weights)
    return plain and _code() is not None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: Act = "none",
    weight2: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """act(x weight^T + bias) + residual: x (rows, in), weight (out, in), all bfloat16; (rows, out) in `dtype`.

    act "swiglu": silu(x weight^T) * (x weight2^T). float32 sums; the residual is added to the rounded result.
    """
    out = torch.empty(len(x), len(weight), dtype=dtype)
    linears([(x, weight, out)], bias, act, None if weight2 is None else [weight2], residual)
    return out


def linears(
    jobs: Sequence[tuple[Tensor, Tensor, Tensor]],
    bias: Tensor | None = None,
    act: Act = "none",
    seconds: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    which: Sequence[Tensor] | None = None,
) -> None:
    """Several products at once: (x (rows, in), weight (out, in), result (rows, out)) each, the result written.

    which: for each product the rows of x that it takes, int64 (rows); without it all of them in their order.
    """
    held = []
    table = (_Linear * len(jobs))()
    for n, (x, weight, out) in enumerate(jobs):
        x, weight = (x if x.stride(-1) == 1 else x.contiguous()), weight.contiguous()
        second = None if seconds is None else seconds[n].contiguous()
        taken = None if which is None else which[n].contiguous()
        held += [x, weight, second, taken]
        rows = len(x) if taken is None else len(taken)
        if x.ndim != 2 or weight.shape[1] != x.shape[1] or out.shape != (rows, len(weight)) or out.stride(-1) != 1:
            raise ValueError(
                f"a product of {tuple(x.shape)} and {tuple(weight.shape)} into {tuple(out.shape)}: "
                "wanted (rows, in), (out, in) and (rows, out)"
            )
        if residual is not None and (residual.shape != out.shape or residual.stride() != out.stride()):
            raise ValueError(f"a residual of {tuple(residual.shape)} for a result of {tuple(out.shape)}")
        table[n] = _Linear(
            x=x.data_ptr(),
            w=weight.data_ptr(),
            w2=None if second is None else second.data_ptr(),
            residual=None if residual is None else residual.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            which=None if taken is None else taken.data_ptr(),
            y=out.data_ptr(),
            rows=rows,
            in_=x.shape[1],
            out=len(weight),
            x_stride=x.stride(0),
            y_stride=out.stride(0),
            act=_ACTS[act],
            y_float=out.dtype == torch.float32,
        )
    work = sum(job.rows * job.in_ * job.out for job in table) * (2 if act == "swiglu" else 1)
    _code().moonkit_linear(table, len(jobs), _threads(work))


def weigh(x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums of a few rows of x, bfloat16 (anything, dim): (tokens, dim), summed in float32 and rounded once.

    rows int64 and weights float32, both (tokens, chosen): which rows a token gets, and how much of each.
    """
    x, rows, weights = x.contiguous(), rows.contiguous(), weights.float().contiguous()
    if x.ndim != 2 or rows.shape != weights.shape or rows.ndim != 2 or rows.dtype != torch.int64:
        raise ValueError(f"rows {tuple(rows.shape)} of {tuple(x.shape)} by weights {tuple(weights.shape)}")
    out = torch.empty(len(rows), x.shape[1], dtype=x.dtype)
    pointers = (each.data_ptr() for each in (x, rows, weights, out))
    _code().moonkit_weigh(*pointers, *rows.shape, x.shape[1], _threads(8 * rows.numel() * x.shape[1]))
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(q k^T scale) v: q and k (tokens, heads, wide), v (tokens, heads, value), to (tokens, heads, value).

    Items of `lengths` tokens lie end to end and none sees another. causal: one item; q may be shorter than k, and is
    then its end. cos, sin: float32 (tokens, wide / 2), the rotation of the pairs of q and k, made on the way.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    past = len(k) - len(q)
    if sum(lengths) != len(q) or past < 0 or len(v) != len(k) or ((causal or past) and len(lengths) != 1):
        raise ValueError(f"{len(q)} queries and {len(k)} keys in items of {list(lengths)}, causal={causal}")
    if past and not causal:
        raise ValueError(f"{past} keys before the first query: only causal attention has a past")
    out = torch.empty(len(q), q.shape[1], v.shape[2], dtype=q.dtype)
    counts = torch.tensor(list(lengths))
    if cos is not None and sin is not None:
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
    job = _Attention(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        cos=None if cos is None else cos.data_ptr(),
        sin=None if sin is None else sin.data_ptr(),
        y=out.data_ptr(),
        lengths=counts.data_ptr(),
        items=len(counts),
        heads=q.shape[1],
        wide=q.shape[2],
        value=v.shape[2],
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        y_stride=out.stride(0),
        q_head=q.stride(1),
        k_head=k.stride(1),
        v_head=v.stride(1),
        causal=causal,
        past=past,
        scale=scale,
    )
    work = sum(n * (n + past) for n in lengths) * q.shape[1] * (q.shape[2] + v.shape[2])
    _code().moonkit_attention(job, _threads(work))
    return out
