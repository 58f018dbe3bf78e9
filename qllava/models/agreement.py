"""Checks that the parts of a model fit each other: config, tokenizer, processor, generation config and weights.

transformers loads parts of different models without an error, and training fails later with an index
error or a device-side assert. These checks run before weights are loaded: shapes are
read from the headers of the files. `qllava check --model`, `qllava plan` and a run call the same functions;
each function checks only files that exist, so that `plan` works with a config.json alone.

Every function raises InputError, with the file and both values in the message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, GenerationConfig, LlavaForConditionalGeneration

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN
from qllava.models.errors import does_not_fit, lacks, one_line, one_sentence
from qllava.models.weights import EMBEDDING, HEAD, Weights, llava_name

_ADVICE = "take both from the same model"
_SCALES = re.compile(r"\.(?:SCB|absmax|quant_state\.\w+)$")
"""Suffixes of the additional tensors that bitsandbytes writes for each packed weight."""
_LAYER = re.compile(r"(?P<stack>language_model\.model|vision_tower\.vision_model\.encoder)\.layers\.(?P<number>\d+)\.")


def check_llava_config(name: str, config: Any) -> None:
    """Check that the values of a LLaVA's config.json fit each other, and that qllava can train the model."""
    check_text_config(name, config.text_config)
    check_feature_layer(name, config.vision_feature_layer, config.vision_config)
    text, vision = config.text_config, config.vision_config
    strategy = config.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        raise InputError(
            f"{name}: config.json has the vision_feature_select_strategy {strategy!r}. It must be 'default' or 'full'."
        )
    _check_heads(name, "vision_config", vision)
    sides = (vision.image_size, vision.patch_size)
    if not all(isinstance(side, int) for side in sides) or not 0 < vision.patch_size <= vision.image_size:
        raise InputError(
            f"{name}: config.json has a tower with the image_size {sides[0]} and the patch_size {sides[1]}; an image "
            "must be a square of at least one patch."
        )
    if not 0 <= config.image_token_index < text.vocab_size:
        raise _differ(
            name, "config.json", f"the image_token_index {config.image_token_index}", "its text_config",
            f"a vocab_size of {text.vocab_size}",
        )  # fmt: skip
    _check_ids(name, "config.json", config, text.vocab_size)


def check_text_config(name: str, text: Any) -> None:
    """Check that the values of a language model's config fit each other."""
    _check_heads(name, "the language model", text)
    heads, shared = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % shared:
        raise InputError(
            f"{name}: config.json has num_attention_heads {heads} and num_key_value_heads {shared}; the first must be "
            "a multiple of the second."
        )
    _check_ids(name, "config.json", text, text.vocab_size)


def refuse_quantized(name: str, config: Any) -> None:
    """Raise InputError if a model to be trained is already quantized."""
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "quantization_config", None):
            raise InputError(f"{name} is already quantized. Give the 16-bit model; qllava quantizes it.")


def check_feature_layer(name: str, layer: Any, vision: Any) -> None:
    """Check that vision_feature_layer is a single layer of the tower that exists."""
    depth = vision.num_hidden_layers
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(
            f"{name} uses features of several layers (vision_feature_layer {layer}). qllava trains only models that "
            "use one layer, such as -2."
        )
    if not -depth - 1 <= layer <= depth:
        raise InputError(
            f"{name}: vision_feature_layer is {layer}, and the tower has {depth} layers. Give one from {-depth - 1} to "
            f"{depth}."
        )
    if layer == 0:  # transformers treats 0 as unset
        raise InputError(
            f"{name}: vision_feature_layer is 0, which transformers treats as unset. Give {-depth - 1} for the "
            "embeddings before the first layer, or another layer."
        )


def check_tokenizer(name: str, config: Any, tokenizer: Any) -> None:
    """Check that a LLaVA's embedding has a row for every token id, and that `<image>` is image_token_index."""
    vocabulary = tokenizer.get_vocab()
    rows = config.text_config.vocab_size
    _check_rows(name, vocabulary, rows)
    if vocabulary.get(IMAGE_TOKEN) is None:
        raise InputError(f"{name}: the tokenizer has no token {IMAGE_TOKEN}, which config.json names as "
                         f"{config.image_token_index}; {_ADVICE}.")  # fmt: skip
    if vocabulary[IMAGE_TOKEN] != config.image_token_index:
        raise _differ(
            name, "config.json", f"the image_token_index {config.image_token_index}", "the tokenizer",
            f"{IMAGE_TOKEN} as {vocabulary[IMAGE_TOKEN]}",
        )  # fmt: skip


def check_language_model(name: str, text: Any, tokenizer: Any) -> None:
    """Check that the embedding of a language model covers its vocabulary; only added tokens may exceed it."""
    own = tokenizer.get_vocab()
    added = set(tokenizer.added_tokens_encoder)
    _check_rows(name, {token: id for token, id in own.items() if token not in added}, text.vocab_size)


def check_processor(name: str, config: Any, processor: Any) -> None:
    """Check that the processor makes images of the tower's size, and writes `<image>` for them."""
    token = str(getattr(processor, "image_token", IMAGE_TOKEN))
    if token != IMAGE_TOKEN:
        raise _differ(name, "processor_config.json", f"the image_token {token!r}", "the tokenizer", repr(IMAGE_TOKEN))
    side = config.vision_config.image_size
    with one_sentence(f"{name}: preprocessor_config.json", "copy it from where the weights came from"):
        pixels = processor.image_processor(Image.new("RGB", (side + 8, side)), return_tensors="pt")["pixel_values"]
        found = tuple(pixels.shape)
    if found != (1, 3, side, side):
        raise _differ(
            name, "preprocessor_config.json", f"images of {' x '.join(map(str, found[-2:]))} pixels", "config.json",
            f"a tower of {side} x {side} pixels",
        )  # fmt: skip
    if not torch.isfinite(torch.as_tensor(pixels)).all():
        raise InputError(
            f"{name}: preprocessor_config.json gives pixels that are not finite (image_std must not be 0). Copy it "
            "from where the weights came from."
        )


def check_packed(name: str, config: Any, weights: Weights) -> None:
    """Check that weights are packed if config.json says so; otherwise bitsandbytes fails later in an assert."""
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method") == "bitsandbytes" and not any(_SCALES.search(tensor) for tensor in weights):
        raise InputError(
            f"{name}: config.json has a quantization_config of bitsandbytes, but the weights are not packed. Remove "
            f"quantization_config, or {_ADVICE}."
        )


def check_weights(name: str, config: Any, weights: Weights) -> None:
    """Check that the weights have exactly the layers, and the tensor shapes, of config.json."""
    if getattr(config, "quantization_config", None):
        return  # packed tensors have shapes of their own
    wanted = shapes_of(name, config)
    tied = bool(config.tie_word_embeddings or config.text_config.tie_word_embeddings)
    check_table(name, config.text_config, weights)
    depths = {
        "language_model.model": ("text_config", config.text_config.num_hidden_layers),
        "vision_tower.vision_model.encoder": ("vision_config", config.vision_config.num_hidden_layers),
    }
    for tensor in weights:
        layer = _LAYER.match(tensor)
        if layer and int(layer["number"]) >= depths[layer["stack"]][1]:
            part, depth = depths[layer["stack"]]
            raise _differ(name, "config.json", f"{depth} layers in {part}", "the weights", tensor)
    for tensor, shape in wanted.items():
        if tensor not in weights:
            if not (tied and tensor == HEAD):
                raise lacks(name, tensor)
        elif weights.shape(tensor) != shape:
            raise does_not_fit(name, tensor, weights.shape(tensor), shape)


def check_table(name: str, text: Any, weights: Weights) -> None:
    """Check that embedding and head have the shape (vocab_size, hidden_size)."""
    expected = (text.vocab_size, text.hidden_size)
    for table in (EMBEDDING, HEAD):
        if table in weights and weights.shape(table) != expected:
            raise _differ(
                name, "config.json", f"a vocab_size of {expected[0]} and a hidden_size of {expected[1]}", "the weights",
                f"{' x '.join(map(str, weights.shape(table)))} in {table}",
            )  # fmt: skip


def shapes_of(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a LLaVA's config.json, by their names on disk."""
    with one_sentence(f"{name}: config.json", "correct it, or copy it from where the weights came from"):
        with torch.device("meta"):
            model: Any = LlavaForConditionalGeneration(config)
        return {llava_name(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def read_config(folder: Path, name: str) -> Any:
    """Return a model's config.json, read by transformers."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' own checks of a config raise errors of many kinds
        raise InputError(f"{name} has no readable config.json ({one_line(error)}).") from error


def read_generation(folder: Path, name: str, text: Any) -> GenerationConfig | None:
    """Return a model's generation_config.json after a check of its token ids; None if the file does not exist.

    Args:
        folder: Folder of the file.
        name: Name of the model, as the user gave it.
        text: Config of its language model.
    """
    if not (folder / "generation_config.json").is_file():
        return None
    with one_sentence(f"{name}: generation_config.json", "correct it, or remove it"):
        generation = GenerationConfig.from_pretrained(folder)
    _check_ids(name, "generation_config.json", generation, text.vocab_size)
    return generation


def _differ(name: str, file: str, value: str, other: str, expected: str) -> InputError:
    """Return the error for two files of a model that contradict each other."""
    return InputError(f"{name}: {file} has {value}, and {other} has {expected}; {_ADVICE}.")


def _check_heads(name: str, what: str, part: Any) -> None:
    heads, width = part.num_attention_heads, part.hidden_size
    if heads < 1 or (getattr(part, "head_dim", None) is None and width % heads):
        raise InputError(
            f"{name}: config.json has hidden_size {width} and num_attention_heads {heads} for {what}; the first must "
            "be a multiple of the second."
        )


def _check_rows(name: str, vocabulary: dict[str, int], rows: int) -> None:
    token, id = max(vocabulary.items(), key=lambda entry: entry[1])
    if id >= rows:
        raise _differ(
            name, "the tokenizer", f"the token {token!r} with the id {id}", "config.json", f"a vocab_size of {rows}"
        )


def _check_ids(name: str, file: str, config: Any, rows: int) -> None:
    """Raise InputError for token ids outside the vocabulary."""
    for key, id in _ids(config.to_dict()):
        if id >= rows:
            raise _differ(name, file, f"the {key} {id}", "config.json", f"a vocab_size of {rows}")


def _ids(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the token ids in a config: one or several `*_token_id`, and suppressed tokens."""
    for key, value in values.items():
        if key.endswith("_token_id") or key in ("suppress_tokens", "begin_suppress_tokens"):
            for id in value if isinstance(value, list | tuple) else [value]:
                if isinstance(id, int) and not isinstance(id, bool):
                    yield key, id
