"""The shapes of a vision tower without its weights, from open_clip's architecture or from a folder's config.json.

The sizes of an open_clip tower are read from its modules, which are built on the meta device; loading a tower
(`vision.py`) reads them from the same modules with the same function, so that a plan describes the tower that a run
loads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from transformers import AutoConfig, CLIPVisionConfig, SiglipVisionConfig
from transformers.activations import ACT2FN

from qllava.config import InputError, expanded
from qllava.models.errors import LOAD_ERRORS, one_line

SUPPORTED = (
    "supported are the CLIP ViTs of open_clip (OpenAI, LAION, DataComp, DFN, MetaCLIP), its SigLIP and SigLIP 2 "
    "towers, and folders in transformers' own format of type clip, clip_vision_model, siglip or siglip_vision_model"
)

TowerConfig = CLIPVisionConfig | SiglipVisionConfig

KINDS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
"""Types in a folder's config.json that include a tower, alone or with a text model."""


def tower_config(spec: str) -> TowerConfig:
    """Return the shapes of a tower by its open_clip name or from a folder; see `vision.load_tower`.

    Raises:
        InputError: The tower does not exist, its files cannot be read, or it is of another kind.
    """
    if spec.startswith("open_clip:"):
        return _named(spec)
    folder = Path(expanded(spec))
    if not folder.is_dir():
        raise InputError(
            f"The vision tower '{spec}' is neither a folder nor of the form open_clip:ARCH/PRETRAINED "
            "(for example open_clip:ViT-L-14-336-quickgelu/openai)."
        )
    kind_of(folder)
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' own checks of a config raise errors of many kinds
        raise InputError(f"The vision tower {folder} has no readable config.json ({one_line(error)}).") from error
    return getattr(config, "vision_config", config)  # type: ignore[no-any-return]


def kind_of(folder: Path) -> str:
    """Return which of `KINDS` a folder holds; raise an InputError if it holds another model, or none."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"The vision tower {folder} has no readable config.json; {SUPPORTED}.") from error
    if kind not in KINDS:
        raise InputError(f"The vision tower {folder} is a model of type '{kind}'; {SUPPORTED}.")
    return str(kind)


def config_of(visual: torch.nn.Module, *, source: str = "this tower") -> TowerConfig:
    """Read the sizes of the image tower of an open_clip model (`model.visual`) from its modules.

    Args:
        visual: The tower; its weights are not used and may be on the meta device.
        source: Name of the tower in errors.

    Raises:
        InputError: It is neither a CLIP nor a SigLIP.
    """
    trunk: Any = getattr(visual, "trunk", None)
    if isinstance(visual, open_clip.transformer.VisionTransformer) and visual.attn_pool is None:
        return _clip_config(visual, source)
    without_cls = isinstance(trunk, TimmVisionTransformer) and trunk.cls_token is None
    if without_cls and hasattr(trunk.blocks[0].mlp, "fc1"):  # ViTamin's blocks have gated MLPs
        return _siglip_config(trunk, source)
    kind = type(visual).__name__ if trunk is None else f"timm's {type(trunk).__name__}"
    pooling = " with attentional pooling" if getattr(visual, "attn_pool", None) is not None else ""
    raise InputError(f"{source} is a {kind}{pooling}, which cannot be used as a vision tower; {SUPPORTED}.")


def _named(spec: str) -> TowerConfig:
    """Return the shapes of an open_clip architecture; only its image tower is built, without weights."""
    name = spec.removeprefix("open_clip:")
    arch = name if name.startswith(("hf-hub:", "local-dir:")) else name.partition("/")[0]
    try:
        known = open_clip.get_model_config(arch) or {}
    except LOAD_ERRORS as error:
        raise InputError(f"open_clip could not read '{spec}': {one_line(error)}") from error
    if "vision_cfg" not in known:
        raise InputError(f"open_clip has no architecture '{arch}' (from '{spec}'); open_clip.list_models() lists them.")
    with torch.device("meta"):
        # `create_model`, the public function, would build the text model too.
        visual = open_clip.model._build_vision_tower(
            known["embed_dim"], known["vision_cfg"], bool(known.get("quick_gelu"))
        )
    return config_of(visual, source=f"'{spec}'")


def _clip_config(visual: Any, source: str) -> CLIPVisionConfig:
    """Read the sizes from open_clip's VisionTransformer itself, so that custom architectures need no special case."""
    block = visual.transformer.resblocks[0]
    return CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        projection_dim=visual.output_dim,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=square(visual.image_size, source),
        patch_size=square(visual.patch_size, source),
        hidden_act=_activation(block.mlp.gelu, source),
        layer_norm_eps=block.ln_1.eps,
    )


def _siglip_config(trunk: Any, source: str) -> SiglipVisionConfig:
    """Read the sizes from the timm trunk. SigLIP 1 there computes the exact GELU, SigLIP 2 mostly the tanh form."""
    block = trunk.blocks[0]
    return SiglipVisionConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=square(trunk.patch_embed.img_size, source),
        patch_size=square(trunk.patch_embed.patch_size, source),
        hidden_act=_activation(block.mlp.act, source),
        layer_norm_eps=block.norm1.eps,
        vision_use_head=trunk.attn_pool is not None,
    )


def square(sides: Any, source: str) -> int:
    """Return the side of a square, given as one number or as (height, width)."""
    height, width = sides if isinstance(sides, Sequence) else (sides, sides)
    if height != width:
        raise InputError(
            f"{source} uses images or patches of {height} x {width}. LLaVA needs square images and patches."
        )
    return int(height)


def _activation(layer: torch.nn.Module, source: str) -> str:
    """Return transformers' name of the activation that the source computes.

    It is identified by its values and not by its class: open_clip, timm and torch have several classes for each.
    """
    names = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
    probe = torch.linspace(-6, 6, 401)
    for name in names:
        if torch.allclose(layer(probe.clone()), ACT2FN[name](probe), rtol=0, atol=1e-6):
            return name
    raise InputError(
        f"{source} uses the activation {type(layer).__name__}, which is not one of {', '.join(names)}; {SUPPORTED}."
    )
