"""Learning rates by tokens, and the chunked loss.

pytest tests/train/test_schedule.py
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from train.loss import token_losses
from train.schedule import Schedule, Stage, cosine, k2, wsd


def test_wsd() -> None:
    plan = wsd(1.0, tokens=100, warmup=10, decay=40, end=0.1)
    rates = {t: plan.at(t)[1] for t in (0, 5, 10, 59, 60, 80, 100, 500)}
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == rates[59] == rates[60] == 1.0
    assert rates[80] == pytest.approx(0.55) and rates[100] == rates[500] == 0.1
    assert [stage.name for stage in plan.stages] == ["warm-up", "stable", "decay"] and plan.tokens == 100
    assert [stage.name for stage in cosine(1.0, 100, 0).stages] == ["decay"]


def test_k2_is_the_reports() -> None:
    plan = k2()
    assert plan.tokens == pytest.approx(15.96e12)
    assert plan.at(5e12)[1] == 2e-4 and plan.at(10e12 + 2.75e12)[1] == pytest.approx(1.1e-4)
    assert plan.at(15.5e12)[1] == pytest.approx(2e-5) and plan.at(16e12)[1] == pytest.approx(7e-6)
    assert plan.at(15.95e12)[0].sequence == 32_768


@given(st.floats(0, 2e13), st.floats(1, 1e9))
def test_the_rate_never_jumps(tokens: float, step: float) -> None:
    plan = k2()
    change = abs(plan.at(tokens + step)[1] - plan.at(tokens)[1])
    assert change <= 2e-4 * step / (500 * 67e6) * 1.01 + 1e-12  # the warm-up is the steepest part


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wsd(1, 10, 6, 6), "longer than all"),
        (lambda: Schedule(()), "at least one stage"),
        (lambda: Stage("x", 0, 1, 1), "must be positive"),
        (lambda: Stage("x", 1, -1, 1, "linear"), "not negative"),
        (lambda: Stage("x", 1, 1, 2), "is constant but"),
        (lambda: Stage("x", 1, 1, 2, "square"), "'square' is unknown"),  # type: ignore[arg-type]
        (lambda: k2().at(-1), "must not be negative"),
    ],
)
def test_plans_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_is_whole(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (30,))
    targets[::3] = -100
    whole = F.cross_entropy(hidden @ head.T, targets, reduction="none", ignore_index=-100)
    wanted = torch.autograd.grad(whole.sum(), (hidden, head))
    losses = token_losses(hidden, head, targets, chunk)
    found = torch.autograd.grad(losses.sum(), (hidden, head))
    torch.testing.assert_close(losses, whole)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_all_masked_has_a_gradient_of_zero() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    token_losses(hidden, torch.randn(5, 4), torch.full((3,), -100)).sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()
    assert token_losses(torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_wrong_targets() -> None:
    with pytest.raises(ValueError, match="3 hidden states but targets"):
        token_losses(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="outside the vocabulary of 5"):
        token_losses(torch.zeros(1, 4), torch.zeros(5, 4), torch.tensor([5]))
    with pytest.raises(ValueError, match="chunk"):
        token_losses(torch.zeros(1, 4), torch.zeros(5, 4), torch.tensor([0]), chunk=0)
