"""Two ranks give what one gives, whole or sliced, and take over each other's checkpoints.

pytest tests/train/test_parallel.py
"""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny_run import children, tiny_run, train_in
from train.loop import Optimization, Trainer, make_model
from train.parallel import Mode, Ranks, gradient_norm, start

# gradients of experts that one rank's tokens never chose, and of a step whose pictures all lie on one rank, come by
# themselves: eight experts, four short lanes
GENTLE = {"optimization": Optimization(tau=0.5, kind="muon"), "precision": "float32"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def together(target: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Run a function as so many ranks, and wait for them; one rank is an ordinary process."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        processes.append(children().Process(target=target, args=(arguments[0], environment, *arguments[1:])))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks


def losses_of(folder: Path) -> list[float]:
    return [record["loss"] for record in steps_of(folder)]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "event" not in record]


def check_same(one: Path, other: Path) -> None:
    """Losses, norms, loads and clipped heads of every step, and the weights at the end, up to float32's rounding."""
    first, second = steps_of(one), steps_of(other)
    assert len(first) == len(second) > 5
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "grad_norm", "max_logit", "balance"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), (a["step"], key)
        assert (a["clipped"], a["targets"], a["tokens"]) == (b["clipped"], b["targets"], b["tokens"])
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    together(train_in, folder, GENTLE, ranks=1)
    assert sum(record["clipped"] for record in steps_of(folder)) > 0, "no head is clipped: the test is too tame"
    return folder


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_equal_one(alone: Path, tmp_path: Path, mode: Mode) -> None:
    together(train_in, tmp_path / mode, {**GENTLE, "parallel": mode})
    check_same(alone, tmp_path / mode)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_checkpoint_moves_from_two_ranks_to_one_and_back(alone: Path, tmp_path: Path, mode: Mode) -> None:
    folder = tmp_path / "run"
    together(train_in, folder, {**GENTLE, "parallel": mode}, 3)
    together(train_in, folder, GENTLE, 6, ranks=1)
    together(train_in, folder, {**GENTLE, "parallel": mode})
    check_same(alone, folder)


def test_a_gradient_of_zeros_counts_as_none() -> None:
    """So an expert without tokens keeps weight and momentum on any number of ranks."""
    there, idle, absent = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    there.grad, idle.grad = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert float(gradient_norm([there, idle, absent], Ranks())) == 5.0
    assert idle.grad is None and absent.grad is None and there.grad is not None


def test_modes_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="parallel mode 'zero' is unknown"):
        start("zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fsdp needs several processes"):
        start("fsdp")
    trainer = Trainer(make_model(tiny_run()), tiny_run(), Ranks())
    assert not trainer.sharded
