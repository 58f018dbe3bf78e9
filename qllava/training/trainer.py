"""TRL's SFTTrainer, for batches that hold pictures: one function and one class for both stages.

What is added to TRL's trainer, and why:

- The projector has a learning rate of its own.
- A loss or gradient that is not finite ends the run before the weights are touched, and names the samples that do it
  (`numbers.py`; transformers would log a loss of 0 and go on to the end with NaN in every weight). Spikes are told of.
- A checkpoint is written aside, sealed and renamed (`checkpoints.py`); it holds what `load_run` needs.
- Held-out questions are answered and compared, beside the held-out loss; a checkpoint of the same step is saved before.
- A batch is rows (`rows.py`): samples about one picture come together and share its tokens. However many rows a batch
  becomes, its samples are one step's, and its loss is that of all their learned tokens.
- Several processes share out the samples of a step (`order.py`), and stop together (`processes.py`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from qllava.config import InputError
from qllava.data.collate import RowCollator
from qllava.data.encode import IGNORE_INDEX
from qllava.evaluation.vqa import VqaResult
from qllava.models.adapter import refuse_not_finite, save_projector, save_record
from qllava.models.assemble import Assembled
from qllava.runs import ADAPTER_FILE, PARTIAL, PROJECTOR_FILE, SPIKES_FILE, Run
from qllava.training.durable import processes
from qllava.training.durable.checkpoints import append_line, engine_of, publish, rotate, saving, seal
from qllava.training.durable.numbers import Alone, Spikes, check_weights, traced
from qllava.training.durable.order import InOrder, PictureOrder, loader
from qllava.training.evaluations import of_samples, same_draws
from qllava.training.memory.paged import keep_paged
from qllava.training.settings import TrainConfig
from qllava.training.step.exact import compile_layers, take_shortcuts, teach_rows
from qllava.training.step.kernels import choose, choose_layers
from qllava.training.step.rows import RowTrainer, prepare_for_rows


class Metrics(TrainerCallback):
    """Writes what the trainer logs to `metrics.jsonl`, a line for each report."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append one line; flushed, so that a killed run keeps it."""
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        line = {"stage": self.stage, "step": state.global_step, "total_steps": state.max_steps, **numbers}
        processes.by_main(partial(append_line, self.path, line))


class LlavaTrainer(RowTrainer):
    """See the head of this file."""

    args: TrainConfig
    model: Any
    passed_over: Sequence[Path] = ()
    """Checkpoints that are not whole: the run goes on from one before them, and they go when the next is saved."""
    evaluating = 0.0
    """Seconds that evaluations have taken."""
    _saved = 0
    _evaluated: tuple[int, dict[str, float]] = (-1, {})
    """The step of the last evaluation, and what it found over the held-out samples."""

    def __init__(
        self,
        model: nn.Module,
        assembled: Assembled,
        config: TrainConfig,
        *,
        train: Dataset,
        evaluation: Dataset | None,
        pictures: np.ndarray,
        exact_match: Callable[[], VqaResult] | None,
        callbacks: list[TrainerCallback],
        begun_with: Mapping[str, Any] | None = None,
        kept: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Args:
        model: what `add_lora` or `train_projector_only` returned.
        assembled: the model's parts, for its tokenizer and its record.
        train, evaluation: rows as `RowCollator` takes them.
        pictures: a hash of the pictures of each row of train, 0 for none.
        exact_match: answers held-out questions and returns their score.
        begun_with: what decides the run; every checkpoint's manifest keeps it.
        kept: `computed` of the checkpoint that is resumed.
        """
        self.begun_with = dict(begun_with or {})
        self.assembled = assembled
        self.exact_match = exact_match
        self._order = PictureOrder(pictures, config)
        self._aside: str | None = None
        # Of the optimizer step that is being computed.
        self._step: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        kind_of_stage = "finetune" if isinstance(model, PeftModel) else "pretrain"
        self._spikes = Spikes(Path(str(config.output_dir)) / SPIKES_FILE, kind_of_stage)
        tokenizer = assembled.processor.tokenizer
        prepare_for_rows(config)
        llava: Any = assembled.model
        super().__init__(
            model=model,  # type: ignore[arg-type]  # a PeftModel or a LlavaForConditionalGeneration
            args=config,
            data_collator=RowCollator(
                llava.config.image_token_index,
                assembled.processor.image_processor,
                config.share_image_prefix,
                min((n for n in (config.tokens_per_row, kept.get("halved")) if n), default=None),
            ),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.halved = kept.get("halved")
        self._choose_kernels(kept)
        # After TRL, which puts a forward pass of its own on the instance.
        teach_rows(llava, self.kernel.kernel)
        take_shortcuts(llava, config)
        if self.layers.kernel == "compiled":
            compile_layers(llava.model.language_model)

    def _choose_kernels(self, kept: Mapping[str, Any]) -> None:
        """Settle what computes a row: by trial, or as a checkpoint has it that was written on such a device."""
        llava: Any = self.assembled.model
        device, dtype = llava.device, computing_in(self.args, llava.dtype)
        self._computing_on = f"{device.type} in {str(dtype).removeprefix('torch.')}"
        kept = kept if kept.get("on") == self._computing_on else {}
        kind = (llava.config.text_config, device, dtype)
        self.kernel = choose(*kind, kept.get("attention"))
        self.layers = choose_layers(*kind, self.args.compile_layers, kept.get("layers"))

    @property
    def computed(self) -> dict[str, Any]:
        """What was settled about how the run computes, by trial or when memory ran out: kept in every checkpoint."""
        names = {"on": self._computing_on, "attention": self.kernel.kernel, "layers": self.layers.kernel}
        return {**names, "halved": self.halved}

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
            keep_paged(self.optimizer)
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """This process's share of every step; samples about one picture come together, so that they can share it."""
        return loader(self.train_dataset, self._order, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This process's share of the held-out samples, each of them once."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return loader(rows, InOrder(len(rows), self.args), self.data_collator, self.args, again=False)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and its learned tokens in all processes; one that cannot be read ends all."""
        with processes.together():
            batches = list(islice(epoch_iterator, num_batches))
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, once per step and before the optimizer's; stops at a gradient that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        # Looked at once per step, before any weight is touched: each look makes a GPU wait.
        losses, self._losses = torch.stack(self._losses), []
        samples, self._step = [sample for batch in self._step for sample in batch["kept"].samples], []
        step, mine = self.state.global_step + 1, losses.sum().item()
        loss = processes.mean(mine)
        if not (math.isfinite(loss) and (math.isfinite(norm) or self._searching())):
            self._end(step, loss, mine, samples)
        if (usual := self._spikes.usual(loss)) is not None:
            ids = processes.every([str(sample["id"]) for sample in samples])
            processes.by_main(partial(self._spikes.tell, step, loss, usual, ids))
        return norm

    def _searching(self) -> bool:
        """Whether an infinite gradient may be how fp16 finds its scale: it skips that step itself and lowers it."""
        if self.is_deepspeed_enabled:
            engine: Any = self.deepspeed
            return bool(self.args.fp16 and engine.optimizer.loss_scale > 1)
        return self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() > 1

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        """As transformers does; where a run goes on, with what is told now and not what the checkpoint was told.

        Returns the epochs that are done, and the batches of the one in progress. When the last step was saved already,
        no other comes: transformers would take one more where `max_steps` ends inside an epoch.
        """
        epochs, batches = super()._init_training_state(max_steps, *arguments)
        self._saved = self.state.global_step
        self.state.compute_steps(self.args, max_steps)
        return (self.state.num_train_epochs, 0) if self.state.global_step >= max_steps else (epochs, batches)

    def _end(self, step: int, loss: float, mine: float, samples: list[dict[str, Any]]) -> NoReturn:
        """End the run, in all processes, at a step whose loss or gradient is not finite. Raises NotFinite.

        loss, mine: of all processes and of this one. samples: this one's.
        """
        lost = not math.isfinite(loss)
        # A gradient is the sum over all processes, so nobody knows whose it was.
        suspects = processes.every(samples if not (lost and math.isfinite(mine)) else [])
        what = f"The loss is {loss}" if lost else "A gradient is not finite"
        # In several processes each would have to look at as many samples as the others.
        look = None if processes.several() else partial(self._alone, gradient=not lost)
        error = traced(what, step, self.model, suspects, look)
        with processes.together():
            raise error

    def _alone(self, sample: dict[str, Any], *, gradient: bool) -> Alone:
        """One sample alone: its loss, or its gradient, which is thrown away."""
        batch = self.data_collator([sample])
        pixels = all(bool(torch.isfinite(row["pixel_values"]).all()) for row in batch["rows"] if "pixel_values" in row)
        if not gradient:
            return Alone(pixels, math.isfinite(self.sums(self.model, batch)[0]))
        self.model.zero_grad(set_to_none=True)
        self._rows(self.model, batch, batch["labels"].ne(IGNORE_INDEX).sum().to(self.args.device))
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = all(bool(torch.isfinite(g).all()) for g in found)
        self.model.zero_grad(set_to_none=True)
        return Alone(pixels, finite)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save before an evaluation of the same step, where transformers evaluates first.

        An evaluation that fails (memory, an image that is gone) then costs no step, and the same command resumes behind
        it instead of meeting it again for ever. Where the evaluation decides what a checkpoint holds (schedulers that
        follow the held-out loss, the best metric) it is written once more; where it decides whether there is one,
        transformers' order stays.
        """
        control = self.control
        first = control.should_save and control.should_evaluate and self.args.save_strategy != SaveStrategy.BEST
        if first:
            control.should_evaluate = False
            super()._maybe_log_save_evaluate(*args, **kwargs)
            control = self.control  # callbacks may have put another in its place
            control.should_evaluate, control.should_save = True, self.args.metric_for_best_model is not None
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss, and the share of held-out questions that are answered right.

        The random state is as before: a run that resumes behind an evaluation draws what it would have drawn.
        """
        began = time.monotonic()
        with same_draws():
            self._ask()
            result: dict[str, float] = super().evaluate(*args, **kwargs)
        self.evaluating += time.monotonic() - began
        self._evaluated = (self.state.global_step, of_samples(self.state.log_history[-1]))
        return result

    def evaluate_last(self, exact_match: Callable[[], VqaResult] | None) -> dict[str, float]:
        """Evaluate the trained model with other questions; the held-out loss is not computed twice for one step."""
        self.exact_match = exact_match
        step, found = self._evaluated
        if step != self.state.global_step:
            return self.evaluate()
        figures = dict(found)
        if exact_match is not None:
            self._ask()
            self.log(figures)  # TRL adds the score
        return figures

    def _ask(self) -> None:
        """Answer the held-out questions; TRL averages the figures into its next evaluation report."""
        if self.exact_match is not None:
            found = self.exact_match()
            figures = {"": found.accuracy, "_n": found.n, "_low": found.ci95[0], "_high": found.ci95[1]}
            for name, value in figures.items():
                self._metrics["eval"][f"exact_match{name}"].append(value)

    @property
    def tokens_seen(self) -> int:
        """Tokens of all packs that were trained on, in all processes, since this process began."""
        return int(self._total_train_tokens)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Adapter or projector, tokenizer and record: what `load_run` needs; state_dict: of a sharded model."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), state_dict=state_dict)
            (folder / "README.md").unlink(missing_ok=True)  # peft's, a form that nobody filled in
        save_projector(self.model, folder, state_dict)
        self.assembled.processor.save_pretrained(str(folder))
        save_record(self.assembled.recipe, folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's card speaks of another way of training; `qllava merge` writes one that is true."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers does, but written aside, and given its name when it is whole.

        Raises NotFinite when there is nothing good to save.
        """
        check_weights(self.model, self.state.global_step)
        folder = Path(str(self.args.output_dir))
        aside = folder / PARTIAL
        name = Run(folder).checkpoint(self.state.global_step).name
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._aside = str(aside)

        def whole() -> None:
            with saving(f"The checkpoint {folder / name}"):
                seal(aside / name, self.begun_with, self.args.optimizer, self.computed)
                publish(aside / name, folder / name)

        try:
            processes.by_main(partial(shutil.rmtree, aside, ignore_errors=True))
            # Each process has a random state of its own to save; the seal is for all that they wrote. Where weights or
            # state are shared out, or the best is sought, the processes wait for each other in there: one that fails
            # ends on its own.
            waiting = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.metric_for_best_model
            with nullcontext() if waiting else processes.together(), saving(f"The checkpoint {folder / name}"):
                super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
            processes.by_main(whole)
        finally:
            self._aside, self.args.save_total_limit = None, limit
            if processes.is_main():
                shutil.rmtree(aside, ignore_errors=True)
        gone = [place for place in self.passed_over if place != folder / name]
        processes.by_main(partial(rotate, folder, limit, gone))
        self._saved, self.passed_over = self.state.global_step, ()

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or str(super()._get_output_dir(trial))

    def save_now(self) -> None:
        """Save the step that was computed last, unless it has been."""
        if self.state.global_step != self._saved:
            self._save_checkpoint(self.model_wrapped, None)

    def check_start(self, checkpoint: Path) -> None:
        """Whether a whole checkpoint can be continued from here, before anything of it is loaded.

        Raises InputError where another engine has saved the optimizer's state (each has a form of its own, and
        transformers would begin with an empty one), and where a weight is not finite.
        """
        own = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else ""
        engine, count = engine_of(checkpoint)
        if engine != own:
            raise InputError(
                f"{checkpoint} was saved {f'under {engine}' if engine else 'without FSDP and DeepSpeed'}, where the "
                f"optimizer's state has another form than {f'under {own}' if own else 'here'}; continue as the run "
                "began."
            )
        if engine == "DeepSpeed" and count != processes.share()[1]:
            raise InputError(
                f"{checkpoint} was saved by {count} processes under DeepSpeed, which continues with as many only."
            )
        path = checkpoint / (ADAPTER_FILE if isinstance(self.model, PeftModel) else PROJECTOR_FILE)
        hint = f"remove {checkpoint}, and the same command continues from the one before"
        refuse_not_finite(load_file(path), path, hint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Transformers loads an adapter, and what FSDP shares out; of a stage 1's projector it does not know."""
        if self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            state = load_file(Path(resume_from_checkpoint) / PROJECTOR_FILE)
            self.model.model.multi_modal_projector.load_state_dict(state)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """The scale of fp16's loss; where this device computes in another type there is nothing to scale."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)


def computing_in(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    """What the model computes in: autocast's type, or its own."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else dtype
