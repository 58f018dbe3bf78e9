"""Layout of an image as tokens of the language model: a grid of patches, and additional tokens of a tower.

Plain arithmetic on the sizes in a model's config, without torch. Only this module decides whether a tower has a class
token (`CLASS_TOKEN`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

CLASS_TOKEN = ("clip_vision_model",)
"""Types of towers that have one additional token before the patches; the others have only patches."""
_DROPS_FIRST: Literal["default"] = "default"


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of an image, in the order of the tower's outputs."""

    rows: int
    """Number of patches from top to bottom."""
    columns: int
    """Number of patches from left to right."""
    additional: int = 0
    """Number of tokens of the tower before the patches: 1 for a class token, else 0."""
    drops_first: bool = False
    """Whether the language model does not read the tower's first token."""

    @classmethod
    def of_tower(cls, vision: Any) -> ImageLayout:
        """Return the layout of a new LLaVA with this tower, which leaves out a class token, as LLaVA does.

        Args:
            vision: Config of the tower, with `model_type`, and `image_size` and `patch_size` in pixels.
        """
        additional = int(vision.model_type in CLASS_TOKEN)
        side = int(vision.image_size) // int(vision.patch_size)
        return cls(side, side, additional, drops_first=bool(additional))

    @classmethod
    def of_config(cls, config: Any) -> ImageLayout:
        """Return the layout of a LLaVA by its config and the `vision_feature_select_strategy` in it."""
        return replace(
            cls.of_tower(config.vision_config), drops_first=config.vision_feature_select_strategy == _DROPS_FIRST
        )

    @classmethod
    def of_processor(cls, processor: Any, height: int, width: int) -> ImageLayout:
        """Return the layout for which a LLaVA's processor writes image tokens, for an image of this size in pixels."""
        return cls(
            height // processor.patch_size,
            width // processor.patch_size,
            int(processor.num_additional_image_tokens),
            processor.vision_feature_select_strategy == _DROPS_FIRST,
        )

    @property
    def outputs(self) -> int:
        """Number of tokens that the tower computes for an image."""
        return self.rows * self.columns + self.additional

    @property
    def first(self) -> int:
        """Index of the first of the tower's tokens that the language model reads."""
        return int(self.drops_first)

    @property
    def tokens(self) -> int:
        """Number of tokens of an image in the language model, each an `<image>`."""
        return self.outputs - self.first

    @property
    def strategy(self) -> Literal["default", "full"]:
        """LLaVA's `vision_feature_select_strategy`: "default" leaves out the first token, "full" keeps all."""
        return _DROPS_FIRST if self.drops_first else "full"
