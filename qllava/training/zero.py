"""DeepSpeed's ZeRO-2, where it is installed and accelerate was told of it: what has to be asked of it besides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensors_only() -> Iterator[None]:
    """While a run goes on from its checkpoint: DeepSpeed unpickles its own files, whatever they hold.

    torch is told to read tensors alone, and the few classes of DeepSpeed's in which it keeps numbers. Anything else
    raises pickle.UnpicklingError.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
