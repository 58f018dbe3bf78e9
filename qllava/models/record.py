"""The record of a run's base model in its folder, read without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qllava.config import NANO, InputError, ModelConfig, expanded
from qllava.models.errors import one_line
from qllava.runs import ADAPTER_CONFIG_FILE, RECORD_FILE

BELONGS_TO_BASE = ("template", "load_in_4bit", "image_aspect", "vision_feature_layer", "projector_type")
"""Settings that an adapter was trained with and cannot be used without."""


@dataclass(frozen=True)
class Recipe:
    """Parts from which a model is built; saved with every adapter, so that its folder is self-contained."""

    model: str | None
    """Folder or hub name of an existing LLaVA; None for a LLaVA built from the two parts below."""
    language_model: str | None
    """Folder or hub name of the language model."""
    vision_tower: str | None
    """`open_clip:ARCH/PRETRAINED` or a folder."""
    projector_type: Literal["mlp2x_gelu", "linear"]
    """Kind of the projector of a LLaVA that is built from parts."""
    vision_feature_layer: int
    """Index of the hidden states of the tower that are used."""
    image_aspect: Literal["pad", "crop", "squash"]
    """How an image is made square; `squash` changes its proportions."""
    template: str
    """Name of the conversation template; empty if the language model's tokenizer decides it."""
    load_in_4bit: bool
    """Whether the language model is in NF4."""
    fingerprint: str = ""
    """Hash of the base's weights, vocabulary and shapes; empty before the base was loaded."""
    dtype: str = ""
    """Type of weights that are not quantized, used on every device; empty before the base was loaded."""

    @classmethod
    def of_settings(cls, model: ModelConfig) -> Recipe:
        """Return the recipe in a run's settings, with absolute paths, because the record is read elsewhere too.

        `plain` is for captions; the model keeps the template of its later questions.
        """
        built = bool(model.language_model or model.vision_tower)
        return cls(
            model=None if built or model.is_nano else _absolute(model.model_name_or_path),
            language_model=NANO if model.is_nano else _absolute(model.language_model),
            vision_tower=NANO if model.is_nano else _absolute(model.vision_tower),
            projector_type=model.projector_type,  # type: ignore[arg-type]
            vision_feature_layer=model.vision_feature_layer,
            image_aspect=model.image_aspect,  # type: ignore[arg-type]
            template=model.template or "" if model.template != "plain" else "",
            load_in_4bit=model.load_in_4bit,
        )

    def is_of_another_nano(self, fingerprint: str) -> bool:
        """Whether this recipe and a base of that fingerprint have nano's parts of two versions, so other weights."""
        ours = self.language_model == self.vision_tower == NANO
        return ours and self.fingerprint.rpartition("-")[2] != fingerprint.rpartition("-")[2]


def _absolute(name: str | None) -> str | None:
    folder = Path(expanded(name)) if name else None
    return str(folder.absolute()) if folder is not None and folder.is_dir() else name


def save_record(recipe: Recipe, folder: Path) -> None:
    """Write the record of the base into an adapter's folder."""
    (folder / RECORD_FILE).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Recipe:
    """Read the recipe of the model of a run or checkpoint.

    Raises:
        InputError: The folder has no record, or it cannot be read.
    """
    path = folder / RECORD_FILE
    try:
        return Recipe(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is not a run of qllava (it has no {path.name}). Give the folder of a finished run or of a "
            "checkpoint."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} is not a run of qllava: {path.name} cannot be read ({one_line(error)}).") from error


def adapter_at(name: str | None) -> Path | None:
    """Return the folder of a run or checkpoint with an adapter; None for any other model."""
    folder = Path(expanded(name)) if name else None
    found = folder is not None and all((folder / file).is_file() for file in (RECORD_FILE, ADAPTER_CONFIG_FILE))
    return folder if found else None
