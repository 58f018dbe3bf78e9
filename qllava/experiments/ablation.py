"""Ablations: the same run with one thing changed, repeated for each seed, all measured in the same way.

A grid is a YAML file. `pretrain` and `finetune` hold settings of the two recipes; `variants` holds the changes of each
variant, by name; `grid` adds a variant for each combination of values. A variant is compared with the first one, or
with the one that it names under `against`. It may set `measure`; only variants with the same `measure` should be
compared.

    seeds: [1, 2, 3]
    measure: vqa {model} test.json --image-folder images
    pretrain: {train_file: captions.json, image_folder: images}
    finetune: {train_file: train.json, image_folder: images, language_model: parts/llama, vision_tower: parts/tower}
    variants:
      as it is: {}
      last layer: {vision_feature_layer: -1}
      without stage 1: {pretrain: {max_steps: 1, learning_rate: 0}}
    grid: {lora_r: [8, 32], projector_type: [mlp2x_gelu, linear]}

A setting that defines the base model applies to both stages. Variants with the same stage 1 share it, seed by seed.
Without `pretrain`, the projector is the one that `finetune` names, or that of its model. This module trains and
evaluates nothing itself: a cell (one variant with one seed) is a series of the commands that a user would type, each in
its own process. Commands that have finished are not run again.

    OUT/aligned/HASH/            a stage 1 run
    OUT/NAME/seed-1/             a run of finetune_lora; seed-1.yaml is its configuration, seed-1.log its log
    OUT/NAME/seed-1.measured/    results of `qllava eval` for the run, or for each of its checkpoints, as JSON
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from qllava.config import InputError
from qllava.files import write_whole
from qllava.runs import Run, step_of

IN_BOTH_STAGES = (
    "model_name_or_path",
    "language_model",
    "vision_tower",
    "projector_type",
    "vision_feature_layer",
    "image_aspect",
    "load_in_4bit",
)
"""Keys of `finetune` that apply to stage 1 too, because they define the base model."""
KEYS = {"seeds", "measure", "pretrain", "finetune", "variants", "grid"}

Command = Callable[[Sequence[str], Path], str]
"""Run a command (`pretrain_projector`, `finetune_lora` or `eval`) and return what it printed.

It takes the command with its arguments, and the path of a log for its messages, and raises InputError if it fails."""


@dataclass(frozen=True)
class Variant:
    """One variant of the run: a line of the table."""

    name: str
    """Name in reports; in lower case and with hyphens also the name of the folder."""
    pretrain: dict[str, Any] | None
    """Configuration of stage 1; None if stage 1 is not run."""
    finetune: dict[str, Any]
    """Configuration of stage 2."""
    measure: str
    """Arguments of `qllava eval`; `{model}` is the run or checkpoint, `{out}` a file for this variant alone."""
    against: str
    """Name of the variant that it is compared with; its own name if there is none."""

    @property
    def folder(self) -> str:
        """Name of the variant's folder."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.")


@dataclass(frozen=True)
class Grid:
    """Variants, each of which is run with every seed."""

    variants: tuple[Variant, ...]
    """Variants in the order of the report."""
    seeds: tuple[int, ...]
    """Seeds, each of which is used for both stages."""


@dataclass(frozen=True)
class Measured:
    """Results of one variant with one seed."""

    variant: str
    """Name of the variant."""
    seed: int
    """Seed of both stages."""
    points: tuple[tuple[int, float], ...]
    """(optimizer step, accuracy) of each checkpoint that was measured; the last is the result."""
    ci95: tuple[float, float]
    """95 % interval of the last accuracy, over questions."""

    @property
    def result(self) -> float:
        """Accuracy at the end of the run."""
        return self.points[-1][1]


def read_grid(path: Path, places: Mapping[str, Callable[[], Path]] | None = None) -> Grid:
    """Read a grid's YAML.

    Args:
        path: The YAML file.
        places: Functions that return the value of `{name}`; called only if the file uses it, as it may take minutes.

    Raises:
        InputError: If the file cannot be read, or if it has unknown keys or invalid values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        for name, make in (places or {}).items():
            if f"{{{name}}}" in text:
                text = text.replace(f"{{{name}}}", str(make()))
        given = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"The grid {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The grid {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(given, dict) or not given.keys() <= KEYS:
        raise InputError(f"The grid {path} must be a mapping. Its keys can only be {', '.join(sorted(KEYS))}.")
    for key in KEYS - {"seeds", "measure"}:
        if not isinstance(given.setdefault(key, {}), dict):
            raise InputError(f"The grid {path}: the value of {key} must be a mapping (name: value).")
    seeds = given.get("seeds", [42])
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise InputError(f"The grid {path}: seeds must be a list of whole numbers.")
    if not isinstance(given.get("measure"), str):
        raise InputError(
            f"The grid {path} has no evaluation. Add one under the key measure, such as `vqa {{model}} test.json`."
        )
    changes = list(_changes(given, path))
    variants = tuple(_variant(name, changed, given, path, changes[0][0]) for name, changed in changes)
    for variant in variants:
        if variant.against not in dict(changes):
            raise InputError(
                f"The grid {path}: {variant.name} has `against: {variant.against}`, but no variant has this name."
            )
    if not variants:
        raise InputError(f"The grid {path} has no variants. Add at least one.")
    folders = [variant.folder for variant in variants]
    if len(set(folders)) < len(folders) or not all(folders) or "aligned" in folders:
        raise InputError(
            f"The grid {path}: two variants have the same name or the same folder name, or a variant is named "
            "`aligned`, which is reserved. Rename the variant."
        )
    return Grid(variants, tuple(dict.fromkeys(seeds)))


def _changes(given: dict[str, Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the names of all variants, and what each changes."""
    for name, changed in given["variants"].items():
        if not isinstance(changed, dict) or not isinstance(changed.get("pretrain", {}), dict):
            raise InputError(f"The grid {path}: the variant {name} must be a mapping (setting: value).")
        yield str(name), changed
    for key, values in given["grid"].items():
        if not isinstance(values, list) or not values:
            raise InputError(f"The grid {path}: {key} must have a list of values.")
    if given["grid"]:
        for values in itertools.product(*given["grid"].values()):
            changed = dict(zip(given["grid"], values, strict=True))
            yield ", ".join(f"{key} {value}" for key, value in changed.items()), changed


def _variant(name: str, changed: dict[str, Any], given: dict[str, Any], path: Path, first: str) -> Variant:
    """Return the common settings, with the changes of this variant."""
    own = {key: value for key, value in changed.items() if key not in ("pretrain", "measure", "against")}
    finetune = {**given["finetune"], **own}
    shared = {key: finetune[key] for key in IN_BOTH_STAGES if key in finetune}
    pretrain = {**shared, **given["pretrain"], **changed.get("pretrain", {})}
    reserved = {"output_dir", "seed", *(["projector"] if given["pretrain"] else [])}
    if taken := reserved & {*finetune, *pretrain}:
        raise InputError(f"The grid {path}: {name} sets {min(taken)}, which the grid sets itself; remove it.")
    measure, against = changed.get("measure", given["measure"]), str(changed.get("against", first))
    return Variant(name, pretrain if given["pretrain"] else None, finetune, measure, against)


def run_grid(grid: Grid, out: Path, run: Command) -> list[Measured]:
    """Run and measure every unfinished cell, seed by seed, with a progress bar; return the results of all cells.

    Raises:
        InputError: If a command fails, or if `out` holds a cell with other settings.
    """
    cells = [(variant, seed) for seed in grid.seeds for variant in grid.variants]
    for variant, seed in cells:
        _configure(out, variant, seed)  # all of them first, so that a changed grid is refused before hours of work
    finished = [_is_measured(out, variant, seed) for variant, seed in cells]
    with tqdm(total=len(cells), initial=sum(finished), unit=" cells", disable=None) as bar:
        for (variant, seed), done in zip(cells, finished, strict=True):
            if done:
                continue
            bar.set_description(f"{variant.name}, seed {seed}")
            _train(out, variant, seed, run)
            _measure(out, variant, seed, run)
            bar.update()
    return read_measured(grid, out)


def read_measured(grid: Grid, out: Path) -> list[Measured]:
    """Return the results of all measured cells; the grid may be unfinished."""
    found = []
    for variant, seed in itertools.product(grid.variants, grid.seeds):
        if _is_measured(out, variant, seed):
            names = [model.name for model in _models(_folder(out, variant, seed))]
            said = [json.loads((_told(out, variant, seed) / f"{name}.json").read_text("utf-8")) for name in names]
            points = tuple((step_of(Path(name)), one["accuracy"]) for name, one in zip(names, said, strict=True))
            low, high = said[-1]["ci95"]
            found.append(Measured(variant.name, seed, points, (low, high)))
    return found


def _folder(out: Path, variant: Variant, seed: int) -> Path:
    return out / variant.folder / f"seed-{seed}"


def _told(out: Path, variant: Variant, seed: int) -> Path:
    return out / variant.folder / f"seed-{seed}.measured"


def _models(folder: Path) -> list[Path]:
    """Return what to measure of a finished run: its checkpoints (the last is its end), or the run if it has none."""
    return Run(folder).checkpoints() or [folder]


def _is_measured(out: Path, variant: Variant, seed: int) -> bool:
    folder, told = _folder(out, variant, seed), _told(out, variant, seed)
    if not Run(folder).finished:
        return False
    return all((told / f"{model.name}.json").is_file() for model in _models(folder))


def _aligned(out: Path, variant: Variant, seed: int) -> Path:
    """Return the folder of stage 1, which variants with the same stage 1 share."""
    settings = json.dumps({**(variant.pretrain or {}), "seed": seed}, sort_keys=True, default=str)
    return out / "aligned" / hashlib.sha256(settings.encode()).hexdigest()[:12]


def _configure(out: Path, variant: Variant, seed: int) -> None:
    """Write a cell's configurations; it is an error if the cell was started with other ones."""
    folder, aligned = _folder(out, variant, seed), _aligned(out, variant, seed)
    stage2 = {**variant.finetune, "seed": seed, "output_dir": str(folder)}
    if variant.pretrain is not None:
        _write({**variant.pretrain, "seed": seed, "output_dir": str(aligned)}, aligned)
        stage2["projector"] = str(aligned)
    _write(stage2, folder)


def _write(settings: dict[str, Any], folder: Path) -> None:
    text, path = yaml.safe_dump(settings, sort_keys=False), folder.with_name(f"{folder.name}.yaml")
    try:
        if folder.is_dir() and path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"The runs in {folder} were started with other settings than those of the grid. Choose another --out."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}). Choose another --out.") from error


def _train(out: Path, variant: Variant, seed: int, run: Command) -> None:
    """Run both stages, unless they are finished."""
    stages = [("finetune_lora", _folder(out, variant, seed))]
    if variant.pretrain is not None:
        stages.insert(0, ("pretrain_projector", _aligned(out, variant, seed)))
    for recipe, folder in stages:
        if not Run(folder).finished:
            configuration, log = (folder.with_name(f"{folder.name}.{kind}") for kind in ("yaml", "log"))
            run([recipe, "--config", str(configuration)], log)


def _measure(out: Path, variant: Variant, seed: int, run: Command) -> None:
    """Measure the run, or each of its checkpoints, unless that is done already."""
    told = _told(out, variant, seed)
    told.mkdir(exist_ok=True)
    for model in _models(_folder(out, variant, seed)):
        path = told / f"{model.name}.json"
        if path.is_file():
            continue
        places = {"{model}": str(model), "{out}": str(told / f"{model.name}.jsonl")}
        words = [_put(word, places) for word in shlex.split(variant.measure)]
        said = run(["eval", *words, "--json"], told / f"{model.name}.log")
        try:
            figures = json.loads(said)
            float(figures["accuracy"]), *figures["ci95"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"`qllava eval {shlex.join(words)}` returns no accuracy. Change `measure` in the grid."
            ) from error
        write_whole(path, json.dumps(figures, indent=1) + "\n")


def _put(word: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        word = word.replace(name, value)
    return word
