"""A tower that starts from SigLIP is SigLIP, to the last bit, until the three deliberate differences are switched on.

pytest tests/moonvit/test_siglip.py
"""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from moonvit.config import VisionConfig
from moonvit.encoder import MoonViT
from moonvit.packing import PackedPatches
from moonvit.siglip import as_siglip


def timm_twin(side: int = 6, seed: int = 0) -> Any:
    """A small ViT of SigLIP-SO400M's structure (no class token, qkv bias, attention pool), all weights random."""
    torch.manual_seed(seed)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=14 * side,
        patch_size=14,
        embed_dim=64,
        depth=3,
        num_heads=4,
        mlp_ratio=2,
        class_token=False,
        global_pool="map",
        num_classes=0,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


class Wrapped(nn.Module):
    """The shape of an open_clip model: its timm vision transformer is .visual.trunk."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.trunk = trunk


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lambda vit: vit, Wrapped], ids=["timm", "open_clip"])
def test_run_as_siglip_the_tower_is_timm_to_zero(wrap: Any) -> None:
    vit = timm_twin()
    tower = MoonViT.from_siglip(wrap(vit), table_size=6)
    pixels = torch.randn(1, 3, 84, 84)
    assert (as_siglip(tower, pixels) - vit.forward_features(pixels)[0]).abs().max().item() == 0.0


@torch.no_grad()
def test_the_tower_itself_differs_by_its_rotation() -> None:
    tower = MoonViT.from_siglip(timm_twin(), table_size=6)
    pixels = torch.randn(1, 3, 84, 84)
    cut = pixels[0].unflatten(1, (6, 14)).unflatten(3, (6, 14)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    states = tower.encoder_states(PackedPatches(cut, torch.tensor([[1, 6, 6]])))
    assert (states - as_siglip(tower, pixels)).abs().max() > 1e-3


def test_the_position_table_is_resized_bicubically() -> None:
    vit = timm_twin()
    tower = MoonViT.from_siglip(vit, table_size=12)
    table = vit.pos_embed.detach().view(1, 6, 6, 64).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(table, (12, 12), mode="bicubic")[0].permute(1, 2, 0)
    torch.testing.assert_close(tower.patch_embed.pos_emb.weight.detach(), wanted)


def test_so400m_maps_name_by_name() -> None:
    """timm's and open_clip's SO400M at full size, on the meta device: 329 tensors, nothing left over."""
    with torch.device("meta"):
        vit = timm.create_model("vit_so400m_patch14_siglip_378", pretrained=False, num_classes=0)
        tower = MoonViT(VisionConfig())
    own = {name for name in vit.state_dict() if not name.startswith("attn_pool.")}
    assert len(own) == len(tower.state_dict()) == 329
    assert sum(p.numel() for p in tower.parameters()) == 416_866_032


def test_weights_that_cannot_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match="not cached and could not be downloaded") as caught:
        MoonViT.from_siglip("timm:vit_so400m_patch14_siglip_378.webli")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("siglip", "must look like"),
        ("timm:", "no SigLIP"),
        ("hub:a/b", "must look like"),
        ("timm:no_such_model", "no_such_model"),
        ("timm:resnet18.untrained", "resnet18"),
        ("open_clip:NoModel/tag", "NoModel"),
        (7, "must be"),
    ],
)
def test_unknown_sources_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MoonViT.from_siglip(source)
    assert "\n" not in str(caught.value)


def test_models_of_another_structure_are_refused() -> None:
    with_class_token = timm.models.vision_transformer.VisionTransformer(
        img_size=28, patch_size=14, embed_dim=64, depth=1, num_heads=4
    )
    with pytest.raises(ValueError, match="class token"):
        MoonViT.from_siglip(with_class_token)
    with pytest.raises(ValueError, match="no pos_embed"):
        MoonViT.from_siglip(torch.nn.Linear(2, 2))


def test_table_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="table_size"):
        MoonViT.from_siglip(timm_twin(), table_size=0)
