"""A converted tower computes what open_clip computes: hidden states of tiny random towers, equal to 1e-5."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel

from qllava.models.vision import convert_open_clip

TOLERANCE = 1e-5


def tiny_clip(*, quick_gelu: bool, image_size: int, patch_size: int = 8, mlp_ratio: float = 4.0) -> torch.nn.Module:
    """A random open_clip CLIP image tower of 4 layers."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={
            "image_size": image_size,
            "patch_size": patch_size,
            "layers": 4,
            "width": 64,
            "head_width": 16,
            "mlp_ratio": mlp_ratio,
        },
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1},
        quick_gelu=quick_gelu,
    )
    return _shaken(model.visual)


def tiny_siglip(*, image_size: int, act_layer: str, pool: str = "map") -> TimmModel:
    """A random SigLIP image tower of 4 layers: open_clip's adapter around a small timm trunk."""
    torch.manual_seed(0)
    adapter = TimmModel("test_vit", embed_dim=0, pool="", proj="none")
    adapter.image_size = (image_size, image_size)
    adapter.trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=image_size,
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=3.7362,  # SO400M's: the width of the MLP is no multiple of anything
        class_token=False,
        global_pool=pool,
        num_classes=0,
        act_layer=act_layer,
    )
    return _shaken(adapter)


def _shaken(model: Any) -> Any:
    """Move every parameter away from its start: zeros and ones would hide a bias or a norm in the wrong place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def reference(visual: torch.nn.Module, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Patch features (I, P, D) after the block that `hidden_states[layer]` of transformers means."""
    blocks = 4
    out = visual.forward_intermediates(
        pixels, indices=[blocks + layer], normalize_intermediates=False, output_fmt="NLC"
    )
    features: torch.Tensor = out["image_intermediates"][0]
    return features


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("image_size", [32, 48])
@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_clip_features_are_equal(quick_gelu: bool, image_size: int, layer: int) -> None:
    visual = tiny_clip(quick_gelu=quick_gelu, image_size=image_size)
    tower = convert_open_clip(visual)
    pixels = torch.randn(2, 3, image_size, image_size)

    hidden = tower(pixels, output_hidden_states=True).hidden_states[layer]

    assert hidden.shape == (2, (image_size // 8) ** 2 + 1, 64)
    torch.testing.assert_close(hidden[:, 1:], reference(visual, pixels, layer), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_the_comparison_can_fail() -> None:
    """The wrong activation moves the features by far more than the tolerance: a mismatch cannot hide in it."""
    visual, other = tiny_clip(quick_gelu=True, image_size=32), tiny_clip(quick_gelu=False, image_size=32)
    other.load_state_dict(visual.state_dict())
    pixels = torch.randn(2, 3, 32, 32)

    difference = (reference(visual, pixels, -2) - reference(other, pixels, -2)).abs().max()

    assert difference > 100 * TOLERANCE


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("image_size", [32, 48])
@pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh"])
@torch.no_grad()
def test_siglip_features_are_equal(act_layer: str, image_size: int, layer: int) -> None:
    visual = tiny_siglip(image_size=image_size, act_layer=act_layer)
    tower = convert_open_clip(visual)
    pixels = torch.randn(2, 3, image_size, image_size)

    out = tower(pixels, output_hidden_states=True)

    assert out.hidden_states[layer].shape == (2, (image_size // 8) ** 2, 64)
    torch.testing.assert_close(out.hidden_states[layer], reference(visual, pixels, layer), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(out.pooler_output, visual(pixels), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_siglip_without_pooling_head() -> None:
    visual = tiny_siglip(image_size=32, act_layer="gelu_tanh", pool="")
    tower = convert_open_clip(visual)
    pixels = torch.randn(1, 3, 32, 32)

    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]

    assert tower.config.vision_use_head is False
    torch.testing.assert_close(hidden, reference(visual, pixels, -2), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_tower_of_a_coca_like_nanos() -> None:
    """The nano tower's shape: trained inside CoCa without attentional pooling, 96 pixels in patches of 16."""
    torch.manual_seed(0)
    coca = open_clip.CoCa(
        embed_dim=64,
        vision_cfg={
            "image_size": 96,
            "patch_size": 16,
            "layers": 4,
            "width": 128,
            "head_width": 32,
            "mlp_ratio": 3.0,
            "output_tokens": True,
        },
        text_cfg={
            "context_length": 8,
            "vocab_size": 32,
            "width": 64,
            "heads": 2,
            "layers": 1,
            "embed_cls": True,
            "output_tokens": True,
        },
        multimodal_cfg={"context_length": 8, "vocab_size": 32, "width": 64, "heads": 2, "layers": 1},
    )
    visual = _shaken(coca.visual)
    tower = convert_open_clip(visual)
    pixels = torch.randn(1, 3, 96, 96)

    out = tower(pixels, output_hidden_states=True)

    assert tower.config.intermediate_size == 384
    torch.testing.assert_close(out.hidden_states[-2][:, 1:], reference(visual, pixels, -2), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(out.pooler_output @ visual.proj, visual(pixels)[0], rtol=0, atol=TOLERANCE)
