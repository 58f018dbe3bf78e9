"""Conversion of pickled weights to safetensors: the only place where pickled weights are read.

    python -m qllava.models.convert lmsys/vicuna-7b-v1.5 vicuna-7b-v1.5-safetensors

This is a separate command and never a step of a run. torch reads the files with `weights_only`, which refuses
everything but tensors. Files are memory-mapped one by one, so the peak memory is the largest shard. Tensors
keep their names and types; all other files are copied.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from qllava.arguments import Parser, carry_out, check_model, check_written_folder, file_path, looks, model_name
from qllava.config import InputError, expanded
from qllava.models.checkpoint import write_aside, write_tensors
from qllava.models.errors import LOAD_ERRORS, one_line
from qllava.models.hub import SETTINGS, fetch, repository_files
from qllava.models.layouts import LLAVA_LORA, LLAVA_PROJECTOR, PICKLES, read_index, shard_name, write_index
from qllava.runs import PROJECTOR_FILE
from qllava.surroundings import prepare_process

# Files that many repositories have next to the weights, and that are not weights.
_OTHER = ("training_args.bin", "optimizer.", "scheduler.", "rng_state", LLAVA_LORA, "scaler.")
_LAYERS = {"0": "linear_1", "2": "linear_2"}


def convert(name: str, out: Path) -> Path:
    """Write a copy of a model with safetensors weights into a new folder, and return the folder.

    A folder with only `mm_projector.bin`, LLaVA's own projector, is converted to `projector.safetensors`.

    Raises:
        InputError: If there are no pickled weights, they hold more than tensors, or `out` cannot be written.
    """
    folder = Path(expanded(name))
    local = folder.is_dir()
    files = sorted(path.name for path in folder.iterdir()) if local else repository_files(name)
    pickles = [file for file in files if file.endswith(PICKLES) and not file.startswith(_OTHER)]
    whole = [file for file in pickles if file != LLAVA_PROJECTOR] or pickles
    if not whole:
        raise InputError(f"{name} has no pickled weights (such as pytorch_model.bin) to convert.")
    settings = [file for file in files if file.endswith(SETTINGS)]
    if not local:
        folder = fetch(name, [*settings, *whole])
    whole = _of_index(folder, whole)
    with write_aside(out) as aside:
        for file in settings:
            if not file.endswith(".index.json"):
                shutil.copyfile(folder / file, aside / file)
        if whole == [LLAVA_PROJECTOR]:
            path = folder / LLAVA_PROJECTOR
            save_file(_projector(_tensors(path), path), aside / PROJECTOR_FILE)
        else:
            _write(folder, whole, aside)
    return out


def _of_index(folder: Path, pickles: list[str]) -> list[str]:
    """Return the shards that the model's index names, or all pickles if it has no index."""
    indices = sorted(folder.glob("*.bin.index.json"))
    return sorted(set(read_index(indices[0]).values())) if indices else pickles


def _write(folder: Path, pickles: list[str], aside: Path) -> None:
    """Write one safetensors file for each pickle, and an index if there are several."""
    where: dict[str, str] = {}
    count = len(pickles)
    for number, file in enumerate(tqdm(pickles, desc="Converting", unit="file", leave=False), start=1):
        shard = shard_name(number, count)
        # Cloned, because tied tensors share memory in a pickle, which safetensors does not allow.
        tensors = {key: tensor.contiguous().clone() for key, tensor in _tensors(folder / file).items()}
        write_tensors(aside / shard, tensors)
        where |= dict.fromkeys(tensors, shard)
    if count > 1:
        write_index(aside, where)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle by name; raise InputError if it holds anything else."""
    try:
        try:
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6, in a format that cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        raise InputError(f"{path} cannot be converted ({one_line(error)}).") from error
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} cannot be converted: it is not a dictionary of tensors.")
    return {str(key): value for key, value in found.items()}


def _projector(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return LLaVA's projector tensors under qllava's names, in fp32; raise InputError for another type."""
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition("mm_projector.")[2].partition(".")
        if layer not in _LAYERS or part not in ("weight", "bias"):
            raise InputError(
                f"{path} contains {key}, which a projector of type mlp2x_gelu does not have. Give such a projector."
            )
        named[f"{_LAYERS[layer]}.{part}"] = tensor.float().contiguous().clone()
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one model and return the exit status."""
    prepare_process()
    parser = Parser(
        prog="python -m qllava.models.convert",
        description="Convert a model with pickled weights to safetensors. Only tensors are read from a pickle.",
    )
    parser.add_argument("model", metavar="MODEL", type=model_name, help="folder or hub name of the model")
    parser.add_argument("out", metavar="OUT", type=file_path, help="folder to write the converted model into")
    looks(parser, model=check_model, out=check_written_folder)
    return carry_out(parser.parse_args(arguments), _run)


def _run(given: argparse.Namespace) -> int:
    print(f"Wrote {convert(given.model, given.out)}. Use it in place of {given.model}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
