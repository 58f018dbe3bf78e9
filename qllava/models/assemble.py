"""Parts become a LLaVA that can be tuned: 4-bit language model, fp32 projector, frozen tower.

    language model (NF4) ---------\
    projector (fp32, trained) -----> LlavaForConditionalGeneration --adapter.py: LoRA, by full path--> PeftModel
    tower (frozen, no graph) -----/

Chosen: the language model is loaded by itself, quantized, and put in its place in an empty LLaVA, so that nothing else
can be quantized by a mismatched list of names; a LLaVA that exists already is loaded with the full names of what must
stay as it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from qllava.config import NANO_WEIGHTS, InputError
from qllava.conversation import EOS, IMAGE_TOKEN, TEMPLATES, Template
from qllava.models.checkpoint import build_processor, load_llava
from qllava.models.vision import LOAD_ERRORS, check_loading, load_tower, one_line

LANGUAGE_MODELS = {"llama": "LLaMA 1-3, Vicuna, SmolLM2, TinyLlama", "mistral": "Mistral"}
# Full names: a bare "multi_modal_projector" or "vision_tower" matches nothing, and both would be quantized.
# Full names: a bare "multi_modal_projector" or "vision_tower" matches nothing, and both would be quantized.
_KEPT_IN_FULL = ["model.multi_modal_projector", "model.vision_tower", "lm_head"]


@dataclass(frozen=True)
class Recipe:
    """What a model is built from; written beside every adapter, so that the folder needs nothing else."""

    model: str | None
    """A LLaVA's folder or hub name; None when it is built from the two parts below."""
    language_model: str | None
    """Folder or hub name of the language model."""
    vision_tower: str | None
    """`open_clip:ARCH/PRETRAINED` or a folder."""
    projector_type: Literal["mlp2x_gelu", "linear"]
    """Shape of the projector of a LLaVA that is built from parts."""
    vision_feature_layer: int
    """Index into the tower's hidden states."""
    image_aspect: Literal["pad", "crop"]
    """How a picture becomes a square."""
    template: str
    """Name of the conversation template; empty: chosen by the language model's tokenizer."""
    load_in_4bit: bool
    """Whether the language model is held in NF4."""
    fingerprint: str = ""
    """Of the base's weights, vocabulary and shapes; empty until it was loaded."""
    dtype: str = ""
    """Of what is not quantized; empty until it was loaded. Another device then loads the same, as training saw it."""


@dataclass
class Assembled:
    """A LLaVA with what belongs to it, before anything was adapted."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    recipe: Recipe
    """With template, fingerprint and dtype filled in."""

    @property
    def template(self) -> Template:
        """The conversation template by its name."""
        return TEMPLATES[self.recipe.template]


def compute_dtype() -> torch.dtype:
    """bf16 where the device has it, fp16 where it has not, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def assemble(recipe: Recipe, *, seed: int = 0) -> Assembled:
    """Load or build the model of a recipe; a new projector is drawn from `seed`.

    Raises InputError for parts that are missing, of another kind, or of widths that do not fit, and when the recipe
    carries the fingerprint of another base.
    """
    dtype: torch.dtype = getattr(torch, recipe.dtype) if recipe.dtype else compute_dtype()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    quantization = nf4(dtype) if recipe.load_in_4bit else None
    if recipe.model is not None:
        on_device = {"": device} if quantization else None
        model, processor = load_llava(recipe.model, dtype=dtype, quantization_config=quantization, device_map=on_device)
    else:
        model, processor = _from_parts(recipe, dtype, device, seed)
    if quantization is None:
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    model.model.multi_modal_projector.to(device=device, dtype=torch.float32)
    recipe = replace(recipe, template=recipe.template or template_of(processor.tokenizer))
    template = TEMPLATES[recipe.template]
    # `plain` is how captions are learned; nobody chats with it, so the model keeps the template it will be asked in.
    processor.chat_template = processor.tokenizer.chat_template = template.chat_template()
    _settle_end_of_turn(model, processor.tokenizer, template)
    prepare_for_training(model)
    found = fingerprint(model, built=recipe.model is None)
    if recipe.fingerprint and recipe.fingerprint != found:
        raise InputError(
            f"The base {recipe.model or recipe.language_model} is not the one that this adapter was trained on (its "
            "weights, shapes or vocabulary differ); give the base that the run used."
        )
    return Assembled(model, processor, replace(recipe, fingerprint=found, dtype=str(dtype).removeprefix("torch.")))


def template_of(tokenizer: Any) -> str:
    """The template that a language model was made for, by its control tokens.

    Where there are none it is `vicuna_v1`, LLaVA's own.
    """
    vocabulary = tokenizer.get_vocab()
    for name in ("llama_3", "chatml"):
        if all(control in vocabulary for control in TEMPLATES[name].controls):
            return name
    return "llama_2" if "[INST]" in str(tokenizer.chat_template or "") else "vicuna_v1"


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization for the language model only; `dtype` is what its layers compute in."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_KEPT_IN_FULL,
    )


def _from_parts(
    recipe: Recipe, dtype: torch.dtype, device: str, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a LLaVA from a language model and a tower."""
    if recipe.language_model is None or recipe.vision_tower is None:
        raise InputError("A new LLaVA needs both language_model and vision_tower; give both, or model_name_or_path.")
    llm, tokenizer = load_language_model(
        nano_part(recipe.language_model, "llama"), dtype, device, four_bit=recipe.load_in_4bit
    )
    tower = load_tower(nano_part(recipe.vision_tower, "tower"), image_aspect=recipe.image_aspect)
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if recipe.load_in_4bit:
        # It would be saved inside the merged model's config, and programs would take plain weights for packed ones.
        del llm.config.quantization_config
    config = LlavaConfig(
        text_config=llm.config,
        vision_config=tower.model.config,
        image_token_index=image_token,
        projector_hidden_act="gelu" if recipe.projector_type == "mlp2x_gelu" else "linear",
        vision_feature_layer=recipe.vision_feature_layer,
        vision_feature_select_strategy=tower.strategy,
        image_seq_length=tower.tokens_per_image,
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = llm.model, llm.lm_head
    model.model.vision_tower = nn.Module.to(tower.model, device=device, dtype=dtype)
    model.model.multi_modal_projector.to_empty(device="cpu")
    _draw_projector(model.model.multi_modal_projector, recipe.projector_type, seed)
    model.generation_config = llm.generation_config
    model.is_loaded_in_4bit = recipe.load_in_4bit
    return model.eval(), build_processor(tokenizer, tower)


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
    try:
        # legacy: LLaMA 1, 2 and Vicuna were trained with it; tokenizers that come as tokenizer.json do not look at it.
        tokenizer: Any = AutoTokenizer.from_pretrained(name, legacy=True)
    except (*LOAD_ERRORS, TypeError) as error:
        raise InputError(f"The tokenizer of {name} cannot be loaded ({one_line(error)}); get it anew.") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def load_language_model(
    name: str, dtype: torch.dtype, device: str, *, four_bit: bool
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a LLaMA-family model (safetensors, no remote code) and its tokenizer, with `<image>` as one more token.

    Raises InputError when it is no such model, or cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except LOAD_ERRORS as error:
        raise InputError(f"The language model {name} has no readable config.json ({one_line(error)}).") from error
    if config.model_type not in LANGUAGE_MODELS:
        supported = "; ".join(f"{kind} ({names})" for kind, names in LANGUAGE_MODELS.items())
        raise InputError(f"The language model {name} is of type '{config.model_type}'; supported are: {supported}.")
    tokenizer = load_tokenizer(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **({"quantization_config": nf4(dtype), "device_map": {"": device}} if four_bit else {}),
        )
    except (*LOAD_ERRORS, TypeError) as error:
        raise InputError(f"The language model {name} cannot be loaded ({one_line(error)}); get it anew.") from error
    model, report = loaded
    check_loading(report, f"The language model {name}")
    if not four_bit:
        model.to(device)
    _grow_embeddings(model, len(tokenizer))
    return model, tokenizer


def _grow_embeddings(model: Any, size: int) -> None:
    """Make room for new tokens, a multiple of 64; a new row is the mean of the old, so that it is never likely."""
    old = model.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    model.resize_token_embeddings(size, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[old:] = table.weight[:old].mean(0)


def _draw_projector(projector: Any, kind: str, seed: int) -> None:
    """Initialize in fp32 from a seed of its own; `linear` is W in `linear_1` and a fixed identity in `linear_2`."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("linear_1", "linear_2"):
        layer = getattr(projector, name)
        nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    if kind == "linear":
        nn.init.eye_(projector.linear_2.weight)


def _settle_end_of_turn(model: Any, tokenizer: Any, template: Template) -> None:
    """Generation stops where a turn ends."""
    end = template.end_of_turn.strip()
    ids = {tokenizer.eos_token_id}
    if end and end != EOS:
        ids.add(tokenizer.convert_tokens_to_ids(end))
    ids.discard(None)
    model.generation_config.eos_token_id = sorted(ids)
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def prepare_for_training(model: Any) -> None:
    """Freeze everything, take the tower out of the graph, and let a 16-bit tower feed an fp32 projector."""
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise a forward pass without gradients repacks the weights in place, and training after an evaluation
            # on such a CPU goes on with no gradients and no error.
            module.support_avx512bf16_for_cpu = False
    tower = model.model.vision_tower
    # `enable_input_require_grads` hooks the tower's embedding too: it would run in the graph and be checkpointed.
    tower.forward = torch.no_grad()(tower.forward)
    # In training autocast does this; an answer during a run, and chat, are computed without it.
    model.model.multi_modal_projector.register_forward_pre_hook(_to_own_dtype)


def _to_own_dtype(projector: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Features come in the tower's type, the projector is fp32."""
    return (inputs[0].to(projector.linear_1.weight.dtype), *inputs[1:])


def fingerprint(model: Any, *, built: bool) -> str:
    """A hash of names, shapes and evenly spaced values of every weight of the base.

    The projector is left out where it was built here (`built`): it belongs to the adapter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if built and "multi_modal_projector" in name:
            continue
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 256)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step][:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
