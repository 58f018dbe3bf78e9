"""The folder of a run: the names of files that mark one, and the nano run that finished last. Without torch."""

from __future__ import annotations

from pathlib import Path

from qllava.config import NANO, InputError, expanded

RUNS = Path("runs")
"""Where nano's runs are looked for: in the folder that a command is given in."""
RUN_FILE = "run.yaml"
"""The settings that a run began with."""
ADAPTER_FILE = "adapter_model.safetensors"
RESULTS_FILE = "results.json"
"""Written last: a folder that has it holds a finished run."""


def folder_of(model: str) -> Path:
    """The folder that a model's name means, if it means one: of `nano` its newest finished run.

    Raises:
        InputError: It is `nano`, and no such run has finished.
    """
    return newest_nano_run() if model == NANO else Path(expanded(model))


def newest_nano_run(runs: Path = RUNS) -> Path:
    """The folder of the nano run that finished last. Raises InputError when there is none."""
    finished = finished_nano_runs(runs)
    if not finished:
        raise InputError(f"No nano run in {runs}/ has finished yet; run `make finetune` first.")
    return finished[-1]


def finished_nano_runs(runs: Path = RUNS) -> list[Path]:
    """Return the folders of finished nano runs, the one that finished last at the end.

    Raises:
        InputError: The settings of a finished run cannot be read.
    """
    finished = [
        folder
        for folder in runs.glob("*/")
        if all((folder / name).is_file() for name in (RESULTS_FILE, ADAPTER_FILE, RUN_FILE))
        and _is_nano(folder / RUN_FILE)
    ]
    return sorted(finished, key=lambda folder: (folder / RESULTS_FILE).stat().st_mtime)


def _is_nano(path: Path) -> bool:
    import yaml  # here, so that a command line that names no nano stays instant

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())}); repair or remove the run."
        ) from error
    return isinstance(settings, dict) and settings.get("model_name_or_path") == NANO
