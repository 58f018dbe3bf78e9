"""`qllava plan`: what a run will need, before anything but a config.json is downloaded.

Shapes of the models that presets name come with qllava (`models.known`), those of any other from its config.json, and
those of open_clip's towers from open_clip itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

from qllava.config import NANO, InputError, ModelConfig, expanded
from qllava.models.adapter import RECORD_FILE
from qllava.models.agreement import check_feature_layer, refuse_quantized
from qllava.models.bases import located
from qllava.models.checkpoint import look_at
from qllava.models.errors import LOAD_ERRORS, one_line
from qllava.models.known import known_config
from qllava.models.outline import language_model_config, nano_part
from qllava.models.vision import SUPPORTED
from qllava.training import memory
from qllava.training.options.defaults import NANO_FINETUNE
from qllava.training.scores import asking_of, expects_held_out
from qllava.training.settings import parse

_BAR = 30


def plan(
    *,
    config: str | None = None,
    model: str | None = None,
    language_model: str | None = None,
    vision_tower: str | None = None,
    lora_r: int | None = None,
    tokens_per_row: int | None = None,
    limit: str | None = None,
    base_model: Sequence[str] = (),
) -> memory.Plan:
    """What a run on a card comes to, or on a CPU where the recipe sets use_cpu; whatever this machine has.

    config: a recipe's YAML. model, or language_model and vision_tower: in its place, with the recipes' defaults; nano
    where nothing is said. lora_r: 0 for stage 1. limit: such as 12GB; choose what fits, but for what is set.

    Raises InputError when a config cannot be read.
    """
    line = ["--config", config] if config else []
    given: dict[str, Any] = {
        "model_name_or_path": model,
        "language_model": language_model,
        "vision_tower": vision_tower,
        "lora_r": lora_r,
        "tokens_per_row": tokens_per_row,
        "fit_memory": limit,
    }
    for name, value in given.items():
        line += [f"--{name}", str(value)] if value is not None else []
    line += ["--base_model", *base_model] if base_model else []
    settings = parse(line, output_dir="unused", nano=NANO_FINETUNE, elsewhere=True)
    train = settings.train
    setup = memory.setup_of(settings.model, train, llava_config(settings.model), lora_r=settings.model.lora_r)
    asking = asking_of(train, lora_r=setup.lora_r, held_out=expects_held_out(settings))
    if not train.fit_memory:
        return memory.plan_of(setup, memory.estimate(setup), asking=asking)
    try:
        return memory.fit(
            setup,
            memory.parse_bytes(train.fit_memory),
            asking=asking,
            least_tokens=setup.tokens_per_row,
            fixed=memory.settled(train),
        )
    except memory.DoesNotFit as refusal:
        return refusal.plan


def as_json(plan: memory.Plan) -> dict[str, Any]:
    """The object that `--json` prints."""
    chosen = {name: getattr(plan, name) for name in ("tokens_per_row", "recompute_layers", "optim")}
    found = {"peak_bytes": plan.peak_bytes, "phases": plan.phases, "parts": plan.estimate.parts}
    return {**found, **chosen, "fits": plan.fits, "suggestion": plan.suggestion}


def as_text(plan: memory.Plan) -> str:
    """The peak of each phase, the parts of a step, and what to do."""
    lines = ["phase"] + _bars(plan.phases) + ["part of a step"] + _bars(plan.estimate.parts)
    lines.append(f"{'peak':<12} {memory.format_bytes(plan.peak_bytes):>9}")
    verdict = {None: "", True: "It fits. ", False: "It does not fit. "}[plan.fits]
    lines.append(
        f"with rows of {plan.tokens_per_row:,} tokens, {plan.recompute_layers} layers recomputed, {plan.optim}; GB are "
        "2^30 bytes, as cards are sold"
    )
    return "\n".join([*lines, f"{verdict}{plan.suggestion}"])


def _bars(sizes: dict[str, int]) -> list[str]:
    """A line with a bar for each size."""
    most = max(sizes.values())
    return [
        f"{name:<12} {memory.format_bytes(size):>9}  {'#' * round(_BAR * size / most)}".rstrip()
        for name, size in sizes.items()
    ]


def llava_config(model: ModelConfig) -> LlavaConfig:
    """The shapes of the model of a recipe. Raises InputError when they cannot be read."""
    if model.is_nano:
        return _of_parts(nano_part(NANO, "llama"), nano_part(NANO, "tower"), model.vision_feature_layer)
    if model.model_name_or_path:
        if model.language_model or model.vision_tower:
            raise InputError("Give either model_name_or_path, or language_model with vision_tower; not both.")
        return _of_model(model)
    if not (model.language_model and model.vision_tower):
        raise InputError("A new LLaVA needs both language_model and vision_tower; give both, or model_name_or_path.")
    return _of_parts(
        nano_part(model.language_model, "llama"), nano_part(model.vision_tower, "tower"), model.vision_feature_layer
    )


def _of_model(model: ModelConfig) -> LlavaConfig:
    """The config of a LLaVA, or of the one that a run's adapter belongs to."""
    name = str(model.model_name_or_path)
    folder = Path(expanded(name))
    if (folder / RECORD_FILE).is_file():
        base = located(folder, model.base_model or ())
        return llava_config(
            ModelConfig(
                base.model, base.language_model, base.vision_tower, vision_feature_layer=base.vision_feature_layer
            )
        )
    config: LlavaConfig = _known(name) or look_at(name)[0]
    refuse_quantized(name, config)
    return config


def _of_parts(language_model: str, vision_tower: str, layer: int) -> LlavaConfig:
    """The config of a LLaVA that is yet to be built."""
    if (text := _known(language_model)) is None:
        text, _ = language_model_config(language_model, whole=False)
    vision: Any = _tower(vision_tower)
    check_feature_layer(vision_tower, layer, vision)
    # `<image>` becomes one more token, and the table a multiple of 64.
    image_token = text.vocab_size
    text.vocab_size = -(-(text.vocab_size + 1) // 64) * 64
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if isinstance(vision, CLIPVisionConfig) else "full",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def _known(name: str) -> Any:
    """The shapes that come with qllava, unless a folder has this name; None where there are none."""
    return None if Path(expanded(name)).is_dir() else known_config(name)


def _tower(spec: str) -> CLIPVisionConfig | SiglipVisionConfig:
    """The shapes of a tower by its name in open_clip, or from its folder."""
    if spec.startswith("open_clip:"):
        return _of_open_clip(spec)
    folder = Path(expanded(spec))
    if not folder.is_dir():
        raise InputError(f"The vision tower '{spec}' is neither a folder nor of the form open_clip:ARCH/PRETRAINED.")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' own checks of a config raise errors of many kinds
        raise InputError(f"The vision tower {spec} has no readable config.json ({one_line(error)}).") from error
    config = getattr(config, "vision_config", config)
    if not isinstance(config, CLIPVisionConfig | SiglipVisionConfig):
        raise InputError(f"The vision tower {spec} is a model of type '{config.model_type}'; {SUPPORTED}.")
    return config


def _of_open_clip(spec: str) -> CLIPVisionConfig | SiglipVisionConfig:
    name = spec.removeprefix("open_clip:")
    arch = name if name.startswith(("hf-hub:", "local-dir:")) else name.partition("/")[0]
    try:
        config = open_clip.get_model_config(arch) or {}
    except LOAD_ERRORS as error:
        raise InputError(f"open_clip could not read '{spec}': {one_line(error)}") from error
    known = config.get("vision_cfg")
    if known is None:
        raise InputError(f"open_clip has no architecture '{arch}' (from '{spec}'); open_clip.list_models() lists them.")
    timm_name = known.get("timm_model_name", "")
    if "siglip" in timm_name:
        with torch.device("meta"):
            trunk: Any = timm.create_model(timm_name, pretrained=False, num_classes=0)
        return SiglipVisionConfig(
            hidden_size=trunk.embed_dim,
            intermediate_size=trunk.blocks[0].mlp.fc1.out_features,
            num_hidden_layers=len(trunk.blocks),
            num_attention_heads=trunk.blocks[0].attn.num_heads,
            image_size=trunk.patch_embed.img_size[0],
            patch_size=trunk.patch_embed.patch_size[0],
            vision_use_head=trunk.attn_pool is not None,
        )
    if timm_name or not isinstance(known["layers"], int):
        raise InputError(f"The vision tower '{spec}' cannot be used; {SUPPORTED}.")
    width = known["width"]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * known.get("mlp_ratio", 4.0)),
        num_hidden_layers=known["layers"],
        num_attention_heads=width // known.get("head_width", 64),
        image_size=known["image_size"],
        patch_size=known["patch_size"],
        hidden_act="quick_gelu" if config.get("quick_gelu") else "gelu",
    )
