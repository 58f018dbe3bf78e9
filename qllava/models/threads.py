"""Number of torch threads for generating answers on a CPU.

Threads of OpenMP that spin while they wait take the cores from each other as soon as another program runs: nano
(hidden size 192) then answered at 1 token/s with two threads and at 25 to 34 with one, on two cores that eight programs
shared. Programs of ours let threads sleep instead (`surroundings.wait_asleep`), with which two threads cost no more
than one. In a process that has imported torch before, or whose user wants threads to spin, one thread is the safe
number for a small model, whose operations on single tokens are too short to be shared out.

A number that the user chose is kept: OMP_NUM_THREADS, MKL_NUM_THREADS, or `torch.set_num_threads` before.
Training keeps torch's number, which a pack is large enough for.
"""

from __future__ import annotations

import os
from typing import Any

import torch

SMALL = 1024
"""Hidden sizes below this answer with one thread: an operation on one token takes microseconds."""
_GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_DEFAULT = torch.get_num_threads()
"""What torch chose, when this module was imported."""


def settle_threads(model: Any) -> None:
    """Choose the number of torch's threads for a model that answers on the CPU, unless the user has chosen one.

    Args:
        model: A model, or anything with its `config` and `device`.
    """
    on_cpu = torch.device(model.device).type == "cpu"
    if on_cpu and not any(os.environ.get(name) for name in _GIVEN) and torch.get_num_threads() in (1, _DEFAULT):
        hidden: int = model.config.get_text_config().hidden_size
        torch.set_num_threads(1 if hidden < SMALL else _DEFAULT)
