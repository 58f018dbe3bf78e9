"""Parts become a LLaVA that can be tuned: 4-bit language model, fp32 projector, frozen tower.

    language model (NF4) ---------\
    projector (fp32, trained) -----> LlavaForConditionalGeneration --adapter.py: LoRA, by full path--> PeftModel
    tower (frozen, no graph) -----/

Chosen: the language model is loaded alone, quantized, and put in its place in an empty LLaVA, so that nothing else
can be quantized by a mismatched list of names; a LLaVA that exists already is loaded with the full names of what must
stay as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from qllava.config import InputError
from qllava.conversation import TEMPLATES, Template
from qllava.models.checkpoint import load_llava
from qllava.models.errors import LOAD_ERRORS, check_loading, one_line
from qllava.models.hub import model_folder
from qllava.models.language import grown, nano_part
from qllava.models.outline import Outline, Recipe, outline, settle_template
from qllava.models.shapes import Shapes
from qllava.models.vision import load_tower

# Full names: a bare "multi_modal_projector" or "vision_tower" matches nothing, and both would be quantized.
_KEPT_IN_FULL = ["model.multi_modal_projector", "model.vision_tower", "lm_head"]


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


def assemble(recipe: Recipe, *, seed: int = 0) -> Assembled:
    """Load or build the model of a recipe; a new projector is drawn from `seed`.

    Raises InputError as `outline` does, and when the weights cannot be loaded.
    """
    plan = outline(recipe)
    dtype: torch.dtype = getattr(torch, plan.recipe.dtype)
    # Of several processes each has a card of its own.
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    quantization = nf4(dtype) if recipe.load_in_4bit else None
    if recipe.model is not None:
        on_device = {"": device} if quantization else None
        model, _ = load_llava(recipe.model, dtype=dtype, quantization_config=quantization, device_map=on_device)
    else:
        model = _from_parts(plan, dtype, device, seed)
    if quantization is None:
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    model.model.multi_modal_projector.to(device=device, dtype=torch.float32)
    settle_template(model, plan.processor, TEMPLATES[plan.recipe.template])
    prepare_for_training(model)
    return Assembled(model, plan.processor, plan.recipe)


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization for the language model only; `dtype` is what its layers compute in.

    Where accelerate was told of FSDP, the packed weights are held as numbers of that type: FSDP leaves bytes whole in
    every process.
    """
    shared_out = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if shared_out else torch.uint8,
        llm_int8_skip_modules=_KEPT_IN_FULL,
    )


def _from_parts(plan: Outline, dtype: torch.dtype, device: str, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of a language model that is loaded alone, a tower and a new projector."""
    recipe, tower, tokenizer = plan.recipe, plan.tower, plan.processor.tokenizer
    assert recipe.language_model and recipe.vision_tower and tower  # `outline` has seen to it
    if tower.model.device.type == "meta":
        tower = load_tower(nano_part(recipe.vision_tower, "tower"), image_aspect=recipe.image_aspect)
    name = nano_part(recipe.language_model, "llama")
    llm = load_language_model(name, dtype, device, four_bit=recipe.load_in_4bit, tokens=len(tokenizer))
    if recipe.load_in_4bit:
        # It would be saved inside the merged model's config, and programs would take plain weights for packed ones.
        del llm.config.quantization_config
    layer, projector_type = recipe.vision_feature_layer, recipe.projector_type
    shapes = Shapes.of_parts(llm.config, tower.model.config, tokenizer, layer=layer, projector_type=projector_type)
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(shapes.config)
    model.model.language_model, model.lm_head = llm.model, llm.lm_head
    model.model.vision_tower = nn.Module.to(tower.model, device=device, dtype=dtype)
    model.model.multi_modal_projector.to_empty(device="cpu")
    _draw_projector(model.model.multi_modal_projector, recipe.projector_type, seed)
    model.generation_config = llm.generation_config
    model.is_loaded_in_4bit = recipe.load_in_4bit
    return model.eval()  # type: ignore[no-any-return]


def load_language_model(name: str, dtype: torch.dtype, device: str, *, four_bit: bool, tokens: int) -> Any:
    """Load a LLaMA-family model (safetensors, no remote code), with room for so many tokens.

    Raises InputError when it cannot be read.
    """
    folder = model_folder(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"quantization_config": nf4(dtype), "device_map": {"": device}} if four_bit else {}),
        )
    except (*LOAD_ERRORS, TypeError) as error:
        raise InputError(
            f"The language model {name} cannot be loaded ({one_line(error)}); download it again."
        ) from error
    model, report = loaded
    check_loading(report, f"The language model {name}")
    if not four_bit:
        model.to(device)
    _grow_embeddings(model, tokens)
    return model


def _grow_embeddings(model: Any, tokens: int) -> None:
    """Make room for new tokens; a new row is the mean of the old, so that it is never likely."""
    old = model.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    model.resize_token_embeddings(grown(old, tokens), mean_resizing=False)
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
