"""What a LLaVA that exists already decides itself: settings that would change only a LLaVA that is built from parts."""

from __future__ import annotations

from typing import Any

from qllava.models.checkpoint import load_config


def decided(config: Any, processor: Any) -> dict[str, Any]:
    """The settings `projector_type`, `vision_feature_layer` and `image_aspect` as a model has them.

    Args:
        config: Of the model.
        processor: Of the model; how it makes an image square decides the aspect.
    """
    pads = bool(getattr(processor.image_processor, "do_pad", False))
    crops = bool(getattr(processor.image_processor, "do_center_crop", False))
    return {
        "projector_type": "linear" if config.projector_hidden_act == "linear" else "mlp2x_gelu",
        "vision_feature_layer": config.vision_feature_layer,
        "image_aspect": "pad" if pads else "crop" if crops else "squash",
    }


def decided_by(model: str) -> dict[str, Any]:
    """The same for a folder or a hub name, whose weights are not fetched. Raises InputError when it cannot be read."""
    return decided(*load_config(model, fetch=False))
