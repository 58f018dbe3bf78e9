"""Settings that an existing LLaVA determines itself; the user can choose them only for a new LLaVA."""

from __future__ import annotations

from typing import Any

from qllava.models.checkpoint import load_config


def decided(config: Any, processor: Any) -> dict[str, Any]:
    """Return `projector_type`, `vision_feature_layer` and `image_aspect` of a model.

    Args:
        config: Config of the model.
        processor: Processor of the model; the way it makes an image square determines `image_aspect`.
    """
    pads = bool(getattr(processor.image_processor, "do_pad", False))
    crops = bool(getattr(processor.image_processor, "do_center_crop", False))
    return {
        "projector_type": "linear" if config.projector_hidden_act == "linear" else "mlp2x_gelu",
        "vision_feature_layer": config.vision_feature_layer,
        "image_aspect": "pad" if pads else "crop" if crops else "squash",
    }


def decided_by(model: str) -> dict[str, Any]:
    """Return the same for a folder or hub name, without fetching weights; raise InputError if it cannot be read."""
    return decided(*load_config(model, fetch=False))
