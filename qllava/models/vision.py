"""A vision tower, from open_clip or from a folder, as a transformers vision model and its image processor.

open_clip supplies weights and preprocessing; the tower is converted here when it is loaded, so that training, merging,
export and serving handle a single layout. The source's parameters are renamed one by one, and the result must account
for every one of them; a tower with a part that the target lacks is refused, never approximated.

    tower = load_tower("open_clip:ViT-L-14-336-quickgelu/openai")
    pixels = tower.image_processor(image, return_tensors="pt")["pixel_values"]          # (1, 3, S, S)
    features = tower.model(pixels, output_hidden_states=True).hidden_states[-2]           # (1, layout.outputs, D)

Shapes: S image side in pixels, P patches = tokens per image, D width of the tower, N layers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from PIL.Image import Resampling
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from qllava.config import InputError, expanded
from qllava.image_layout import ImageLayout
from qllava.models.errors import LOAD_ERRORS, check_loading, one_line
from qllava.models.hub import hub_trouble, model_folder
from qllava.models.towers import SUPPORTED, config_of, kind_of, square

ImageAspect = Literal["pad", "crop", "squash"]
VisionModel = CLIPVisionModel | SiglipVisionModel
Tensors = dict[str, torch.Tensor]

_CLIP_NAMES = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),  # transformers' spelling
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.in_proj_", ".self_attn.in_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)

_SIGLIP_NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.in_proj."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^attn_pool\.latent$", "head.probe"),
    (r"^attn_pool\.proj\.", "head.attention.out_proj."),
    (r"^attn_pool\.norm\.", "head.layernorm."),
    (r"^attn_pool\.mlp\.", "head.mlp."),
)


@dataclass(frozen=True)
class Tower:
    """A vision tower that can be used in a LLaVA."""

    model: VisionModel
    """The vision model in fp32 and eval mode; `hidden_states[layer]` has shape (images, layout.outputs, D)."""
    image_processor: BaseImageProcessor
    """Turns an image into pixels (3, S, S) as the tower was trained; can be loaded by any program with transformers."""
    layout: ImageLayout
    """Tokens of an image."""
    source: str
    """Name or folder as the user wrote it."""


def load_tower(spec: str, *, image_aspect: ImageAspect = "pad", weights: bool = True) -> Tower:
    """Load a tower by name or from a folder.

    A weights file does not say how it was trained: name the architecture with `-quickgelu` if it was trained so; its
    images are normalized as OpenAI's (CLIP) or with 0.5 (SigLIP). If that is wrong, use `local-dir:`.

    Args:
        spec: `open_clip:ARCH/PRETRAINED` (PRETRAINED: one of open_clip's tags, or a weights file),
            `open_clip:hf-hub:ORG/NAME`, `open_clip:local-dir:FOLDER`, or a folder with a CLIP or SigLIP vision model
            (or a full CLIP or SigLIP model) in transformers' format.
        image_aspect: How an image is made square: "pad" fills it with the mean colour, "crop" scales the shorter
            side to S and cuts out the centre, "squash" changes its proportions, as SigLIP's own preprocessing does.
        weights: Whether to load the weights; without them a tower from a folder is on the meta device.

    Raises:
        InputError: The name is unknown, files are missing or corrupt, or the tower is of another type.
    """
    if spec.startswith("open_clip:"):
        return _load_open_clip(spec, image_aspect)
    folder = Path(expanded(spec))
    if not folder.is_dir():
        raise InputError(
            f"The vision tower '{spec}' is neither a folder nor of the form open_clip:ARCH/PRETRAINED "
            "(for example open_clip:ViT-L-14-336-quickgelu/openai)."
        )
    return _load_folder(folder, image_aspect, weights)


def convert_open_clip(visual: torch.nn.Module, *, source: str = "this tower") -> VisionModel:
    """Convert the image tower of an open_clip model (`model.visual`) to the equal transformers model, in fp32.

    A `VisionTransformer` (also inside open_clip's CoCa without attentional pooling) becomes a `CLIPVisionModel`, a
    SigLIP tower (a timm trunk without class token) a `SiglipVisionModel`. Hidden states are equal to the source's to
    1e-5; the projection into the space shared with text is left out. `source` names the tower in errors.

    Raises:
        InputError: The tower is of another kind.
    """
    config = config_of(visual, source=source)
    if isinstance(config, CLIPVisionConfig):
        return _fill(CLIPVisionModel, config, _clip_tensors(visual), source)
    return _fill(SiglipVisionModel, config, _siglip_tensors(visual.trunk), source)


def _load_open_clip(spec: str, image_aspect: ImageAspect) -> Tower:
    """Load a model with open_clip, convert its image tower and read its preprocessing."""
    name = spec.removeprefix("open_clip:")
    complete = name.startswith(("hf-hub:", "local-dir:"))  # these include architecture, preprocessing and weights
    arch, pretrained = (name, None) if complete else _arch_and_weights(spec, name)
    try:
        model = open_clip.create_model(arch, pretrained=pretrained, require_pretrained=True)
    except LOAD_ERRORS as error:
        if (trouble := hub_trouble(spec, error)) is not None:
            raise trouble from error
        raise InputError(f"open_clip could not load '{spec}': {one_line(error)}") from error
    vision = convert_open_clip(model.visual, source=f"'{spec}'")
    preprocessing = dict(model.visual.preprocess_cfg)
    mean, std = list(preprocessing["mean"]), list(preprocessing["std"])
    from_file = pretrained is not None and not open_clip.get_pretrained_cfg(arch, pretrained)
    if from_file and isinstance(vision, SiglipVisionModel):
        # open_clip knows the preprocessing of its tags only; for a file it assumes OpenAI's, wrong for every SigLIP.
        mean, std = [0.5] * 3, [0.5] * 3
    resample = Resampling.BILINEAR if preprocessing["interpolation"] == "bilinear" else Resampling.BICUBIC
    return _tower(vision, mean, std, resample, image_aspect, spec)


def _arch_and_weights(spec: str, name: str) -> tuple[str, str]:
    """Split ARCH/PRETRAINED, and refuse, before a download, what open_clip does not have or only warns about."""
    arch, _, pretrained = name.partition("/")
    if arch not in open_clip.list_models():
        close = difflib.get_close_matches(arch, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}?" if close else "open_clip.list_models() lists all architectures."
        raise InputError(f"open_clip has no architecture '{arch}' (from '{spec}'). {hint}")
    quick = bool(open_clip.get_model_config(arch).get("quick_gelu"))
    known = open_clip.get_pretrained_cfg(arch, pretrained)
    file = Path(expanded(pretrained))
    if not known and file.is_file():  # in this order, as open_clip does: a tag wins over a file of the same name
        return arch, str(file)
    if not known:
        tags = {tag: open_clip.get_pretrained_cfg(arch, tag) for tag in open_clip.list_pretrained_tags_by_model(arch)}
        fitting = [tag for tag, config in tags.items() if bool(config.get("quick_gelu")) == quick]
        raise InputError(
            f"'{spec}' does not specify weights of {arch}. After {arch}/ give the path of a weights file"
            + (f" or one of {', '.join(fitting)}." if fitting else ".")
        )
    if known.get("quick_gelu") and not quick:
        # open_clip only warns, and the features are wrong from the first layer on.
        right = f"{arch}-quickgelu"
        advice = f"use open_clip:{right}/{pretrained}" if right in open_clip.list_models() else "choose other weights"
        raise InputError(
            f"The weights '{pretrained}' were trained with QuickGELU, which {arch} does not use; {advice}."
        )
    return arch, pretrained


def _load_folder(folder: Path, image_aspect: ImageAspect, weights: bool) -> Tower:
    """Load a vision model and its preprocessing from a folder in transformers' format."""
    kind = kind_of(folder)
    classes: dict[str, Any] = {
        "clip": CLIPModel,
        "clip_vision_model": CLIPVisionModel,
        "siglip": SiglipModel,
        "siglip_vision_model": SiglipVisionModel,
    }
    try:
        model = _model_of_folder(folder, classes[kind], weights)
    except LOAD_ERRORS as error:
        raise InputError(f"The weights of the vision tower {folder} cannot be read: {one_line(error)}") from error
    try:
        saved = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        mean, std, resample = list(saved.image_mean), list(saved.image_std), int(saved.resample)
    except (*LOAD_ERRORS, TypeError, AttributeError) as error:
        raise InputError(
            f"The vision tower {folder} has no readable preprocessor_config.json, which defines how its images are "
            "normalized. Copy the file from the source of the weights."
        ) from error
    vision = model.vision_model if kind in ("clip", "siglip") else model
    return _tower(vision.eval(), mean, std, resample, image_aspect, str(folder))


def _model_of_folder(folder: Path, kind: Any, weights: bool) -> Any:
    """Return the model in fp32, or without weights on the meta device."""
    if not weights:
        with torch.device("meta"):
            return kind(kind.config_class.from_pretrained(folder))
    folder = model_folder(str(folder))
    how = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    how["use_safetensors"] = True  # otherwise transformers would unpickle pytorch_model.bin
    model, report = kind.from_pretrained(folder, dtype=torch.float32, **how)
    check_loading(report, f"The vision tower {folder}")
    return model


def _tower(
    model: VisionModel, mean: list[float], std: list[float], resample: int, image_aspect: ImageAspect, source: str
) -> Tower:
    """Combine the parts of a tower; the number of image tokens follows from the sizes of the model."""
    size = square(model.config.image_size, source)
    square(model.config.patch_size, source)
    values: dict[str, Any] = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": int(resample),
        "image_mean": mean,
        "image_std": std,
    }
    if image_aspect == "squash":
        values |= {"size": {"height": size, "width": size}, "do_center_crop": False}
    # Both use the torchvision backend, which plain transformers chooses too when it loads them: equal pixels.
    # CLIPImageProcessor where it suffices, because llava-hf's checkpoints name it and every server knows it.
    processor: BaseImageProcessor = (
        LlavaImageProcessor(do_pad=True, **values) if image_aspect == "pad" else CLIPImageProcessor(**values)
    )
    return Tower(model, processor, ImageLayout.of_tower(model.config), source)


def _clip_tensors(visual: Any) -> Tensors:
    """Return the tensors of a VisionTransformer by transformers' names, without its projection to shared space."""
    own = {name: tensor for name, tensor in visual.state_dict().items() if name != "proj"}
    return _split_attention(_rename(own, _CLIP_NAMES))


def _siglip_tensors(trunk: Any) -> Tensors:
    """Return the tensors of a timm trunk by transformers' names; the pooling head's q and kv become one matrix."""
    own = dict(trunk.state_dict())
    if trunk.attn_pool is not None:
        for part in ("weight", "bias"):
            query, key_value = own.pop(f"attn_pool.q.{part}"), own.pop(f"attn_pool.kv.{part}")
            own[f"head.attention.in_proj_{part}"] = torch.cat([query, key_value])
    tensors = _split_attention(_rename(own, _SIGLIP_NAMES))
    position = "embeddings.position_embedding.weight"
    tensors[position] = tensors[position].squeeze(0)
    return tensors


def _rename(tensors: Mapping[str, torch.Tensor], names: tuple[tuple[str, str], ...]) -> Tensors:
    """Apply every pattern to every name."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _split_attention(tensors: Tensors) -> Tensors:
    """Split each fused input projection (3D, ...) into q, k and v of D rows each, in this order."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        if ".self_attn.in_proj." not in name:
            split[name] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            split[name.replace("in_proj", f"{letter}_proj")] = part
    return split


def _fill(
    model_class: Any, config: CLIPVisionConfig | SiglipVisionConfig, tensors: Tensors, source: str
) -> VisionModel:
    """Build the model and load the tensors, which must be exactly the ones it has.

    A part that only one side has (layer scale, query and key norms, register tokens, a missing first norm) shows up as
    a name on one side only, so no list of special features is needed.
    """
    model = model_class(config)
    expected = model.state_dict()
    different = sorted(expected.keys() ^ tensors.keys()) or sorted(
        name for name in expected if expected[name].shape != tensors[name].shape
    )
    if different:
        raise InputError(
            f"{source} is built differently from a {model_class.__name__} (in {', '.join(different[:3])}) "
            f"and cannot be used as a tower; {SUPPORTED}."
        )
    model.load_state_dict(tensors)
    filled: VisionModel = model.eval()
    return filled
