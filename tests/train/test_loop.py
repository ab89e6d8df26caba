"""The training step is exact however its batch is cut, learns, guards itself and says what it did.

pytest tests/train/test_loop.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.config import k2_7_code
from fusion.model import Kimi
from lm.config import Yarn
from tests.train.tiny_run import tiny_run
from train import plot, pretrain
from train.console import keep_lines, step_flops
from train.data import Loader, Pack, collate
from train.loop import (
    BatchSize,
    Guard,
    Objective,
    Optimization,
    Run,
    Saving,
    Trainer,
    load_tokenizer,
    make_model,
    train,
)
from train.parallel import Ranks
from train.plan import describe_run
from train.schedule import Schedule, Stage, k2

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("vision", "text")


def packs_of(run: Run, steps: int = 1) -> list[list[Pack]]:
    loader = Loader(
        run.mixture,
        load_tokenizer(run),
        run.config(),
        sequence=run.schedule.stages[0].sequence,
        lanes=run.batch.lanes,
        patch_budget=run.batch.patch_budget,
        seed=run.seed,
        rank=0,
        world_size=1,
        workers=0,
    )
    return [loader.next_step() for _ in range(steps)]


def gradients_of(trainer: Trainer, packs: list[Pack]) -> dict[str, Tensor]:
    """The gradients with which the optimizer is called."""
    kept: dict[str, Tensor] = {}

    def keep(lr: float, peaks: Tensor) -> int:
        kept.update({name: p.grad.clone() for name, p in trainer.named if p.grad is not None})
        return 0

    trainer._update = keep  # type: ignore[method-assign]
    trainer.step(packs, 0.0, 0.0, NAMES)
    return kept


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6 + 1e-5 * float(gradient.abs().max()))


def steps_of(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("event") == event]


# ---- one step --------------------------------------------------------------------------------------------------------


def test_gradients_do_not_depend_on_micro_batches() -> None:
    """Lanes have different numbers of targets, so a mean of means would differ; the balance loss counts lanes."""
    run = tiny_run(optimization=Optimization(balance=0.1, max_norm=1e9))
    packs = packs_of(run)[0]
    assert len({collate([pack]).target_count for pack in packs}) > 1
    all_at_once, *others = (
        gradients_of(
            Trainer(make_model(run), replace(run, batch=replace(run.batch, lanes_per_micro_batch=n)), Ranks()), packs
        )
        for n in (4, 1, 3)
    )
    for other in others:
        close(all_at_once, other)


def test_recomputed_layers_give_the_same_gradients() -> None:
    run = tiny_run()
    packs = packs_of(run)[0]
    kept, again = (gradients_of(Trainer(make_model(r), r, Ranks()), packs) for r in (run, replace(run, recompute=True)))
    close(kept, again)


def test_the_loss_is_the_mean_over_targets_of_each_group() -> None:
    run = tiny_run()
    packs = packs_of(run)[0]
    kimi = make_model(run)
    batch = collate(packs)
    with torch.no_grad():
        hidden = kimi(batch.ids, batch.media, batch.lengths)
        shares = kimi.language_model.logits(hidden).log_softmax(-1)
    at = (batch.targets >= 0).nonzero()[:, 0]
    losses = -shares[at, batch.targets[at]]
    report = Trainer(kimi, run, Ranks()).step(packs, 0.0, 0.0, NAMES)
    assert report.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    group = batch.group_of_token(NAMES)[at]
    for number, name in enumerate(NAMES):
        assert report.losses[name] == pytest.approx(float(losses[group == number].mean()), rel=1e-5)
    assert (report.targets, report.tokens) == (len(at), len(batch))
    assert report.flops == pytest.approx(sum(step_flops(kimi.config, collate([pack])) for pack in packs))


def test_gradients_are_clipped_by_their_norm_together() -> None:
    run = tiny_run(optimization=Optimization(max_norm=0.125))
    packs = packs_of(run)[0]
    gradients = gradients_of(Trainer(make_model(run), run, Ranks()), packs)
    assert float(torch.stack([g.norm() for g in gradients.values()]).norm()) == pytest.approx(0.125, rel=1e-4)


def test_heads_are_clipped_and_biases_move() -> None:
    run = tiny_run(optimization=Optimization(tau=0.01))
    kimi = make_model(run)
    trainer = Trainer(kimi, run, Ranks())
    gate = kimi.language_model.model.layers[1].mlp.gate  # type: ignore[union-attr]
    report = trainer.step(packs_of(run)[0], 1e-3, 1e-3, NAMES)
    assert report.max_logit > 0.01 and report.clipped > 0
    assert float(gate.e_score_correction_bias.abs().max()) > 0  # type: ignore[union-attr, operator]
    assert report.load >= 1


def test_bfloat16_keeps_float32_weights() -> None:
    run = tiny_run(precision="bfloat16")
    kimi = make_model(run)
    trainer = Trainer(kimi, run, Ranks())
    report = trainer.step(packs_of(run)[0], 1e-3, 1e-3, NAMES)
    exact = Trainer(make_model(run), replace(run, precision="float32"), Ranks()).step(packs_of(run)[0], 0.0, 0.0, NAMES)
    assert report.applied and report.loss == pytest.approx(exact.loss, rel=2e-2) and report.loss != exact.loss
    assert {p.dtype for p in kimi.parameters()} == {torch.float32}


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_it_learns_what_it_sees(tmp_path: Path) -> None:
    train(tiny_run(tokens=12_000), tmp_path)
    steps = steps_of(tmp_path)
    assert steps[0]["loss"] > 8  # as much as nothing known: ln 4096 = 8.3
    assert steps[-1]["losses"]["vision"] < 1.5  # of three colours it has seen hundreds
    assert {"lr", "grad_norm", "max_logit", "clipped", "load", "idle", "mfu", "tokens_per_second", "bad"} <= steps[
        -1
    ].keys()
    started = json.loads((tmp_path / "versions.jsonl").read_text())
    assert started["seed"] == 0 and started["packages"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((tmp_path / "data.json").read_text())["documents"]["colours"] > 50
    assert "muon" in (tmp_path / "parameters.txt").read_text()
    kimi = Kimi.from_pretrained(tmp_path / "model")
    assert kimi.tokenizer is not None and kimi.dtype == torch.float32
    again = train(tiny_run(tokens=12_000), tmp_path)
    assert again.step == len(steps) and math.isnan(again.loss)  # it was done: nothing is trained


def test_what_is_frozen_stays_bitwise_frozen(tmp_path: Path) -> None:
    run = tiny_run(frozen=("vision_tower.", "mm_projector."))
    before = make_model(run).state_dict()
    train(run, tmp_path, stop_at=2)
    trainer = Trainer(make_model(run), run, Ranks())
    assert {name.split(".")[0] for name, _ in trainer.named} == {"language_model"}
    trainer.step(packs_of(run)[0], 1e-2, 0.0, NAMES)
    for name, after in trainer.kimi.state_dict().items():
        if name.startswith(run.frozen):
            assert torch.equal(before[name], after), name
    with pytest.raises(ValueError, match="frozen: no parameter's name starts with 'tower'"):
        make_model(replace(run, frozen=("tower",)))


def test_steps_without_a_finite_loss_are_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is skipped and counted, with weights and momentum as they were; three in a row stop the run."""
    real, calls, weights = Objective.forward, 0, []

    def broken(self: Objective, batch: Any, taps: Any) -> Tensor:
        nonlocal calls
        calls += 1
        losses = real(self, batch, taps)
        step = (calls + 1) // 2  # two micro-batches each
        weights.append(self.kimi.language_model.lm_head.weight.detach().clone())
        return losses * math.nan if step in bad else losses

    monkeypatch.setattr(Objective, "forward", broken)
    bad: tuple[int, ...] = (2,)
    train(tiny_run(), tmp_path / "one", stop_at=3)
    assert torch.equal(weights[2], weights[4]) and not torch.equal(weights[0], weights[2])
    assert [record["step"] for record in steps_of(tmp_path / "one", "skipped")] == [2]
    assert [record["skipped"] for record in steps_of(tmp_path / "one")] == [0, 1, 1]
    calls, bad = 0, (2, 3, 4)
    with pytest.raises(ValueError, match=r"3 steps in a row had no finite loss.*step 4"):
        train(tiny_run(), tmp_path / "three")


def test_spikes_are_written_down_with_their_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Objective.forward, 0

    def spiking(self: Objective, batch: Any, taps: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return real(self, batch, taps) * (6.0 if calls in (19, 20) else 1.0)

    monkeypatch.setattr(Objective, "forward", spiking)
    train(tiny_run(guard=Guard(spike=2.0)), tmp_path, stop_at=11)
    (record,) = steps_of(tmp_path, "spike")
    assert record["step"] == 10
    assert [pack["lane"] for pack in record["packs"]] == [0, 1, 2, 3]
    assert all(document.split(":")[0] in ("colours", "sums") for document in record["packs"][0]["documents"])


def test_a_schedule_in_steps_takes_exactly_so_many(tmp_path: Path) -> None:
    train(tiny_run(tokens=1e9, steps=8), tmp_path)
    rates = [record["lr"] for record in steps_of(tmp_path)]
    assert len(rates) == 8 and rates[0] < max(rates) == 1e-2 and rates[-1] < rates[-2] < 1e-2


def test_longer_sequences_and_another_rotation_in_a_later_stage(tmp_path: Path) -> None:
    yarn = Yarn(factor=4.0, original_max_position_embeddings=128)
    schedule = Schedule(
        (
            Stage("short", 512, 1e-3, 1e-3, sequence=64),
            Stage("long", 1024, 1e-3, 0.0, "linear", sequence=128, yarn=yarn),
        )
    )
    optimization = Optimization(router_still=("long",))
    train(tiny_run(schedule=schedule, optimization=optimization), tmp_path, stop_at=3)
    train(tiny_run(schedule=schedule, optimization=optimization), tmp_path)  # also across a restart
    steps = steps_of(tmp_path)
    assert [record["stage"] for record in steps][:4] == ["short", "short", "short", "long"]
    assert steps[0]["step_tokens"] > 4 * 48, "four sequences of 64"
    assert 2 * 64 < steps[3]["step_tokens"] <= 2 * 128, "two of 128: a step holds as many tokens"
    text = Kimi.from_pretrained(tmp_path / "model").config.text
    assert text.yarn == yarn and text.max_position_embeddings == 512


def test_adamw_takes_all_parameters() -> None:
    run = tiny_run(optimization=Optimization(kind="adamw"))
    trainer = Trainer(make_model(run), run, Ranks())
    trainer.step(packs_of(run)[0], 1e-3, 0.0, NAMES)
    assert trainer.optimizer.newton_schulz_calls == 0
    assert {key for state in trainer.optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}


def test_evaluations_are_logged_and_change_nothing(tmp_path: Path) -> None:
    def evaluate(kimi: Kimi, step: int) -> dict[str, float]:
        assert not kimi.training and not torch.is_grad_enabled()
        return {"draw": float(torch.rand(())), "step": step}

    train(tiny_run(), tmp_path / "without", stop_at=4)
    train(tiny_run(evaluate=evaluate, evaluate_steps=2), tmp_path / "with", stop_at=4)
    assert [record["scores"]["step"] for record in steps_of(tmp_path / "with", "evaluation")] == [2, 4]
    losses = [[record["loss"] for record in steps_of(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_lines_of_a_killed_process_leave_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 6)) + '{"step": 6, "lo')
    keep_lines(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


# ---- the command line ------------------------------------------------------------------------------------------------

RECIPE = """
from tests.train.tiny_run import tiny_run

def run():
    return tiny_run()

def second():
    return tiny_run()

def sft():
    return tiny_run()

def wrong():
    return 1
"""


def test_verbs_train_tune_and_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train import sft

    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pretrain", str(recipe), "--steps", "2", "--out", "first", "--seed", "3"])
    pretrain.main()
    assert "done: 2 steps" in capsys.readouterr().out
    assert json.loads((tmp_path / "first" / "config.json").read_text())["seed"] == 3
    monkeypatch.setattr("sys.argv", ["sft", str(recipe), "--model", "first/model", "--steps", "2"])
    sft.main()
    first, tuned = (steps_of(tmp_path / name) for name in ("first", "runs/recipe-sft"))
    assert tuned[0]["loss"] < first[0]["loss"]  # it starts from what was learned
    monkeypatch.setattr("sys.argv", ["sft", str(recipe)])
    with pytest.raises(ValueError, match="--model"):
        sft.main()
    more = ["--part", "second", "--model", "first/model", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["pretrain", str(recipe), *more])
    pretrain.main()
    annealed = tmp_path / "runs" / "recipe-second"
    assert steps_of(annealed)[0]["loss"] < first[0]["loss"]
    assert json.loads((annealed / "config.json").read_text())["start"] == "first/model"
    monkeypatch.setattr("sys.argv", ["plot", "first", "runs/recipe-sft"])
    plot.main()
    assert (tmp_path / "first" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_recipes_that_are_none(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        pretrain.load_recipe(tmp_path / "missing.py")
    with pytest.raises(ValueError, match=r"must return a train.loop.Run, got int"):
        pretrain.load_recipe(recipe, "wrong")
    with pytest.raises(ValueError, match=r"defines no function other\(\)"):
        pretrain.load_recipe(recipe, "other")


def test_the_plan_of_k2_costs_nothing() -> None:
    run = tiny_run(model=k2_7_code(), schedule=k2(), batch=BatchSize(lanes=16_384), parallel="fsdp")
    text = describe_run(run, ranks=256)
    stable = next(line for line in text.splitlines() if line.startswith("stable"))
    assert "9,966,500,000,000" in stable and "148,512" in stable  # 10T tokens less the warm-up, in steps of 2^26
    assert "memory of each rank, sliced over 256 ranks (fsdp): 4" in text
    with pytest.raises(ValueError, match="16384 lanes cannot be shared by 3 ranks"):
        describe_run(run, ranks=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "half"}, "precision 'half' is unknown"),
        ({"steps": 3, "minutes": 1.0}, "give one of them"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"minutes": math.nan}, "minutes must be positive"),
        ({"model": "nanno"}, "preset 'nanno' is unknown"),
    ],
)
def test_runs_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_run(**changes)


def test_tensorboard_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="TensorBoard is not installed"):
        train(tiny_run(saving=Saving(tensorboard=True)), tmp_path)
