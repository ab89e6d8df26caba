"""The parity oracle: transformers' Kimi_K25 and DeepseekV3 with our config and their weights under released names.

The renaming here is written apart from fusion/checkpoint.py on purpose: a shared mistake would hide itself.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion.config import KimiConfig
from fusion.model import Kimi
from lm.config import TextConfig
from moonvit.config import VisionConfig


def text_config(config: TextConfig) -> Any:
    """transformers' config of the same language model."""
    from transformers import DeepseekV3Config

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn:
        rope |= {"rope_type": "yarn", **vars(config.yarn)}
    same = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "n_shared_experts n_routed_experts routed_scaling_factor kv_lora_rank q_lora_rank qk_rope_head_dim v_head_dim "
        "qk_nope_head_dim n_group topk_group num_experts_per_tok first_k_dense_replace norm_topk_prob "
        "max_position_embeddings rms_norm_eps"
    )
    values = {name: getattr(config, name) for name in same.split()}
    return DeepseekV3Config(
        **values, num_key_value_heads=config.num_attention_heads, rope_parameters=rope, tie_word_embeddings=False
    )


def reference_model(config: KimiConfig, seed: int = 0) -> nn.Module:
    """transformers' model, float32, with unit-gain matrices and random norms, biases and buffers."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    transformers.logging.set_verbosity_error()
    if config.vision is None:
        model = transformers.DeepseekV3ForCausalLM(text_config(config.text))
    else:
        from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig

        v = config.vision
        vision = Kimi_K25VisionConfig(
            patch_size=v.patch_size,
            pos_emb_height=v.pos_emb_height,
            pos_emb_width=v.pos_emb_width,
            pos_emb_time=v.pos_emb_time,
            num_attention_heads=v.num_heads,
            num_hidden_layers=v.num_layers,
            hidden_size=v.hidden_size,
            intermediate_size=v.intermediate_size,
        )
        whole = transformers.Kimi_K25Config(
            text_config=text_config(config.text),
            vision_config=vision,
            projection_hidden_size=v.hidden_size,
            image_token_id=config.media_placeholder_token_id,
            tie_word_embeddings=False,
        )
        model = transformers.Kimi_K25ForConditionalGeneration(whole)
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Unit gain and random norms, biases and correction biases: what default initialisation would hide shows."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim == 1:
            parameter.copy_((1 if name.endswith("weight") else 0) + 0.3 * noise)
        elif "embed_tokens" in name or "pos_emb" in name:
            parameter.copy_(noise)
        else:
            fan_in = parameter[0].numel() if "conv" in name or parameter.ndim == 4 else parameter.shape[-1]
            parameter.copy_(noise / fan_in**0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draw))


def released_state(config: KimiConfig, model: nn.Module) -> dict[str, Tensor]:
    """The oracle's weights under the released names."""
    released: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if config.vision is None:
            name = "language_model." + name
        name = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
        name = re.sub(r"^lm_head", "language_model.lm_head", name)
        if name.startswith("vision_tower."):
            name = re.sub(r"vision_tower\.layers\.(\d+)", r"vision_tower.encoder.blocks.\1", name)
            name = name.replace("pos_emb.position_embeddings", "pos_emb.weight")
            name = name.replace("vision_tower.final", "vision_tower.encoder.final")
            for new, old in ((".norm1.", ".norm0."), (".norm2.", ".norm1."), (".fc1.", ".fc0."), (".fc2.", ".fc1.")):
                if new in name:
                    name = name.replace(new, old)
                    break
            name = name.replace(".attn.proj.", ".wo.")
            if match := re.match(r"(.*)\.attn\.([qkv])_proj\.(weight|bias)", name):
                qkv.setdefault(f"{match[1]}.wqkv.{match[3]}", {})[match[2]] = tensor
                continue
        name = name.replace("mm_projector.in_proj", "mm_projector.proj.0")
        name = name.replace("mm_projector.out_proj", "mm_projector.proj.2")
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                released[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                released[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                released[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            released[name] = tensor
    for name, parts in qkv.items():
        assert config.vision is not None
        heads = config.vision.num_heads
        for part in "qk":  # rotate-half back to interleaved pairs
            split = parts[part].unflatten(0, (heads, 2, -1))
            parts[part] = split.transpose(1, 2).flatten(0, 2)
        released[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return released


def twin(config: KimiConfig, model: nn.Module) -> Kimi:
    """Our model with the oracle's weights."""
    kimi = Kimi(config).eval()
    kimi.load_state_dict(released_state(config, model), strict=True)
    return kimi


def small(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, with_vision: bool = True
) -> KimiConfig:
    """A tiny config of the K2.5 kind, with changes."""
    import fusion.config as presets

    base = presets.tiny()
    assert base.vision is not None
    new_text: TextConfig = replace(base.text, **{"vocab_size": 400, "num_hidden_layers": 2, **(text or {})})
    new_vision: VisionConfig = replace(base.vision, **(vision or {}))
    ids = {"bos_token_id": 390, "eos_token_id": 391, "pad_token_id": 392, "media_placeholder_token_id": 393}
    return KimiConfig(new_text, new_vision if with_vision else None, **ids)
