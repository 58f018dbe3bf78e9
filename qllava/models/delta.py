"""What a run has learned, read from its folder tensor by tensor: LoRA of each layer, and the projector.

Names are those of llava-hf's layout (`weights.py`), as for everything that is read so.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from qllava.config import InputError
from qllava.models.adapter import ADAPTER_FILE, read_lora
from qllava.models.weights import Base, Weights, llava_name

_PEFT = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Delta:
    """The adapter of a run or checkpoint.

    Raises InputError when it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_lora(folder)
        self._weights = Weights({folder / ADAPTER_FILE: None}, lambda name: llava_name(name.removeprefix(_PEFT)))
        self.layers = sorted(name.removesuffix(_A) for name in self._weights if name.endswith(_A))
        self.replaced = sorted(name for name in self._weights if not name.endswith((_A, _B)))
        """Tensors of the base that were trained whole: the projector's."""

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.config.lora_alpha / (math.sqrt(self.config.r) if self.config.use_rslora else self.config.r)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a layer."""
        return self._weights[layer + _A], self._weights[layer + _B]

    def of(self, layer: str) -> Tensor:
        """What is added to the weight of a layer, (out, in) in fp32."""
        a, b = self.factors(layer)
        return self.scaling * (b.float() @ a.float())

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that was trained whole."""
        return self._weights[name]

    def check(self, base: Base) -> None:
        """It fits the base, and every number is one. Raises InputError, before anything was computed."""
        rank = self.config.r
        for layer in self.layers:
            if layer + _B not in self._weights:
                raise InputError(f"The adapter in {self.folder} is not whole: {layer} has no lora_B.")
            a, b = self._weights.shape(layer + _A), self._weights.shape(layer + _B)
            if not a[0] == b[1] == rank:
                raise InputError(
                    f"The adapter in {self.folder} is of another rank than its adapter_config.json says: {layer} has "
                    f"rank {a[0]}, and r is {rank}; take both files from the same run."
                )
            weight = f"{layer}.weight"
            if weight not in base or base.shape(weight) != (b[0], a[1]):
                found = base.shape(weight) if weight in base else "not there"
                raise InputError(
                    f"The adapter in {self.folder} does not fit this base: {weight} is {found} and should be "
                    f"{(b[0], a[1])}; give the base that the run used."
                )
        for name in self._weights:
            if not torch.isfinite(self._weights[name]).all():
                raise InputError(
                    f"The adapter in {self.folder} has numbers that are not finite, in {name}; merge an earlier "
                    "checkpoint of the run."
                )
