"""A recipe under FSDP2 on CPUs, which accelerate would quietly replace by DDP: it is told that these are GPUs.

    accelerate launch --config_file recipes/accelerate/fsdp2_qlora.yaml tests/distributed/sharded.py RECIPE --FLAGS

Ends with status 3 when what is trained is no FSDPModule.
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
    """A training step, if each decoder layer is a unit of FSDP2's and everything is shared out."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("LlamaDecoderLayer")]
    units = [model, *layers]
    if not (layers and all(isinstance(unit, FSDPModule) for unit in units)):
        os._exit(3)
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        os._exit(3)
    return training_step(self, model, *args, **kwargs)


def settings() -> Settings:
    """The command line's."""
    with patch.object(torch.accelerator, "is_available", lambda: True):
        return parse(sys.argv[2:], output_dir="", nano={})


if __name__ == "__main__":
    gpus = ("gloo", DistributedType.MULTI_GPU)
    with (
        patch.object(PartialState, "_prepare_backend", lambda *_: gpus),
        patch.object(LlavaTrainer, "training_step", watched),
    ):
        sys.exit(main(RECIPES[sys.argv[1]], settings))
