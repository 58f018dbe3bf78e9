"""Tokenizer, template and image processing of a model, without its weights.

`qllava check` and `qllava inspect` need nothing else, so data for a 7B model can be checked on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoProcessor, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from qllava.config import NANO, InputError
from qllava.conversation import IMAGE_TOKEN, TEMPLATES, Template
from qllava.image_layout import ImageLayout
from qllava.models.agreement import refuse_quantized
from qllava.models.checkpoint import build_processor, look_at
from qllava.models.errors import one_line, one_sentence
from qllava.models.hub import settings_folder
from qllava.models.language import language_model_config, load_tokenizer, nano_part
from qllava.models.outline import template_of
from qllava.models.positions import positions_of
from qllava.models.record import Recipe, read_record
from qllava.models.shapes import Shapes, read_shapes
from qllava.models.vision import ImageAspect, load_tower
from qllava.runs import RECORD_FILE

LLAVA_IMAGE = ImageLayout(24, 24, additional=1, drops_first=True)
"""Image layout of LLaVA-1.5, for a tokenizer without a tower."""


@dataclass(frozen=True)
class Reader:
    """Everything that determines token ids and labels."""

    tokenizer: PreTrainedTokenizerBase
    """Tokenizer with `<image>` as one token."""
    template: Template
    """Conversation template."""
    image: ImageLayout
    """Tokens of an image."""
    image_processor: BaseImageProcessor | None
    """Processor that turns an image into pixels; None if only the tokenizer is known."""
    positions: int | None = None
    """Maximum number of tokens of the language model; None if unknown."""

    @property
    def image_token_id(self) -> int:
        """The id of `<image>`."""
        id: int = self.tokenizer.get_vocab()[IMAGE_TOKEN]
        return id


def read_model(model: str) -> Reader:
    """Return the reader of nano, a run, a merged model or a hub name.

    Raises:
        InputError: If the model does not exist.
    """
    if model == NANO:
        return read_parts(NANO, NANO)
    folder = settings_folder(model)
    advice = "give the folder of a LLaVA, or use --tokenizer"
    if (folder / RECORD_FILE).is_file():  # a run: it has its own processor, but not its base
        record = read_record(folder)
        positions = _positions_of_base(record)
        with one_sentence(model, advice):
            processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    elif not (folder / "config.json").is_file():
        raise InputError(f"{model} is not a model: it has no config.json; {advice}.")
    else:
        config, processor = look_at(model)
        refuse_quantized(model, config)
        positions = Shapes(config).positions
        if processor is None:
            raise InputError(f"{model} is not a complete model: it has no tokenizer or processor files; {advice}.")
    with one_sentence(model, advice):
        return _of_processor(processor, _template_of_folder(folder, processor), positions)


def _positions_of_base(record: Recipe) -> int | None:
    """Return the number of positions of a run's base; None if the base is not available."""
    if record.model is not None:
        return read_shapes(record).positions if Path(record.model).is_dir() else None
    name = nano_part(record.language_model or "", "llama")
    return positions_of(language_model_config(name)[0]) if Path(name).is_dir() else None


def read_parts(language_model: str, vision_tower: str, *, image_aspect: ImageAspect = "pad") -> Reader:
    """Return the reader of a LLaVA that will be built from these parts."""
    text, tokenizer = language_model_config(nano_part(language_model, "llama"))
    assert tokenizer is not None  # required by `whole`
    tower = load_tower(nano_part(vision_tower, "tower"), image_aspect=image_aspect)
    return _of_processor(build_processor(tokenizer, tower), TEMPLATES[template_of(tokenizer)], positions_of(text))


def read_tokenizer(path: Path) -> Reader:
    """Return the reader of a tokenizer: a folder, a tokenizer.json or a sentencepiece tokenizer.model.

    An image takes as many tokens as in LLaVA-1.5.

    Raises:
        InputError: If the tokenizer cannot be read.
    """
    if not path.is_file():
        return _alone(load_tokenizer(str(path)))
    try:
        if path.suffix == ".json":
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            tokenizer = LlamaTokenizer.from_pretrained(str(path), legacy=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"The tokenizer {path} cannot be read ({one_line(error)}). Download it again.") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return _alone(tokenizer)


def _alone(tokenizer: PreTrainedTokenizerBase) -> Reader:
    return Reader(tokenizer, TEMPLATES[template_of(tokenizer)], LLAVA_IMAGE, None)


def _of_processor(processor: Any, template: Template, positions: int | None) -> Reader:
    # From the pixels it makes, for which it writes tokens: a run's folder has no config of a tower.
    pixels = processor.image_processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    image = ImageLayout.of_processor(processor, *pixels.shape[-2:])
    return Reader(processor.tokenizer, template, image, processor.image_processor, positions)


def _template_of_folder(folder: Path, processor: Any) -> Template:
    """Return the template of a run, else the one whose chat template is saved, else the one for the tokenizer."""
    if (folder / RECORD_FILE).is_file() and (name := read_record(folder).template):
        return TEMPLATES[name]
    return TEMPLATES[template_of(processor.tokenizer, processor.chat_template)]
