"""A run: one command, one folder. Both recipes are thin calls of `pretrain` and `finetune`.

    settings -> data -> model -> align (stage 1) -> tune (stage 2) -> measure -> finish

The same command again resumes an unfinished run at its newest checkpoint; a finished one is refused.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from qllava.conversation import PLAIN, TEMPLATES
from qllava.models.adapter import adapter_at, train_projector_only
from qllava.runs import REPORT_FILE
from qllava.training import base, evaluations, folders, outcome, scores
from qllava.training.alignment import align, captions_of
from qllava.training.asked import HeldOut
from qllava.training.data import Part, hashes_of, prepare_for
from qllava.training.durable import processes
from qllava.training.durable.checkpoints import begun_with, refuse_changes
from qllava.training.measures import Measures
from qllava.training.nano_start import take_projector
from qllava.training.settings import Settings
from qllava.training.stage import train_stage
from qllava.training.stages import ALIGNMENT, INSTRUCTION, Stage


def pretrain(settings: Settings) -> Path:
    """Run stage 1 only: train the projector on captions; return the run's folder."""
    with ExitStack() as held:
        return _pretrain(settings, held)


def _pretrain(settings: Settings, held: ExitStack) -> Path:
    # Settings
    folder = folders.open_folder(settings, held)
    started = outcome.Started(folder, held)
    # Data
    files = folders.files_of(settings.data.train_file, settings, "train_file", nano_file="pretrain")
    held_out = folders.held_out(settings, stage1=True)
    evaluations.refuse_unmeasured(settings.train, bool(held_out))
    begun = processes.by_main(partial(_begin, settings, folder, files))
    started.keep()
    # Model
    assembled = base.assembled(settings)
    template = TEMPLATES[settings.model.template] if settings.model.template else PLAIN
    train, evaluation = prepare_for(settings, assembled, template, files, held_out)
    # Align
    config = ALIGNMENT.rated(settings.train)
    stage = Stage(ALIGNMENT, template, train, evaluation, [], folder, config, begun, saved=started.keep)
    trained = train_stage(stage, train_projector_only(assembled), assembled)
    # Finish
    processes.by_main(partial(folders.finish, folder, {"seconds": started.seconds, **trained}))
    folders.say_next(
        f"Stage 1 is finished: {folder} (open {folder / REPORT_FILE} in a browser)", outcome.next_commands(folder)
    )
    return folder


def _begin(settings: Settings, folder: Path, files: list[Part]) -> dict[str, Any]:
    begun = begun_with(settings, train_file=hashes_of(files))
    refuse_changes(folder, begun)
    folders.write_settings(settings, folder)
    return begun


def finetune(settings: Settings) -> Path:
    """Run both stages, or only stage 2 if a projector is given; return the run's folder."""
    with ExitStack() as held:
        return _finetune(settings, held)


def _finetune(settings: Settings, held: ExitStack) -> Path:
    # Settings
    start = adapter_at(settings.model.model_name_or_path)
    folder = folders.open_folder(settings, held)
    started = outcome.Started(folder, held)
    take_projector(settings, folder)
    # Data, before the model, which may be a download of 14 GB
    files = folders.files_of(settings.data.train_file, settings, "train_file", nano_file="train")
    held_out = folders.held_out(settings)
    evaluations.refuse_unmeasured(settings.train, bool(held_out))
    begun = processes.by_main(partial(folders.begin, settings, folder, files, held_out))
    started.keep()
    # Model; the data of both stages is checked with it before any training, the user's own data first
    assembled = base.assembled(settings, start)
    measures = Measures(settings, folder, assembled)
    train, evaluation = prepare_for(settings, assembled, assembled.template, files, held_out)
    captions = captions_of(settings, assembled, folder)
    # Align
    measures.add("untrained", assembled.model)
    align(settings, assembled, folder, captions, begun, len(train.lengths), started)
    measures.add("stage1", assembled.model)
    # Tune
    model = base.with_lora(settings, assembled, start)
    asked = HeldOut(held_out, evaluation)
    measures.before(model, asked)
    config = INSTRUCTION.rated(settings.train)
    if measures.table:
        evaluations.few(config, len(train.lengths))
    questions = asked.spaced(config.eval_questions)
    final = [] if measures.table else asked.drawn(config.eval_questions_final, config.seed)
    stage = Stage(
        INSTRUCTION, assembled.template, train, evaluation, questions, folder, config, begun, final, started.keep
    )
    trained = train_stage(stage, model, assembled)
    # Measure
    results = {**measures.after(model), "seconds": started.seconds, **trained}
    measures.write()
    # Finish
    processes.by_main(partial(folders.finish, folder, results))
    if measures.table:
        print("\n" + scores.format_table(measures.table.found))
    _say_done(folder, results)
    return folder


def _say_done(folder: Path, results: dict[str, Any]) -> None:
    """Print the results of a finished run, and the commands that can follow."""
    print("\nResult")
    for label, value in outcome.figures(folder, results):
        print(f"  {label:<19}{value}")
    folders.say_next(
        f"The run is finished: {folder} (open {folder / REPORT_FILE} in a browser)", outcome.next_commands(folder)
    )
