"""The other side: transformers, timm and llama.cpp, each with weights or shapes of ours; all of them optional.

    twin = transformers_language(kimi)           the same memory: nothing is copied
    tower = transformers_tower(moonvit)          ours, in its order of rows
    llama = Llama(gguf)                          a file of bench/gguf.py

A peer that is not installed raises ImportError, which becomes a note of the table.
"""

import ctypes
import inspect
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.shapes import fused_experts
from fusion.model import Kimi
from lm.config import TextConfig
from lm.moe import MoE
from moonvit.config import VisionConfig
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _language_config(text: TextConfig) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.yarn:
        rope |= {"rope_type": "yarn", **vars(text.yarn)}
    skip = {"rope_theta", "yarn", "latent_norm_eps", "tie_word_embeddings", "aux_loss_alpha", "moe_layer_freq"}
    return _transformers().DeepseekV3Config(
        **{name: value for name, value in vars(text).items() if name not in skip},
        num_key_value_heads=text.num_attention_heads,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )


def transformers_language(kimi: Kimi) -> Any:
    """transformers' DeepseekV3ForCausalLM over the memory of a `random_model`. It picks how experts run."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    config = _language_config(kimi.config.text)
    with torch.device("meta"):
        twin: Any = _transformers().DeepseekV3ForCausalLM(config).eval()
    ours = kimi.language_model.state_dict()
    state = {name: tensor for name, tensor in ours.items() if ".mlp.experts." not in name}
    for index, layer in enumerate(kimi.language_model.model.layers):
        if isinstance(layer.mlp, MoE):
            both, down = fused_experts(layer.mlp)
            state[f"model.layers.{index}.mlp.experts.gate_up_proj"] = both
            state[f"model.layers.{index}.mlp.experts.down_proj"] = down
    twin.load_state_dict(state, assign=True)
    twin.model.rotary_emb = DeepseekV3RotaryEmbedding(config)  # made on meta: its buffers are in no file
    return twin.requires_grad_(False)


def transformers_cache(twin: Any, sequences: int, context: int) -> Any:
    """What its cache holds after `context` tokens of each sequence: random latents and rotary keys."""
    cache = _transformers().DynamicCache(config=twin.config)
    sizes = (twin.config.kv_lora_rank, twin.config.qk_rope_head_dim)
    for layer in range(twin.config.num_hidden_layers):
        cache.update(*(torch.randn(sequences, 1, context, size).to(twin.dtype) for size in sizes), layer)
    return cache


def transformers_step(twin: Any, tokens: Tensor, cache: Any) -> Tensor:
    """float32 logits (sequences, vocab) after one more token of each sequence (sequences,)."""
    # renamed in 5.24; the old name goes in 5.40
    name = "cache" if "cache" in inspect.signature(twin.forward).parameters else "past_key_values"
    out = twin(input_ids=tokens[:, None], use_cache=True, logits_to_keep=1, **{name: cache})
    return out.logits[:, -1].float()


def transformers_prompt(twin: Any, ids: Tensor) -> Tensor:
    """float32 logits (vocab) after a prompt (tokens,)."""
    return twin(input_ids=ids[None], use_cache=True, logits_to_keep=1).logits[0, -1].float()


# ---- vision ----------------------------------------------------------------------------------------------------------


def transformers_tower(tower: MoonViT) -> Any:
    """transformers' Kimi_K25VisionModel with the weights of ours."""
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

    _transformers()
    sizes: VisionConfig = tower.config
    config = Kimi_K25VisionConfig(
        pos_emb_height=sizes.pos_emb_height,
        pos_emb_width=sizes.pos_emb_width,
        num_attention_heads=sizes.num_heads,
        num_hidden_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
    )
    twin: Any = Kimi_K25VisionModel(config).to(tower.patch_embed.proj.weight.dtype).eval()
    ours = tower.state_dict()
    state = {}
    for name, tensor in twin.state_dict().items():
        state[name] = _tower_weight(name, ours, sizes.num_heads).reshape(tensor.shape)
    twin.load_state_dict(state)
    return twin.requires_grad_(False)


def _tower_weight(name: str, ours: dict[str, Tensor], heads: int) -> Tensor:
    """Our tensor for one of transformers' names."""
    name = re.sub(r"^layers", "encoder.blocks", name)
    name = re.sub(r"^final", "encoder.final", name)
    name = name.replace("pos_emb.position_embeddings", "pos_emb.weight").replace("attn.proj", "wo")
    for theirs, mine in ((".norm1.", ".norm0."), (".norm2.", ".norm1."), (".fc1.", ".fc0."), (".fc2.", ".fc1.")):
        if theirs in name:
            name = name.replace(theirs, mine)
            break
    if match := re.match(r"(.*)\.attn\.([qkv])_proj\.(weight|bias)", name):
        part = ours[f"{match[1]}.wqkv.{match[3]}"].chunk(3)["qkv".index(match[2])]
        # pairs to halves, head by head: the same rotation in another order of rows
        return part if match[2] == "v" else part.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return ours[name]


def timm_naflex(sizes: VisionConfig, layers: int, grids: Sequence[tuple[int, int]], dtype: torch.dtype) -> Any:
    """timm's NaFlex ViT of SigLIP-SO400M width on pictures of the same pixels, and its two ways of running them.

    Its patches are 16 pixels wide, so there are fewer of them. Gives (real patches, one by one, padded together).
    """
    import timm

    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "depth": layers}
    if sizes.hidden_size != 1152:  # a try-out
        options |= {"embed_dim": sizes.hidden_size, "num_heads": sizes.num_heads}
    model: Any = timm.create_model("naflexvit_so400m_patch16_siglip", **options).to(dtype).eval()
    shapes = [(max(1, h * 14 // 16), max(1, w * 14 // 16)) for h, w in grids]

    def batch(chosen: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        most = max(h * w for h, w in chosen)
        patches = torch.randn(len(chosen), most, 3 * 16 * 16).to(dtype)
        places = torch.zeros(len(chosen), most, 2, dtype=torch.int64)
        valid = torch.zeros(len(chosen), most, dtype=torch.bool)
        for row, (h, w) in enumerate(chosen):
            places[row, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
            valid[row, : h * w] = True
        return patches, places, valid

    def run(packed: tuple[Tensor, Tensor, Tensor]) -> None:
        model.forward_features(packed[0], patch_coord=packed[1], patch_valid=packed[2])

    together, alone = batch(shapes), [batch([shape]) for shape in shapes]

    def one_by_one() -> None:
        for each in alone:
            run(each)

    return sum(h * w for h, w in shapes), one_by_one, lambda: run(together)


def tower_call(twin: Any, media: PackedPatches) -> Callable[[], None]:
    """One packed call: attention splits by item inside."""
    pixels = media.pixels.to(twin.dtype)

    def run() -> None:
        twin(pixels, grid_thw=media.grid_thw)

    return run


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


class Llama:
    """llama.cpp through llama-cpp-python's C functions. Raises ImportError without it, OSError for a bad file.

    Known pitfall: built with gcc 12 its AMX path crashes; build with CC=clang CXX=clang++.
    """

    def __init__(self, gguf: Path, threads: int, room: int) -> None:
        import llama_cpp

        self.code: Any = llama_cpp
        code = self.code
        self._quiet = code.llama_log_callback(lambda level, text, data: None)
        code.llama_log_set(self._quiet, ctypes.c_void_p(0))
        code.llama_backend_init()
        options = code.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = code.llama_model_load_from_file(str(gguf).encode(), options)
        if not self.model:
            raise OSError(f"llama.cpp could not load {gguf}")
        self.vocab = code.llama_vocab_n_tokens(code.llama_model_get_vocab(self.model))
        options = code.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = room, 2048, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = code.llama_init_from_model(self.model, options)
        if not self.context:
            raise OSError(f"llama.cpp could not make a context of {room} tokens for {gguf}")
        self.memory = code.llama_get_memory(self.context)
        self.length = 0

    def _read(self, count: int) -> None:
        batch = self.code.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for index in range(count):
            batch.token[index] = random.randrange(self.vocab)
            batch.pos[index] = self.length + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == count - 1
        status = self.code.llama_decode(self.context, batch)
        self.code.llama_synchronize(self.context)
        self.code.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama.cpp answered {status} to {count} tokens after {self.length}")
        self.length += count

    def prompt(self, tokens: int) -> None:
        """Read a prompt into an empty cache."""
        self.code.llama_memory_clear(self.memory, True)
        self.length = 0
        self.extend(tokens)

    def extend(self, tokens: int) -> None:
        """Read until `tokens` are in the cache."""
        while self.length < tokens:
            self._read(min(2048, tokens - self.length))

    def step(self) -> None:
        """One more token."""
        self._read(1)


def installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
