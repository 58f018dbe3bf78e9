"""Recognition of a model folder by its file names: safetensors under any name, pickles, LLaVA's own layout.

Only the names of tensors are read, not their values.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qllava.config import InputError
from qllava.files import whole_folder
from qllava.models.errors import one_line
from qllava.runs import ADAPTER_FILE, PROBES_FILE, PROJECTOR_FILE

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that hold pickled weights."""

# Files of a run or an adapter, which are never the weights of a model.
_OTHER = (ADAPTER_FILE, PROJECTOR_FILE, PROBES_FILE)
_SHARD = re.compile(r"(?P<begin>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>.*)\.safetensors")
LLAVA_PROJECTOR, LLAVA_LORA = "mm_projector.bin", "non_lora_trainables.bin"
"""Files of LLaVA's own code: a projector, and the weights of a LoRA run that are not LoRA."""
_LLAVA_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_LLAVA_CLASSES = ("llavallama", "llava_llama", "llavamistral", "llava_mistral")
_MARKER = ".of"
"""File in a folder of links that identifies the weights they point to."""
_SCRIPT = "transformers' convert_llava_weights_to_hf.py (in its repository, under src/transformers/models/llava)"


@dataclass(frozen=True)
class Found:
    """The safetensors files of a model, by name."""

    index: str | None
    """File that maps tensors to shards; None if there is none."""
    files: tuple[str, ...]
    """The weight files in order, for a model without an index."""
    usual: bool
    """Whether they have the names that transformers expects."""


def find_weights(files: Sequence[str], name: str) -> Found | None:
    """Return the safetensors files among the files of a model; None if there are none.

    Raises:
        InputError: Shards are missing, or it is not clear which of several files is the model.
    """
    if WEIGHTS in files:  # if both exist, transformers takes this one
        return Found(None, (WEIGHTS,), True)
    if INDEX in files:
        return Found(INDEX, (), True)
    indices = sorted(file for file in files if file.endswith(".safetensors.index.json"))
    if len(indices) == 1:
        return Found(indices[0], (), False)
    weights = sorted(file for file in files if file.endswith(".safetensors") and file not in _OTHER)
    if not weights:
        return None
    sets: dict[tuple[str, str, str], list[str]] = {}
    for file in weights:
        if shard := _SHARD.fullmatch(file):
            sets.setdefault((shard["begin"], shard["count"], shard["end"]), []).append(file)
    if len(weights) == 1 and not sets:
        return Found(None, (weights[0],), False)
    if len(sets) == 1 and len(weights) == len(next(iter(sets.values()))):
        (begin, count, end), shards = next(iter(sets.items()))
        wanted = [f"{begin}-{number:05}-of-{count}{end}.safetensors" for number in range(1, int(count) + 1)]
        missing = sorted(set(wanted) - set(shards))
        if missing:
            raise InputError(
                f"The weights of {name} are incomplete: {missing[0]} is missing. Copy or download the model again."
            )
        return Found(None, tuple(wanted), False)
    raise InputError(
        f"{name} has several weight files and no index ({', '.join(weights[:3])}). Rename the file with the model's "
        f"weights to {WEIGHTS}."
    )


def read_index(path: Path) -> dict[str, str]:
    """Return the shard of each tensor, from an index.

    Raises:
        InputError: The file cannot be read, or refers to a file outside its folder.
    """
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in found.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} cannot be read. Copy or download the model again.") from error
    for shard in shards.values():
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise InputError(
                f"{path} refers to {shard}, which is outside its folder. Get the model from another source."
            )
    return shards


def opened(path: Path) -> Any:
    """Open a safetensors file; its header is compared with its length.

    Raises:
        InputError: The file is missing, truncated or corrupt.
    """
    if not path.is_file():
        raise InputError(f"The weights {path} are missing. Copy or download them again (safetensors only).")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"The weights {path} are truncated or corrupt ({one_line(error)}). Copy or download them again."
        ) from error


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors of a safetensors file; raise an InputError like `opened`."""
    with opened(path) as file:
        return list(file.keys())


def shard_name(number: int, count: int) -> str:
    """Return the name under which transformers finds one of `count` weight files; `number` starts at 1."""
    return WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def write_index(folder: Path, where: Mapping[str, str]) -> None:
    """Write an index that maps tensors to shards."""
    text = json.dumps({"metadata": {}, "weight_map": dict(sorted(where.items()))}, indent=2)
    (folder / INDEX).write_text(f"{text}\n", encoding="utf-8")


def arrange(found: Found, settings: Path, weights: Path, cache: Path, *, known_as: str | None = None) -> Path:
    """Return a folder of links in which transformers finds a model, whatever the names of its weight files.

    Args:
        found: The weight files.
        settings: Folder of all other files.
        weights: Folder of the weights.
        cache: Folder for such folders of links.
        known_as: Name of the folder; by default derived from its content.

    Raises:
        InputError: The weights cannot be read.
    """
    shards = read_index(weights / found.index) if found.index else {}
    files = list(found.files) or sorted(set(shards.values()))
    key = repr([(str((weights / file).resolve()), _stamp(weights / file)) for file in files] + [str(settings)])
    out = cache / (known_as or f"folder-{blake2b(key.encode(), digest_size=12).hexdigest()}")
    if _holds(out, key):
        return out
    names = {file: shard_name(number, len(files)) for number, file in enumerate(files, start=1)}
    where = {name: names[file] for file in files for name in tensor_names(weights / file)}
    try:
        # A folder of these weights by another process stays, because it may be in use; one of others is replaced.
        with whole_folder(out, lambda folder: _holds(folder, key)) as aside:
            for path in settings.iterdir():
                if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", *PICKLES)):
                    _link(path, aside / path.name)
            for file, name in names.items():
                _link(weights / file, aside / name)
            if len(files) > 1:
                write_index(aside, where)
            (aside / _MARKER).write_text(key, encoding="utf-8")
    except OSError as error:
        if not _holds(out, key):
            raise InputError(
                f"{out} cannot be written ({error.strerror}). Set QLLAVA_CACHE to another folder."
            ) from error
    return out


def _holds(out: Path, key: str) -> bool:
    """Return whether a folder of links is complete and of these weights; its marker is written last."""
    try:
        return (out / _MARKER).read_text(encoding="utf-8") == key
    except OSError:
        return False


def _stamp(path: Path) -> tuple[int, int]:
    """Return values that change when a file changes; zeros if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _link(path: Path, link: Path) -> None:
    """Link a file under another name, or copy it if links are not allowed."""
    try:
        link.symlink_to(path.resolve())
    except OSError:
        shutil.copyfile(path, link)


def refuse_llava_own(name: str, files: Sequence[str], folder: Path) -> None:
    """Raise an InputError for a model in the layout of LLaVA's own code, which must be converted first.

    transformers would treat its config.json as a LLaVA of 7B, and download weights for it that do not fit.

    Args:
        name: Name of the model, as the user gave it.
        files: Names of all its files.
        folder: Folder of its config.json.

    Raises:
        InputError: The model is in that layout.
    """
    if LLAVA_LORA in files:
        raise InputError(
            f"{name} is a LoRA of LLaVA's own code ({LLAVA_LORA}). Merge it with LLaVA's merge_lora_weights.py, "
            f"convert the result with {_SCRIPT}, and give that folder."
        )
    config = _json(folder / "config.json")
    kinds = [str(config.get("model_type")), *(str(kind) for kind in config.get("architectures") or [])]
    marks = [kind for kind in kinds if kind.lower().startswith(_LLAVA_CLASSES)]
    marks += [key for key in _LLAVA_KEYS if key in config and "text_config" not in config]
    marks += [LLAVA_PROJECTOR] if LLAVA_PROJECTOR in files else []
    if not marks:
        return
    known = re.search(r"llava-v?1\.5-(7b|13b)", name.lower())
    raise InputError(
        f"{name} is in the layout of LLaVA's own code ({marks[0]}), not of transformers. Give the converted model "
        f"(llava-hf/llava-1.5-{known[1] if known else '7b'}-hf on the hub is LLaVA-1.5), or convert yours with "
        f"{_SCRIPT}."
    )


def projector_advice(folder: Path) -> str:
    """Return advice for a folder without projector.safetensors."""
    if (folder / LLAVA_PROJECTOR).is_file():
        command = (
            f"python -m qllava.models.convert {shlex.quote(str(folder))} {shlex.quote(folder.name + '-projector')}"
        )
        return f"the folder has LLaVA's own {LLAVA_PROJECTOR}: convert it once ({command}), and give the new folder"
    return "give the folder of a pretrain_projector run"


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that cannot be read gives an empty one, because other checks report it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
