"""A recipe under DeepSpeed, if it is ZeRO-2 that trains; FAULT names one that is planted, as in `several.py`.

    accelerate launch --config_file recipes/accelerate/deepspeed_zero2.yaml tests/distributed/zero.py RECIPE --FLAGS

Ends with status 3 when what is trained is no engine of DeepSpeed's that shares out gradients and state.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from deepspeed import DeepSpeedEngine

from qllava.training.main import main
from qllava.training.settings import parse
from qllava.training.trainer import LlavaTrainer
from tests.distributed.several import FAULTS, RECIPES

training_step = LlavaTrainer.training_step


def watched(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """A training step, if the model is ZeRO-2's."""
    if not (isinstance(model, DeepSpeedEngine) and model.zero_optimization_stage() == 2):
        os._exit(3)
    return training_step(self, model, *args, **kwargs)


if __name__ == "__main__":
    planted = FAULTS.get(os.environ.get("FAULT"), nullcontext())
    with patch.object(LlavaTrainer, "training_step", watched), planted:
        sys.exit(main(RECIPES[sys.argv[1]], lambda: parse(sys.argv[2:], output_dir="", nano={})))
