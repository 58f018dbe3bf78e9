"""TRL's SFTTrainer, for batches that hold pictures: one function and one class for both stages.

What is added to TRL's trainer, and why:

- The projector has a learning rate of its own.
- A loss or gradient that is not finite ends the run before the weights are touched, and says which samples it met. (transformers
  would log a loss of 0 and go on to the end with NaN in every weight.)
- A checkpoint is written aside and renamed, so a folder `checkpoint-N` is always whole; it holds what `load_run` needs.
- Held-out questions are answered and compared, beside the held-out loss.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTTrainer

from qllava.config import InputError
from qllava.data.collate import Collator
from qllava.data.encode import Sample
from qllava.models.assemble import PROJECTOR_FILE, Assembled, save_projector, save_record
from qllava.training.settings import TrainConfig

METRICS_FILE = "metrics.jsonl"


class NotFinite(InputError):
    """The loss or a gradient is NaN or infinite: the run has ended, and no weight was changed by it."""


def to_dataset(samples: Sequence[Sample]) -> Dataset:
    """Samples as a table on which TRL trains. No column is called image: TRL would prepare the rows itself."""
    return Dataset.from_dict(
        {
            "id": [s.id for s in samples],
            "input_ids": [s.input_ids for s in samples],
            "labels": [s.labels for s in samples],
            "pictures": [[str(path) for path in s.images] for s in samples],
        }
    )


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Writes what the trainer logs to `metrics.jsonl`, a line for each report."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append one line; flushed, so that a killed run keeps it."""
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        line = {"stage": self.stage, "step": state.global_step, "total_steps": state.max_steps, **numbers}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class LlavaTrainer(SFTTrainer):  # type: ignore[misc]
    """See the head of this file."""

    def __init__(
        self,
        model: nn.Module,
        assembled: Assembled,
        config: TrainConfig,
        *,
        train: Dataset,
        evaluation: Dataset | None,
        exact_match: Callable[[], float] | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        """Args:
        model: what `add_lora` or `train_projector_only` returned.
        assembled: the model's parts, for its tokenizer and its record.
        train, evaluation: tables from `to_dataset`.
        exact_match: answers held-out questions and returns the share that is right.
        """
        self.assembled = assembled
        self.exact_match = exact_match
        tokenizer = assembled.processor.tokenizer
        config.dataset_kwargs = {"skip_prepare_dataset": True}
        config.remove_unused_columns = False
        config.logging_nan_inf_filter = False
        config.use_cache = False
        super().__init__(
            model=model,
            args=config,
            data_collator=Collator(tokenizer.pad_token_id, assembled.processor.image_processor),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or what `optim` names, over two groups: LoRA, and the projector with `projector_lr`."""
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            projector = [p for n, p in named if "multi_modal_projector" in n]
            lora = [p for n, p in named if "multi_modal_projector" not in n]
            rate = self.args.projector_lr if lora else self.args.learning_rate
            groups = [{"params": lora}, {"params": projector, "lr": rate}]
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([group for group in groups if group["params"]], **arguments)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, after the ids of the samples were taken out of the batch."""
        ids = inputs.pop("ids", [])
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        value = loss[0] if isinstance(loss, tuple) else loss
        if self.model.training and not torch.isfinite(value):
            raise NotFinite(
                f"The loss is {value.item()} at step {self.state.global_step + 1}, with the samples {', '.join(ids)}; no weight was "
                "changed. Look at these samples, or lower the learning rate, and give the command again."
            )
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip, and stop at a gradient that is not finite: the optimizer has not stepped yet."""
        norm = super()._clip_grad_norm(model)
        value = norm if isinstance(norm, Tensor) else torch.tensor(float(norm))
        # With fp16 an infinite gradient now and then is how the scaler finds its scale; it skips that step itself.
        if self.accelerator.scaler is None and not torch.isfinite(value):
            raise NotFinite(
                f"A gradient is not finite at step {self.state.global_step + 1}; no weight was changed. Lower the learning rate and give "
                "the command again."
            )
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss, and the share of held-out questions that are answered right."""
        if self.exact_match is not None:
            # TRL averages what it finds here into the next evaluation report.
            self._metrics["eval"]["exact_match"].append(self.exact_match())
        result: dict[str, float] = super().evaluate(*args, **kwargs)
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Adapter or projector, tokenizer and record: what `load_run` needs."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder))
        save_projector(self.model, folder)
        self.assembled.processor.save_pretrained(str(folder))
        save_record(self.assembled.recipe, folder)
        torch.save(self.args, folder / "training_args.bin")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's card speaks of another way of training; `qllava merge` writes one that is true."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers does, but written aside and renamed when it is whole."""
        folder = Path(self.args.output_dir)
        aside = folder / ".partial"
        name = f"checkpoint-{self.state.global_step}"
        shutil.rmtree(aside, ignore_errors=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._aside = str(aside)
        try:
            super()._save_checkpoint(model, trial)
            shutil.rmtree(folder / name, ignore_errors=True)
            (aside / name).rename(folder / name)
        except OSError as error:
            raise InputError(
                f"The checkpoint {folder / name} could not be saved ({error.strerror or error}); the one before it is untouched. Make room "
                "and give the command again."
            ) from error
        finally:
            self._aside, self.args.save_total_limit = None, limit
            shutil.rmtree(aside, ignore_errors=True)
        if limit:
            for old in checkpoints(folder)[:-limit]:
                shutil.rmtree(old)

    _aside: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or str(super()._get_output_dir(trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """An adapter is loaded by transformers; the projector of a stage 1 from its own file."""
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            state = load_file(os.path.join(resume_from_checkpoint, PROJECTOR_FILE))
            self.model.model.multi_modal_projector.load_state_dict(state)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; a folder that is not whole never bears such a name."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))
