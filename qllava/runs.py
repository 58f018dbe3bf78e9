"""Folder of a run: the names of its files, the kind of run, its state and its checkpoints. Without torch.

    run.yaml                    the settings that the run started with
    data.json                   of an instruction tuning: the training and held-out files by their hashes
    command.json                the command, the versions of the packages that compute, the seconds so far
    ledger.txt                  what is trained, and how it is computed
    metrics.jsonl               reports of the trainer, one per line; spikes.jsonl: steps with a loss spike
    before.json, scores.json    answers and scores from before the training, kept for a resumed run
    probes.safetensors          held-out examples on which `qllava merge` compares
    checkpoint-N/               the weights after N optimizer steps; manifest.json in it is written last
    .partial/                   a checkpoint that is being written, or removed
    stage1/                     the pretraining that an instruction tuning did first, a run of its own, with begun.json
    projector.safetensors       the projector alone, of a pretraining
    adapter_model.safetensors   LoRA and projector, of an instruction tuning; with adapter_config.json
    qllava.json                 what the base was built from
    samples.json, report.html   answers before and after; the page
    results.json                written last: a folder that has it is a finished run

A checkpoint has the adapter or the projector, and qllava.json, under the same names. Other modules use the constants
below instead of these names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qllava.config import NANO, NANO_IDENTITY, OLDER_NANO, RENAMED, InputError, expanded

RUNS = Path("runs")
"""Folder of nano's runs, relative to the current folder."""

RUN_FILE = "run.yaml"
DATA_FILE = "data.json"
COMMAND_FILE = "command.json"
LEDGER_FILE = "ledger.txt"
METRICS_FILE = "metrics.jsonl"
SPIKES_FILE = "spikes.jsonl"
BEFORE_FILE = "before.json"
SCORES_FILE = "scores.json"
PROBES_FILE = "probes.safetensors"
MANIFEST_FILE = "manifest.json"
BEGUN_FILE = "begun.json"
PROJECTOR_FILE = "projector.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "qllava.json"
SAMPLES_FILE = "samples.json"
REPORT_FILE = "report.html"
"""Default name of every page that a command writes."""
RESULTS_FILE = "results.json"
MERGE_FILE = "merge.json"
"""File of a merged model: what it was merged from, and how well it agrees with that."""
PARTIAL = ".partial"
STAGE1 = "stage1"
_CHECKPOINT = "checkpoint-"

Kind: TypeAlias = Literal["stage 1", "stage 2", "merged"]
State: TypeAlias = Literal["empty", "begun", "interrupted", "finished"]


@dataclass(frozen=True)
class Run:
    """Folder of a run, which may not have started; or of a checkpoint, which has some of the same files."""

    folder: Path
    """Path of the folder."""

    @property
    def settings(self) -> Path:
        """File of the settings that the run started with."""
        return self.folder / RUN_FILE

    @property
    def results(self) -> Path:
        """File that marks the run as finished."""
        return self.folder / RESULTS_FILE

    @property
    def report(self) -> Path:
        """Path of the report page."""
        return self.folder / REPORT_FILE

    @property
    def stage1(self) -> Run:
        """Run of the pretraining that this run did first, in its own folder."""
        return Run(self.folder / STAGE1)

    @property
    def kind(self) -> Kind | None:
        """Kind of the folder: a pretraining, an instruction tuning, or a merged model; None for other folders."""
        if (self.folder / MERGE_FILE).is_file():
            return "merged"
        if self.has_adapter or (self.settings.is_file() and (self.folder / DATA_FILE).is_file()):
            return "stage 2"
        return "stage 1" if self.settings.is_file() or (self.folder / PROJECTOR_FILE).is_file() else None

    @property
    def state(self) -> State:
        """State of the run.

        - "finished": it has results.
        - "interrupted": there is work to resume: a checkpoint, or a finished pretraining of its own. Only the command
          that started the run can resume it.
        - "begun": it has settings. Other files are from an earlier start, perhaps with other settings.
        - "empty": no run was started here.
        """
        if self.finished:
            return "finished"
        if self.checkpoints() or self.stage1.checkpoints() or self.stage1.finished:
            return "interrupted"
        return "begun" if self.settings.is_file() else "empty"

    @property
    def finished(self) -> bool:
        """Whether the run has results."""
        return self.results.is_file()

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA was trained and saved here; a pretraining saves only a projector."""
        return (self.folder / ADAPTER_CONFIG_FILE).is_file()

    @property
    def unfinished(self) -> str | None:
        """Message for a request for the model of a run whose training has not ended; None for other folders."""
        has_model = self.has_adapter or any((self.folder / name).is_file() for name in (PROJECTOR_FILE, "config.json"))
        saved = self.checkpoints()
        if has_model or not (saved or self.settings.is_file()):
            return None
        usable = [place for place in saved if Run(place).has_adapter]
        other = f", or use its newest checkpoint, {usable[-1]}" if usable else ""
        return f"{self.folder} is not finished. Run the training command again to resume it{other}."

    @property
    def without_model(self) -> str | None:
        """Message for a run without a model for chat, unfinished or a pretraining; None for other folders."""
        if self.kind == "stage 1" and (self.folder / PROJECTOR_FILE).is_file():
            return f"{self.folder} is a stage 1 run, which has only a projector. Use it with finetune_lora --projector."
        return self.unfinished

    @property
    def is_nano(self) -> bool:
        """Whether the run was of nano's parts.

        Raises:
            InputError: The settings cannot be read.
        """
        return self.read_settings().get("model_name_or_path") == NANO

    @property
    def is_of_another_nano(self) -> bool:
        """Whether the record of a nano run names the nano of another version of qllava, whose adapter does not fit.

        A record that cannot be read says nothing about it: whoever loads the run reports what is wrong.
        """
        try:
            record = json.loads((self.folder / RECORD_FILE).read_text(encoding="utf-8"))
            return str(record["fingerprint"]).rpartition("-")[2] != NANO_IDENTITY
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def read_settings(self) -> dict[str, Any]:
        """Return the settings that the run started with, by their current names.

        Raises:
            InputError: The settings cannot be read.
        """
        import yaml  # here, so that a command line that names no nano stays instant

        try:
            read = yaml.safe_load(self.settings.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise InputError(f"{self.settings} cannot be read ({said}). Repair the file or remove the run.") from error
        if not isinstance(read, dict):
            raise InputError(f"{self.settings} contains no settings. Repair the file or remove the run.")
        return {RENAMED.get(str(name), str(name)): value for name, value in read.items()}

    def checkpoints(self, after: Path | None = None) -> list[Path]:
        """Return the folders that are named like a checkpoint, oldest first; they may be corrupt.

        Args:
            after: One of them, to return only those of later steps; None for all.
        """
        found = sorted((path for path in self.folder.glob(f"{_CHECKPOINT}*") if is_checkpoint(path)), key=step_of)
        return found[found.index(after) + 1 :] if after else found

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` optimizer steps."""
        return self.folder / f"{_CHECKPOINT}{step}"


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is named like a checkpoint."""
    return path.name.startswith(_CHECKPOINT) and path.name.removeprefix(_CHECKPOINT).isdigit()


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps of a checkpoint; 0 for any other folder."""
    return int(checkpoint.name.removeprefix(_CHECKPOINT)) if is_checkpoint(checkpoint) else 0


def folder_of(model: str) -> Path:
    """Return the folder of a model by its name; for `nano` that of its newest finished run.

    Raises:
        InputError: The name is `nano`, and no such run is finished.
    """
    return newest_nano_run() if model == NANO else Path(expanded(model))


def newest_nano_run(runs: Path = RUNS) -> Path:
    """Return the folder of the nano run that finished last.

    Raises:
        InputError: No run on this version's nano is finished.
    """
    finished = finished_nano_runs(runs)
    usable = [folder for folder in finished if not Run(folder).is_of_another_nano]
    if usable:
        return usable[-1]
    if finished:
        raise InputError(f"{finished[-1]} {OLDER_NANO}")
    raise InputError(f"No nano run in {runs}/ is finished. Run `make finetune` first.")


def finished_nano_runs(runs: Path = RUNS) -> list[Path]:
    """Return the folders of finished nano runs, the one that finished last at the end; some may be of another nano.

    Raises:
        InputError: The settings of a finished run cannot be read.
    """
    every = [Run(folder) for folder in runs.glob("*/")]
    finished = [
        run
        for run in every
        if run.finished and (run.folder / ADAPTER_FILE).is_file() and run.settings.is_file() and run.is_nano
    ]
    return [run.folder for run in sorted(finished, key=lambda run: run.results.stat().st_mtime)]
