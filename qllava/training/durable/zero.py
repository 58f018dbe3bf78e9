"""DeepSpeed's ZeRO-2, if it is installed and configured in accelerate: additional settings that it needs."""

from __future__ import annotations

import os

import torch


def read_tensors_only() -> None:
    """Allow only tensors when DeepSpeed's files are unpickled from here on.

    torch loads tensors, and the few classes in which DeepSpeed stores numbers. Anything else raises
    pickle.UnpicklingError.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
