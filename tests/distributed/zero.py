"""A recipe under DeepSpeed, if it is ZeRO-2 that trains; NaN is planted in the second process at the step NAN_AT.

    accelerate launch --config_file recipes/accelerate/deepspeed_zero2.yaml tests/distributed/zero.py RECIPE --FLAGS

Ends with status 3 when what is trained is no engine of DeepSpeed's that shares out gradients and state.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import patch

from deepspeed import DeepSpeedEngine

from qllava.training.run import finetune, main, pretrain
from qllava.training.settings import parse
from qllava.training.trainer import LlavaTrainer

RECIPES = {"pretrain": pretrain, "finetune": finetune}
training_step, compute_loss = LlavaTrainer.training_step, LlavaTrainer.compute_loss


def watched(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """A training step, if the model is ZeRO-2's."""
    if not (isinstance(model, DeepSpeedEngine) and model.zero_optimization_stage() == 2):
        os._exit(3)
    return training_step(self, model, *args, **kwargs)


def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The loss, or NaN."""
    loss = compute_loss(self, *args, **kwargs)
    now = self.args.process_index == 1 and self.state.global_step + 1 == int(os.environ.get("NAN_AT", "0"))
    return loss * float("nan") if now else loss


if __name__ == "__main__":
    with (
        patch.object(LlavaTrainer, "training_step", watched),
        patch.object(LlavaTrainer, "compute_loss", planted),
    ):
        sys.exit(main(RECIPES[sys.argv[1]], lambda: parse(sys.argv[2:], output_dir="", nano={})))
