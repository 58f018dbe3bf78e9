"""Program that runs a recipe with FSDP2 on CPUs; accelerate would silently use DDP, so the devices are named GPUs.

    accelerate launch --config_file recipes/accelerate/fsdp2_qlora.yaml tests/distributed/sharded.py RECIPE --FLAGS

It ends with status 3 if the trained model is not an FSDPModule.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qllava.training.main import main
from qllava.training.settings import Settings, parse
from qllava.training.trainer import LlavaTrainer
from tests.distributed.several import RECIPES

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
training_step = LlavaTrainer.training_step


def watched(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a training step; end the process if a decoder layer is not an FSDP2 unit or a parameter is not sharded."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("LlamaDecoderLayer")]
    units = [model, *layers]
    if not (layers and all(isinstance(unit, FSDPModule) for unit in units)):
        os._exit(3)
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        os._exit(3)
    return training_step(self, model, *args, **kwargs)


def settings() -> Settings:
    """Return the settings of the command line."""
    with patch.object(torch.accelerator, "is_available", lambda: True):
        return parse(sys.argv[2:], output_dir="", nano={})


if __name__ == "__main__":
    gpus = ("gloo", DistributedType.MULTI_GPU)
    with (
        patch.object(PartialState, "_prepare_backend", lambda *_: gpus),
        patch.object(LlavaTrainer, "training_step", watched),
    ):
        sys.exit(main(RECIPES[sys.argv[1]], settings))
