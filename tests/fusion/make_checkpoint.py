"""Writes small checkpoints with exactly the released names, dtypes and files, for tests of the loader.

Written apart from fusion/checkpoint.py: names come from the released files' lists, not from our saver.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusion.config import KimiConfig
from lm.config import TextConfig
from lm.fp8 import quantize_fp8
from lm.int4 import quantize_int4
from moonvit.config import VisionConfig

Named = Iterator[tuple[str, tuple[int, ...], str]]  # name, shape, dtype as safetensors spells it


def text_names(c: TextConfig, prefix: str, experts: str = "BF16", others: str = "BF16", junk: int = 0) -> Named:
    """Every tensor of a released language model. experts: BF16, INT4 or FP8; others: BF16 or FP8 (matrices only).

    junk: elements of the rotary_emb.inv_freq tensor that old checkpoints carry in each layer.
    """

    def matrix(name: str, rows: int, columns: int, kind: str) -> Named:
        if kind == "INT4":
            yield f"{name}.weight_packed", (rows, columns // 8), "I32"
            yield f"{name}.weight_scale", (rows, columns // 32), "BF16"
            yield f"{name}.weight_shape", (2,), "I32"
            return
        yield f"{name}.weight", (rows, columns), "F8_E4M3" if kind == "FP8" else kind
        if kind == "FP8":
            yield f"{name}.weight_scale_inv", (-(-rows // 128), -(-columns // 128)), "F32"

    def mlp(name: str, inner: int, kind: str) -> Named:
        yield from matrix(f"{name}.gate_proj", inner, c.hidden_size, kind)
        yield from matrix(f"{name}.up_proj", inner, c.hidden_size, kind)
        yield from matrix(f"{name}.down_proj", c.hidden_size, inner, kind)

    yield f"{prefix}model.embed_tokens.weight", (c.vocab_size, c.hidden_size), "BF16"
    yield f"{prefix}model.norm.weight", (c.hidden_size,), "BF16"
    yield f"{prefix}lm_head.weight", (c.vocab_size, c.hidden_size), "BF16"
    heads = c.num_attention_heads
    for i in range(c.num_hidden_layers):
        layer = f"{prefix}model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (c.hidden_size,), "BF16"
        yield f"{layer}.post_attention_layernorm.weight", (c.hidden_size,), "BF16"
        attention = f"{layer}.self_attn"
        if junk:
            yield f"{attention}.rotary_emb.inv_freq", (junk,), "BF16"
        if c.q_lora_rank:
            yield from matrix(f"{attention}.q_a_proj", c.q_lora_rank, c.hidden_size, others)
            yield f"{attention}.q_a_layernorm.weight", (c.q_lora_rank,), "BF16"
            yield from matrix(f"{attention}.q_b_proj", heads * c.qk_head_dim, c.q_lora_rank, others)
        else:
            yield from matrix(f"{attention}.q_proj", heads * c.qk_head_dim, c.hidden_size, others)
        yield from matrix(f"{attention}.kv_a_proj_with_mqa", c.cache_dim, c.hidden_size, others)
        yield f"{attention}.kv_a_layernorm.weight", (c.kv_lora_rank,), "BF16"
        both = heads * (c.qk_nope_head_dim + c.v_head_dim)
        yield from matrix(f"{attention}.kv_b_proj", both, c.kv_lora_rank, others)
        yield from matrix(f"{attention}.o_proj", c.hidden_size, heads * c.v_head_dim, others)
        if i < c.first_k_dense_replace:
            yield from mlp(f"{layer}.mlp", c.intermediate_size, others)
            continue
        yield f"{layer}.mlp.gate.weight", (c.n_routed_experts, c.hidden_size), "BF16"
        yield f"{layer}.mlp.gate.e_score_correction_bias", (c.n_routed_experts,), "F32"
        yield from mlp(f"{layer}.mlp.shared_experts", c.moe_intermediate_size * c.n_shared_experts, others)
        for e in range(c.n_routed_experts):
            yield from mlp(f"{layer}.mlp.experts.{e}", c.moe_intermediate_size, experts)


def tower_names(v: VisionConfig, prefix: str = "vision_tower.") -> Named:
    """Every tensor of a released tower."""
    d = v.hidden_size
    yield f"{prefix}patch_embed.proj.weight", (d, 3, v.patch_size, v.patch_size), "BF16"
    yield f"{prefix}patch_embed.proj.bias", (d,), "BF16"
    yield f"{prefix}patch_embed.pos_emb.weight", (v.pos_emb_height, v.pos_emb_width, d), "BF16"
    parts = {"wqkv": (3 * d, d), "wo": (d, d), "mlp.fc0": (v.intermediate_size, d), "mlp.fc1": (d, v.intermediate_size)}
    for i in range(v.num_layers):
        block = f"{prefix}encoder.blocks.{i}"
        for norm in ("norm0", "norm1"):
            yield f"{block}.{norm}.weight", (d,), "BF16"
            yield f"{block}.{norm}.bias", (d,), "BF16"
        for part, shape in parts.items():
            yield f"{block}.{part}.weight", shape, "BF16"
            yield f"{block}.{part}.bias", shape[:1], "BF16"
    yield f"{prefix}encoder.final_layernorm.weight", (d,), "BF16"
    yield f"{prefix}encoder.final_layernorm.bias", (d,), "BF16"


def projector_names(v: VisionConfig, text_dim: int, kimi_vl: bool = False) -> Named:
    """The projector under K2.5's or Kimi-VL's names."""
    wide = 4 * v.hidden_size
    prefix, first, second = (
        ("multi_modal_projector", "linear_1", "linear_2") if kimi_vl else ("mm_projector", "proj.0", "proj.2")
    )
    yield f"{prefix}.pre_norm.weight", (v.hidden_size,), "BF16"
    yield f"{prefix}.pre_norm.bias", (v.hidden_size,), "BF16"
    for name, rows in ((first, wide), (second, text_dim)):
        yield f"{prefix}.{name}.weight", (rows, wide), "BF16"
        yield f"{prefix}.{name}.bias", (rows,), "BF16"


def k2_5_names(config: KimiConfig) -> Named:
    """K2.5, K2.6 and K2.7-Code: INT4 experts, everything else bfloat16."""
    assert config.vision is not None
    yield from text_names(config.text, "language_model.", experts="INT4")
    yield from tower_names(config.vision)
    yield from projector_names(config.vision, config.text.hidden_size)


def fill(names: Named, seed: int = 0) -> dict[str, Tensor]:
    """Random contents of unit gain. Packed and FP8 parts are made by quantising a random matrix."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape, dtype in names:
        if name.endswith(".weight_packed"):
            weight = torch.randn(shape[0], shape[1] * 8, generator=draw) / (shape[1] * 8) ** 0.5
            tensors[name], tensors[name.replace("packed", "scale")] = quantize_int4(weight)
            tensors[name.replace("packed", "shape")] = torch.tensor([shape[0], shape[1] * 8], dtype=torch.int32)
        elif dtype == "F8_E4M3":
            weight = torch.randn(shape, generator=draw) / shape[1] ** 0.5
            tensors[name], tensors[name + "_scale_inv"] = quantize_fp8(weight)
        elif name not in tensors:
            noise = torch.randn(shape, generator=draw)
            if len(shape) == 1:
                noise = (1 if name.endswith("weight") else 0) + 0.2 * noise
            elif "embed" not in name or name.endswith("proj.weight"):
                noise = noise / (noise[0].numel() ** 0.5)
            tensors[name] = noise.to({"BF16": torch.bfloat16, "F32": torch.float32}[dtype])
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1, **files: Any) -> Path:
    """A checkpoint folder. With several shards the tensors are dealt round robin, so that parts lie apart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    groups: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for number, (name, tensor) in enumerate(tensors.items()):
        groups[number % shards][name] = tensor
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{shards:06d}.safetensors"  # padding as uneven as the released one
        save_file(group, folder / file)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def released_text_config(c: TextConfig, **more: Any) -> dict[str, Any]:
    """The text part of a released config.json, with some of the inert fields that real dumps carry."""
    raw = {name: getattr(c, name) for name in c.__dataclass_fields__ if name not in ("yarn", "latent_norm_eps")}
    rope = {"type": "yarn", **vars(c.yarn)} if c.yarn else None
    inert = {
        "use_cache": True,
        "top_k": 50,
        "temperature": 1.0,
        "id2label": {"0": "LABEL_0"},
        "transformers_version": "4.56.2",
    }
    family = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu", "model_type": "kimi_k2"}
    return raw | {"rope_scaling": rope, "num_key_value_heads": c.num_attention_heads} | inert | family | more


def k2_5_config(config: KimiConfig, **more: Any) -> dict[str, Any]:
    """A config.json like K2.6's."""
    v = config.vision
    assert v is not None
    vision = {
        "vt_hidden_size": v.hidden_size,
        "vt_num_hidden_layers": v.num_layers,
        "vt_num_attention_heads": v.num_heads,
        "vt_intermediate_size": v.intermediate_size,
        "init_pos_emb_height": v.pos_emb_height,
        "init_pos_emb_width": v.pos_emb_width,
        "init_pos_emb_time": 4,
        "patch_size": 14,
        "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool",
        "pos_emb_type": "divided_fixed",
        "video_attn_type": "spatial_temporal",
        "mm_projector_type": "patchmerger",
        "mm_hidden_size": v.hidden_size,
        "text_hidden_size": config.text.hidden_size,
        "projector_hidden_act": "gelu",
        "projector_ln_eps": 1e-5,
        "_attn_implementation": "flash_attention_2",
    }
    int4 = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        # as K2.5 was first uploaded: the tower is not listed, though it is not quantised
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True, "type": "int"}}},
    }
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "tie_word_embeddings": False,
        "media_placeholder_token_id": config.media_placeholder_token_id,
        "text_config": released_text_config(config.text, quantization_config=int4),
        "vision_config": vision,
        **ids,
        **more,
    }


def map_names(tensors: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in tensors.items()}
