"""Program of each rank in tests of distributed training: it runs several trainings and reports how each ended.

    torchrun --nproc-per-node 2 tests/distributed/several.py RUNS.json

RUNS.json is a list of {"recipe": pretrain or finetune, "flags": [...], "out": FOLDER, "fault": one of FAULTS or null};
rank N writes the error that was raised to FOLDER.N.json. All runs share one start of the processes, because importing
takes longer than a tiny run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qllava.config import InputError
from qllava.training.durable import processes
from qllava.training.durable.signals import SaveAndStop, Stopped
from qllava.training.run import finetune, pretrain
from qllava.training.settings import Settings, parse
from qllava.training.trainer import LlavaTrainer

RECIPES = {"pretrain": pretrain, "finetune": finetune}
AT_STEP = 4  # a step in which both ranks have samples
compute_loss = LlavaTrainer.compute_loss
on_step_end = SaveAndStop.on_step_end


def nan(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the loss, but NaN for one step in rank 1."""
    loss = compute_loss(self, *args, **kwargs)
    return loss * float("nan") if self.args.process_index == 1 and self.state.global_step == AT_STEP - 1 else loss


def signalled(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """End a step; at the end of one step, rank 1 gets SIGTERM first."""
    if args.process_index == 1 and state.global_step == AT_STEP:
        os.kill(os.getpid(), signal.SIGTERM)
    on_step_end(self, args, state, control, **kwargs)


FAULTS: dict[str | None, Any] = {
    "nan": patch.object(LlavaTrainer, "compute_loss", nan),
    "signal": patch.object(SaveAndStop, "on_step_end", signalled),
}


def do(run: dict[str, Any], chosen: Settings) -> None:
    """Run one training, and write the error that it raised."""
    raised: BaseException | None = None
    with FAULTS.get(run["fault"], nullcontext()):
        try:
            RECIPES[run["recipe"]](chosen)
        except (InputError, Stopped) as error:
            raised = error
    said = {"raised": type(raised).__name__ if raised else None, "said": str(raised)}
    Path(f"{run['out']}.{processes.share()[0]}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    runs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    every = [parse(run["flags"], output_dir=run["out"], nano={}) for run in runs]
    with processes.one_voice():
        for run, chosen in zip(runs, every, strict=True):
            do(run, chosen)
