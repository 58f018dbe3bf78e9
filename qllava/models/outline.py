"""What a model is built from, before its weights: configs, tokenizer, template, and which weights belong to it.

recipe --outline--> empty model + processor + `Base` (the weights on disk, one by one) --assemble.py--> Assembled
                                                                                       --merge--------> a new folder
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from qllava.config import NANO_WEIGHTS, InputError, expanded
from qllava.conversation import EOS, IMAGE_TOKEN, TEMPLATES, Template
from qllava.models import agreement
from qllava.models.checkpoint import build_processor, load_config, names_on_disk
from qllava.models.decided import decided
from qllava.models.errors import one_line, one_sentence
from qllava.models.hub import settings_folder
from qllava.models.layouts import find_weights
from qllava.models.record import Recipe as Recipe
from qllava.models.vision import Tower, load_tower
from qllava.models.weights import Base, language_model_name, open_weights, tower_name

LANGUAGE_MODELS = {"llama": "LLaMA 1-3, Vicuna, SmolLM2, TinyLlama", "mistral": "Mistral"}


def compute_dtype() -> torch.dtype:
    """bf16 where the device has it, fp16 where it has not, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass
class Outline:
    """A LLaVA before its weights, which lie on disk."""

    model: LlavaForConditionalGeneration
    """On the meta device, all of it."""
    processor: LlavaProcessor
    recipe: Recipe
    """With template, fingerprint and dtype filled in."""
    base: Base
    """The weights, read one by one."""
    tower: Tower | None
    """Of a LLaVA that is built from parts; on the meta device too, where its weights lie in a folder."""


def outline(recipe: Recipe) -> Outline:
    """Everything of a recipe but the weights of its language model: minutes earlier, and in no memory.

    Raises InputError for parts that are missing, of another kind, or of widths that do not fit, and when the recipe
    carries the fingerprint of another base.
    """
    dtype: torch.dtype = getattr(torch, recipe.dtype) if recipe.dtype else compute_dtype()
    tower: Tower | None = None
    config: Any
    if recipe.model is not None:
        config, processor = load_config(recipe.model)
        generation = _generation_config(recipe.model, config)
        base = Base(open_weights(recipe.model), dtype)
    else:
        config, processor, generation, base, tower = _of_parts(recipe, dtype)
    config.dtype = dtype
    name = recipe.model or recipe.language_model or ""
    agreement.refuse_quantized(name, config)
    with one_sentence(f"{name}: config.json", "correct it"), torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.generation_config = generation
    if recipe.model is None:  # the weights of a ready LLaVA have been compared with its config
        base.check_parts(names_on_disk(model), tied=bool(config.text_config.tie_word_embeddings), what=name)
    saved = processor.chat_template if recipe.model is not None else None
    recipe = replace(recipe, template=recipe.template or template_of(processor.tokenizer, saved))
    found = fingerprint(config, processor.tokenizer, base, built=recipe.model is None)
    if recipe.fingerprint and recipe.fingerprint != found:
        parts = zip(recipe.fingerprint.split("-"), found.split("-"), ("config", "vocabulary", "weights"), strict=False)
        other = ", ".join(what for wanted, given, what in parts if wanted != given)
        raise InputError(
            f"The base {name} is not the one that this adapter was trained on (another {other or 'kind'}); give the "
            "base that the run used, with --base-model DIR if it is elsewhere now."
        )
    own = decided(config, processor) if recipe.model is not None else {}
    filled = replace(recipe, **own, fingerprint=found, dtype=str(dtype).removeprefix("torch."))
    settle_template(model, processor, TEMPLATES[filled.template])
    return Outline(model.eval(), processor, filled, base, tower)


def _of_parts(recipe: Recipe, dtype: torch.dtype) -> tuple[Any, LlavaProcessor, GenerationConfig, Base, Tower]:
    """Config, processor, generation config, weights and tower of a LLaVA that is built from parts."""
    if recipe.language_model is None or recipe.vision_tower is None:
        raise InputError("A new LLaVA needs both language_model and vision_tower; give both, or model_name_or_path.")
    name = nano_part(recipe.language_model, "llama")
    text, tokenizer = language_model_config(name)
    assert tokenizer is not None  # `whole` has seen to it
    weights = open_weights(name, language_model_name)
    spec = nano_part(recipe.vision_tower, "tower")
    on_disk = not spec.startswith("open_clip:")
    tower = load_tower(spec, image_aspect=recipe.image_aspect, weights=not on_disk)
    agreement.check_feature_layer(spec, recipe.vision_feature_layer, tower.model.config)
    held = {}
    if on_disk:
        weights.join(open_weights(spec, tower_name))
    else:  # open_clip's, which was converted
        held = {tower_name(key): tensor for key, tensor in tower.model.state_dict().items()}
    text.vocab_size = grown(text.vocab_size, len(tokenizer))
    config = llava_config(recipe, text, tower, tokenizer)
    processor = build_processor(tokenizer, tower)
    generation = _generation_config(name, text)
    base = Base(weights, dtype, held, rows=text.vocab_size)
    return config, processor, generation, base, tower


def settle_template(model: Any, processor: LlavaProcessor, template: Template) -> None:
    """How the model will be asked, and where it stops."""
    # `plain` is how captions are learned; nobody chats with it, so the model keeps the template it will be asked in.
    processor.chat_template = processor.tokenizer.chat_template = template.chat_template()
    _settle_end_of_turn(model, processor.tokenizer, template)


def template_of(tokenizer: Any, saved: Any = None) -> str:
    """The template that a model was trained in, if its saved chat template is one of ours; else by control tokens.

    Where there are none it is `vicuna_v1`, LLaVA's own.
    """
    for name, template in TEMPLATES.items():
        if saved and template.chat_template() == saved:
            return name
    vocabulary = tokenizer.get_vocab()
    for name in ("llama_3", "chatml"):
        if all(control in vocabulary for control in TEMPLATES[name].controls):
            return name
    return "llama_2" if "[INST]" in str(tokenizer.chat_template or "") else "vicuna_v1"


def llava_config(recipe: Recipe, text: Any, tower: Tower, tokenizer: Any) -> LlavaConfig:
    """The config of a LLaVA from parts; `text` is that of its language model."""
    return LlavaConfig(
        text_config=text,
        vision_config=tower.model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        projector_hidden_act="gelu" if recipe.projector_type == "mlp2x_gelu" else "linear",
        vision_feature_layer=recipe.vision_feature_layer,
        vision_feature_select_strategy=tower.strategy,
        image_seq_length=tower.tokens_per_image,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def _generation_config(name: str, config: Any) -> GenerationConfig:
    """A model's own, or what its config says where it has none."""
    own = agreement.read_generation(settings_folder(name), name, config.get_text_config())
    return own or GenerationConfig.from_model_config(config)


def nano_part(name: str, part: str) -> str:
    """The folder of one of nano's parts, or the name as it is."""
    if name != "nano":
        return name
    folder = NANO_WEIGHTS / part
    if not (folder / "model.safetensors").is_file():
        raise InputError(
            f"nano's weights are missing ({folder}); install qllava anew, or make them with recipes/build_nano.py."
        )
    return str(folder)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, with `<image>` as one more token, and padding.

    Raises InputError when it cannot be read.
    """
    folder = settings_folder(name)
    try:
        # legacy: LLaMA 1, 2 and Vicuna were trained with it; tokenizers that come as tokenizer.json do not look at it.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, legacy=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"The tokenizer of {name} cannot be loaded ({one_line(error)}); get it anew.") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def language_model_config(name: str, *, whole: bool = True) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """Config and tokenizer of a LLaMA-family model, compared with each other and with what else is there.

    Args:
        name: A folder, or a name on the hub.
        whole: Whether a tokenizer has to be there; else it is None where there is none.

    Raises:
        InputError: It is no such model, or its parts do not agree.
    """
    folder = settings_folder(name)
    config = agreement.read_config(folder, f"The language model {name}")
    if config.model_type not in LANGUAGE_MODELS:
        supported = "; ".join(f"{kind} ({names})" for kind, names in LANGUAGE_MODELS.items())
        raise InputError(f"The language model {name} is of type '{config.model_type}'; supported are: {supported}.")
    with one_sentence(f"{name}: config.json", "correct it, or copy it from where the weights came from"):
        agreement.check_text_config(name, config)
    files = [path.name for path in folder.iterdir()]
    tokenizer = None
    if whole or any(file in files for file in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(name)
        agreement.check_language_model(name, config, tokenizer)
    agreement.read_generation(folder, name, config)
    if Path(expanded(name)).is_dir() and find_weights(files, name):
        agreement.check_table(name, config, open_weights(name, language_model_name))
    return config, tokenizer


def grown(rows: int, tokens: int) -> int:
    """Rows of an embedding with room for so many tokens: as many as it has, or a multiple of 64."""
    return rows if tokens <= rows else -(-tokens // 64) * 64


def _settle_end_of_turn(model: Any, tokenizer: Any, template: Template) -> None:
    """Generation stops where a turn ends."""
    end = template.end_of_turn.strip()
    ids = {tokenizer.eos_token_id}
    if end and end != EOS:
        ids.add(tokenizer.convert_tokens_to_ids(end))
    ids.discard(None)
    model.generation_config.eos_token_id = sorted(ids)
    model.generation_config.pad_token_id = tokenizer.pad_token_id


_TEXT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "vocab_size",
)  # fmt: skip


_VISION = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "hidden_act")


def fingerprint(config: Any, tokenizer: Any, base: Base, *, built: bool) -> str:
    """Hashes of what the base computes, of its vocabulary, and of evenly spaced values of every weight on disk.

    None depends on the device or on quantization. The projector is left out where it was built here (`built`): it
    belongs to the adapter.
    """
    shape = [str(getattr(config, key, None)) for key in ("vision_feature_layer", "vision_feature_select_strategy")]
    shape += [f"{key}={getattr(config.text_config, key, None)}" for key in _TEXT]
    shape += [f"{key}={getattr(config.vision_config, key, None)}" for key in _VISION]
    vocabulary = sorted(tokenizer.get_vocab().items())
    weights = hashlib.sha256()
    for name in sorted(base):
        if not (built and "multi_modal_projector" in name):
            weights.update(f"{name}{tuple(base.shape(name))}".encode())
            weights.update(base.sample(name).numpy().tobytes())
    hashes = (hashlib.sha256(str(part).encode()) for part in (shape, vocabulary))
    return "-".join(found.hexdigest()[:12] for found in (*hashes, weights))
