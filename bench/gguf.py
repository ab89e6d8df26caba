"""A GGUF file of the Moon-6 shape with random weights, for llama.cpp: python -m bench.gguf --out moon6-q4_0.gguf

Architecture deepseek2 without low-rank queries, sigmoid routing. Needs `pip install gguf`, and 2.2 GB of disk for Q4_0.
The halves of kv_b stay in BF16: quantised 3-D tensors make llama.cpp's AMX path abort.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from bench import shapes
from lm.config import TextConfig

Kind = Literal["Q4_0", "Q8_0", "BF16"]


@dataclass(frozen=True)
class Write:
    """Write the file."""

    out: Path
    """File to write."""
    kind: Kind = "Q4_0"
    """Format of the matrices."""


def write(out: Path, config: TextConfig, kind: Kind = "Q4_0") -> None:
    """Write a model of this shape. Raises ImportError without the gguf package, ValueError for low-rank queries."""
    import gguf

    if config.q_lora_rank is not None:
        raise ValueError(f"this writer makes models with one q_proj; q_lora_rank is {config.q_lora_rank}")
    writer: Any = gguf.GGUFWriter(str(out), "deepseek2")
    heads, latent, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)  # the latent is one head that all queries share
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(rope)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_tokenizer_model("no_vocab")

    draw = np.random.default_rng(0)
    blocks: dict[Kind, NDArray[np.uint8]] = {kind: _block(draw, kind), "BF16": _block(draw, "BF16")}
    offset = 0

    def matrix(name: str, *shape: int, kind: Kind = kind) -> None:
        nonlocal offset
        numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]  # of a block
        if shape[-1] % numbers:
            raise ValueError(f"{name}: a row of {shape[-1]} does not divide into blocks of {numbers} ({kind})")
        block = np.roll(blocks[kind], offset * 977 * size)
        offset += 1
        row = shape[-1] // numbers * size
        data = np.resize(block, int(np.prod(shape[:-1])) * row).reshape(*shape[:-1], row)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    def small(name: str, *shape: int) -> None:
        writer.add_tensor(name, (draw.standard_normal(shape) * 0.02).astype(np.float32))

    dim, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    shared = inner * config.n_shared_experts
    matrix("token_embd.weight", config.vocab_size, dim)
    matrix("output.weight", config.vocab_size, dim)
    vector("output_norm.weight", dim)
    for layer in range(config.num_hidden_layers):
        at = f"blk.{layer}."
        vector(at + "attn_norm.weight", dim)
        vector(at + "ffn_norm.weight", dim)
        vector(at + "attn_kv_a_norm.weight", latent)
        matrix(at + "attn_q.weight", heads * config.qk_head_dim, dim)
        matrix(at + "attn_kv_a_mqa.weight", latent + rope, dim)
        matrix(at + "attn_k_b.weight", heads, latent, config.qk_nope_head_dim, kind="BF16")
        matrix(at + "attn_v_b.weight", heads, config.v_head_dim, latent, kind="BF16")
        matrix(at + "attn_output.weight", dim, heads * config.v_head_dim)
        if not config.is_moe(layer):
            matrix(at + "ffn_gate.weight", config.intermediate_size, dim)
            matrix(at + "ffn_up.weight", config.intermediate_size, dim)
            matrix(at + "ffn_down.weight", dim, config.intermediate_size)
            continue
        small(at + "ffn_gate_inp.weight", experts, dim)
        small(at + "exp_probs_b.bias", experts)
        matrix(at + "ffn_gate_exps.weight", experts, inner, dim)
        matrix(at + "ffn_up_exps.weight", experts, inner, dim)
        matrix(at + "ffn_down_exps.weight", experts, dim, inner)
        matrix(at + "ffn_gate_shexp.weight", shared, dim)
        matrix(at + "ffn_up_shexp.weight", shared, dim)
        matrix(at + "ffn_down_shexp.weight", dim, shared)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _block(draw: np.random.Generator, kind: Kind) -> NDArray[np.uint8]:
    """About a million random weights in a format, as bytes."""
    count = 2**20
    if kind == "BF16":
        values = (draw.standard_normal(count) * 0.02).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    groups = count // 32
    size, scale = {"Q8_0": (32, 0.0005), "Q4_0": (16, 0.004)}[kind]
    block = draw.integers(0, 256, (groups, 2 + size), dtype=np.uint8)
    block[:, :2] = np.full((groups, 1), scale, np.float16).view(np.uint8)
    return block.reshape(-1)


def main() -> None:
    """The command."""
    arguments = tyro.cli(Write, prog="python -m bench.gguf")
    write(arguments.out, shapes.moon(), arguments.kind)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
