"""Shapes of a model, from its config files without its weights.

`outline` (and so a run, its merge and its chat), `plan`, `check` and `inspect` take the config of a LLaVA from here, so
that a plan describes what is run: one function joins a language model and a tower, and one reads an existing LLaVA.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, PreTrainedTokenizerBase

from qllava.config import InputError, ModelConfig, expanded
from qllava.conversation import IMAGE_TOKEN
from qllava.image_layout import ImageLayout
from qllava.models.agreement import check_feature_layer, refuse_quantized
from qllava.models.bases import located
from qllava.models.checkpoint import look_at
from qllava.models.known import known_config
from qllava.models.language import grown, language_model_config, nano_part
from qllava.models.positions import positions_of
from qllava.models.record import Recipe
from qllava.models.towers import TowerConfig, tower_config
from qllava.runs import RECORD_FILE


@dataclass(frozen=True)
class Shapes:
    """Sizes of a LLaVA and of its parts."""

    config: LlavaConfig
    """Config from which transformers builds the model; must not be changed."""

    @classmethod
    def of_parts(
        cls,
        text: Any,
        vision: TowerConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        layer: int,
        projector_type: str,
    ) -> Shapes:
        """Join a language model and a tower.

        Args:
            text: Config of the language model, which is not changed.
            vision: Config of the tower.
            tokenizer: Tokenizer of the language model, with `<image>`. None if it is not available: the embedding is
                then assumed to have one row per token, and `<image>` comes after them.
            layer: Layer of the tower whose features are used.
            projector_type: Value of the setting `projector_type`.
        """
        image_token: Any = text.vocab_size
        tokens, image = image_token + 1, ImageLayout.of_tower(vision)
        if tokenizer is not None:
            image_token, tokens = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), len(tokenizer)
        if (rows := grown(text.vocab_size, tokens)) != text.vocab_size:
            text = copy.deepcopy(text)
            text.vocab_size = rows
        config = LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=image_token,
            projector_hidden_act="gelu" if projector_type == "mlp2x_gelu" else "linear",
            vision_feature_layer=layer,
            vision_feature_select_strategy=image.strategy,
            image_seq_length=image.tokens,
            tie_word_embeddings=bool(text.tie_word_embeddings),
        )
        return cls(config)

    @property
    def image(self) -> ImageLayout:
        """Tokens of an image."""
        return ImageLayout.of_config(self.config)

    @property
    def rows(self) -> int:
        """Number of rows of the language model's embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int:
        """Maximum number of tokens of the language model."""
        return positions_of(self.config.text_config)


def shapes_of(model: ModelConfig) -> Shapes:
    """Return the shapes of the model in a run's settings; only small files are downloaded.

    Raises:
        InputError: The settings name no model, a part of it cannot be read, or its parts do not fit each other.
    """
    built = model.language_model or model.vision_tower
    if model.model_name_or_path and built and not model.is_nano:
        raise InputError("Give either model_name_or_path, or language_model with vision_tower; not both.")
    recipe = Recipe.of_settings(model)
    if recipe.model and (Path(expanded(recipe.model)) / RECORD_FILE).is_file():  # a run, without its base
        recipe = located(Path(expanded(recipe.model)), model.base_model or ())
    return read_shapes(recipe)


def read_shapes(recipe: Recipe) -> Shapes:
    """Return the shapes of the model that a recipe builds or names; raise an InputError like `shapes_of`."""
    name = recipe.model or recipe.language_model or ""
    if recipe.model is not None:
        shapes = Shapes(_known(recipe.model) or look_at(recipe.model)[0])
    elif recipe.language_model is None or recipe.vision_tower is None:
        raise InputError("A new LLaVA needs both language_model and vision_tower; give both, or model_name_or_path.")
    else:
        language_model, tower = nano_part(recipe.language_model, "llama"), nano_part(recipe.vision_tower, "tower")
        text, tokenizer = _known(language_model), None
        if text is None:
            text, tokenizer = language_model_config(language_model, whole=False)
        vision = tower_config(tower)
        check_feature_layer(tower, recipe.vision_feature_layer, vision)
        layer, projector_type = recipe.vision_feature_layer, recipe.projector_type
        shapes = Shapes.of_parts(text, vision, tokenizer, layer=layer, projector_type=projector_type)
    refuse_quantized(name, shapes.config)
    return shapes


def _known(name: str) -> Any:
    """Return the shapes included in qllava unless a folder has this name; None if there are none."""
    return None if Path(expanded(name)).is_dir() else known_config(name)
