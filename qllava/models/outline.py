"""Everything of a model except its weights: configs, tokenizer, template, and the location of its weights.

recipe --outline--> empty model + processor + `Base` (the weights on disk, one by one) --assemble.py--> Assembled
                                                                                       --merge--------> a new folder
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from qllava.config import OLDER_NANO, InputError
from qllava.conversation import EOS, TEMPLATES, Template
from qllava.models import agreement
from qllava.models.checkpoint import build_processor, load_config, names_on_disk
from qllava.models.decided import decided
from qllava.models.errors import one_sentence
from qllava.models.hub import settings_folder
from qllava.models.language import language_model_config, nano_part
from qllava.models.record import Recipe as Recipe
from qllava.models.shapes import Shapes
from qllava.models.vision import Tower, load_tower
from qllava.models.weights import Base, language_model_name, open_weights, tower_name


def compute_dtype() -> torch.dtype:
    """Return bf16 if the GPU supports it, else fp16; fp32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass
class Outline:
    """A LLaVA without loaded weights."""

    model: LlavaForConditionalGeneration
    """Model on the meta device."""
    """On the meta device, all of it."""
    processor: LlavaProcessor
    """Processor with tokenizer and chat template."""
    recipe: Recipe
    """With template, fingerprint and dtype filled in."""
    base: Base
    """The weights, which are read one by one."""
    tower: Tower | None
    """Tower of a LLaVA that is built from parts; on the meta device if its weights are in a folder."""


def outline(recipe: Recipe) -> Outline:
    """Read everything of a recipe except the weights of its language model, in seconds and with little memory.

    Raises:
        InputError: If parts are missing, of another type or do not fit each other, or if the recipe has the
            fingerprint of another base.
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
    if recipe.model is None:  # the weights of an existing LLaVA have been compared with its config
        base.check_parts(names_on_disk(model), tied=bool(config.text_config.tie_word_embeddings), what=name)
    saved = processor.chat_template if recipe.model is not None else None
    recipe = replace(recipe, template=recipe.template or template_of(processor.tokenizer, saved))
    found = fingerprint(config, processor.tokenizer, base, built=recipe.model is None)
    if recipe.fingerprint and recipe.fingerprint != found:
        if recipe.is_of_another_nano(found):
            raise InputError(f"The adapter {OLDER_NANO}")
        parts = zip(recipe.fingerprint.split("-"), found.split("-"), ("config", "vocabulary", "weights"), strict=False)
        other = ", ".join(what for wanted, given, what in parts if wanted != given)
        raise InputError(
            f"The adapter was trained on another base than {name} (different {other or 'kind'}). Give "
            "the base of the run; if it has moved, use --base-model DIR."
        )
    own = decided(config, processor) if recipe.model is not None else {}
    filled = replace(recipe, **own, fingerprint=found, dtype=str(dtype).removeprefix("torch."))
    settle_template(model, processor, TEMPLATES[filled.template])
    return Outline(model.eval(), processor, filled, base, tower)


def _of_parts(recipe: Recipe, dtype: torch.dtype) -> tuple[Any, LlavaProcessor, GenerationConfig, Base, Tower]:
    """Return config, processor, generation config, weights and tower of a LLaVA that is built from parts."""
    if recipe.language_model is None or recipe.vision_tower is None:
        raise InputError("A new LLaVA needs both language_model and vision_tower; give both, or model_name_or_path.")
    name = nano_part(recipe.language_model, "llama")
    text, tokenizer = language_model_config(name)
    assert tokenizer is not None  # `whole` guarantees it
    weights = open_weights(name, language_model_name)
    spec = nano_part(recipe.vision_tower, "tower")
    on_disk = not spec.startswith("open_clip:")
    tower = load_tower(spec, image_aspect=recipe.image_aspect, weights=not on_disk)
    layer, vision = recipe.vision_feature_layer, tower.model.config
    agreement.check_feature_layer(spec, layer, vision)
    held = {}
    if on_disk:
        weights.join(open_weights(spec, tower_name))
    else:  # open_clip's tower, which was converted
        held = {tower_name(key): tensor for key, tensor in tower.model.state_dict().items()}
    shapes = Shapes.of_parts(text, vision, tokenizer, layer=layer, projector_type=recipe.projector_type)
    processor = build_processor(tokenizer, tower)
    generation = _generation_config(name, shapes.config.text_config)
    base = Base(weights, dtype, held, rows=shapes.rows)
    return shapes.config, processor, generation, base, tower


def settle_template(model: Any, processor: LlavaProcessor, template: Template) -> None:
    """Set the chat template of the model, and the tokens that end an answer."""
    # `plain` is for captions; nobody chats with it, so the model keeps the template of its later questions.
    processor.chat_template = processor.tokenizer.chat_template = template.chat_template()
    _settle_end_of_turn(model, processor.tokenizer, template)


def template_of(tokenizer: Any, saved: Any = None) -> str:
    """Return the template in which a model was trained: its saved chat template if it is ours, else by control tokens.

    Without control tokens it is `vicuna_v1`, LLaVA's own.
    """
    for name, template in TEMPLATES.items():
        if saved and template.chat_template() == saved:
            return name
    vocabulary = tokenizer.get_vocab()
    for name in ("llama_3", "chatml"):
        if all(control in vocabulary for control in TEMPLATES[name].controls):
            return name
    return "llama_2" if "[INST]" in str(tokenizer.chat_template or "") else "vicuna_v1"


def _generation_config(name: str, config: Any) -> GenerationConfig:
    """Return a model's generation config, or one made from its config if it has none."""
    own = agreement.read_generation(settings_folder(name), name, config.get_text_config())
    return own or GenerationConfig.from_model_config(config)


def _settle_end_of_turn(model: Any, tokenizer: Any, template: Template) -> None:
    """Stop generation at the end of a turn."""
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
    """Hash the base's shapes, its vocabulary, and evenly spaced values of every weight on disk.

    The hash does not depend on the device or on quantization. The projector is left out if it was newly `built`,
    because it then belongs to the adapter.
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
