"""Towers: what is loaded from which name, the images they see, and every way in which a name can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)

from qllava.config import InputError
from qllava.models.decided import decided
from qllava.models.vision import ImageAspect, Tower, convert_open_clip, load_tower

SIZE, PATCH = 32, 8
VISION = {"image_size": SIZE, "patch_size": PATCH, "layers": 2, "width": 32, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}
SIGLIP = {"timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none", "image_size": SIZE}


def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    """A timm trunk of SigLIP's kind; open_clip makes it by the name under which it is registered below."""
    for word in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(word, None)
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**sizes, class_token=False, act_layer="gelu_tanh", **kwargs)


@pytest.fixture
def architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny architectures in open_clip's registry, gone again after the test."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "tiny_siglip", tiny_siglip)
    clip = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    siglip = {"embed_dim": 32, "custom_text": True, "vision_cfg": SIGLIP, "text_cfg": TEXT}
    folder = tmp_path / "architectures"
    folder.mkdir()
    (folder / "Tiny-CLIP.json").write_text(json.dumps(clip))
    (folder / "Tiny-SigLIP.json").write_text(json.dumps(siglip))
    open_clip.add_model_config(folder)


def weights_file(arch: str, path: Path) -> torch.nn.Module:
    """Save random weights of the whole open_clip model where `pretrained` can find them, and return its image tower."""
    torch.manual_seed(1)
    model = open_clip.create_model(arch).eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    visual: torch.nn.Module = model.visual
    return visual


def striped(width: int, height: int) -> Image.Image:
    """An image in which neither a shift nor another crop goes unnoticed."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x * 7 + y * 3) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype("uint8"))


def pixels(processor: Any, image: Image.Image) -> torch.Tensor:
    out: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"]
    return out


@pytest.mark.usefixtures("architectures")
@torch.no_grad()
def test_clip_by_architecture_and_file(tmp_path: Path) -> None:
    visual = weights_file("Tiny-CLIP", tmp_path / "weights.safetensors")
    spec = f"open_clip:Tiny-CLIP/{tmp_path}/weights.safetensors"

    tower = load_tower(spec)

    assert isinstance(tower.model, CLIPVisionModel)
    assert (tower.layout.strategy, tower.layout.additional, tower.layout.tokens) == ("default", 1, 16)
    assert tower.source == spec
    assert not tower.model.training
    x = torch.randn(1, 3, SIZE, SIZE)
    ours = tower.model(x, output_hidden_states=True).hidden_states[-2][:, 1:]
    theirs = visual.forward_intermediates(x, indices=[0], output_fmt="NLC")["image_intermediates"][0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("architectures")
def test_siglip_from_a_file_is_normalized_as_siglip(tmp_path: Path) -> None:
    """For a file open_clip falls back to OpenAI's mean, which no SigLIP was trained with."""
    weights_file("Tiny-SigLIP", tmp_path / "weights.safetensors")

    tower = load_tower(f"open_clip:Tiny-SigLIP/{tmp_path / 'weights.safetensors'}")

    assert isinstance(tower.model, SiglipVisionModel)
    assert (tower.layout.strategy, tower.layout.additional, tower.layout.tokens) == ("full", 0, 16)
    assert list(tower.image_processor.image_mean) == [0.5, 0.5, 0.5]


def test_local_dir_of_open_clip_brings_its_preprocessing(tmp_path: Path) -> None:
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    model_cfg = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocessing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(**model_cfg)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")

    tower = load_tower(f"open_clip:local-dir:{tmp_path}", image_aspect="crop")

    assert tower.model.config.hidden_act == "quick_gelu"
    assert list(tower.image_processor.image_mean) == preprocessing["mean"]
    assert list(tower.image_processor.image_std) == preprocessing["std"]
    assert tower.image_processor.resample == Image.Resampling.BILINEAR


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A CLIP vision model with its preprocessing, as transformers saves them."""
    folder = tmp_path / "tower"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=PATCH)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 99}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


def test_folder_of_a_vision_model(clip_folder: Path) -> None:
    tower = load_tower(str(clip_folder))

    kept = CLIPVisionModel.from_pretrained(clip_folder).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tower.model.state_dict().items())
    assert tower.layout.tokens == 16
    assert list(tower.image_processor.image_mean) == [0.4, 0.5, 0.6]
    # The size is the model's own; what the preprocessing beside it says may belong to another.
    assert pixels(tower.image_processor, striped(50, 20)).shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_folder_of_a_whole_model(tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": SIZE, "patch_size": PATCH}
    text = {**sizes, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    whole = (
        CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
        if kind == "clip"
        else SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    )
    whole.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)

    tower = load_tower(str(tmp_path))

    theirs = whole.vision_model.state_dict()
    assert tower.model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tower.model.state_dict().items())


@pytest.mark.parametrize("image_aspect", ["pad", "crop", "squash"])
def test_processor_is_reloaded_by_plain_transformers(clip_folder: Path, tmp_path: Path, image_aspect: Any) -> None:
    processor = load_tower(str(clip_folder), image_aspect=image_aspect).image_processor
    images = [striped(61, 40), striped(40, 61), striped(SIZE, SIZE), striped(61, 40)]

    processor.save_pretrained(tmp_path / "saved")
    reloaded = AutoImageProcessor.from_pretrained(tmp_path / "saved")

    alone = torch.cat([pixels(processor, image) for image in images])
    assert alone.shape == (4, 3, SIZE, SIZE)
    assert torch.equal(alone, torch.cat([pixels(reloaded, image) for image in images]))
    assert torch.equal(alone, processor(images, return_tensors="pt")["pixel_values"])  # batching changes nothing


def test_how_an_image_becomes_a_square_is_read_off_the_processor(clip_folder: Path) -> None:
    """A LLaVA over SigLIP squashes; it used to be recorded as one that crops."""
    config = SimpleNamespace(projector_hidden_act="gelu", vision_feature_layer=-2)

    def aspect(image_processor: Any) -> str:
        return str(decided(config, SimpleNamespace(image_processor=image_processor))["image_aspect"])

    for own in get_args(ImageAspect):
        assert aspect(load_tower(str(clip_folder), image_aspect=own).image_processor) == own
    assert aspect(SiglipImageProcessor()) == "squash" and aspect(CLIPImageProcessor()) == "crop"


def test_squash_keeps_all_of_the_image(clip_folder: Path) -> None:
    processor = load_tower(str(clip_folder), image_aspect="squash").image_processor
    image = striped(61, 40)
    whole = pixels(processor, image.resize((SIZE, SIZE), Image.Resampling(int(processor.resample))))
    apart = (pixels(processor, image) - whole) * torch.tensor(processor.image_std)[:, None, None] * 255
    assert apart.abs().max() <= 2.01


def test_pad_fills_up_with_the_mean_colour(clip_folder: Path) -> None:
    processor = load_tower(str(clip_folder), image_aspect="pad").image_processor
    mean = torch.tensor(processor.image_mean)

    out = pixels(processor, Image.new("RGB", (SIZE, SIZE // 2), "white"))[0]

    background = (mean * 255).floor() / 255
    expected = ((background - mean) / torch.tensor(processor.image_std))[:, None, None].expand(3, 6, SIZE)
    torch.testing.assert_close(out[:, :6], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(out[:, -6:], expected, rtol=0, atol=1e-5)
    assert (out[:, 12:20] > 1).all()  # the image itself lies in the middle


def test_crop_sees_what_open_clip_sees(clip_folder: Path) -> None:
    """Up to rounding: open_clip scales with PIL and transformers with torchvision, at most 2 of 255 steps apart."""
    processor = load_tower(str(clip_folder), image_aspect="crop").image_processor
    theirs = open_clip.image_transform(
        SIZE, is_train=False, mean=tuple(processor.image_mean), std=tuple(processor.image_std)
    )
    image = striped(64, 40).resize((96, 64))

    steps = (pixels(processor, image)[0] - theirs(image)) * torch.tensor(processor.image_std)[:, None, None] * 255

    assert steps.abs().max() <= 2.01


def tower_of(**changes: Any) -> torch.nn.Module:
    """The image tower of a tiny open_clip CLIP with some settings changed."""
    visual: torch.nn.Module = open_clip.CLIP(embed_dim=32, vision_cfg={**VISION, **changes}, text_cfg=TEXT).visual
    return visual


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": [1, 1, 1, 1]}, "ModifiedResNet"),
        ({"attentional_pool": True}, "attentional pooling"),
        ({"no_ln_pre": True}, "pre_layrnorm"),
        ({"ls_init_value": 0.1}, "ls_1"),
        ({"qk_norm": True}, "ln_q"),
        ({"image_size": [32, 64]}, "32 x 64"),
    ],
)
def test_towers_of_another_kind_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match="the tower") as refused:
        convert_open_clip(tower_of(**changes), source="the tower")
    assert named in str(refused.value)
    assert "SigLIP" in str(refused.value) or "square" in str(refused.value)


def test_another_timm_trunk_is_refused() -> None:
    adapter = open_clip.timm_model.TimmModel("test_vit", embed_dim=8)
    with pytest.raises(InputError, match="timm's VisionTransformer.*supported are"):
        convert_open_clip(adapter)


def test_a_trunk_with_gated_mlps_is_refused() -> None:
    """ViTamin's: a timm VisionTransformer without class token, like SigLIP's, and still another network."""
    adapter = open_clip.timm_model.TimmModel("test_vit", embed_dim=8)
    adapter.trunk = tiny_siglip(mlp_layer=timm.models.vitamin.GeGluMlp, global_pool="map")
    with pytest.raises(InputError, match="cannot be used as a vision tower"):
        convert_open_clip(adapter)


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("open_clip:ViT-L-14-336/openai", "use open_clip:ViT-L-14-336-quickgelu/openai"),
        ("open_clip:ViT-H-14-378/dfn5b", "use open_clip:ViT-H-14-378-quickgelu/dfn5b"),
        ("open_clip:ViT-L14-336-quickgelu/openai", "Did you mean ViT-L-14-336-quickgelu"),
        ("open_clip:ViT-L-14-quickgelu/laion2b_s32b_b82k", "or one of .*openai"),
        ("open_clip:ViT-B-32", "give the path of a weights file or one of .*laion2b_s34b_b79k"),
        ("open_clip:", "no architecture ''"),
        ("open_clip:local-dir:/nowhere", "could not load"),
        ("openai/clip-vit-large-patch14", "neither a folder nor of the form open_clip:ARCH/PRETRAINED"),
    ],
)
def test_wrong_names(spec: str, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        load_tower(spec)


def test_a_file_called_like_a_tag_does_not_hide_the_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openai").write_text("open_clip takes the tag, not this file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="QuickGELU"):
        load_tower("open_clip:ViT-L-14-336/openai")


@pytest.mark.usefixtures("architectures")
def test_weights_file_of_another_architecture_or_broken(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights_file("Tiny-SigLIP", path)
    with pytest.raises(InputError, match="open_clip could not load"):
        load_tower(f"open_clip:Tiny-CLIP/{path}")

    weights_file("Tiny-CLIP", path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="open_clip could not load"):
        load_tower(f"open_clip:Tiny-CLIP/{path}")


def load_refused(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        load_tower(str(folder))
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_broken_folders(clip_folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(clip_folder, tmp_path / name))

    (tmp_path / "empty").mkdir()
    assert "no readable config.json" in load_refused(tmp_path / "empty")

    other = copy("other")
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "of type 'llama'" in load_refused(other)

    no_weights = copy("no_weights")
    (no_weights / "model.safetensors").unlink()
    assert "has no weights" in load_refused(no_weights)

    truncated = copy("truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be read" in load_refused(truncated)

    incomplete = copy("incomplete")
    kept = CLIPVisionModel.from_pretrained(incomplete).state_dict()
    del kept["post_layernorm.bias"]
    save_file(kept, incomplete / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights, for example post_layernorm.bias" in load_refused(incomplete)

    other_sizes = copy("other_sizes")
    config = json.loads((other_sizes / "config.json").read_text())
    (other_sizes / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert "do not fit its config.json" in load_refused(other_sizes)

    no_images = copy("no_images")
    (no_images / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in load_refused(no_images)


def test_tower_is_frozen(clip_folder: Path) -> None:
    tower = load_tower(str(clip_folder))
    assert isinstance(tower, Tower)
    with pytest.raises(AttributeError):
        tower.layout.strategy = "full"  # type: ignore[misc]
