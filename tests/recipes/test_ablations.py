"""Ablations: arms differ in what is asked about and in nothing else, and a whole one runs and writes its page.

pytest tests/recipes/test_ablations.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from recipes import ablations
from recipes.ablations import ABLATIONS, LANES, Ablation, final_losses, small


@pytest.mark.parametrize("name", ABLATIONS)
def test_arms_have_equal_tokens_and_seeds(name: str) -> None:
    arms = list(ABLATIONS[name](1e6).arms.values())
    pretrained = [run for run in arms if run.start is None]
    assert len({run.schedule.tokens for run in pretrained}) == 1
    assert len({run.seed for run in pretrained}) == 1
    assert len({(run.batch, run.schedule.stages[0].sequence) for run in arms}) == 1


def test_fusion_shows_as_many_pictures_early_or_late() -> None:
    arms = ABLATIONS["fusion"](1e6).arms
    per_lane = 1e6 / LANES
    seen = [run.mixture.wanted(per_lane)["pictures"] for run in arms.values()]
    assert seen == pytest.approx([0.2 * per_lane] * 3)
    half = [run.mixture.wanted(per_lane / 2)["pictures"] for run in arms.values()]
    assert half == pytest.approx([0.1 * per_lane, 0, 0])


def test_optimizers_differ_by_kind_alone() -> None:
    arms = ABLATIONS["optimizer"](1e6).arms
    muon, adam = arms["MuonClip"], arms["AdamW"]
    assert replace(adam, optimization=muon.optimization) == muon
    assert adam.optimization.kind == "adamw"


def test_zero_vision_fine_tuning_sees_no_picture() -> None:
    arms = ABLATIONS["sft"](1e6).arms
    assert {source.group for source in arms["zero-vision"].mixture.sources} == {"code", "text", "tool"}
    assert "vision" in {source.group for source in arms["with pictures"].mixture.sources}
    assert arms["zero-vision"].schedule == arms["with pictures"].schedule


def test_sparsity_changes_the_experts_alone() -> None:
    for experts, sparsity in ((16, 8), (32, 16), (64, 32)):
        text = small(experts).text
        assert text.n_routed_experts // text.num_experts_per_tok == sparsity
        assert replace(text, n_routed_experts=16) == small(16).text


def test_a_small_one_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def two(tokens: float) -> Ablation:
        whole = ablations.sft(tokens)
        return replace(whole, arms={n: whole.arms[n] for n in ("none", "zero-vision")}, families=("thing",))

    monkeypatch.setitem(ABLATIONS, "sft", two)
    arguments = [
        "sft",
        "--tokens",
        "16e3",
        "--n",
        "2",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "docs"),
    ]
    monkeypatch.setattr("sys.argv", ["moonkit ablate", *arguments])
    ablations.main()
    page = (tmp_path / "docs" / "sft.md").read_text()
    assert "| none |" in page and "| zero-vision |" in page and (tmp_path / "docs" / "sft.png").stat().st_size > 10_000
    capsys.readouterr()
    ablations.main()  # nothing is trained again
    assert "step 1 " not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["moonkit ablate", *arguments[:1], "--tokens", "2e4", *arguments[3:]])
    with pytest.raises(ValueError, match="another length"):
        ablations.main()


def test_refusals() -> None:
    for arguments in (["nothing"], ["fusion", "--n", "0"], ["fusion", "--tokens", "12"]):
        with pytest.raises((ValueError, SystemExit)):
            tyro.cli(ablations.Arguments, args=arguments)


def test_final_losses_are_of_the_last_steps(tmp_path: Path) -> None:
    lines = [
        f'{{"step": {i}, "losses": {{"a": {10.0 if i < 95 else 1.0}}}, "tokens": {i}, "seconds": 1}}'
        for i in range(100)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    losses, last = final_losses(tmp_path)
    assert losses == {"a": 1.0} and last["step"] == 99
