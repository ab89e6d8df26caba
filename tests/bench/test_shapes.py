"""The models that are measured: one memory for both sides, the same answers, bytes and operations as counted by hand.

pytest tests/bench/test_shapes.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gguf, peers, shapes
from fusion.generate import decode, prefill
from fusion.prompt import Prompt
from lm.config import moonlight
from lm.int4 import PackedLinear
from lm.step import Unfit, kernel
from moonvit.config import VisionConfig
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches


def test_what_a_step_and_a_prompt_need() -> None:
    moon = shapes.moon()
    # 834 M weights of 2 bytes for a token, 335 M of them the head; 1,152 bytes of cache for each token and layer
    assert shapes.step_bytes(moon, 1, 0) == pytest.approx(2 * 834e6, rel=2e-3)
    assert shapes.step_bytes(moon, 1, 8192) - shapes.step_bytes(moon, 1, 0) == 6 * 1152 * 8192
    # eight tokens hit 54 % of 64 experts by chance: 34.8 of them instead of 6, five layers, 8.65 M weights each
    more = shapes.step_bytes(moon, 8, 0) - shapes.step_bytes(moon, 1, 0)
    hit = 64 * (1 - (58 / 64) ** 8)
    assert more == pytest.approx((hit - 6) * 5 * 2 * 3 * 2048 * 1408, rel=1e-6)
    experts = 5 * 6 * 3 * 2048 * 1408
    saved = shapes.step_bytes(moon, 1, 0) - shapes.step_bytes(moon, 1, 0, "int4 experts")
    assert saved == pytest.approx(experts * (2 - 4.5 / 8))
    # kv_b and the routers stay: 6 * 512 * 16 * 256 and 5 * 64 * 2048 weights
    rest = 834e6 - 6 * 512 * 16 * 256 - 5 * 64 * 2048
    assert shapes.step_bytes(moon, 1, 0, "int4 all") == pytest.approx(rest * 4.5 / 8 + 2 * (834e6 - rest), rel=3e-3)
    # without the head 499 M weights for a token; causal pairs, 16 heads, 192 + 128 wide
    assert shapes.prompt_flops(moon, 512) == pytest.approx(
        2 * 499e6 * 512 + 2 * 6 * 5120 * 512**2 / 2 + 671e6, rel=5e-3
    )
    assert shapes.tower_flops(1152, 4304, 27, [256]) == pytest.approx(
        27 * 256 * 2 * 15.23e6 + 27 * 4 * 256**2 * 1152, rel=1e-3
    )


def test_transformers_reads_our_memory_and_gives_our_answers() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    kimi = shapes.random_model(shapes.tiny(), torch.float32)
    twin = peers.transformers_language(kimi)
    for mine, theirs in (
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        assert kimi.language_model.get_parameter(mine).data_ptr() == twin.get_parameter(theirs).data_ptr()
    moe = kimi.language_model.model.layers[1].mlp
    fused = twin.model.layers[1].mlp.experts.gate_up_proj
    assert fused.data_ptr() == moe.experts[0].gate_proj.weight.data_ptr()
    assert torch.equal(fused[3, -1], moe.experts[3].up_proj.weight[-1])
    ids = torch.randint(0, kimi.config.text.vocab_size, (50,))
    with torch.inference_mode():
        cache = kimi.language_model.new_cache(1)
        torch.testing.assert_close(prefill(kimi, Prompt(ids), cache), peers.transformers_prompt(twin, ids))
        out = twin(input_ids=ids[None], use_cache=True)
        step = peers.transformers_step(twin, torch.tensor([7]), out.past_key_values)
        torch.testing.assert_close(decode(kimi, [7], cache), step)
        held = peers.transformers_cache(twin, 2, 50).layers[0]
        real = out.past_key_values.layers[0]
        assert held.keys.shape[2:] == (50, real.keys.shape[3]) and held.values.shape[3] == real.values.shape[3]


def test_transformers_tower_sees_as_ours() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = VisionConfig(
        hidden_size=64, num_heads=4, intermediate_size=128, num_layers=2, pos_emb_height=8, pos_emb_width=8
    )
    tower = MoonViT(sizes).eval().requires_grad_(False)
    torch.nn.init.normal_(tower.patch_embed.pos_emb.weight)
    media = PackedPatches(torch.randn(40, 3, 14, 14), torch.tensor([(1, 4, 4), (1, 4, 6)]))
    twin = peers.transformers_tower(tower)
    theirs = twin(media.pixels, grid_thw=media.grid_thw).pooler_output
    torch.testing.assert_close(theirs.reshape(tower(media).shape), tower(media))


def test_no_two_experts_are_alike() -> None:
    moe = shapes.random_model(shapes.tiny()).language_model.model.layers[2].mlp
    firsts = torch.stack([expert.up_proj.weight[0] for expert in moe.experts])
    assert len(firsts.unique(dim=0)) == len(moe.experts)
    assert all(parameter.isfinite().all() for parameter in moe.parameters())


@pytest.mark.parametrize("which", ["experts", "all"])
def test_weights_in_four_bits(which: str) -> None:
    plain = shapes.random_model(shapes.tiny())
    packed = shapes.in_int4(plain, which)  # type: ignore[arg-type]
    kinds = {path: isinstance(module, PackedLinear) for path, module in packed.named_modules() if "_proj" in path}
    assert all(kinds[path] == (".experts." in path or which == "all") for path in kinds if "kv_b_proj" not in path)
    assert not any(kinds[path] for path in kinds if path.endswith("kv_b_proj"))
    assert isinstance(packed.language_model.lm_head, PackedLinear) == (which == "all")
    shared = packed.language_model.model.embed_tokens.weight
    assert shared.data_ptr() == plain.language_model.model.embed_tokens.weight.data_ptr()
    with torch.inference_mode():
        logits = decode(packed, [5, 6], shapes.filled_cache(packed, 2, 20))
    assert logits.isfinite().all() and logits.std() > 0
    try:
        kernel()
    except Unfit:
        return
    assert packed.language_model.stepper() is not None, "else a bench of the kernel would measure the plain form"


def test_a_gguf_file(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf")
    config = replace(moonlight(), num_hidden_layers=2, hidden_size=64, intermediate_size=128, moe_intermediate_size=32)
    config = replace(config, vocab_size=320, n_routed_experts=8, kv_lora_rank=32, qk_nope_head_dim=32)
    config = replace(config, qk_rope_head_dim=32, v_head_dim=32, num_attention_heads=2)
    gguf.write(tmp_path / "small.gguf", config)
    file = reader.GGUFReader(tmp_path / "small.gguf")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert list(tensors["blk.1.ffn_gate_exps.weight"].shape) == [64, 32, 8]  # the file's order: the last axis first
    assert tensors["blk.1.ffn_gate_exps.weight"].tensor_type.name == "Q4_0"
    assert tensors["blk.0.attn_k_b.weight"].tensor_type.name == "BF16"
    assert "blk.0.ffn_gate.weight" in tensors and "blk.1.ffn_gate.weight" not in tensors
    weights = reader.dequantize(tensors["output.weight"].data, reader.GGMLQuantizationType.Q4_0)
    assert weights.shape == (320, 64) and 0.01 < weights.std() < 0.03
    assert file.fields["deepseek2.expert_used_count"].contents() == 6
    with pytest.raises(ValueError, match="q_lora_rank"):
        gguf.write(tmp_path / "no.gguf", shapes.tiny())
    with pytest.raises(ValueError, match="blocks of 32"):
        gguf.write(tmp_path / "no.gguf", replace(config, moe_intermediate_size=40))
