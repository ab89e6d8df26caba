"""Products and attention on AMX equal torch's in float32 to bfloat16's rounding: pytest tests/kernels/test_wide.py"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.wide import _code, attention, fits, linear, linears, weigh

pytestmark = pytest.mark.skipif(_code() is None, reason="no AMX, or no compiler")


@pytest.fixture(autouse=True)
def without_gradient(two_threads: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernels.wide._SMALL", 0)  # so that two threads share what is small enough for a test
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def far(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# few rows of whole steps are taken another way than many, or than a ragged step
@pytest.mark.parametrize(
    "rows, inner, out",
    [(1, 32, 16), (33, 40, 50), (200, 72, 130), (64, 304, 65), (7, 8, 3), (5, 64, 3), (47, 320, 50), (128, 96, 600)],
)
@pytest.mark.parametrize("act", ["none", "gelu", "swiglu"])
def test_products(rows: int, inner: int, out: int, act: str) -> None:
    x, w, w2 = torch.randn(rows, inner), torch.randn(out, inner), torch.randn(out, inner)
    x, w, w2 = x.bfloat16(), (w / inner**0.5).bfloat16(), (w2 / inner**0.5).bfloat16()
    bias = torch.randn(out).bfloat16() if act != "swiglu" else None
    residual = torch.randn(rows, out).bfloat16()
    want = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    if act == "gelu":
        want = F.gelu(want, approximate="tanh")
    elif act == "swiglu":
        want = F.silu(want) * F.linear(x.float(), w2.float())
    second = w2 if act == "swiglu" else None
    exact = linear(x, w, bias, act, second, dtype=torch.float32)
    torch.testing.assert_close(exact, want, rtol=2e-5, atol=2e-5)
    assert torch.equal(linear(x, w, bias, act, second), exact.bfloat16())
    both = linear(x, w, bias, act, second, residual)
    assert torch.equal(both, (exact.bfloat16().float() + residual.float()).bfloat16())


def test_a_product_reads_and_writes_nothing_else() -> None:
    wide = torch.full((40, 100), float("nan")).bfloat16()
    wide[:37, 10:60] = torch.randn(37, 50).bfloat16()
    w = torch.randn(20, 50).bfloat16()
    out = torch.full((37, 64), 7.0).bfloat16()
    linears([(wide[:37, 10:60], w, out[:, 8:28])])
    assert far(out[:, 8:28], wide[:37, 10:60].float() @ w.float().T) < 4e-3
    assert bool((out[:, :8] == 7).all()) and bool((out[:, 28:] == 7).all())


def test_many_products_of_any_sizes_at_once() -> None:
    jobs, wants = [], []
    for rows in (5, 0, 64, 1, 300):
        x, w = torch.randn(rows, 96).bfloat16(), torch.randn(48, 96).bfloat16()
        jobs.append((x, w, torch.empty(rows, 48).bfloat16()))
        wants.append(x.float() @ w.float().T)
    linears(jobs)
    for (_, _, out), want in zip(jobs, wants, strict=True):
        assert out.shape == want.shape and (not len(out) or far(out, want) < 4e-3)
    with pytest.raises(ValueError, match="wanted"):
        linears([(torch.zeros(2, 32).bfloat16(), torch.zeros(4, 64).bfloat16(), torch.zeros(2, 4).bfloat16())])


def test_products_of_chosen_rows_and_their_sums() -> None:
    """What a layer of experts does: rows by index, a part each, weighed sums of the results."""
    x = torch.randn(70, 48).bfloat16()
    which = [torch.randint(0, 70, (count,)) for count in (33, 1, 90)]
    weights = [torch.randn(40, 48).bfloat16() for _ in which]
    outs = torch.empty(124, 40).bfloat16()
    parts = list(outs.split([33, 1, 90]))
    linears([(x, weight, part) for weight, part in zip(weights, parts, strict=True)], which=which)
    for rows, weight, part in zip(which, weights, parts, strict=True):
        assert torch.equal(part, linear(x[rows], weight))
    rows, shares = torch.randint(0, 124, (50, 6)), torch.rand(50, 6)
    want = (outs[rows].float() * shares[..., None]).sum(1)
    assert far(weigh(outs, rows, shares), want) < 3e-3
    with pytest.raises(ValueError, match="weights"):
        weigh(outs, rows, shares[:5])


@pytest.mark.parametrize("rows, inner", [(70, 3000), (4500, 4304)])
def test_long_rows_are_taken_in_parts(rows: int, inner: int) -> None:
    x, w = torch.randn(rows, inner).bfloat16(), (torch.randn(70, inner) / inner**0.5).bfloat16()
    residual = torch.randn(rows, 70).bfloat16()
    got = linear(x, w, residual=residual)
    want = (x.float() @ w.float().T).bfloat16().float() + residual.float()
    assert far(got, want) < 3e-3


def test_activations_of_large_numbers() -> None:
    x = torch.tensor([[-3e4, -200.0, -80.0, -5.0, 0.0, 5.0, 80.0, 3e4]]).bfloat16().T.contiguous()
    one = torch.zeros(1, 1).bfloat16() + 1
    got = linear(x, one, act="gelu", dtype=torch.float32)
    exact = x.double()  # the tanh form as a sigmoid, which loses nothing to cancellation
    want = exact * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30)
    assert torch.equal(linear(x * float("nan"), one, act="gelu").isnan(), torch.ones_like(x, dtype=torch.bool))


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, causal: bool) -> Tensor:
    past = len(k) - len(q)
    parts = []
    for a, b, c in zip(
        q.split(lengths), k.split([n + past for n in lengths]), v.split([n + past for n in lengths]), strict=True
    ):
        logits = torch.einsum("qhd,khd->hqk", a.float(), b.float()) * scale
        if causal:
            hidden = torch.ones(len(a), len(b), dtype=torch.bool).triu(past + 1)
            logits = logits.masked_fill(hidden, float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), c.float()))
    return torch.cat(parts)


@pytest.mark.parametrize("lengths", [[1], [5, 40], [300], [64, 1, 515, 32], [3500, 20]])
@pytest.mark.parametrize("wide, value", [(72, 72), (24, 24), (192, 128), (80, 16)])
def test_attention_inside_items(lengths: list[int], wide: int, value: int) -> None:
    tokens, heads = sum(lengths), 3
    q, k = (torch.randn(tokens, heads, wide).bfloat16() for _ in range(2))
    v = torch.randn(tokens, heads, value).bfloat16()
    got = attention(q, k, v, lengths, wide**-0.5)
    assert far(got, plain(q, k, v, lengths, wide**-0.5, False)) < 6e-3


# the last two are longer than what of keys and values is laid out at once
@pytest.mark.parametrize(
    "new, past", [(1, 0), (70, 0), (600, 0), (33, 500), (1, 256), (300, 31), (64, 2100), (2200, 64)]
)
def test_causal_attention_with_a_past(new: int, past: int) -> None:
    q = torch.randn(new, 2, 192).bfloat16()
    k, v = torch.randn(past + new, 2, 192).bfloat16(), torch.randn(past + new, 2, 128).bfloat16()
    got = attention(q, k, v, [new], 0.1, causal=True)
    want = plain(q, k, v, [new], 0.1, True)
    assert far(got, want) < 6e-3
    changed = attention(q, k.index_fill(0, torch.tensor([past + new - 1]), 9.0), v, [new], 0.1, causal=True)
    assert torch.equal(changed[:-1], got[:-1])  # the last key is seen by the last query alone


def test_the_rotation_is_that_of_the_tower() -> None:
    from moonvit.position import rotate, rotation

    grids = [(1, 6, 8), (2, 4, 4)]
    cos, sin = rotation(grids, 72, 10_000.0, torch.device("cpu"))
    lengths = [t * h * w for t, h, w in grids]
    qkv = torch.randn(sum(lengths), 3, 4, 72).bfloat16()
    q, k, v = qkv.unbind(1)
    want = plain(rotate(q, cos, sin), rotate(k, cos, sin), v, lengths, 0.1, False)
    got = attention(q, k, v, lengths, 0.1, cos[:, 0], sin[:, 0])
    assert far(got, want) < 6e-3


def test_large_logits_and_equal_ones() -> None:
    q = torch.zeros(40, 1, 32).bfloat16()
    v = torch.randn(40, 1, 32).bfloat16()
    assert far(attention(q, q, v, [40], 1.0), v.float().mean(0).expand(40, 1, 32)) < 6e-3
    q[:, 0, 0] = 100 * torch.arange(40).bfloat16()
    got = attention(q, q, v, [40], 1.0)
    assert bool(got.isfinite().all()) and far(got[1:], v[-1:].expand(39, 1, 32)) < 6e-3


def test_one_thread_gives_what_two_give(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(300, 96).bfloat16(), torch.randn(200, 96).bfloat16()
    q = torch.randn(300, 3, 64).bfloat16()
    rows, shares = torch.randint(0, 300, (90, 2)), torch.rand(90, 2)
    results = []
    for small in (0, 10**8):
        monkeypatch.setattr("kernels.wide._SMALL", small)
        results.append([linear(x, w), attention(q, q, q, [300], 0.1), weigh(x, rows, shares)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_does_not_fit() -> None:
    x = torch.zeros(2, 32)
    assert not fits(x) and fits(x.bfloat16()) and not fits(x.bfloat16(), x)
    with torch.inference_mode(False), torch.enable_grad():
        assert not fits(torch.zeros(2, 32).bfloat16())
    y = x.bfloat16()[:, None]
    with pytest.raises(ValueError, match="queries"):
        attention(y, y, y, [3], 1.0)
    with pytest.raises(ValueError, match="causal"):
        attention(y[:1], y, y, [1], 1.0)
