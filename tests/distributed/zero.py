"""Program that runs a recipe with DeepSpeed and checks that ZeRO-2 trains it.

    accelerate launch --config_file recipes/accelerate/deepspeed_zero2.yaml tests/distributed/zero.py RECIPE --FLAGS

It ends with status 3 if the trained model is not a DeepSpeed engine that shards gradients and optimizer state. The
environment variable FAULT can name a fault of `several.py` to plant.
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
    """Run a training step; end the process if the model is not trained by ZeRO-2."""
    if not (isinstance(model, DeepSpeedEngine) and model.zero_optimization_stage() == 2):
        os._exit(3)
    return training_step(self, model, *args, **kwargs)


if __name__ == "__main__":
    planted = FAULTS.get(os.environ.get("FAULT"), nullcontext())
    with patch.object(LlavaTrainer, "training_step", watched), planted:
        sys.exit(main(RECIPES[sys.argv[1]], lambda: parse(sys.argv[2:], output_dir="", nano={})))
