"""Pickled weights become safetensors, where their owner asks for it: the one place where a pickle of weights is read.

    python -m qllava.models.convert lmsys/vicuna-7b-v1.5 vicuna-7b-v1.5-safetensors

Chosen: a command of its own and never a step of a run. torch reads the file with `weights_only`, so all but
tensors is refused and not called; file by file, mapped into memory, so a 13B needs no more than its largest shard. The
tensors keep their names and types, and everything else of the model is copied.
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

# Beside the weights in many repositories, and no weights.
_OTHER = ("training_args.bin", "optimizer.", "scheduler.", "rng_state", LLAVA_LORA, "scaler.")
_LAYERS = {"0": "linear_1", "2": "linear_2"}


def convert(name: str, out: Path) -> Path:
    """Write the model of a folder or hub name with its weights as safetensors into a new folder, which is returned.

    A folder that holds `mm_projector.bin` alone, LLaVA's own projector, becomes a `projector.safetensors`.

    Raises:
        InputError: There are no pickled weights, they hold more than tensors, or `out` cannot be written.
    """
    folder = Path(expanded(name))
    local = folder.is_dir()
    files = sorted(path.name for path in folder.iterdir()) if local else repository_files(name)
    pickles = [file for file in files if file.endswith(PICKLES) and not file.startswith(_OTHER)]
    whole = [file for file in pickles if file != LLAVA_PROJECTOR] or pickles
    if not whole:
        raise InputError(f"{name} has no pickled weights (such as pytorch_model.bin), so there is nothing to convert.")
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
    """The shards that the model's index names, where it has one: others beside them are of other formats."""
    indices = sorted(folder.glob("*.bin.index.json"))
    return sorted(set(read_index(indices[0]).values())) if indices else pickles


def _write(folder: Path, pickles: list[str], aside: Path) -> None:
    """One safetensors file for each pickle, and an index where there are several."""
    where: dict[str, str] = {}
    count = len(pickles)
    for number, file in enumerate(tqdm(pickles, desc="Converting", unit="file", leave=False), start=1):
        shard = shard_name(number, count)
        # Cloned: tied tensors are one in a pickle, and safetensors holds no tensor twice.
        tensors = {key: tensor.contiguous().clone() for key, tensor in _tensors(folder / file).items()}
        write_tensors(aside / shard, tensors)
        where |= dict.fromkeys(tensors, shard)
    if count > 1:
        write_index(aside, where)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name; nothing else of it is read. Raises InputError."""
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
        raise InputError(f"{path} cannot be converted: it holds something else than tensors by name.")
    return {str(key): value for key, value in found.items()}


def _projector(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """LLaVA's `model.mm_projector.0.weight` and so on under our names, in fp32. Raises InputError for another kind."""
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition("mm_projector.")[2].partition(".")
        if layer not in _LAYERS or part not in ("weight", "bias"):
            raise InputError(
                f"{path} holds {key}, which a two-layer projector (mlp2x_gelu) does not have; choose another."
            )
        named[f"{_LAYERS[layer]}.{part}"] = tensor.float().contiguous().clone()
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one model; returns the exit status."""
    prepare_process()
    parser = Parser(
        prog="python -m qllava.models.convert",
        description="Write a model whose weights are pickles with safetensors. Only tensors are read of a pickle.",
    )
    parser.add_argument("model", metavar="MODEL", type=model_name, help="a folder, or a name on the hub")
    parser.add_argument("out", metavar="OUT", type=file_path, help="folder to write the converted model into")
    looks(parser, model=check_model, out=check_written_folder)
    return carry_out(parser.parse_args(arguments), _run)


def _run(given: argparse.Namespace) -> int:
    print(f"Wrote {convert(given.model, given.out)}; give it in place of {given.model}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
