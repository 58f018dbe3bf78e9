"""Weights on disk, read one tensor at a time, so that a whole model is never in memory.

Names are those of llava-hf's layout (`checkpoint.py`), whatever the names in the folder itself:

    a LLaVA in llava-hf's layout      as they are
    a LLaVA in transformers' own      model.language_model.X  ->  language_model.model.X   and so on
    a language model                  model.X, lm_head.X      ->  language_model.model.X, language_model.lm_head.X

A file is open only while a tensor is read from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qllava.config import InputError
from qllava.models.errors import does_not_fit, lacks
from qllava.models.hub import model_folder
from qllava.models.layouts import INDEX, WEIGHTS, opened, read_index

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
TABLES = (EMBEDDING, HEAD)

_SAMPLE_ROWS, _SAMPLE_COLUMNS = 8, 32
_LAYOUTS = (
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?"), "vision_tower.vision_model."),
    (re.compile(r"(?:model\.)?multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"model\.language_model\.|language_model\.model\."), "language_model.model."),
    (re.compile(r"(?:language_model\.)?lm_head\."), "language_model.lm_head."),
)


def llava_name(name: str) -> str:
    """Return the name in llava-hf's layout of a tensor of a LLaVA, given by any of its names; others are unchanged."""
    for pattern, ours in _LAYOUTS:
        found = pattern.match(name)
        if found:
            return ours + name[found.end() :]
    return name


def tower_name(name: str) -> str:
    """Return the name inside a LLaVA of a tensor in a tower's folder, which may be a whole CLIP or SigLIP."""
    return f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"


def language_model_name(name: str) -> str:
    """Return the name inside a LLaVA of a tensor in a language model's folder."""
    return f"language_model.{name}"


class Weights(Mapping[str, Tensor]):
    """Tensors of safetensors files by name; a tensor is read when it is accessed.

    Raises:
        InputError: If files are missing, truncated or corrupt.
    """

    def __init__(self, files: Mapping[Path, list[str] | None], rename: Callable[[str], str] = llava_name) -> None:
        """Open the files.

        Args:
            files: Files with the names that each must contain; None for whatever it contains.
            rename: Returns the name in llava-hf's layout.
        """
        self._places: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path, names in files.items():
            with opened(path) as file:
                held = list(file.keys())
                missing = sorted(set(names or []) - set(held))
                if missing:
                    raise InputError(f"The weights {path} lack {missing[0]}. Copy or download them again.")
                for name in held:
                    self._places[rename(name)] = (path, name)
                    self._shapes[rename(name)] = tuple(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        path, own = self._places[name]
        with opened(path) as file:
            return file.get_tensor(own)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def join(self, other: Weights) -> None:
        """Add the tensors of another folder."""
        self._places |= other._places
        self._shapes |= other._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._shapes[name]

    def sample(self, name: str) -> Tensor:
        """Return `sampled` of a tensor without reading the rest of it."""
        path, own = self._places[name]
        with opened(path) as file:
            if len(self._shapes[name]) < 2:
                return sampled(file.get_tensor(own))
            cut = file.get_slice(own)
            return torch.cat([_begin(cut[row : row + 1]) for row in _rows(self._shapes[name][0])])


def sampled(tensor: Tensor) -> Tensor:
    """Return a few values of a tensor in fp32, from evenly spaced rows: enough to distinguish two models."""
    if tensor.ndim < 2:
        return tensor.detach().reshape(-1)[: _SAMPLE_ROWS * _SAMPLE_COLUMNS].float().cpu()
    return torch.cat([_begin(tensor[row : row + 1]) for row in _rows(len(tensor))])


def _rows(length: int) -> list[int]:
    return list(range(0, length, max(1, length // _SAMPLE_ROWS)))[:_SAMPLE_ROWS]


def _begin(row: Tensor) -> Tensor:
    return row.detach().reshape(-1)[:_SAMPLE_COLUMNS].float().cpu()


def open_weights(folder_or_name: str, rename: Callable[[str], str] = llava_name) -> Weights:
    """Open the weights of a model's folder or hub name; safetensors only.

    Raises:
        InputError: If the weights are missing or incomplete.
    """
    folder = model_folder(folder_or_name)
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():  # if both exist, transformers takes this one
        return Weights({folder / WEIGHTS: None}, rename)
    shards: dict[Path, list[str] | None] = {}
    for name, shard in read_index(index).items():
        shards.setdefault(folder / shard, []).append(name)  # type: ignore[union-attr]
    return Weights(shards, rename)


class Base(Mapping[str, Tensor]):
    """Weights of the base of an adapter, in the type that training used for weights that are not quantized."""

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        held: Mapping[str, Tensor] | None = None,
        *,
        rows: int | None = None,
    ) -> None:
        """Start without reading weights.

        Args:
            weights: Weights on disk.
            dtype: Type of the returned tensors.
            held: Tensors that are in memory already.
            rows: Number of rows of embedding and head, if they were enlarged.
        """
        self._weights, self._dtype, self._held, self._rows = weights, dtype, held or {}, rows

    def __getitem__(self, name: str) -> Tensor:
        tensor = (self._held[name] if name in self._held else self._weights[name]).to(self._dtype)
        if self._rows is not None and name in TABLES and len(tensor) < self._rows:
            # As `assemble` does it: a new row is the mean of the old rows.
            return torch.cat([tensor, tensor.mean(0).expand(self._rows - len(tensor), -1)])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter([*self._held, *self._weights])

    def __len__(self) -> int:
        return len(self._held) + len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._held or name in self._weights

    def spill(self, path: Path) -> None:
        """Write the tensors in memory to a file, and read them from there."""
        if self._held:
            save_file({name: tensor.contiguous() for name, tensor in self._held.items()}, path)
            self._weights.join(Weights({path: None}))
            self._held = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor on disk without reading it."""
        return tuple(self._held[name].shape) if name in self._held else self._weights.shape(name)

    def sample(self, name: str) -> Tensor:
        """Return a few values of a tensor on disk, see `sampled`."""
        return sampled(self._held[name]) if name in self._held else self._weights.sample(name)

    def check_parts(self, wanted: Mapping[str, Tensor], *, tied: bool, what: str) -> None:
        """Check that every tensor of a model built from parts exists in its shape, except those of the projector.

        Args:
            wanted: Tensors of the model; only their shapes are used.
            tied: Whether the head may be missing.
            what: Name of the model in errors.

        Raises:
            InputError: A tensor is missing or has another shape.
        """
        for name, tensor in wanted.items():
            if name.startswith("multi_modal_projector.") or tied and name == HEAD:
                continue
            if name not in self:
                raise lacks(what, name)
            found, expected = self.shape(name), tuple(tensor.shape)
            grown = self._rows is not None and name in TABLES and found[0] <= expected[0]
            if found != expected and not (grown and found[1:] == expected[1:]):
                raise does_not_fit(what, name, found, expected)
