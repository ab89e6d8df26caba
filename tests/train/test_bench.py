"""The training bench compares like with like, and what makes a step fast changes no result.

pytest tests/train/test_bench.py
"""

import platform

import pytest
import torch

import train.loss
import train.muon
from train.bench import Bench, Stopwatch, measure, workloads
from train.loss import token_losses
from train.memory import keep_memory
from train.muon import Muon, newton_schulz_dtype, orthogonalize


def test_both_sides_have_the_same_loss() -> None:
    pytest.importorskip("transformers")
    result = measure(Bench(shape="tiny", tokens=96, length=24, rounds=1), lambda line: None)
    assert [row["workload"] for row in result["rows"]] == ["sequences", "documents"]
    for row in result["rows"]:
        assert row["loss"]["ours"] == pytest.approx(row["loss"]["transformers"], rel=1e-5)
        assert row["tokens"] == 96 and set(row["seconds"]) == {"ours", "transformers", "transformers, stock"}
        assert min(row["times_faster"].values()) > 0
        for part in ("attention", "experts", "dense", "loss", "optimizer, Newton-Schulz", "backward of experts"):
            assert row["parts"][part] > 0
    assert train.muon.orthogonalize is orthogonalize, "watching must leave no trace"


def test_workloads_have_the_tokens_asked_for() -> None:
    loads = workloads(Bench(tokens=8192))
    assert [len(each) for each in loads["sequences"]] == [1024] * 8
    lengths = [len(each) for each in loads["documents"]]
    assert sum(lengths) in (8191, 8192) and max(lengths) <= 300 and len(lengths) > 40


def test_a_part_inside_another_counts_for_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, now = Stopwatch(), iter([0.0, 2.0, 7.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    with watch.part("step"), watch.part("loss"):
        pass
    assert watch.seconds == {"step": 3.0, "loss": 5.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tokens": 1000}, "tokens must be"), ({"length": 1}, "length must be"), ({"rounds": 0}, "rounds must be")],
)
def test_wrong_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bench(**options)  # type: ignore[arg-type]


def test_kept_logits_are_recomputed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(90, 8), torch.randn(31, 8)
    targets = torch.randint(-1, 31, (90,))
    found = []
    for keep in (0, 90 * 31):
        monkeypatch.setattr(train.loss, "_KEEP", keep)
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        losses = token_losses(x, w, targets, chunk=32)
        (losses * torch.arange(90)).sum().backward()
        found.append((losses.detach(), x.grad, w.grad))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_newton_schulz_in_float32_is_that_in_bfloat16() -> None:
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(matrices, dtype=torch.float32)
    assert (exact - orthogonalize(matrices, dtype=torch.bfloat16).float()).abs().max() < 0.03
    assert orthogonalize(matrices).dtype == newton_schulz_dtype(matrices.device)
    parameter = torch.nn.Parameter(torch.zeros(24, 40))
    parameter.grad = matrices[0].clone()
    Muon([{"kind": "muon", "params": [parameter]}], lr=1.0, momentum=0.0, dtype=torch.float32).step()
    torch.testing.assert_close(parameter.detach(), -0.2 * 40**0.5 * exact[0])


def test_batches_of_newton_schulz_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    updated = []
    for batch in (2**19, 1):
        monkeypatch.setattr(train.muon, "_CPU_BATCH", batch)
        draw = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(6, 4, generator=draw)) for _ in range(5)]
        for parameter in parameters:
            parameter.grad = torch.randn(6, 4, generator=draw)
        optimizer = Muon([{"kind": "muon", "params": parameters}], lr=0.1)
        optimizer.step()
        assert optimizer.newton_schulz_calls == 5
        updated.append(torch.stack([parameter.detach() for parameter in parameters]))
    torch.testing.assert_close(updated[0], updated[1])


def test_memory_is_kept_where_malloc_can() -> None:
    assert keep_memory() == (platform.libc_ver()[0] == "glibc")
