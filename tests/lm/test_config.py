"""Sizes and rotations of every released model, to the digit.

pytest tests/lm/test_config.py
"""

import json
import math
from typing import Any

import pytest
import torch

import fusion.config as presets
import lm.config as text
from fusion.projector import Projector
from lm.config import TextConfig, Yarn
from lm.model import count_parameters
from lm.rope import inverse_frequencies
from moonvit.config import so400m
from moonvit.encoder import MoonViT

K2 = {
    "total": 1_026_408_209_408,
    "router_biases": 23_040,
    "activated": 32_861_477_888,
    "experts": 1_014_686_023_680,
    "attention": 6_168_569_856,
    "dense": 396_361_728,
    "shared": 2_642_411_520,
    "router": 165_150_720,
    "embedding": 1_174_405_120,
    "head": 1_174_405_120,
}
MOONLIGHT = {
    "total": 15_960_108_544,
    "router_biases": 1_664,
    "activated": 2_914_774_528,
    "experts": 14_394_851_328,
    "attention": 371_602_944,
    "dense": 69_206_016,
    "shared": 449_839_104,
    "router": 3_407_872,
    "embedding": 335_544_320,
    "head": 335_544_320,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, K2) for name in ("k2", "k2_0905", "k2_thinking", "k2_5", "k2_6", "k2_7_code")),
        ("moonlight", MOONLIGHT),
        ("kimi_vl_a3b", MOONLIGHT),
    ],
)
def test_parameter_counts(name: str, expected: dict[str, int]) -> None:
    found = count_parameters(getattr(text, name)())
    assert {key: found[key] for key in expected} == expected


def test_tower_and_projector() -> None:
    with torch.device("meta"):
        tower, projector = MoonViT(so400m()), Projector(presets.ProjectorConfig(), so400m(), 7168)
    assert sum(p.numel() for p in tower.parameters()) == 416_866_032
    assert sum(p.numel() for p in projector.parameters()) == 54_277_888
    assert len(tower.state_dict()) == 329 and len(projector.state_dict()) == 6


def test_the_paper_and_the_release() -> None:
    """1,026,408,232,448 in all with the routers' biases; with tower and projector 1,026,879,353,328 + 23,040."""
    k2 = count_parameters(text.k2())
    assert k2["total"] + k2["router_biases"] == 1_026_408_232_448
    assert k2["total"] + 416_866_032 + 54_277_888 == 1_026_879_353_328


# ---- YaRN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "values", "scale"),
    [
        (text.k2(), {12: 0.0172936, 19: 0.00162176}, 0.13086079996),
        (text.k2_0905(), {12: 0.0172936, 19: 0.00162176}, 0.14467962580),
        (text.k2_5(), {12: 0.0116192, 19: 0.000158375}, 0.14467962580),
        (text.moonlight(), {}, 0.07216878),
    ],
    ids=["beta 1, factor 32", "beta 1, factor 64", "beta 32, factor 64", "no yarn"],
)
def test_golden_rotations(config: TextConfig, values: dict[int, float], scale: float) -> None:
    found = inverse_frequencies(config, torch.device("cpu"))
    assert config.softmax_scale == pytest.approx(scale, rel=1e-7)
    for index, value in values.items():
        assert found[index].item() == pytest.approx(value, rel=1e-5)


def test_yarn_scales() -> None:
    assert Yarn(factor=32).softmax_scale == pytest.approx(1.34657359**2)
    assert Yarn(factor=64).softmax_scale == pytest.approx(1.41588831**2)
    assert Yarn().rotation_scale == 1.0
    assert Yarn(mscale_all_dim=0.5).rotation_scale == pytest.approx(1.41588831 / (0.05 * math.log(64) + 1))


# ---- reading ---------------------------------------------------------------------------------------------------------

GOOD = text.k2_5().to_dict()


def test_to_dict_comes_back() -> None:
    for name in presets.PRESETS:
        config = getattr(text, name)()
        assert TextConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 8}, "one key per query head"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"hidden_size": -7168}, "hidden_size must be positive"),
        ({"num_experts_per_tok": 400}, "num_experts_per_tok 400 is more than the 384"),
        ({"n_group": 5}, "do not split"),
        ({"topk_group": 2}, "topk_group 2 is more than n_group 1"),
        ({"qk_rope_head_dim": 63}, "must be even"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": True}}, "unknown rope_scaling keys truncate"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "7168"}, "hidden_size"),
        ({"hidden_size": 71.5}, "hidden_size"),
        ({"n_routed_experts": True}, "n_routed_experts"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_theta": float("nan")}, "rope_theta"),
    ],
)
def test_configs_that_we_do_not_implement_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig.from_dict(GOOD | change)


@pytest.mark.parametrize("name", ["hidden_size", "rope_theta", "num_hidden_layers", "routed_scaling_factor"])
def test_missing_sizes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"missing {name}"):
        TextConfig.from_dict({key: value for key, value in GOOD.items() if key != name})
