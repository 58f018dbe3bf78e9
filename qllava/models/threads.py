"""Number of torch threads for generating answers on a CPU.

OpenMP threads that spin while they wait take the cores from each other as soon as another program runs: nano (hidden
size 192) then answered at 1 token/s with two threads and at 25 to 34 with one, on two cores shared by eight programs.
qllava's commands let threads sleep instead (`surroundings.wait_asleep`), so that two threads cost no more than one. In
a process that imported torch before, or whose user wants spinning threads, one thread is the safe number for a small
model, whose operations on single tokens are too short to be parallelized.

A number chosen by the user is kept: OMP_NUM_THREADS, MKL_NUM_THREADS, or an earlier `torch.set_num_threads`.
Training keeps torch's number, because a pack is large enough for it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

SMALL = 1024
"""Models with a smaller hidden size answer with one thread: an operation on one token takes microseconds."""
_GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_DEFAULT = torch.get_num_threads()
"""Number that torch had chosen when this module was imported."""


def settle_threads(model: Any) -> None:
    """Set torch's number of threads for a model that answers on the CPU, unless the user has chosen one.

    Args:
        model: A model, or any object with its `config` and `device`.
    """
    on_cpu = torch.device(model.device).type == "cpu"
    if on_cpu and not any(os.environ.get(name) for name in _GIVEN) and torch.get_num_threads() in (1, _DEFAULT):
        hidden: int = model.config.get_text_config().hidden_size
        torch.set_num_threads(1 if hidden < SMALL else _DEFAULT)
