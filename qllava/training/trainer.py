"""TRL's SFTTrainer, for batches that hold pictures: one function and one class for both stages.

What is added to TRL's trainer, and why:

- The projector has a learning rate of its own.
- A loss or gradient that is not finite ends the run before the weights are touched, and says which samples it met.
  (transformers would log a loss of 0 and go on to the end with NaN in every weight.)
- A checkpoint is written aside, sealed and renamed (`checkpoints.py`); it holds what `load_run` needs.
- Held-out questions are answered and compared, beside the held-out loss.
- A batch is rows (`data.packing`): samples about one picture come together and share its tokens. However many rows a
  batch becomes, its samples are one step's, and its loss is that of all their learned tokens.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import TrainerCallback
from trl import SFTTrainer

from qllava.config import InputError
from qllava.data.collate import RowCollator
from qllava.data.encode import IGNORE_INDEX
from qllava.data.packing import steps_of
from qllava.models.adapter import PROJECTOR_FILE, save_projector, save_record
from qllava.models.assemble import Assembled
from qllava.training.attention import looking_at
from qllava.training.checkpoints import PARTIAL, publish, rotate, saving, seal
from qllava.training.exact import compile_layers, take_shortcuts, teach_rows
from qllava.training.kernels import choose, choose_layers
from qllava.training.settings import TrainConfig

METRICS_FILE = "metrics.jsonl"
LEDGER_FILE = "ledger.txt"


class NotFinite(InputError):
    """The loss or a gradient is NaN or infinite: the run has ended, and no weight was changed by it."""


class Metrics(TrainerCallback):
    """Writes what the trainer logs to `metrics.jsonl`, a line for each report."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append one line; flushed, so that a killed run keeps it."""
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        line = {"stage": self.stage, "step": state.global_step, "total_steps": state.max_steps, **numbers}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class PictureOrder(Sampler[int]):
    """The rows of an epoch in the order of `packing.steps_of`; the same seed and epoch give the same one."""

    def __init__(self, pictures: np.ndarray, batch: int, seed: int, *, share: bool) -> None:
        self.pictures, self.batch, self.seed, self.share = pictures, batch, seed, share
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the beginning of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[int]:
        for step in steps_of(self.pictures, self.batch, seed=self.seed, epoch=self.epoch, share=self.share):
            yield from step.tolist()


class LlavaTrainer(SFTTrainer):
    """See the head of this file."""

    args: TrainConfig
    model: Any

    def __init__(
        self,
        model: nn.Module,
        assembled: Assembled,
        config: TrainConfig,
        *,
        train: Dataset,
        evaluation: Dataset | None,
        pictures: np.ndarray,
        exact_match: Callable[[], float] | None,
        callbacks: list[TrainerCallback],
        begun_with: Mapping[str, Any] | None = None,
    ) -> None:
        """Args:
        model: what `add_lora` or `train_projector_only` returned.
        assembled: the model's parts, for its tokenizer and its record.
        train, evaluation: rows as `RowCollator` takes them.
        pictures: a hash of the pictures of each row of train, 0 for none.
        exact_match: answers held-out questions and returns the share that is right.
        begun_with: what decides the run; every checkpoint's manifest keeps it.
        """
        self.begun_with = dict(begun_with or {})
        self.assembled = assembled
        self.exact_match = exact_match
        self._order = PictureOrder(
            pictures, config.per_device_train_batch_size, config.seed, share=config.share_image_prefix
        )
        self._aside: str | None = None
        # Of the optimizer step that is being computed.
        self._step: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        tokenizer = assembled.processor.tokenizer
        config.dataset_kwargs = {"skip_prepare_dataset": True}
        config.remove_unused_columns = False
        config.logging_nan_inf_filter = False
        config.use_cache = False
        llava: Any = assembled.model
        super().__init__(
            model=model,  # type: ignore[arg-type]  # a PeftModel or a LlavaForConditionalGeneration
            args=config,
            data_collator=RowCollator(
                llava.config.image_token_index,
                assembled.processor.image_processor,
                config.share_image_prefix,
                config.tokens_per_row,
            ),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        kind = (llava.config.text_config, llava.device, computing_in(config, llava.dtype))
        self.kernel, self.layers = choose(*kind), choose_layers(*kind, config.compile_layers)
        # After TRL, which puts a forward pass of its own on the instance.
        teach_rows(llava, self.kernel.kernel)
        take_shortcuts(llava, config)
        if self.layers.kernel == "compiled":
            compile_layers(llava.model.language_model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or what `optim` names, over two groups: LoRA, and the projector with `projector_lr`."""
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            projector = [p for n, p in named if "multi_modal_projector" in n]
            lora = [p for n, p in named if "multi_modal_projector" not in n]
            rate = self.args.projector_lr if lora else self.args.learning_rate
            # Decay by group: torch's AdamW would take 0.01 of its own where nothing is said.
            decay: dict[str, Any] = {"weight_decay": self.args.weight_decay}
            groups: list[Any] = [{"params": lora, **decay}, {"params": projector, "lr": rate, **decay}]
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([group for group in groups if group["params"]], **arguments)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a batch; when memory runs out, of the whole step again in shorter rows."""
        self._step.append(self._cut(inputs))
        batches = self._step[-1:]
        while True:
            try:
                losses = [self._rows(model, batch, num_items_in_batch) for batch in batches]
                break
            except torch.OutOfMemoryError:
                if self.accelerator.num_processes > 1:  # the others would wait for ever
                    raise
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
        with looking_at(self.assembled.model.model.language_model):
            for number, row in enumerate(batch["rows"], start=1):
                last = number == len(batch["rows"])
                # Several processes share their gradients once a batch: each may have another number of rows.
                with nullcontext() if last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, row, num_items))  # type: ignore[no-untyped-call]
        return torch.stack(losses).sum()

    def _cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch in rows of the present length: workers that began before it was halved still make longer ones."""
        limit = getattr(self.data_collator, "tokens_per_row", None)
        most = max(row["input_ids"].shape[1] for row in batch["rows"])
        if limit is None or most <= max(limit, int(batch["lengths"].max())):
            return batch
        collator: Any = self.data_collator
        return collator(batch["kept"].samples)  # type: ignore[no-any-return]

    def _halve_rows(self) -> None:
        """Rows of half the length from here on. Raises InputError when a single sample is too long."""
        longest = max(row["input_ids"].shape[1] for batch in self._step for row in batch["rows"])
        sample = max(int(batch["lengths"].max()) for batch in self._step)
        if longest <= sample:
            raise InputError(
                f"Memory does not suffice for one sample of {sample} tokens, at step {self.state.global_step + 1}; "
                "lower max_length or lora_r, or see what `qllava plan` proposes. Checkpoints are untouched."
            )
        limit = max(longest // 2, sample)
        collator: Any = self.data_collator
        self.data_collator = replace(collator, tokens_per_row=limit)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        line = f"Out of memory at step {self.state.global_step + 1}: rows have at most {limit:,} tokens from here on."
        tqdm.write(line)
        with (Path(str(self.args.output_dir)) / LEDGER_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rehearse(self, lengths: np.ndarray) -> None:
        """Try the longest samples of the data before the first step, so that memory ends now and not at step 4,000.

        lengths: tokens of each row of the training data. Rows are halved if need be; nothing is learned, and the random
        state is as before.
        """
        longest = np.argsort(lengths, kind="stable")[-self.args.per_device_train_batch_size :]
        batch = self.data_collator([self.train_dataset[int(index)] for index in longest])  # type: ignore[index]
        learned = [p for p in self.model.parameters() if p.requires_grad]
        each = 2 if "8bit" in str(self.args.optim) else 8
        # The optimizer's moments come with the first step.
        moments = torch.empty(each * sum(p.numel() for p in learned), dtype=torch.uint8, device=self.args.device)
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        with torch.random.fork_rng():
            self.training_step(self.model, batch, batch["labels"].ne(IGNORE_INDEX).sum().to(self.args.device))
        del moments
        self.model.zero_grad(set_to_none=True)
        self._metrics, self._total_train_tokens = metrics, tokens
        self._losses, self._step = [], []

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """The held-out loss of a batch, per learned token."""
        language_model = self.assembled.model.model.language_model
        total = torch.zeros((), device=self.args.device)
        with looking_at(language_model), torch.no_grad(), self.compute_loss_context_manager():
            for row in inputs["rows"]:
                loss = self.compute_loss(model, self._prepare_inputs(row))  # type: ignore[no-untyped-call]
                total += loss * len(row["targets"])
        return total / sum(len(row["targets"]) for row in inputs["rows"]), None, None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Samples about one picture come in one batch, so that they can share it."""
        return self._order

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, once per step and before the optimizer's; stops at a gradient that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        # Looked at once per step, before any weight is touched: each look makes a GPU wait.
        losses, self._losses = torch.stack(self._losses), []
        ids, self._step = [id for batch in self._step for id in batch["ids"]], []
        if not torch.isfinite(losses).all():
            raise self._not_finite(f"The loss is {losses.sum().item()}", ids)
        # With fp16 an infinite gradient now and then is how the scaler finds its scale; it skips that step itself.
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise self._not_finite("A gradient is not finite", ids)
        return norm

    def _not_finite(self, what: str, ids: Sequence[str]) -> NotFinite:
        return NotFinite(
            f"{what} at step {self.state.global_step + 1}, with the samples {', '.join(ids)}; no weight was changed. "
            "Look at these samples, or lower the learning rate, and give the command again."
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss, and the share of held-out questions that are answered right."""
        if self.exact_match is not None:
            # TRL averages what it finds here into the next evaluation report.
            self._metrics["eval"]["exact_match"].append(self.exact_match())
        result: dict[str, float] = super().evaluate(*args, **kwargs)
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Adapter or projector, tokenizer and record: what `load_run` needs."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder))
            (folder / "README.md").unlink(missing_ok=True)  # peft's, a form that nobody filled in
        save_projector(self.model, folder)
        self.assembled.processor.save_pretrained(str(folder))
        save_record(self.assembled.recipe, folder)
        torch.save(self.args, folder / "training_args.bin")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's card speaks of another way of training; `qllava merge` writes one that is true."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers does, but written aside, and given its name when it is whole."""
        folder = Path(str(self.args.output_dir))
        aside = folder / PARTIAL
        name = f"checkpoint-{self.state.global_step}"
        shutil.rmtree(aside, ignore_errors=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._aside = str(aside)
        try:
            with saving(f"The checkpoint {folder / name}"):
                super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
                seal(aside / name, self.begun_with)
                publish(aside / name, folder / name)
        finally:
            self._aside, self.args.save_total_limit = None, limit
            shutil.rmtree(aside, ignore_errors=True)
        rotate(folder, limit)

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or str(super()._get_output_dir(trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """An adapter is loaded by transformers; the projector of a stage 1 from its own file."""
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            state = load_file(Path(resume_from_checkpoint) / PROJECTOR_FILE)
            self.model.model.multi_modal_projector.load_state_dict(state)


def computing_in(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    """What the model computes in: autocast's type, or its own."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else dtype
