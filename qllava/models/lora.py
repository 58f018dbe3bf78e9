"""LoRA settings of a run or adapter, and everything that depends on the variant of LoRA.

The values come from a run's settings or from an adapter's `adapter_config.json`. This module provides peft's config,
the update of a weight, the number of parameters, and whether the training step
may compute LoRA before its base layer. An adapter of an unknown variant is refused, because other code
would treat it as plain LoRA. Torch and peft are imported only where needed, so that settings are read without them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qllava.config import InputError, ModelConfig
from qllava.models.errors import one_line
from qllava.runs import ADAPTER_CONFIG_FILE

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

Variant = Literal["lora", "rslora"]
"""`rslora` divides by the root of the rank. Runs of qllava train `lora`; of the other, finished adapters are merged."""

# Full paths: a tower has a q_proj too, and a bare name would put LoRA there.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PROJECTOR = "multi_modal_projector"

# Keys of adapter_config.json for the location, initialization or loading of an adapter, which do not change what it
# computes; `megatron_core` and `qalora_group_size` have a value even if they are not used.
_ASIDE = frozenset(
    ("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern")
    + ("layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config")
    + ("target_modules", "task_type")
)
# Supported keys and their allowed values; None allows any value.
_READ: dict[str, Collection[Any] | None] = {
    "peft_type": ("LORA",),
    "r": None,
    "lora_alpha": None,
    "lora_dropout": None,
    "use_rslora": (True, False),
    "bias": ("none",),
    # Other values change the base's weights when the adapter is created.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
    "modules_to_save": (None, [], [PROJECTOR]),
}


@dataclass(frozen=True)
class Lora:
    """LoRA of the linear layers of a language model."""

    r: int
    """Rank."""
    alpha: float
    """Scale: the update is multiplied by alpha / r, or by alpha / sqrt(r) for `rslora`."""
    dropout: float = 0.0
    """Dropout probability of the inputs of A."""
    variant: Variant = "lora"
    """Variant of LoRA."""
    targets: str = LORA_TARGETS
    """Regular expression for the full paths of the layers with LoRA."""

    @classmethod
    def of_settings(cls, model: ModelConfig) -> Lora:
        """Return the LoRA that a run's settings describe."""
        return cls(model.lora_r, model.lora_alpha, model.lora_dropout)

    @classmethod
    def of_folder(cls, folder: Path) -> Lora:
        """Read the adapter of a run or checkpoint.

        Raises:
            InputError: The adapter's config cannot be read, or is of an unknown variant.
        """
        where = f"The adapter in {folder}"
        try:
            values = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
            return cls.of_values(values, where)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{where} cannot be loaded ({ADAPTER_CONFIG_FILE}: {one_line(error)}).") from error

    @classmethod
    def of_values(cls, values: Mapping[str, Any], where: str = "The adapter") -> Lora:
        """Read the values of a `peft.LoraConfig`; `where` begins the message of an error.

        Raises:
            InputError: A value describes a LoRA that is not a `Variant`.
        """
        for name, value in values.items():
            allowed = _READ.get(name, (None,))
            off = name not in _READ and (name in _ASIDE or not value)
            if not off and allowed is not None and value not in allowed:
                raise InputError(
                    f"{where} has {name} {value!r} in its {ADAPTER_CONFIG_FILE}, which qllava does not "
                    "support. Merge it with peft and give the merged model."
                )
        variant: Variant = "rslora" if values.get("use_rslora") else "lora"
        r, alpha = int(values["r"]), values["lora_alpha"]
        if r < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"r {values['r']!r} and lora_alpha {alpha!r} must be numbers, r at least 1")
        return cls(r, alpha, float(values.get("lora_dropout", 0.0)), variant)

    @classmethod
    def of_model(cls, model: Any) -> Lora | None:
        """Return the LoRA of a model, or of the model inside a PeftModel; None if there is none.

        Raises:
            InputError: The LoRA is of an unknown variant, see `of_values`.
        """
        config = getattr(model, "peft_config", {}).get("default")
        if config is None:
            return None
        return cls.of_values(config.to_dict(), "The adapter of this model")

    @property
    def scaling(self) -> float:
        """Factor of the product B A."""
        return self.alpha / (math.sqrt(self.r) if self.variant == "rslora" else self.r)

    @property
    def goes_first(self) -> bool:
        """Whether what LoRA adds to a layer's output depends only on the layer's input.

        Only then can it be computed before the layer, or be added to the layer's weight beforehand.
        """
        return self.variant in ("lora", "rslora")

    def peft_config(self, targets: str | list[str] | None = None, *, projector: bool = True) -> LoraConfig:
        """Return peft's config.

        Args:
            targets: Layers with LoRA, instead of `self.targets`.
            projector: Whether the whole projector is trained too.
        """
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.variant == "rslora",
            target_modules=self.targets if targets is None else targets,
            modules_to_save=[PROJECTOR] if projector else None,
            bias="none",
        )

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the update of a weight, (out, in) in fp32, from A (r, in) and B (out, r)."""
        return self.scaling * (b.float() @ a.float())

    def parameters(self, model: Any) -> int:
        """Return the number of LoRA's parameters for a model that does not have it yet."""
        layers = [module for name, module in model.named_modules() if re.fullmatch(self.targets, name)]
        return sum(self.r * (int(layer.in_features) + int(layer.out_features)) for layer in layers)
