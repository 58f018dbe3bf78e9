"""How an image becomes tokens of the language model: a grid of patches, and what a tower puts beside them.

Plain arithmetic on the sizes in a model's config, without torch. Whether a tower has a class token is decided here
(`CLASS_TOKEN`), and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

CLASS_TOKEN = ("clip_vision_model",)
"""Types of tower that put one more token, not a patch, before the patches; the others have patches alone."""
_DROPS_FIRST: Literal["default"] = "default"


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of an image, in the order in which the tower gives them."""

    rows: int
    """Patches from top to bottom."""
    columns: int
    """Patches from left to right."""
    additional: int = 0
    """Tokens that the tower has before the patches: a class token, or none."""
    drops_first: bool = False
    """Whether the first of the tower's tokens is left out of what the language model reads."""

    @classmethod
    def of_tower(cls, vision: Any) -> ImageLayout:
        """Return the layout of a new LLaVA with this tower, which leaves out a class token, as LLaVA does.

        Args:
            vision: The config of the tower: its `model_type`, and `image_size` and `patch_size` in pixels.
        """
        additional = int(vision.model_type in CLASS_TOKEN)
        side = int(vision.image_size) // int(vision.patch_size)
        return cls(side, side, additional, drops_first=bool(additional))

    @classmethod
    def of_config(cls, config: Any) -> ImageLayout:
        """Return the layout of a LLaVA by its config; its `vision_feature_select_strategy` says what is left out."""
        return replace(
            cls.of_tower(config.vision_config), drops_first=config.vision_feature_select_strategy == _DROPS_FIRST
        )

    @classmethod
    def of_processor(cls, processor: Any, height: int, width: int) -> ImageLayout:
        """Return the layout that a LLaVA's processor writes image tokens for, of pixels of this size."""
        return cls(
            height // processor.patch_size,
            width // processor.patch_size,
            int(processor.num_additional_image_tokens),
            processor.vision_feature_select_strategy == _DROPS_FIRST,
        )

    @property
    def outputs(self) -> int:
        """Tokens that the tower computes of an image."""
        return self.rows * self.columns + self.additional

    @property
    def first(self) -> int:
        """Index of the first of the tower's tokens that the language model reads."""
        return int(self.drops_first)

    @property
    def tokens(self) -> int:
        """Tokens that an image takes in the language model, each an `<image>`."""
        return self.outputs - self.first

    @property
    def strategy(self) -> Literal["default", "full"]:
        """LLaVA's `vision_feature_select_strategy`: "default" leaves out the first token, "full" keeps all."""
        return _DROPS_FIRST if self.drops_first else "full"
