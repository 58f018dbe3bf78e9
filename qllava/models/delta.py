"""What a run has learned, read from its folder tensor by tensor: LoRA of each layer, and the projector.

Names are those of llava-hf's layout (`weights.py`), as for everything that is read so.
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

    Raises InputError when it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lora = Lora.of_folder(folder)
        self._weights = Weights({folder / ADAPTER_FILE: None}, lambda name: llava_name(name.removeprefix(_PEFT)))
        self.layers = sorted(name.removesuffix(_A) for name in self._weights if name.endswith(_A))
        self.replaced = sorted(name for name in self._weights if not name.endswith((_A, _B)))
        """Tensors of the base that were trained whole: the projector's."""

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a layer."""
        return self._weights[layer + _A], self._weights[layer + _B]

    def of(self, layer: str) -> Tensor:
        """What is added to the weight of a layer, (out, in) in fp32."""
        return self.lora.delta(*self.factors(layer))

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that was trained whole."""
        return self._weights[name]

    def check(self, wanted: Mapping[str, Tensor], *, projector: bool) -> None:
        """It fits the base, and every number is one. Raises InputError, before anything was computed.

        wanted: the model's tensors, of which the shapes are looked at. projector: it has to be among what was trained.
        """
        rank, shapes = self.lora.r, {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        halves = {name.removesuffix(end) for end in (_A, _B) for name in self._weights if name.endswith(end)}
        for layer in sorted(halves):
            if layer + _A not in self._weights or layer + _B not in self._weights:
                raise InputError(f"The adapter in {self.folder} is not whole: {layer} lacks lora_A or lora_B.")
            a, b = self._weights.shape(layer + _A), self._weights.shape(layer + _B)
            if not a[0] == b[1] == rank:
                raise InputError(
                    f"The adapter in {self.folder} is of another rank than its {ADAPTER_CONFIG_FILE} says: {layer} has "
                    f"rank {a[0]}, and r is {rank}; take both files from the same run."
                )
            self._fits(f"{layer}.weight", (b[0], a[1]), shapes)
        for name in self.replaced:
            self._fits(name, self._weights.shape(name), shapes)
        missing = {name for name in shapes if name.startswith("multi_modal_projector.")} - set(self.replaced)
        if projector and missing:
            raise InputError(f"The adapter in {self.folder} is not whole: it lacks the projector's {min(missing)}.")
        for name in self._weights:
            if not torch.isfinite(self._weights[name]).all():
                raise InputError(
                    f"The adapter in {self.folder} has numbers that are not finite, in {name}; merge an earlier "
                    "checkpoint of the run."
                )

    def _fits(self, name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
        if shapes.get(name) != shape:
            raise InputError(
                f"The adapter in {self.folder} does not fit this base: {name} is {shapes.get(name, 'not there')} and "
                f"should be {shape}; give the base that the run used."
            )
