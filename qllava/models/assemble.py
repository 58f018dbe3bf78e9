"""Assembly of a trainable LLaVA: 4-bit language model, fp32 projector, frozen tower.

    language model (NF4) ---------\
    projector (fp32, trained) -----> LlavaForConditionalGeneration --adapter.py: LoRA, by full path--> PeftModel
    tower (frozen, no graph) -----/

A new LLaVA: the language model is loaded and quantized alone, then put into an empty LLaVA, so that a
mismatched list of module names cannot quantize anything else. An
existing LLaVA is loaded with the full names of the modules that must not be quantized.
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

# Full names are needed: "multi_modal_projector" or "vision_tower" alone matches nothing, and both would be quantized.
_KEPT_IN_FULL = ["model.multi_modal_projector", "model.vision_tower", "lm_head"]


@dataclass
class Assembled:
    """A LLaVA with its processor and recipe, before LoRA is added."""

    model: LlavaForConditionalGeneration
    """The whole model."""
    processor: LlavaProcessor
    """Its processor, with tokenizer and chat template."""
    recipe: Recipe
    """With template, fingerprint and dtype filled in."""

    @property
    def template(self) -> Template:
        """The conversation template of the recipe."""
        return TEMPLATES[self.recipe.template]


def assemble(recipe: Recipe, *, seed: int = 0) -> Assembled:
    """Load or build the model of a recipe; a new projector is initialized with `seed`.

    Raises:
        InputError: For the same reasons as `outline`, and if the weights cannot be loaded.
    """
    plan = outline(recipe)
    dtype: torch.dtype = getattr(torch, plan.recipe.dtype)
    # With several processes, each has its own GPU.
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
    """Return the config for NF4 with double quantization of the language model; its layers compute in `dtype`.

    If accelerate is configured for FSDP, packed weights are stored in `dtype`, because FSDP does not shard but keeps
    weights of type uint8 in full in every process.
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
    """Build a LLaVA from a language model, a tower and a new projector."""
    recipe, tower, tokenizer = plan.recipe, plan.tower, plan.processor.tokenizer
    assert recipe.language_model and recipe.vision_tower and tower  # `outline` guarantees this
    if tower.model.device.type == "meta":
        tower = load_tower(nano_part(recipe.vision_tower, "tower"), image_aspect=recipe.image_aspect)
    name = nano_part(recipe.language_model, "llama")
    llm = load_language_model(name, dtype, device, four_bit=recipe.load_in_4bit, tokens=len(tokenizer))
    if recipe.load_in_4bit:
        # Otherwise the merged model's config would contain it, and programs would treat plain weights as packed.
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
    """Load a LLaMA-family model (safetensors, no remote code), with an embedding of at least `tokens` rows.

    Raises:
        InputError: If the model cannot be read.
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
    """Enlarge the embeddings for new tokens; a new row is the mean of the old rows, so that it is never likely."""
    old = model.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    model.resize_token_embeddings(grown(old, tokens), mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[old:] = table.weight[:old].mean(0)


def _draw_projector(projector: Any, kind: str, seed: int) -> None:
    """Initialize the projector in fp32 from a seed; for `linear`, `linear_2` is a fixed identity."""
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
            # Otherwise a forward pass without gradients repacks the weights in place, and training after an
            # evaluation on such a CPU continues without gradients and without an error.
            module.support_avx512bf16_for_cpu = False
    tower = model.model.vision_tower
    # `enable_input_require_grads` also hooks the tower's embedding, which would put the tower into the graph.
    tower.forward = torch.no_grad()(tower.forward)
    # In training autocast does this; answers during a run and in chat are computed without autocast.
    model.model.multi_modal_projector.register_forward_pre_hook(_to_own_dtype)


def _to_own_dtype(projector: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Cast features from the tower's type to the projector's type, fp32."""
    return (inputs[0].to(projector.linear_1.weight.dtype), *inputs[1:])
