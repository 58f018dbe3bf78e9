"""Entry point of a recipe: errors that a user can fix become one sentence and an exit status, without a stack trace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from qllava.arguments import explain
from qllava.config import InputError
from qllava.models.errors import one_line, out_of_memory
from qllava.surroundings import prepare_process
from qllava.training.durable import processes
from qllava.training.durable.signals import Stopped, handled
from qllava.training.settings import Settings


def main(run: Callable[[Settings], Path], settings: Callable[[], Settings]) -> int:
    """Run a recipe; print errors that a user can fix on stderr and return status 1; signals have their own status."""
    prepare_process()
    try:
        with handled():
            with processes.meeting():
                chosen = settings()
            with processes.one_voice():
                run(chosen)
    except Stopped as stopped:
        if processes.speaks():
            print(f"qllava: {stopped}", file=sys.stderr)
        return stopped.status
    except processes.Elsewhere:
        return 1
    except InputError as error:
        # An error in a data loader worker contains its stack trace as text; the message is the last line.
        sentence = str(error).splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")
        print(f"qllava: {sentence}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(
            f"qllava: Out of memory ({one_line(error)}). Checkpoints are unchanged. Lower fit_memory, max_length or "
            "lora_r, or run `qllava plan` to find settings that fit; then run the command again.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"qllava: {explain(error)}", file=sys.stderr)
        return 1
    return 0
