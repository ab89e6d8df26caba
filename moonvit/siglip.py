"""Start a tower from SigLIP-SO400M, as MoonViT itself was started.

In: a timm or open_clip model (or its name). Out: a MoonViT with its weights. The 329 tensors map one to one; only the
position table is resized (27x27 or 16x16 -> 64x64, bicubic).

Three things in MoonViT differ from SigLIP and have to be learned in continued pre-training: 2-D rotation (the large
one), tanh instead of erf GELU, and eps 1e-5 instead of 1e-6. With the three switched back, the mapped tower gives
timm's numbers exactly; `as_siglip` does that switch and exists to show it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from moonvit.config import VisionConfig
from moonvit.encoder import MoonViT

_NAMES = {
    "patch_embed.proj": "patch_embed.proj",
    "norm": "encoder.final_layernorm",
    "norm1": "norm0",
    "norm2": "norm1",
    "attn.qkv": "wqkv",
    "attn.proj": "wo",
    "mlp.fc1": "mlp.fc0",
    "mlp.fc2": "mlp.fc1",
}


def tower_from_siglip(source: str | nn.Module, table_size: int = 64) -> MoonViT:
    """A MoonViT with SigLIP's weights, float32.

    source: "timm:vit_so400m_patch14_siglip_384.webli", "open_clip:ViT-SO400M-14-SigLIP-384/webli" (both download
    unless cached), or a timm VisionTransformer / open_clip model that is already built.
    table_size: side of the position table; the released tower has 64.
    Raises ValueError when the module is not a SigLIP-like ViT: class token, rotary or missing tensors.
    """
    if table_size < 1:
        raise ValueError(f"table_size must be at least 1, got {table_size}")
    if not isinstance(source, str | nn.Module):
        raise ValueError(f"source must be 'timm:MODEL', 'open_clip:MODEL/TAG' or a module, got {type(source).__name__}")
    model = _build(source) if isinstance(source, str) else source
    trunk: Any = getattr(getattr(model, "visual", model), "trunk", model)  # open_clip wraps a timm model
    state = {name: tensor for name, tensor in trunk.state_dict().items() if not name.startswith("attn_pool.")}
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise ValueError(f"not a SigLIP-like vision transformer: it has no {name} (timm names are expected)")
    if "cls_token" in state:
        raise ValueError("the source has a class token; SigLIP and MoonViT have none")
    patch = state["patch_embed.proj.weight"].shape[-1]
    dim = state["pos_embed"].shape[-1]
    config = VisionConfig(
        hidden_size=dim,
        num_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads=trunk.blocks[0].attn.num_heads,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        patch_size=patch,
        pos_emb_height=table_size,
        pos_emb_width=table_size,
    )
    mapped = {"patch_embed.pos_emb.weight": _resize_table(state.pop("pos_embed").float(), table_size)}
    for name, tensor in state.items():
        mapped[_rename(name)] = tensor.float()
    tower = MoonViT(config)
    missing, unexpected = tower.load_state_dict(mapped, strict=False)
    if missing or unexpected:
        raise ValueError(f"not a SigLIP-like vision transformer: missing {missing[:5]}, unexpected {unexpected[:5]}")
    return tower.eval()


def as_siglip(tower: MoonViT, pixels: Tensor) -> Tensor:
    """The tower's weights run the way SigLIP runs: no rotation, erf GELU, eps 1e-6, one square image.

    pixels: (1, 3, side, side), where side / patch_size is the side of the position table. Returns (patches, dim),
    equal to timm's `forward_features` to the last bit.
    """
    dim = tower.config.hidden_size
    x = tower.patch_embed.proj(pixels).flatten(2).transpose(1, 2)  # (1, patches, dim)
    x = x + tower.patch_embed.pos_emb.weight.flatten(0, 1)
    block: Any
    for block in tower.encoder.blocks:
        h = F.layer_norm(x, (dim,), block.norm0.weight, block.norm0.bias, 1e-6)
        q, k, v = block.wqkv(h).unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + block.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias, 1e-6)
        x = x + block.mlp.fc1(F.gelu(block.mlp.fc0(h)))
    norm = tower.encoder.final_layernorm
    return F.layer_norm(x, (dim,), norm.weight, norm.bias, 1e-6)[0]


def _build(source: str) -> nn.Module:
    library, _, name = source.partition(":")
    build: Callable[[], nn.Module]
    if library == "timm":
        import timm

        if not timm.is_model(name.split(".")[0]) or "siglip" not in name:
            raise ValueError(f"timm has no SigLIP {name!r}; timm.list_models('*so400m*siglip*') lists them")
        build = partial(timm.create_model, name, pretrained=True, num_classes=0)
    elif library == "open_clip":
        import open_clip

        model, _, tag = name.partition("/")
        if model not in open_clip.list_models() or "SigLIP" not in model:
            raise ValueError(f"open_clip has no SigLIP {model!r}; the 400M ones begin with ViT-SO400M-14-SigLIP")
        build = partial(open_clip.create_model, model, pretrained=tag or "webli")
    else:
        raise ValueError(f"source must look like 'timm:MODEL' or 'open_clip:MODEL/TAG', got {source!r}")
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return build()
    except (RuntimeError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileNotFoundError(
            f"{source}: its weights are not cached and could not be downloaded ({reason})"
        ) from None


def _rename(name: str) -> str:
    if name.startswith("blocks."):
        _, index, part, kind = name.split(".", 2)[:2] + list(name.split(".", 2)[2].rsplit(".", 1))
        return f"encoder.blocks.{index}.{_NAMES.get(part, part)}.{kind}"
    part, kind = name.rsplit(".", 1)
    return f"{_NAMES.get(part, part)}.{kind}"


def _resize_table(table: Tensor, size: int) -> Tensor:
    """(1, n * n, dim) to (size, size, dim). Bicubic: nearest loses 5-23 % from 27 to 64 and back, bicubic 0.3-2 %."""
    grid = math.isqrt(table.shape[1])
    if grid * grid != table.shape[1]:
        raise ValueError(f"the source's position table has {table.shape[1]} rows, which is not a square")
    square = table.view(grid, grid, -1)
    if grid == size:
        return square
    square = F.interpolate(square.permute(2, 0, 1)[None], size=(size, size), mode="bicubic", align_corners=False)
    return square[0].permute(1, 2, 0).contiguous()
