"""Entry points of both recipes; errors in a command line are reported before torch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qllava.arguments import explain
from qllava.config import InputError
from qllava.surroundings import hide_gpus, prepare_process
from qllava.training.options import command
from qllava.training.options.before import look
from qllava.training.options.defaults import FINETUNE, PRETRAIN, Defaults


def pretrain(args: Sequence[str] | None = None) -> int:
    """Run `pretrain_projector` with a command line (default: of this process) and return the exit status."""
    return _begin(PRETRAIN, args)


def finetune(args: Sequence[str] | None = None) -> int:
    """Run `finetune_lora` with a command line (default: of this process) and return the exit status."""
    return _begin(FINETUNE, args)


def _begin(defaults: Defaults, args: Sequence[str] | None) -> int:
    prepare_process()
    line = list(sys.argv[1:] if args is None else args)
    try:
        if command.show_help(line, defaults):
            return 0
        given = command.read(line, **defaults.for_parsing())
        look(given, stage1=defaults is PRETRAIN)
        if given.values.get("use_cpu"):
            hide_gpus()  # otherwise the model would be loaded onto the first GPU, in its type
    except (InputError, OSError) as error:
        # Every process checks its own machine; one process per machine prints the error.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"qllava: {explain(error)}", file=sys.stderr)
        return 1
    # The imports below take seconds.
    from qllava.training import main, run
    from qllava.training.settings import resolve

    return main.main(run.pretrain if defaults is PRETRAIN else run.finetune, lambda: resolve(given))
