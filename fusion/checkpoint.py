"""Checkpoints: every layout of the family in, the released layout out.

    config.json -> KimiConfig -> model on the meta device -> tensors, shard by shard -> Kimi

Read: the released layout (K2.5 and later), K2 and Moonlight (text only), Kimi-VL, transformers' own layout and the one
that its save_pretrained writes; bfloat16, block FP8, INT4. A layout is recognised by its tensor names. Junk is ignored
by name; anything else missing, unexpected or misshapen is an error that lists the names, before weights are read.
Peak memory is the model plus what is read ahead: 64 MiB at most, and one tensor.
"""

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusion.config import KimiConfig, Profile, ProjectorConfig
from fusion.model import Kimi
from lm.config import TextConfig
from lm.fp8 import dequantize_fp8
from lm.int4 import GROUP, PackedLinear, dequantize_int4
from lm.moe import MoE
from lm.tokenizer import Tokenizer
from moonvit.config import MediaConfig, VisionConfig
from moonvit.load import INDEX, Shards, Stored, join_qkv, name_differences, read_json, resolve, tower_name

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


# ---- config.json -----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> KimiConfig:
    """The config of a checkpoint folder. Raises ValueError for what this model does not implement."""
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    known = ("kimi_k25", "kimi_vl", "kimi_k2", "deepseek_v3")
    if kind not in known:
        where = folder / "config.json"
        hint = "; MoonViT.from_pretrained loads towers alone" if kind == "moonvit" else ""
        raise ValueError(f"{where}: model_type {kind!r} is not known (known: {', '.join(known)}){hint}")
    sees = kind in ("kimi_k25", "kimi_vl")
    text_raw, vision_raw = raw.get("text_config", {}) if sees else raw, raw.get("vision_config", {})
    for name, section in (("text_config", text_raw), ("vision_config", vision_raw)):
        if not isinstance(section, dict):
            raise ValueError(f"{folder / 'config.json'}: {name} must be an object")
    try:
        text = TextConfig.from_dict(text_raw)
        if sees:  # the head is tied by the whole model's flag; class defaults differ, so only the file counts
            text = replace(text, tie_word_embeddings=raw.get("tie_word_embeddings", text.tie_word_embeddings))
        _refuse_unknown(text_raw, "text_config" if sees else "config.json", _TEXT_KEYS)
        vision = VisionConfig.from_dict(vision_raw) if sees else None
        if sees:
            _refuse_unknown(vision_raw, "vision_config", _VISION_KEYS)
        media = _read_media(folder, kind)
        quantization = text_raw.get("quantization_config") or raw.get("quantization_config")
        _check_quantization(quantization)
        projector = _read_projector(kind, raw, vision_raw, text)
        return KimiConfig(
            text,
            vision,
            projector,
            media,
            profile=_profile(kind, raw, quantization, folder),
            bos_token_id=_id(raw, text_raw, "bos_token_id", text.vocab_size - 256),
            eos_token_id=_id(raw, text_raw, "eos_token_id", text.vocab_size - 254),
            pad_token_id=_id(raw, text_raw, "pad_token_id", text.vocab_size - 1),
            media_placeholder_token_id=_id(raw, raw, "media_placeholder_token_id", raw.get("image_token_id") or 163_605)
            if sees
            else text.vocab_size - 235,
            quantization=quantization,
        )
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: a value has the wrong type ({error})") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _id(raw: dict[str, Any], text: dict[str, Any], name: str, default: int) -> int:
    value = raw.get(name) if raw.get(name) is not None else text.get(name)
    value = default if value is None else value
    return value[0] if isinstance(value, list) else value


def _read_media(folder: Path, kind: str) -> MediaConfig:
    path = folder / "preprocessor_config.json"
    if path.is_file():
        raw = read_json(path)
        if "media_proc_cfg" in raw or "in_token_limit" in raw:
            return MediaConfig.from_dict(raw)
        log.info("%s: not a released preprocessor config; the rules of K2.5 apply", path)
    if kind == "kimi_vl":
        return MediaConfig(in_patch_limit=4096, in_patch_limit_each_frame=None, rule="kimi_vl")
    return MediaConfig()


def _read_projector(kind: str, raw: dict[str, Any], vision: dict[str, Any], text: TextConfig) -> ProjectorConfig:
    if kind == "kimi_vl":
        return ProjectorConfig("kimi_vl")
    if vision.get("mm_projector_type", "patchmerger") != "patchmerger":
        raise ValueError(f"mm_projector_type {vision['mm_projector_type']!r} is not implemented (known: patchmerger)")
    if vision.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"projector_hidden_act {vision['projector_hidden_act']!r} is not implemented (known: gelu)")
    for name, wanted in (("text_hidden_size", text.hidden_size), ("mm_hidden_size", vision.get("vt_hidden_size"))):
        if vision.get(name) not in (None, wanted):
            raise ValueError(f"vision_config: {name} is {vision[name]} but the model it describes has {wanted}")
    eps = vision.get("projector_ln_eps", raw.get("projection_layer_norm_eps", 1e-5))
    return ProjectorConfig("patchmerger", eps)


def _check_quantization(quantization: Any) -> None:
    """Only what released checkpoints use. Which tensors are quantised is read off their names, not the ignore list."""
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "fp8":
        if quantization.get("weight_block_size", [128, 128]) != [128, 128]:
            raise ValueError(f"FP8 blocks of {quantization['weight_block_size']} are not implemented (known: 128x128)")
        return
    if method != "compressed-tensors" or quantization.get("format") not in (None, "pack-quantized"):
        raise ValueError(
            f"quantization {method!r} / {quantization.get('format') if method else None!r} is not implemented"
        )
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        wanted = {"num_bits": 4, "group_size": GROUP, "symmetric": True, "type": "int", "strategy": "group"}
        wrong = {key: weights[key] for key, value in wanted.items() if weights.get(key, value) != value}
        if wrong or weights.get("actorder"):
            raise ValueError(
                f"quantization with {wrong or 'actorder'} is not implemented (known: INT4, groups of {GROUP})"
            )


def _profile(kind: str, raw: dict[str, Any], quantization: dict[str, Any] | None, folder: Path) -> Profile:
    """Which chat format. The configs of K2.5, K2.6 and K2.7-Code hardly differ, so several hints are needed."""
    own = raw.get("moonkit_profile")
    if own is not None:
        if own not in Profile.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"moonkit_profile {own!r} is unknown")
        return own
    profile: Profile
    if kind == "kimi_vl":
        return "kimi_vl"
    if kind in ("kimi_k2", "deepseek_v3"):
        profile = "k2_thinking" if (quantization or {}).get("quant_method") == "compressed-tensors" else "k2"
        log.info("chat format %s: text only, %s", profile, "INT4" if profile == "k2_thinking" else "not INT4")
        return profile
    named = re.search(r"k2[._-]?([567])", str(folder.resolve()).lower())
    if named:
        profile = {"5": "k2_5", "6": "k2_6", "7": "k2_7_code"}[named[1]]  # type: ignore[assignment]
        why = "the folder's name"
    elif "re:.*vision_tower.*" in ((quantization or {}).get("ignore") or ()):
        profile, why = "k2_7_code", "the quantization ignore list"
    elif _id(raw, raw.get("text_config", {}), "eos_token_id", 0) == 163_586:
        profile, why = "k2_6", "eos_token_id 163586"
    else:
        profile, why = "k2_5", "eos_token_id other than 163586"
    log.info("chat format %s, by %s", profile, why)
    return profile


_HF_KEYS = set(
    """
    _name_or_path add_cross_attention architectures attention_bias attention_dropout auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype torch_dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label label2id initializer_range is_decoder is_encoder_decoder
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads quantization_config remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript transformers_version
    typical_p unk_token_id use_bfloat16 use_cache _attn_implementation _attn_implementation_autoset
    attn_implementation moonkit_profile
    """.split()
)
_TEXT_KEYS = _HF_KEYS | set(
    """
    aux_loss_alpha ep_size first_k_dense_replace head_dim hidden_act hidden_size intermediate_size kv_lora_rank
    max_position_embeddings moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts
    norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads
    num_nextn_predict_layers num_local_experts output_router_logits pretraining_tp q_lora_rank qk_head_dim
    qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_interleave rope_parameters rope_scaling rope_theta
    routed_scaling_factor router_aux_loss_coef scoring_func seq_aux topk_group topk_method v_head_dim vocab_size
    media_placeholder_token_id
    """.split()
)
_VISION_KEYS = _HF_KEYS | set(
    """
    patch_size init_pos_emb_height init_pos_emb_width init_pos_emb_time pos_emb_height pos_emb_width
    pos_emb_time pos_emb_type vt_hidden_size vt_num_hidden_layers vt_num_attention_heads vt_intermediate_size
    hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act merge_kernel_size merge_type
    video_attn_type mm_projector_type mm_hidden_size projector_hidden_act projector_ln_eps text_hidden_size
    rope_parameters vision_config_type num_channels in_channels
    """.split()
)


def _refuse_unknown(raw: dict[str, Any], where: str, known: set[str]) -> None:
    unknown = sorted(key for key, value in raw.items() if key not in known and value not in (None, False, {}, []))
    if unknown:
        raise ValueError(
            f"{where}: unknown keys {', '.join(unknown[:20])}: they may change the maths; delete those that do not"
        )


def config_to_dict(config: KimiConfig, dtype: torch.dtype, packed: bool) -> dict[str, Any]:
    """The released config.json. packed: the experts are stored in INT4."""
    name = str(dtype).removeprefix("torch.")
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    text = config.text.to_dict() | ids
    if packed:
        stored = config.quantization or {}
        kept = stored if stored.get("quant_method") == "compressed-tensors" else _INT4
        text["quantization_config"] = kept
    own = {"moonkit_profile": config.profile, "dtype": name}
    text_type = "kimi_k2" if config.text.q_lora_rank else "deepseek_v3"
    text |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": text_type}
    if config.vision is None:
        return text | own
    whole = {"tie_word_embeddings": config.text.tie_word_embeddings, "ignore_index": -100, **ids, **own}
    whole["media_placeholder_token_id"] = config.media_placeholder_token_id
    v = config.vision
    if config.projector.kind == "kimi_vl":
        vision: dict[str, Any] = {
            "model_type": "moonvit",
            "patch_size": v.patch_size,
            "init_pos_emb_height": v.pos_emb_height,
            "init_pos_emb_width": v.pos_emb_width,
            "num_attention_heads": v.num_heads,
            "num_hidden_layers": v.num_layers,
            "hidden_size": v.hidden_size,
            "intermediate_size": v.intermediate_size,
            "merge_kernel_size": [v.merge, v.merge],
        }
        architecture, kind = "KimiVLForConditionalGeneration", "kimi_vl"
        text["model_type"] = "deepseek_v3"
    else:
        vision = v.to_dict() | {
            # transformers' native class knows only these spellings, and falls back to the 400M tower's without them
            "hidden_size": v.hidden_size,
            "num_hidden_layers": v.num_layers,
            "num_attention_heads": v.num_heads,
            "intermediate_size": v.intermediate_size,
            "pos_emb_height": v.pos_emb_height,
            "pos_emb_width": v.pos_emb_width,
            "mm_hidden_size": v.hidden_size,
            "mm_projector_type": "patchmerger",
            "projector_hidden_act": "gelu",
            "projector_ln_eps": config.projector.norm_eps,
            "text_hidden_size": config.text.hidden_size,
        }
        architecture, kind = "KimiK25ForConditionalGeneration", "kimi_k25"
        whole |= {"use_unified_vision_chunk": True, "video_placeholder": "<|kimi_k25_video_placeholder|>"}
        whole |= {"image_token_id": config.media_placeholder_token_id, "projection_hidden_size": v.hidden_size}
    return whole | {
        "architectures": [architecture],
        "model_type": kind,
        "text_config": text | {"dtype": name},
        "vision_config": vision,
    }


_INT4: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": GROUP,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "re:.*lm_head.*",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        "re:.*vision_tower.*",
        "re:.*mm_projector.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


# ---- names -----------------------------------------------------------------------------------------------------------

_JUNK = re.compile(r"rotary_emb\.inv_freq$")  # old K2 checkpoints carry them; computed from the config instead
_PARTS = {
    ".weight_packed": "packed",
    ".weight_scale": "scale",
    ".weight_shape": "shape",
    ".weight_scale_inv": "scale_inv",
}


@dataclass(frozen=True)
class Place:
    """Where a stored tensor belongs: the model's tensor, and which part of it this is ("" for the whole)."""

    target: str
    part: str = ""


def place_of(name: str, sees: bool) -> Place:
    """The place of any layout's tensor name. Names that belong nowhere keep their own."""
    tower = tower_name(name) if sees else None
    if tower is not None:
        return Place("vision_tower." + tower[0], tower[1])
    name = re.sub(r"^(?:model\.)?(?:mm_projector|multi_modal_projector)\.", "mm_projector.", name)
    if name.startswith("mm_projector."):
        for other, ours in (
            ("linear_1", "proj.0"),
            ("linear_2", "proj.2"),
            ("in_proj", "proj.0"),
            ("out_proj", "proj.2"),
        ):
            name = name.replace(f"mm_projector.{other}.", f"mm_projector.{ours}.")
        return Place(name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)  # transformers, in memory
    if not name.startswith("language_model."):
        name = "language_model." + name  # K2, Moonlight
    name = re.sub(r"^language_model\.(layers|embed_tokens|norm)\.", r"language_model.model.\1.", name)
    name = name.replace("language_model.model.blocks.", "language_model.model.layers.")  # its save_pretrained
    for suffix, part in _PARTS.items():
        if name.endswith(suffix):
            return Place(name.removesuffix(suffix) + ".weight", part)
    fused = re.match(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$", name)
    if fused:
        return Place(fused[1], fused[2])
    return Place(name)


# ---- loading ---------------------------------------------------------------------------------------------------------


def _in_the_box(path_or_hub_id: str | Path) -> bool:
    return str(path_or_hub_id) == "nano" and not Path("nano").exists()


def locate(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint: "nano" is the model in the box unless a folder has that name; else see `resolve`.

    Raises FileNotFoundError or NotADirectoryError that says what was tried.
    """
    if not _in_the_box(path_or_hub_id):
        return resolve(path_or_hub_id)
    folder = Path(str(files("fusion") / "assets" / "nano"))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("this build ships no trained nano weights; 'untrained:nano' has its shape, untrained")
    return folder


def load_model(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    experts: Literal["packed", "dense"] = "packed",
    progress: Progress | None = None,
) -> Kimi:
    """See Kimi.from_pretrained."""
    dtype, device = _dtype(dtype), _device(device)
    if experts not in ("packed", "dense"):
        raise ValueError(f'experts must be "packed" or "dense", got {experts!r}')
    name = str(path_or_hub_id)
    if name.startswith("untrained:"):
        kimi = Kimi.untrained(name.removeprefix("untrained:"))
        kimi = kimi.to(device=device, dtype=dtype)
        kimi.language_model.stack_experts()
        return kimi
    folder = locate(path_or_hub_id)
    if _in_the_box(name):
        if dtype is None and (device is None or device.type == "cpu"):
            dtype = torch.float32  # 47 MB; many CPUs multiply bfloat16 fifty times slower
        experts = "dense"  # 4 bits save nothing at this size
    config = read_config(folder)
    shards = Shards(folder)
    with torch.device("meta"):
        kimi = Kimi(config)
    load_weights(kimi, shards, dtype, device, experts, progress)
    kimi.tokenizer = Tokenizer.from_folder(folder) if (folder / "tiktoken.model").is_file() else None
    if kimi.tokenizer is not None and kimi.tokenizer.vocab_size > config.text.vocab_size + 2:  # K2-Base reserves 258
        raise ValueError(
            f"{folder}: the tokenizer has {kimi.tokenizer.vocab_size:,} ids, the model {config.text.vocab_size:,}"
        )
    template = folder / "chat_template.jinja"
    kimi.chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
    return kimi.eval()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"dtype {dtype!r} is unknown (known: float32, bfloat16, float16)")
        return found
    return dtype


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)  # a build may know a device that this machine lacks
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason})") from None
    return found


def load_weights(
    kimi: Kimi,
    shards: Shards,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    experts: Literal["packed", "dense"] = "packed",
    progress: Progress | None = None,
) -> None:
    """Fill a model that lies on the meta device. Everything is checked by name and shape before weights are read."""
    places = _places(kimi, shards)
    packed = {place.target for place in places.values() if place.part == "packed"}
    if experts == "packed":
        for target in packed:
            if ".mlp.experts." in target:
                _swap_for_packed(kimi, target.removesuffix(".weight"))
    wanted: dict[str, Tensor] = dict(kimi.named_parameters())
    wanted |= dict(kimi.named_buffers())
    _check_shapes(kimi, shards, places, wanted)

    if dtype is None:  # one dtype for all: that of the embedding
        embedding = next(n for n, p in places.items() if p.target.endswith("embed_tokens.weight"))
        dtype = shards.tensors[embedding].dtype
    for module in kimi.modules():
        if isinstance(module, MoE):
            module.reserve_stacks(dtype, device)
    put = _Filler(kimi, dtype, device)
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in shards.read(places.__contains__, progress):
        place = places[name]
        quantised = place.target in packed or _sibling(name, shards)
        if not place.part and not quantised:
            put(place.target, tensor)
        elif place.part in ("gate_up_proj", "down_proj"):
            _unfuse(put, place, tensor)
        elif place.part == "shape":
            _check_stored_shape(kimi, place, tensor, name)
            if place.target not in wanted:
                put.raw(f"{place.target}_shape", tensor.to(torch.int32))
        elif place.target in packed and place.target not in wanted:  # stays packed
            put.raw(f"{place.target}_{place.part}", tensor)
        else:
            parts = waiting.setdefault(place.target, {})
            parts[place.part] = tensor
            whole = _assemble(parts, place.target, kimi, packed)
            if whole is not None:
                put(place.target, whole)
                del waiting[place.target]
    if kimi.config.text.tie_word_embeddings:
        kimi.language_model.lm_head.weight = kimi.language_model.model.embed_tokens.weight
        put.filled.add("language_model.lm_head.weight")
    left = sorted(set(kimi.state_dict()) - put.filled)
    assert not left and not waiting, f"checked by name, yet not filled: {left[:5]}, {list(waiting)[:5]}"


def _places(kimi: Kimi, shards: Shards) -> dict[str, Place]:
    """Stored name to place, for every tensor that is not junk. Raises for missing and unexpected names."""
    sees = kimi.config.vision is not None
    junk = [name for name in shards.tensors if _JUNK.search(name)]
    if junk:
        log.info("%s: %d rotary_emb.inv_freq tensors are ignored: they are computed", shards.folder, len(junk))
    places = {name: place_of(name, sees) for name in shards.tensors if not _JUNK.search(name)}
    expected = set(kimi.state_dict())
    head = "language_model.lm_head.weight"
    if kimi.config.text.tie_word_embeddings:
        expected.discard(head)
        places = {name: place for name, place in places.items() if place.target != head}
    have: dict[str, set[str]] = {}
    for place in places.values():
        have.setdefault(place.target, set()).add(place.part)
    groups = {target for target in have if target.endswith(".mlp.experts")}
    for group in groups:  # fused experts stand for all of theirs
        for part in have.pop(group):
            kinds = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            have |= {t: {""} for t in expected if t.startswith(group + ".") and t.split(".")[-2] in kinds}
    whole = ({""}, {"packed", "scale", "shape"}, {"packed", "scale"}, {"", "scale_inv"}, {"q", "k", "v"})
    incomplete = [f"{t} (only {', '.join(sorted(p)) or 'weight'})" for t, p in have.items() if p not in whole]
    missing = sorted(expected - set(have)) + sorted(t for t in incomplete if t.split(" ")[0] in expected)
    known = expected | groups
    unexpected = sorted(name for name, place in places.items() if place.target not in known)
    if missing or unexpected:
        raise name_differences(missing, unexpected, shards.folder)
    return places


def _sibling(name: str, shards: Shards) -> bool:
    return name + "_scale_inv" in shards.tensors


def _swap_for_packed(kimi: Kimi, path: str) -> None:
    parent, _, leaf = path.rpartition(".")
    module = kimi.get_submodule(parent)
    linear = getattr(module, leaf)
    with torch.device("meta"):
        setattr(module, leaf, PackedLinear(linear.in_features, linear.out_features))


def _check_shapes(kimi: Kimi, shards: Shards, places: dict[str, Place], wanted: dict[str, Tensor]) -> None:
    for name, place in places.items():
        stored = shards.tensors[name]
        expected = _expected_shape(kimi, place, wanted)
        if expected is not None and stored.shape != expected:
            raise ValueError(f"{stored.file}: {name} has shape {list(stored.shape)}, the config wants {list(expected)}")
        kinds: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        if place.part in ("packed", "shape"):
            kinds = (torch.int32, torch.int64)
        elif _sibling(name, shards):
            kinds = (torch.float8_e4m3fn,)
        if stored.dtype not in kinds:
            raise ValueError(
                f"{stored.file}: {name} has dtype {stored.dtype}, expected one of {[str(k) for k in kinds]}"
            )


def _expected_shape(kimi: Kimi, place: Place, wanted: dict[str, Tensor]) -> tuple[int, ...] | None:
    text = kimi.config.text
    if place.part == "gate_up_proj":
        return (text.n_routed_experts, 2 * text.moe_intermediate_size, text.hidden_size)
    if place.part == "down_proj":
        return (text.n_routed_experts, text.hidden_size, text.moe_intermediate_size)
    if place.target in wanted:
        rows, *rest = wanted[place.target].shape
    else:
        module: Any = kimi.get_submodule(place.target.removesuffix(".weight"))
        rows, rest = module.out_features, [module.in_features]
    if place.part == "packed":
        return (rows, -(-rest[0] // 8))
    if place.part == "scale":
        if rest[0] % GROUP:
            raise ValueError(f"{place.target}: INT4 in groups of {GROUP} cannot hold a width of {rest[0]}")
        return (rows, rest[0] // GROUP)
    if place.part == "shape":
        return (2,)
    if place.part == "scale_inv":
        return (-(-rows // 128), -(-rest[0] // 128))
    return (rows // 3, *rest) if place.part in ("q", "k", "v") else (rows, *rest)


def _check_stored_shape(kimi: Kimi, place: Place, stored: Tensor, name: str) -> None:
    """weight_shape repeats what the config says; where it does not, one of the two is wrong."""
    module: Any = kimi.get_submodule(place.target.removesuffix(".weight"))
    if stored.tolist() != [module.out_features, module.in_features]:
        raise ValueError(f"{name} says {stored.tolist()}, the config {[module.out_features, module.in_features]}")


def _assemble(parts: dict[str, Tensor], target: str, kimi: Kimi, packed: set[str]) -> Tensor | None:
    """The whole tensor once all of its parts are there."""
    if target in packed:
        if not {"packed", "scale"} <= set(parts):
            return None
        in_features = kimi.get_parameter(target).shape[1]
        return dequantize_int4(parts["packed"], parts["scale"], in_features)
    if "scale_inv" in parts:
        return dequantize_fp8(parts[""], parts["scale_inv"]) if "" in parts else None
    if {"q", "k", "v"} <= set(parts):
        assert kimi.config.vision is not None
        return join_qkv(parts, kimi.config.vision.num_heads)
    return None


def _unfuse(put: "_Filler", place: Place, tensor: Tensor) -> None:
    for expert, matrix in enumerate(tensor):
        if place.part == "down_proj":
            put(f"{place.target}.{expert}.down_proj.weight", matrix)
        else:
            gate, up = matrix.chunk(2)
            put(f"{place.target}.{expert}.gate_proj.weight", gate)
            put(f"{place.target}.{expert}.up_proj.weight", up)


class _Filler:
    """Puts real tensors where meta tensors are. What comes is ours: copied only to be cast, or out of a larger one."""

    def __init__(self, kimi: Kimi, dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.modules = dict(kimi.named_modules())
        self.dtype, self.device = dtype, device
        self.filled: set[str] = set()

    def __call__(self, name: str, tensor: Tensor) -> None:
        self.filled.add(name)
        path, _, leaf = name.rpartition(".")
        module = self.modules[path]
        # the router's correction bias is float32 in every checkpoint, and must stay it
        dtype = torch.float32 if leaf == "e_score_correction_bias" else self.dtype
        room = module._parameters.get(leaf)
        if room is not None and not room.is_meta:  # an expert's place in its stack
            room.data.copy_(tensor)
            return
        part = tensor.untyped_storage().nbytes() != tensor.nbytes
        kept = tensor.to(device=self.device, dtype=dtype, copy=part).contiguous()
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(kept))
        else:
            setattr(module, leaf, kept)

    def raw(self, name: str, tensor: Tensor) -> None:
        """Keep the dtype: parts of a packed matrix."""
        self.filled.add(name)
        path, _, leaf = name.rpartition(".")
        setattr(self.modules[path], leaf, tensor.to(device=self.device).contiguous())


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_model(kimi: Kimi, folder: str | Path, *, max_shard_bytes: int = 4 * 10**9, overwrite: bool = False) -> None:
    """Write config, weights, preprocessor, tokenizer and chat template in the released layout.

    All or nothing: files are written beside the target and moved into place when complete. Raises FileExistsError for
    a folder that is not empty, unless `overwrite` and it is a checkpoint.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    target = Path(folder).expanduser().absolute()
    _clear_after_the_dead(target)
    if target.exists():
        if not target.is_dir():
            raise FileExistsError(f"{target} is a file")
        if any(target.iterdir()) and not (overwrite and (target / "config.json").is_file()):
            raise FileExistsError(
                f"{target} is not empty" + ("" if overwrite else "; overwrite=True replaces a checkpoint")
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.writing-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        _write(kimi, draft, max_shard_bytes)
        for file in draft.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if target.exists():
            old = target.parent / f".{target.name}.old-{os.getpid()}"
            os.replace(target, old)
            os.replace(draft, target)
            shutil.rmtree(old)
        else:
            os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _clear_after_the_dead(target: Path) -> None:
    """Drafts of processes that were killed while saving go; a checkpoint that they had moved aside comes back."""
    for left in target.parent.glob(f".{target.name}.*"):
        kind, _, pid = left.name.removeprefix(f".{target.name}.").rpartition("-")
        if kind not in ("writing", "old") or not pid.isdecimal() or _alive(int(pid)):
            continue
        if kind == "old" and not target.exists():
            os.replace(left, target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is there, and someone else's
    return True


def stored_name(name: str, config: KimiConfig) -> str:
    """The released name of a tensor of the model."""
    if config.vision is None:
        return name.removeprefix("language_model.")
    if config.projector.kind == "kimi_vl" and name.startswith("mm_projector."):
        name = name.replace("mm_projector.proj.0.", "mm_projector.linear_1.").replace(
            "mm_projector.proj.2.", "mm_projector.linear_2."
        )
        return name.replace("mm_projector.", "multi_modal_projector.")
    return name


def _write(kimi: Kimi, folder: Path, max_shard_bytes: int) -> None:
    config = kimi.config
    state = {stored_name(name, config): tensor for name, tensor in kimi.state_dict().items()}
    if config.text.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
    left = [name for name, tensor in state.items() if tensor.is_meta]
    if left:
        raise ValueError(f"the model has no weights yet: {left[0]} and {len(left) - 1} more are on the meta device")
    groups = list(_shards(state, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = state[name].detach().cpu().contiguous()
            # a view into stacked experts would drag its whole storage along
            shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
            tensors[name] = tensor.clone() if shared else tensor
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        _json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    packed = any(isinstance(module, PackedLinear) for module in kimi.modules())
    _json(folder / "config.json", config_to_dict(config, kimi.dtype, packed))
    limits = {"max_length": config.text.max_position_embeddings, "eos_token_id": config.eos_token_id}
    _json(folder / "generation_config.json", limits)
    if config.vision is not None:
        _json(folder / "preprocessor_config.json", config.media.to_dict())
    if kimi.tokenizer is not None:
        kimi.tokenizer.save(folder)
    if kimi.chat_template is not None:
        (folder / "chat_template.jinja").write_text(kimi.chat_template, encoding="utf-8")


def _shards(state: dict[str, Tensor], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in state.items():
        nbytes = tensor.numel() * tensor.element_size()
        if names and size + nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def bundled_tokenizer(preset: str = "tiny") -> Tokenizer:
    """A tokenizer that ships with moonkit: 2,048 ids, every digit its own, for "nano"; 4,096 ids for "tiny"."""
    return Tokenizer.from_folder(
        Path(str(files("fusion") / "assets" / ("nano" if preset == "nano" else "tokenizer-4k")))
    )


__all__ = [
    "Progress",
    "Shards",
    "Stored",
    "bundled_tokenizer",
    "config_to_dict",
    "load_model",
    "load_weights",
    "place_of",
    "read_config",
    "resolve",
    "save_model",
]
