"""The trained weights of a run, read tensor by tensor: LoRA of each layer, and the projector.

Names are those of llava-hf's layout (`weights.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qllava.config import InputError
from qllava.models.lora import Lora
from qllava.models.weights import Weights, llava_name
from qllava.runs import ADAPTER_CONFIG_FILE, ADAPTER_FILE

_PEFT = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Delta:
    """The adapter of a run or checkpoint.

    Raises:
        InputError: If the adapter cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lora = Lora.of_folder(folder)
        self._weights = Weights({folder / ADAPTER_FILE: None}, lambda name: llava_name(name.removeprefix(_PEFT)))
        self.layers = sorted(name.removesuffix(_A) for name in self._weights if name.endswith(_A))
        self.replaced = sorted(name for name in self._weights if not name.endswith((_A, _B)))
        """Tensors that were trained directly, without LoRA: those of the projector."""

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of a layer."""
        return self._weights[layer + _A], self._weights[layer + _B]

    def of(self, layer: str) -> Tensor:
        """Return the update of a layer's weight, (out, in) in fp32."""
        return self.lora.delta(*self.factors(layer))

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor that was trained directly."""
        return self._weights[name]

    def check(self, wanted: Mapping[str, Tensor], *, projector: bool) -> None:
        """Check that the adapter fits the base and that all values are finite.

        Args:
            wanted: Tensors of the model; only their shapes are used.
            projector: Whether the adapter must contain the projector.

        Raises:
            InputError: If a check fails.
        """
        rank, shapes = self.lora.r, {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        halves = {name.removesuffix(end) for end in (_A, _B) for name in self._weights if name.endswith(end)}
        for layer in sorted(halves):
            if layer + _A not in self._weights or layer + _B not in self._weights:
                raise InputError(f"The adapter in {self.folder} is incomplete: {layer} has no lora_A or no lora_B.")
            a, b = self._weights.shape(layer + _A), self._weights.shape(layer + _B)
            if not a[0] == b[1] == rank:
                raise InputError(
                    f"The adapter in {self.folder} does not match its {ADAPTER_CONFIG_FILE}: {layer} has "
                    f"rank {a[0]}, and r is {rank}. Take both files from the same run."
                )
            self._fits(f"{layer}.weight", (b[0], a[1]), shapes)
        for name in self.replaced:
            self._fits(name, self._weights.shape(name), shapes)
        missing = {name for name in shapes if name.startswith("multi_modal_projector.")} - set(self.replaced)
        if projector and missing:
            raise InputError(f"The adapter in {self.folder} is incomplete: the projector's {min(missing)} is missing.")
        for name in self._weights:
            if not torch.isfinite(self._weights[name]).all():
                raise InputError(
                    f"The adapter in {self.folder} contains NaN or infinity in {name}. Merge an earlier "
                    "checkpoint of the run."
                )

    def _fits(self, name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
        if shapes.get(name) != shape:
            raise InputError(
                f"The adapter in {self.folder} does not fit this base: {name} is {shapes.get(name, 'missing')} and "
                f"must be {shape}. Give the base that the run used."
            )
