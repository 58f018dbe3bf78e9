"""DeepSpeed's ZeRO-2, where it is installed and accelerate was told of it: what has to be asked of it besides."""

from __future__ import annotations

import os

import torch


def read_tensors_only() -> None:
    """From here on no file of DeepSpeed's is unpickled, whatever it holds.

    torch is told to read tensors alone, and the few classes of DeepSpeed's in which it keeps numbers. Anything else
    raises pickle.UnpicklingError.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
