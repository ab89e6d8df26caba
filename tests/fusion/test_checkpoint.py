"""Every layout in, the released one out.

pytest tests/fusion/test_checkpoint.py
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusion.config as presets
from fusion.checkpoint import bundled_tokenizer, config_to_dict, read_config
from fusion.model import Kimi
from lm.fp8 import dequantize_fp8
from lm.int4 import PackedLinear, dequantize_int4
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches
from tests.fusion.make_checkpoint import (
    fill,
    k2_5_config,
    k2_5_names,
    projector_names,
    released_text_config,
    text_names,
    tower_names,
    write,
)
from tests.reference import reference_model, released_state, small


def packable(**text: Any) -> Any:
    """A tiny config whose experts fit INT4's groups of 32."""
    return small({"moe_intermediate_size": 32, "hidden_size": 64, "n_routed_experts": 8, **text})


def picture() -> PackedPatches:
    return PackedPatches(
        torch.randn(16, 3, 14, 14, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 4, 4]])
    )


@torch.inference_mode()
def run(kimi: Kimi) -> torch.Tensor:
    pad = kimi.config.media_placeholder_token_id
    if kimi.config.vision is None:
        return kimi.language_model.logits(kimi(torch.tensor([1, 2, 3])))
    return kimi.language_model.logits(kimi(torch.tensor([1, 2, pad, pad, pad, pad, 3]), picture()))


def count(names: Any) -> dict[str, int]:
    totals: dict[str, int] = {"tensors": 0}
    for _, shape, dtype in names:
        elements = 1
        for side in shape:
            elements *= side
        totals["tensors"] += 1
        totals[dtype] = totals.get(dtype, 0) + elements
    return totals


@pytest.mark.parametrize(
    ("names", "expected"),
    [  # from the headers of the released files
        (
            lambda: text_names(presets.k2().text, "", experts="FP8", others="FP8", junk=56),
            {"tensors": 139_644, "BF16": 2_514_970_968, "F8_E4M3": 1_023_893_241_856, "F32": 62_518_232},
        ),
        (
            lambda: text_names(presets.k2_0905().text, "", experts="FP8", others="FP8", junk=128),
            {"tensors": 139_644, "BF16": 2_514_975_360, "F8_E4M3": 1_023_893_241_856, "F32": 62_518_232},
        ),
        (
            lambda: text_names(presets.k2_thinking().text, "", experts="INT4", junk=128),
            {"tensors": 208_276, "BF16": 43_431_131_776, "I32": 126_835_891_200, "F32": 23_040},
        ),
        (
            lambda: k2_5_names(presets.k2_5()),
            {"tensors": 208_550, "BF16": 43_902_267_888, "I32": 126_835_891_200, "F32": 23_040},
        ),
    ],
    ids=["k2", "k2_0905", "k2_thinking", "k2_5"],
)
def test_the_generators_names_are_those_of_the_released_headers(names: Any, expected: dict[str, int]) -> None:
    assert count(names()) == expected


def test_the_real_config_file_is_the_preset(data: Path) -> None:
    config = read_config(data / "kimi-tokenizer")
    assert config.text == presets.k2_6().text
    assert config.vision == presets.k2_6().vision
    assert config.media_placeholder_token_id == 163_605
    written = config_to_dict(config, torch.bfloat16, packed=True)
    real = json.loads((data / "kimi-tokenizer" / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        ours, theirs = written[section], real[section]
        differing = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
        assert differing <= {"aux_loss_alpha"}, {key: (ours[key], theirs[key]) for key in differing}


def test_released_int4_layout_in_shards(tmp_path: Path) -> None:
    config = packable()
    tensors = fill(k2_5_names(config))
    folder = write(tmp_path / "k2_5", k2_5_config(config), tensors, shards=5)
    packed = Kimi.from_pretrained(folder)
    dense = Kimi.from_pretrained(folder, experts="dense")
    assert packed.config.text == config.text
    expert = packed.language_model.model.layers[1].mlp.experts[3].up_proj
    assert isinstance(expert, PackedLinear)
    assert packed.dtype == torch.bfloat16
    name = "language_model.model.layers.1.mlp.experts.3.up_proj"
    stored = dequantize_int4(tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"], 64)
    assert torch.equal(expert.dequantize(), stored)
    assert torch.equal(dense.language_model.model.layers[1].mlp.experts[3].up_proj.weight, stored)
    assert torch.equal(
        packed.vision_tower.patch_embed.pos_emb.weight, tensors["vision_tower.patch_embed.pos_emb.weight"]
    )
    bias = packed.language_model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors["language_model.model.layers.1.mlp.gate.e_score_correction_bias"])
    assert (run(packed) - run(dense)).abs().max() < 0.1 * run(dense).std()
    exact = Kimi.from_pretrained(folder, dtype="float32")
    also = Kimi.from_pretrained(folder, dtype=torch.float32, experts="dense")
    assert (run(exact) - run(also)).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["native in memory", "saved by transformers", "released"])
def test_transformers_layouts_give_the_same_model(tmp_path: Path, layout: str) -> None:
    config = small({"vocab_size": 500})
    reference: Any = reference_model(config, 4)
    raw = reference.config.to_dict() | {"bos_token_id": 390, "eos_token_id": 391, "pad_token_id": 392}
    if layout == "released":
        write(tmp_path, k2_5_config(config), {n: t.contiguous() for n, t in released_state(config, reference).items()})
    elif layout == "native in memory":
        write(tmp_path, raw, {n: t.clone().contiguous() for n, t in reference.state_dict().items()})
    else:
        reference.save_pretrained(tmp_path)
    kimi = Kimi.from_pretrained(tmp_path)
    assert kimi.config.text == config.text
    released = released_state(config, reference)
    state = kimi.state_dict()
    assert state.keys() == released.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in released.items())


def test_transformers_reads_what_we_save(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    config = small()
    kimi = Kimi(config).eval()
    from tests.reference import randomise

    randomise(kimi, 1)
    kimi.save_pretrained(tmp_path / "ours")
    theirs = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    ).eval()
    ids = torch.tensor([[1, 5, 9, 200]])
    with torch.inference_mode():
        difference = theirs(input_ids=ids).logits[0] - kimi.language_model.logits(kimi(ids[0]))
    assert difference.abs().max() < 1e-4


def test_kimi_vl_layout(tmp_path: Path) -> None:
    config = small({"q_lora_rank": None, "yarn": None})
    config = replace(config, projector=presets.ProjectorConfig("kimi_vl"), profile="kimi_vl")
    assert config.vision is not None
    names = [
        *text_names(config.text, "language_model."),
        *tower_names(config.vision),
        *projector_names(config.vision, config.text.hidden_size, kimi_vl=True),
    ]
    tensors = fill(iter(names))
    v = config.vision
    raw = {
        "model_type": "kimi_vl",
        "text_config": released_text_config(config.text, model_type="deepseek_v3", rope_scaling=None),
        "vision_config": {
            "model_type": "moonvit",
            "hidden_size": v.hidden_size,
            "num_hidden_layers": v.num_layers,
            "num_attention_heads": v.num_heads,
            "intermediate_size": v.intermediate_size,
            "init_pos_emb_height": v.pos_emb_height,
            "init_pos_emb_width": v.pos_emb_width,
            "patch_size": 14,
            "merge_kernel_size": [2, 2],
        },
        "media_placeholder_token_id": 393,
    }
    preprocessor = {
        "in_token_limit": 4096,
        "patch_size": 14,
        "pad_input": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "merge_kernel_size": [2, 2],
        "num_pooled_tokens": 1024,
    }
    folder = write(tmp_path / "vl", raw, tensors, preprocessor_config=preprocessor)
    kimi = Kimi.from_pretrained(folder)
    assert kimi.config.profile == "kimi_vl"
    assert kimi.config.media.rule == "kimi_vl" and kimi.config.media.in_patch_limit == 4096
    assert torch.equal(kimi.mm_projector.proj[2].weight, tensors["multi_modal_projector.linear_2.weight"])
    assert run(kimi).isfinite().all()
    kimi.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert Kimi.from_pretrained(tmp_path / "again").config.profile == "kimi_vl"


@pytest.mark.parametrize("prefix", ["", "vision_tower."])
def test_moonvit_alone(tmp_path: Path, prefix: str) -> None:
    config = small().vision
    assert config is not None
    tensors = fill(tower_names(config, prefix))
    raw = {
        "model_type": "moonvit",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "init_pos_emb_height": config.pos_emb_height,
        "init_pos_emb_width": config.pos_emb_width,
        "patch_size": 14,
        "merge_kernel_size": [2, 2],
    }
    if prefix:
        raw = {"model_type": "kimi_vl", "vision_config": raw}
    tower = MoonViT.from_pretrained(write(tmp_path, raw, tensors, shards=3), dtype=torch.float32)
    state = tower.state_dict()
    assert all(torch.equal(state[name.removeprefix(prefix)], tensor.float()) for name, tensor in tensors.items())
    (features,) = tower.encode([torch.zeros(3, 56, 28)])
    assert features.shape == (2, 4, config.hidden_size)


def test_tower_out_of_a_whole_checkpoint(tmp_path: Path) -> None:
    config = packable()
    folder = write(tmp_path, k2_5_config(config), fill(k2_5_names(config)), shards=3)
    kimi, tower = Kimi.from_pretrained(folder), MoonViT.from_pretrained(folder)
    assert torch.equal(tower(picture()), kimi.vision_tower(picture()))
    # also from transformers' layout, where queries and keys lie in another order
    reference: Any = reference_model(small(), 4)
    write(tmp_path / "native", reference.config.to_dict(), {n: t.clone() for n, t in reference.state_dict().items()})
    tower = MoonViT.from_pretrained(tmp_path / "native")
    with torch.inference_mode():
        pooled = reference.model.vision_tower(picture().pixels, grid_thw=picture().grid_thw).pooler_output
        assert (tower(picture()) - pooled).abs().max() < 1e-5


def test_fp8_with_junk_and_parts_in_different_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small({"hidden_size": 160, "kv_lora_rank": 136, "qk_rope_head_dim": 8}, with_vision=False)
    tensors = fill(text_names(config.text, "", experts="FP8", others="FP8", junk=56))
    raw = released_text_config(
        config.text, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    folder = write(tmp_path, raw | {"eos_token_id": 391}, tensors, shards=4)
    with caplog.at_level("INFO"):
        kimi = Kimi.from_pretrained(folder)
    assert kimi.config.profile == "k2"
    assert sum("rotary_emb.inv_freq tensors are ignored" in line for line in caplog.messages) == 1
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa"  # 144 x 160: both last blocks are ragged
    expected = dequantize_fp8(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"])
    assert torch.equal(kimi.language_model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight, expected)
    assert run(kimi).isfinite().all()


def test_moonlight_and_tied_heads(tmp_path: Path) -> None:
    config = small({"q_lora_rank": None, "yarn": None, "n_shared_experts": 2}, with_vision=False)
    tensors = fill(text_names(config.text, ""))
    folder = write(tmp_path / "moonlight", released_text_config(config.text, model_type="deepseek_v3"), tensors)
    assert run(Kimi.from_pretrained(folder)).isfinite().all()
    del tensors["lm_head.weight"]
    raw = released_text_config(config.text, model_type="deepseek_v3", tie_word_embeddings=True)
    kimi = Kimi.from_pretrained(write(tmp_path / "tied", raw, tensors))
    assert kimi.language_model.lm_head.weight is kimi.language_model.model.embed_tokens.weight
    kimi.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()
    assert torch.equal(run(Kimi.from_pretrained(tmp_path / "again")), run(kimi))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("shard", [10**9, 60_000])
def test_saved_and_read_back_is_byte_equal(tmp_path: Path, shard: int) -> None:
    config = packable(vocab_size=4096)
    tensors = fill(k2_5_names(config))
    kimi = Kimi.from_pretrained(write(tmp_path / "a", k2_5_config(config), tensors))
    kimi.tokenizer, kimi.chat_template = bundled_tokenizer(), "{{ messages }}"
    kimi.save_pretrained(tmp_path / "b", max_shard_bytes=shard)
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "b").glob("*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == tensors.keys()
    assert all(
        stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor) for name, tensor in tensors.items()
    )
    again = Kimi.from_pretrained(tmp_path / "b")
    assert torch.equal(run(again), run(kimi))
    assert again.config == kimi.config
    again.save_pretrained(tmp_path / "c", max_shard_bytes=shard)
    assert files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_parts_of_a_packed_matrix_that_were_dense_pack_to_the_same_bytes(tmp_path: Path) -> None:
    """Dequantise, quantise again with the stored scales: nothing moves."""
    from lm.int4 import requantize_int4

    config = packable()
    tensors = fill(k2_5_names(config))
    dense = Kimi.from_pretrained(write(tmp_path, k2_5_config(config), tensors), experts="dense")
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            weight = dense.get_parameter(name.removesuffix("_packed"))
            assert torch.equal(requantize_int4(weight, tensors[name.replace("packed", "scale")]), tensor)


@pytest.mark.parametrize(
    ("raw", "ignore", "folder", "profile"),
    [
        ({"eos_token_id": 163_586}, [], "x", "k2_6"),
        ({"eos_token_id": 163_585}, [], "x", "k2_5"),
        ({"eos_token_id": 163_586}, ["re:.*vision_tower.*"], "x", "k2_7_code"),
        ({"eos_token_id": 163_586}, [], "Kimi-K2.7-Code", "k2_7_code"),
        ({"eos_token_id": 163_586}, ["re:.*vision_tower.*"], "kimi-k2.6", "k2_6"),
        ({"eos_token_id": 163_586, "moonkit_profile": "k2_5"}, [], "Kimi-K2.7-Code", "k2_5"),
    ],
)
def test_chat_format_is_recognised(tmp_path: Path, raw: dict, ignore: list, folder: str, profile: str) -> None:
    config = presets.k2_6()
    whole = k2_5_config(config) | raw
    whole["text_config"]["quantization_config"]["ignore"] = ignore
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text(json.dumps(whole))
    assert read_config(tmp_path / folder).profile == profile


def test_all_208550_names_of_k2_5_load_at_tiny_width(tmp_path: Path) -> None:
    """61 layers of 384 experts with width 32: every name of the released index, in 64 shards."""
    base = presets.k2_5()
    text = replace(
        base.text,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_attention_heads=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
    )
    vision = small().vision
    assert vision is not None and base.vision is not None
    vision = replace(vision, num_layers=base.vision.num_layers)
    ids = {"bos_token_id": 500, "eos_token_id": 501, "pad_token_id": 502, "media_placeholder_token_id": 503}
    config = replace(base, text=text, vision=vision, **ids)
    names = list(k2_5_names(config))
    assert len(names) == 208_550
    packed = torch.randint(-(2**31), 2**31 - 1, (32, 4), dtype=torch.int32)
    scale, shape = torch.full((32, 1), 0.02, dtype=torch.bfloat16), torch.tensor([32, 32], dtype=torch.int32)
    quick = {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}
    tensors = fill(iter(n for n in names if ".mlp.experts." not in n[0]))
    tensors |= {name: quick[name.rpartition(".")[2]].clone() for name, _, _ in names if ".mlp.experts." in name}
    folder = write(tmp_path, k2_5_config(config), tensors, shards=64)
    kimi = Kimi.from_pretrained(folder)
    assert sum(isinstance(module, PackedLinear) for module in kimi.modules()) == 60 * 384 * 3
    assert run(kimi).isfinite().all()


MEMORY = """
import resource, sys, torch
from fusion.model import Kimi
def peak():
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024
import fusion.checkpoint
base = peak()
kimi = Kimi.from_pretrained(sys.argv[1])
size = sum(t.numel() * t.element_size() for t in kimi.state_dict().values())
print(size, peak() - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["int4", "bf16"])
def test_peak_memory_while_loading(tmp_path: Path, kind: str) -> None:
    """At most 1.15 times the model, whatever the size of its shards."""
    config = packable(
        hidden_size=512, moe_intermediate_size=512, n_routed_experts=64, num_hidden_layers=3, vocab_size=2048
    )
    config = replace(config, vision=None)
    experts = "INT4" if kind == "int4" else "BF16"
    tensors = fill(text_names(config.text, "", experts=experts))
    raw = released_text_config(config.text)
    if kind == "int4":
        raw["quantization_config"] = k2_5_config(packable())["text_config"]["quantization_config"]
    folder = write(tmp_path, raw, tensors, shards=8)
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    out = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True).stdout
    size, used = map(int, out.split())
    assert size > 50e6 if kind == "int4" else 200e6
    print(f"\n{kind}: model {size / 2**20:.0f} MiB, peak {used / 2**20:.0f} MiB, largest shard {shard / 2**20:.0f} MiB")
    assert used <= 1.15 * size + 8 * 2**20  # the interpreter's own growth


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kimi = Kimi(small()).eval()
    kimi.save_pretrained(tmp_path / "model")
    before = files_of(tmp_path / "model")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fusion.checkpoint.save_file", fails)
    with pytest.raises(OSError, match="no space"):
        kimi.save_pretrained(tmp_path / "model", overwrite=True)
    with pytest.raises(OSError, match="no space"):
        kimi.save_pretrained(tmp_path / "other")
    assert files_of(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_refuses_to_overwrite(tmp_path: Path) -> None:
    kimi = Kimi(small()).eval()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not empty"):
            kimi.save_pretrained(tmp_path / "notes", overwrite=overwrite)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    kimi.save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        kimi.save_pretrained(tmp_path / "model")
    kimi.save_pretrained(tmp_path / "model", overwrite=True)


def test_junk_is_ignored_by_name_only(tmp_path: Path) -> None:
    config = small(with_vision=False)
    tensors = fill(text_names(config.text, ""))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(released_text_config(config.text)))
    Kimi.from_pretrained(tmp_path)
    tensors["model.layers.0.self_attn.rotary_emb.other"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape("unexpected: model.layers.0.self_attn.rotary_emb.other")):
        Kimi.from_pretrained(tmp_path)


@pytest.mark.slow
def test_moonlight_in_int4_at_two_layers(tmp_path: Path) -> None:
    """Full width, all 64 experts, the full vocabulary; two of 27 layers. Loads, keeps its experts in 4 bits, runs."""
    config = presets.moonlight()
    config = replace(config, text=replace(config.text, num_hidden_layers=2))
    raw = released_text_config(config.text, rope_scaling=None, model_type="deepseek_v3")
    raw["quantization_config"] = k2_5_config(packable())["text_config"]["quantization_config"]
    folder = write(tmp_path, raw, fill(text_names(config.text, "", experts="INT4")), shards=4)
    kimi = Kimi.from_pretrained(folder)
    packed = sum(t.numel() * t.element_size() for n, t in kimi.state_dict().items() if ".experts." in n)
    assert packed / (64 * 8_650_752) < 4.51 / 8, "4.5 bits a weight"
    with torch.inference_mode():
        ids = torch.tensor([1, 2, 3, 163_585])
        logits = kimi.language_model.logits(kimi(ids))
        dense = Kimi.from_pretrained(folder, experts="dense")
        close = dense.language_model.logits(dense(ids))
    assert logits.isfinite().all() and (logits - close).abs().max() < 0.1 * close.std()
