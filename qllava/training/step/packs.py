"""An optimizer step, pack by pack: forward and backward passes, in shorter packs if memory runs out.

A batch consists of packs (`data.packing`; under its key `packs`), and its gradient is the sum over them. If memory runs
out, the whole step is computed again in packs of half the length; its samples, and so the result, stay the same. With
several ranks each computes its own packs, and all ranks wait for each other at every pack.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qllava.config import InputError
from qllava.data.collate import PackCollator, weightless_pack
from qllava.models.errors import out_of_memory
from qllava.training.durable import processes
from qllava.training.settings import TrainConfig


class PackStep:
    """Computes the batches of an optimizer step and keeps them until the step is complete; see the module docstring."""

    halved: int | None = None
    """Maximum tokens of a pack since memory ran out; None if it has not."""

    def __init__(
        self,
        collator: PackCollator,
        accelerator: Accelerator,
        *,
        learn: Callable[[nn.Module, dict[str, Any], Any], Tensor],
        looking: Callable[[], AbstractContextManager[Any]],
        say: Callable[[str], None],
    ) -> None:
        """Start with a step that has no batches yet.

        Args:
            collator: Makes the packs, and makes them shorter.
            accelerator: Decides when gradients are summed over the ranks.
            learn: Computes one pack, forward and backward. Called with the model, the pack and the number of learned
                tokens of the step; returns the pack's loss.
            looking: Context in which the language model uses attention by packs.
            say: Called with one line each time memory runs out.
        """
        self._collator, self._accelerator = collator, accelerator
        self._learn, self._looking, self._say = learn, looking, say
        self._batches: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []

    def add(self, model: nn.Module, batch: dict[str, Any], count: Any, step: int) -> Tensor:
        """Compute the next batch of the step; if memory runs out, compute the whole step again in shorter packs.

        Args:
            model: The model that is trained.
            batch: A batch made by the collator.
            count: Learned tokens of the step over all ranks.
            step: Number of the step, for messages.

        Returns:
            The loss of the batch, without gradient.

        Raises:
            InputError: Memory does not suffice for one sample, or ran out on one of several ranks.
        """
        self._batches.append(self._cut(batch))
        batches = self._batches[-1:]
        while True:
            try:
                losses = [self.compute(model, batch, count) for batch in batches]
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if processes.several():  # the other ranks are computing their packs
                    raise InputError(
                        f"Out of memory at step {step} with a pack of {_longest(batches[-1])} tokens. "
                        "With several processes packs cannot be halved during the run. Lower tokens_per_pack."
                    ) from None
            # Not inside the except block, where the error still references the tensors of the packs.
            self._halve(step)
            model.zero_grad(set_to_none=True)
            self._losses.clear()
            batches = self._batches = [self._cut(batch) for batch in self._batches]
        self._losses += [loss.detach() for loss in losses]
        return losses[-1]

    def taken(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Return the losses of the batches and their samples, in order, and start the next step."""
        samples = [sample for batch in self._batches for sample in batch["kept"].samples]
        losses, self._losses, self._batches = self._losses, [], []
        return losses, samples

    def compute(self, model: nn.Module, batch: dict[str, Any], count: Any) -> Tensor:
        """Compute a batch pack by pack and return its loss; the gradients of the packs add up."""
        losses = []
        state, sync = self._accelerator.gradient_state, self._accelerator.sync_gradients
        try:
            with self._looking():
                packs = evened(batch["packs"])
                for number, pack in enumerate(packs, start=1):
                    last = number == len(packs)
                    # Gradients are summed over ranks once per batch; DeepSpeed reads only the state.
                    state._set_sync_gradients(sync and last)
                    with nullcontext() if last else self._accelerator.no_sync(model):
                        losses.append(self._learn(model, pack, count))
        finally:
            state._set_sync_gradients(sync)  # also when memory ran out in between
        return torch.stack(losses).sum()

    def _cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch in packs of the current length; a batch made before a halving has longer ones."""
        limit = self._collator.tokens_per_pack
        if limit is None or _longest(batch) <= max(limit, _longest_sample(batch)):
            return batch
        return self._collator.again(batch)

    def _halve(self, step: int) -> None:
        """Halve the length of packs from here on, or raise an InputError if a single sample is too long."""
        longest = max(map(_longest, self._batches))
        sample = max(map(_longest_sample, self._batches))
        if longest <= sample:
            raise InputError(
                f"Out of memory at step {step} with a single sample of {sample} tokens. Lower max_length or "
                "lora_r, or run `qllava plan` to find settings that fit. Checkpoints are unchanged."
            )
        limit = max(longest // 2, sample)
        self.halved = limit
        self._collator.shorten(limit)  # loaders and their workers keep their collator
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._say(f"Out of memory at step {step}: from now on packs have at most {limit:,} tokens.")


def prepare_for_packs(config: TrainConfig) -> None:
    """Set what batches of packs need from TRL and transformers."""
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.remove_unused_columns = False
    config.logging_nan_inf_filter = False
    config.use_cache = False
    # Every pack uses all trained weights, so DDP need not search for unused ones.
    config.ddp_find_unused_parameters = False


def evened(packs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the packs, padded with weightless ones to the number of the rank that has most."""
    return packs + [weightless_pack() for _ in range(processes.highest(len(packs)) - len(packs))]


def _longest(batch: dict[str, Any]) -> int:
    """Return the tokens of the longest pack of a batch."""
    return max(int(pack["input_ids"].shape[1]) for pack in batch["packs"])


def _longest_sample(batch: dict[str, Any]) -> int:
    """Return the tokens of the longest sample of a batch."""
    return max((int(length) for length in batch["lengths"]), default=0)
