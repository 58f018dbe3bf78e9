"""Whether the parts of a model agree: config, tokenizer, processor, generation config and weights.

A folder whose parts come from different models is loaded by transformers without a word, and ends later in an index
error or a device-side assert. Everything that can be compared is compared here, before weights are loaded: shapes are
read from the headers of the files. `qllava check --model`, `qllava plan` and a run ask the same functions; each of them
compares what is there, so a config.json alone can be planned.

Every function raises InputError: one sentence with the file and both values.
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
"""How tensors end that bitsandbytes writes for each of its own."""
_LAYER = re.compile(r"(?P<stack>language_model\.model|vision_tower\.vision_model\.encoder)\.layers\.(?P<number>\d+)\.")


def check_llava_config(name: str, config: Any) -> None:
    """The values of a LLaVA's config.json fit each other, and qllava can train it."""
    check_text_config(name, config.text_config)
    check_feature_layer(name, config.vision_feature_layer, config.vision_config)
    text, vision = config.text_config, config.vision_config
    strategy = config.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        raise InputError(
            f"{name}: config.json has the vision_feature_select_strategy {strategy!r}; possible are 'default', 'full'."
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
    """The values of a language model's config fit each other."""
    _check_heads(name, "the language model", text)
    heads, shared = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % shared:
        raise InputError(
            f"{name}: config.json has num_attention_heads {heads} and num_key_value_heads {shared}; the first must be "
            "a multiple of the second."
        )
    _check_ids(name, "config.json", text, text.vocab_size)


def refuse_quantized(name: str, config: Any) -> None:
    """A model that is trained comes in 16 bit; one that is only asked may be packed."""
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "quantization_config", None):
            raise InputError(f"{name} is quantized already; give the model in 16 bit, which qllava quantizes itself.")


def check_feature_layer(name: str, layer: Any, vision: Any) -> None:
    """The layer of the tower that features come from exists, and is one."""
    depth = vision.num_hidden_layers
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(
            f"{name} takes the features of several layers (vision_feature_layer {layer}); qllava trains models that "
            "take one, such as -2."
        )
    if not -depth - 1 <= layer <= depth:
        raise InputError(
            f"{name}: vision_feature_layer is {layer}, and the tower has {depth} layers; give one from {-depth - 1} to "
            f"{depth}."
        )
    if layer == 0:  # transformers takes it for unset
        raise InputError(
            f"{name}: vision_feature_layer is 0, which transformers does not compute; give {-depth - 1} for the "
            "embeddings before the first layer, or a layer."
        )


def check_tokenizer(name: str, config: Any, tokenizer: Any) -> None:
    """Every id of a LLaVA's tokenizer has a row in the embedding, and `<image>` is the token that the model fills."""
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
    """A language model's tokenizer belongs to it: a few added tokens may be new to the embedding, a vocabulary not."""
    own = tokenizer.get_vocab()
    added = set(tokenizer.added_tokens_encoder)
    _check_rows(name, {token: id for token, id in own.items() if token not in added}, text.vocab_size)


def check_processor(name: str, config: Any, processor: Any) -> None:
    """Images become squares of the size that the tower takes, and `<image>` is written for them."""
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
            f"{name}: preprocessor_config.json makes pixels that are no numbers (image_std must not be 0); copy it "
            "from where the weights came from."
        )


def check_packed(name: str, config: Any, weights: Weights) -> None:
    """Weights that bitsandbytes has packed, as config.json says, bring their scales; without them it asserts later."""
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method") == "bitsandbytes" and not any(_SCALES.search(tensor) for tensor in weights):
        raise InputError(
            f"{name}: config.json has a quantization_config of bitsandbytes, and none of the weights is packed; remove "
            f"that key, or {_ADVICE}."
        )


def check_weights(name: str, config: Any, weights: Weights) -> None:
    """Every tensor that config.json asks for is there in its shape, and no layer that it does not know of."""
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
    """Embedding and head have a row for each id, each as wide as the model."""
    expected = (text.vocab_size, text.hidden_size)
    for table in (EMBEDDING, HEAD):
        if table in weights and weights.shape(table) != expected:
            raise _differ(
                name, "config.json", f"a vocab_size of {expected[0]} and a hidden_size of {expected[1]}", "the weights",
                f"{' x '.join(map(str, weights.shape(table)))} in {table}",
            )  # fmt: skip


def shapes_of(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a LLaVA's config.json asks for, under their names on disk."""
    with one_sentence(f"{name}: config.json", "correct it, or copy it from where the weights came from"):
        with torch.device("meta"):
            model: Any = LlavaForConditionalGeneration(config)
        return {llava_name(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def read_config(folder: Path, name: str) -> Any:
    """A model's config.json, as transformers reads it."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' own checks of a config raise errors of many kinds
        raise InputError(f"{name} has no readable config.json ({one_line(error)}).") from error


def read_generation(folder: Path, name: str, text: Any) -> GenerationConfig | None:
    """A model's generation_config.json, whose tokens are all in the vocabulary; None where there is none.

    Args:
        folder: Where it is.
        name: The model, as the user gave it.
        text: The config of its language model.
    """
    if not (folder / "generation_config.json").is_file():
        return None
    with one_sentence(f"{name}: generation_config.json", "correct it, or remove it"):
        generation = GenerationConfig.from_pretrained(folder)
    _check_ids(name, "generation_config.json", generation, text.vocab_size)
    return generation


def _differ(name: str, file: str, value: str, other: str, expected: str) -> InputError:
    """The sentence for two files of a model that say different things."""
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
    """Refuse ids of tokens that are not in the vocabulary."""
    for key, id in _ids(config.to_dict()):
        if id >= rows:
            raise _differ(name, file, f"the {key} {id}", "config.json", f"a vocab_size of {rows}")


def _ids(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The ids of tokens among settings: `eos_token_id` and the like, one or several, and tokens that are suppressed."""
    for key, value in values.items():
        if key.endswith("_token_id") or key in ("suppress_tokens", "begin_suppress_tokens"):
            for id in value if isinstance(value, list | tuple) else [value]:
                if isinstance(id, int) and not isinstance(id, bool):
                    yield key, id
