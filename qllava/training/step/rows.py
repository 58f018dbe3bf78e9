"""How a batch goes through the model: row after row, in one process or in several that wait for each other.

A batch is rows (`data.packing`), and its gradients are the sum over them. When memory runs out, the step is computed
again in rows of half the length; its samples, and so what is learned, stay the same.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from trl import SFTTrainer

from qllava.config import InputError
from qllava.data.collate import weightless_row
from qllava.data.encode import IGNORE_INDEX
from qllava.files import Journal
from qllava.models.assemble import Assembled
from qllava.models.errors import out_of_memory
from qllava.runs import LEDGER_FILE
from qllava.training.durable import processes
from qllava.training.memory.fake import held_by
from qllava.training.settings import TrainConfig
from qllava.training.step.attention import looking_at


class RowTrainer(SFTTrainer):
    """SFTTrainer whose batches are rows (`RowCollator`'s); see the head of this file."""

    args: TrainConfig
    model: Any
    assembled: Assembled
    # Of the optimizer step that is being computed: its batches, and the losses of those that are done.
    _step: list[dict[str, Any]]
    _losses: list[Tensor]
    halved: int | None = None
    """Most tokens of a row since memory ran out; None: it has not."""
    # Of the evaluation that is being made: see `sums`.
    _held_out: Tensor

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a batch; when memory runs out, of the whole step again in shorter rows."""
        self._step.append(self._cut(inputs))
        batches = self._step[-1:]
        while True:
            try:
                losses = [self._rows(model, batch, num_items_in_batch) for batch in batches]
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if processes.several():  # the others are in the midst of their rows
                    longest = max(row["input_ids"].shape[1] for row in self._step[-1]["rows"])
                    raise InputError(
                        f"Memory does not suffice for a row of {longest} tokens, at step {self.state.global_step + 1}; "
                        "several processes do not halve their rows on the way: set tokens_per_row to less."
                    ) from None
            # Not inside the except block: there the error still holds what the rows held.
            self._halve_rows()
            model.zero_grad(set_to_none=True)
            self._losses.clear()
            batches = self._step = [self._cut(batch) for batch in self._step]
        self._losses += [loss.detach() for loss in losses]
        return losses[-1]

    def _rows(self, model: nn.Module, batch: dict[str, Any], num_items: Any) -> Tensor:
        """Row after row; gradients add up to those of all samples of the batch."""
        losses = []
        state, sync = self.accelerator.gradient_state, self.accelerator.sync_gradients
        try:
            with looking_at(self.assembled.model.model.language_model):
                rows = _evened(batch["rows"])
                for number, row in enumerate(rows, start=1):
                    last = number == len(rows)
                    # Gradients of several processes are added up once a batch; DeepSpeed looks at the state alone.
                    state._set_sync_gradients(sync and last)
                    with nullcontext() if last else self.accelerator.no_sync(model):
                        losses.append(super().training_step(model, row, num_items))  # type: ignore[no-untyped-call]
        finally:
            state._set_sync_gradients(sync)  # also when memory ran out in between
        return torch.stack(losses).sum()

    def _cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch in rows of the present length: one that was made before it was halved has longer ones."""
        collator: Any = self.data_collator
        limit = collator.tokens_per_row
        most = max(row["input_ids"].shape[1] for row in batch["rows"])
        if limit is None or most <= max(limit, _longest(batch)):
            return batch
        return collator.again(batch)  # type: ignore[no-any-return]

    def _halve_rows(self) -> None:
        """Rows of half the length from here on. Raises InputError when a single sample is too long."""
        longest = max(row["input_ids"].shape[1] for batch in self._step for row in batch["rows"])
        sample = max(_longest(batch) for batch in self._step)
        if longest <= sample:
            raise InputError(
                f"Memory does not suffice for one sample of {sample} tokens, at step {self.state.global_step + 1}; "
                "lower max_length or lora_r, or see what `qllava plan` proposes. Checkpoints are untouched."
            )
        limit = max(longest // 2, sample)
        collator: Any = self.data_collator
        self.halved = limit
        collator.shorten(limit)  # the loaders, and their workers, keep the collator that they were made with
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        line = f"Out of memory at step {self.state.global_step + 1}: rows have at most {limit:,} tokens from here on."
        tqdm.write(line)
        with Journal(Path(str(self.args.output_dir)) / LEDGER_FILE, begins=b"", durable=False) as journal:
            journal.append((line + "\n").encode())

    def rehearse(self, lengths: np.ndarray, pictures: np.ndarray) -> None:
        """Try the largest batches of the data before the first step, so that memory ends now and not at step 4,000.

        The longest samples may all be text, which never runs the vision tower: the longest with images are tried too.
        Rows are halved if need be; nothing is learned, and the random state is as before.

        Args:
            lengths: Tokens of each sample of the training data.
            pictures: A hash of the images of each sample, 0 for none.

        Raises:
            InputError: One sample, or the state of the optimizer, does not fit.
        """
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        moments = self._moments()
        for longest in _largest(lengths, pictures, self.args.per_device_train_batch_size):
            batch = self.data_collator([self.train_dataset[index] for index in longest])  # type: ignore[index]
            with torch.random.fork_rng():
                self.training_step(self.model, batch, batch["labels"].ne(IGNORE_INDEX).sum().to(self.args.device))
            self.model.zero_grad(set_to_none=True)
            self._losses, self._step = [], []
        del moments
        self._metrics, self._total_train_tokens = metrics, tokens

    def _moments(self) -> Tensor:
        """As many bytes as the optimizer's state will take on the device beyond what it has.

        It comes with the first step; in a run that is resumed it was loaded before. Under FSDP and ZeRO the optimizer
        knows the share of this rank.
        """
        there: Any = self.optimizer.state if self.optimizer else {}
        groups = self.optimizer.param_groups if self.optimizer else [{"params": self.model.parameters()}]
        learning = [p for group in groups for p in group["params"] if p.requires_grad]
        shapes = [_local(p).shape for p in learning if not any(map(torch.is_tensor, there.get(p, {}).values()))]
        try:
            return torch.empty(held_by(self.args.optimizer, shapes), dtype=torch.uint8, device=self.args.device)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        raise InputError(
            f"Memory does not suffice for the state of {self.args.optimizer} beside the model; lower lora_r, or take "
            "optim paged_adamw_8bit."
        )

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state in this process."""
        states: Any = self.optimizer.state.values() if self.optimizer else ()
        return sum(_local(value).nbytes for state in states for value in state.values() if torch.is_tensor(value))

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """Take a held-out batch into the means of `evaluation_loop`; transformers would average over batches."""
        self._held_out += self.sums(model, inputs)
        return None, None, None

    def sums(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Loss, entropy and right guesses of a held-out batch, each summed over its learned tokens, and their count."""
        language_model = self.assembled.model.model.language_model
        found = torch.zeros(4, dtype=torch.float64)
        seen = self._metrics["train" if self.model.training else "eval"]
        with looking_at(language_model), torch.no_grad(), self.compute_loss_context_manager():
            for row in _evened(batch["rows"]):
                mine = 0 if row.get("weightless") else len(row["targets"])
                loss = self.compute_loss(model, self._prepare_inputs(row))  # type: ignore[no-untyped-call]
                # TRL keeps the means of the same row of all processes together: each takes its share of them.
                entropy, right = (seen[name].pop() for name in ("entropy", "mean_token_accuracy"))
                found += torch.tensor([float(loss) if mine else 0.0, entropy, right, 1.0], dtype=torch.float64) * mine
        return found

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """As transformers', with means over all held-out learned tokens of all processes.

        So they depend neither on the batch size nor on the number of processes.
        """
        self._held_out = torch.zeros(4, dtype=torch.float64)
        output: Any = super().evaluation_loop(*arguments, **named)
        *sums, tokens = processes.total(self._held_out.tolist())
        loss, entropy, right = (value / tokens for value in sums)
        output.metrics[f"{named.get('metric_key_prefix', 'eval')}_loss"] = loss
        self._metrics["eval"] |= {"entropy": [entropy], "mean_token_accuracy": [right]}
        return output


def prepare_for_rows(config: TrainConfig) -> None:
    """Set what batches of rows need of TRL and transformers."""
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.remove_unused_columns = False
    config.logging_nan_inf_filter = False
    config.use_cache = False
    # Every row uses all that learns: DDP need not look for what is left out.
    config.ddp_find_unused_parameters = False


def _evened(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many rows as the process has that has most: in each of them all wait for each other."""
    return rows + [weightless_row() for _ in range(processes.highest(len(rows)) - len(rows))]


def _largest(lengths: np.ndarray, pictures: np.ndarray, count: int) -> list[list[int]]:
    """The `count` longest samples, and the longest of those that show images where they are others."""
    order = np.argsort(lengths, kind="stable")
    found = (order[-count:].tolist(), order[pictures[order] != 0][-count:].tolist())
    return [found[0]] if found[1] in ([], found[0]) else list(found)


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that FSDP shares out; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _longest(batch: dict[str, Any]) -> int:
    """Tokens of the longest sample of a batch."""
    return max((int(length) for length in batch["lengths"]), default=0)
