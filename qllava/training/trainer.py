"""TRL's SFTTrainer for batches with images: one subclass, composed of parts that can be tested without it.

- `pack_step` (`step/packs.py`) computes an optimizer step pack by pack, in shorter packs if memory runs out.
- `objective` (`objectives/`) computes loss and metrics from the log-probabilities of a pack's learned tokens.
- `guard` (`durable/numbers.py`) ends the run at a loss or gradient that is not finite, before a weight is changed, and
  names the samples. transformers would log a loss of 0 and train to the end with NaN in every weight.
- `writer` and `contents` (`durable/`) write checkpoints that are complete or absent, and define their contents.

This class connects them with TRL's hooks, and adds:

- The projector has its own learning rate.
- Samples about one image are computed together, and the ranks divide the samples of a step (`durable/order.py`).
  However many packs a batch becomes, its samples belong to one step, and its loss is that of all their learned tokens.
- Held-out questions are answered and scored, in addition to the held-out loss, after a checkpoint of the same step.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from qllava.data.collate import PackCollator
from qllava.data.encode import IGNORE_INDEX
from qllava.evaluation.vqa import VqaResult
from qllava.files import Journal
from qllava.models.assemble import Assembled
from qllava.runs import LEDGER_FILE, SPIKES_FILE
from qllava.training.durable import processes
from qllava.training.durable.contents import Contents
from qllava.training.durable.numbers import Alone, Guard, Spikes, check_weights
from qllava.training.durable.order import ImageOrder, InOrder, loader
from qllava.training.durable.writer import CheckpointWriter
from qllava.training.durable.zero import read_tensors_only
from qllava.training.evaluations import of_samples, same_draws
from qllava.training.memory.paged import keep_paged
from qllava.training.memory.rehearsal import largest, moments
from qllava.training.objectives import held_out
from qllava.training.objectives.objective import Objective, Outcome
from qllava.training.objectives.supervised import supervised
from qllava.training.settings import TrainConfig
from qllava.training.stages import Stage
from qllava.training.step.attention import looking_at
from qllava.training.step.exact import compile_layers, take_shortcuts, teach_packs
from qllava.training.step.kernels import settle
from qllava.training.step.packs import PackStep, prepare_for_packs


class LlavaTrainer(SFTTrainer):
    """Trainer of both stages; see the module docstring."""

    args: TrainConfig
    model: Any
    objective: Objective
    """Computes loss and metrics of each pack, in training and for held-out samples."""
    evaluating = 0.0
    """Seconds spent on evaluations."""
    _evaluated: tuple[int, dict[str, float]] = (-1, {})
    """Step of the last evaluation, and its held-out figures."""

    def __init__(
        self,
        model: nn.Module,
        assembled: Assembled,
        stage: Stage,
        *,
        exact_match: Callable[[], VqaResult] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        kept: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Prepare a model for training.

        Args:
            model: Result of `add_lora` or `train_projector_only`.
            assembled: The model's parts, for its tokenizer and its record.
            stage: Data and settings of the training.
            exact_match: Answers held-out questions and returns their score.
            callbacks: Callbacks in addition to transformers' own.
            kept: `computed` of the checkpoint that is resumed.
        """
        config = stage.config
        self.stage, self.assembled, self.exact_match = stage, assembled, exact_match
        self.objective = supervised(config.loss_type)
        folder = Path(str(config.output_dir))
        self.contents = Contents(assembled, adapter=stage.kind.adapter)
        self.writer = CheckpointWriter(folder, stage.begun_with)
        self.guard = Guard(Spikes(folder / SPIKES_FILE, stage.kind.name), self._alone)
        self._order = ImageOrder(stage.train.images, config)
        llava: Any = assembled.model
        self._looking = partial(looking_at, llava.model.language_model)
        collator = PackCollator(
            llava.config.image_token_index,
            assembled.processor.image_processor,
            config.share_image_prefix,
            min((n for n in (config.tokens_per_pack, kept.get("halved")) if n), default=None),
        )
        prepare_for_packs(config)
        super().__init__(
            model=model,  # type: ignore[arg-type]  # a PeftModel or a LlavaForConditionalGeneration
            args=config,
            data_collator=collator,
            train_dataset=stage.train.dataset,
            eval_dataset=stage.evaluation.dataset if stage.evaluation else None,
            processing_class=assembled.processor.tokenizer,
            callbacks=list(callbacks),
        )
        self.pack_step = PackStep(
            collator, self.accelerator, learn=super().training_step, looking=self._looking, say=self._say
        )
        self.pack_step.halved = kept.get("halved")
        self.kernels = settle(llava, config, kept)
        # After TRL, which sets its own forward method on the instance.
        teach_packs(llava, self.kernels.attention.kernel)
        take_shortcuts(llava, config)
        if self.kernels.layers.kernel == "compiled":
            compile_layers(llava.model.language_model)

    @property
    def computed(self) -> dict[str, Any]:
        """Choices about the computation, made by trial or when memory ran out; recorded in every checkpoint."""
        return {**self.kernels.record(), "halved": self.pack_step.halved}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW, or the optimizer `optim`, with two groups: LoRA, and the projector with `projector_lr`."""
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            projector = [p for n, p in named if "multi_modal_projector" in n]
            lora = [p for n, p in named if "multi_modal_projector" not in n]
            # Decay by group, because torch's AdamW would use its own 0.01 otherwise.
            decay: dict[str, Any] = {"weight_decay": self.args.weight_decay}
            groups: list[Any] = [
                {"params": lora, **decay},
                {"params": projector, "lr": self.stage.projector_rate, **decay},
            ]
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([group for group in groups if group["params"]], **arguments)
            keep_paged(self.optimizer)
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Return this rank's batches of every step; samples about one image come together to share it."""
        return loader(self.train_dataset, self._order, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return this rank's held-out samples, each of them once."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return loader(rows, InOrder(len(rows), self.args), self.data_collator, self.args, again=False)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step and its learned tokens over all ranks; an unreadable batch ends all ranks."""
        with processes.together():
            batches = list(islice(epoch_iterator, num_batches))
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm, once per step before the optimizer's; one that is not finite ends the run."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        losses, samples = self.pack_step.taken()
        self.guard.check(self.state.global_step + 1, self.model, losses, norm, samples, self._searching)
        return norm

    def _searching(self) -> bool:
        """Return whether an infinite gradient may be fp16's search for its scale: it skips that step and lowers it."""
        if self.is_deepspeed_enabled:
            engine: Any = self.deepspeed
            return bool(self.args.fp16 and engine.optimizer.loss_scale > 1)
        return self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() > 1

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        """Restore the state as transformers does, but with this start's settings instead of the checkpoint's.

        Returns the completed epochs, and the batches of the current one. If the last step was saved already, no further
        one follows: transformers would add one if `max_steps` ends inside an epoch.
        """
        epochs, batches = super()._init_training_state(max_steps, *arguments)
        self.writer.step = self.state.global_step
        self.state.compute_steps(self.args, max_steps)
        return (self.state.num_train_epochs, 0) if self.state.global_step >= max_steps else (epochs, batches)

    def _alone(self, sample: Mapping[str, Any], gradient: bool) -> Alone:
        """Compute one sample alone: its loss, or its gradient, which is discarded."""
        batch = self.data_collator([dict(sample)])
        pixels = all(
            bool(torch.isfinite(pack["pixel_values"]).all()) for pack in batch["packs"] if "pixel_values" in pack
        )
        if not gradient:
            return Alone(pixels, math.isfinite(self.sums(self.model, batch)["loss"]))
        self.model.zero_grad(set_to_none=True)
        self.pack_step.compute(self.model, batch, batch["labels"].ne(IGNORE_INDEX).sum().to(self.args.device))
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = all(bool(torch.isfinite(g).all()) for g in found)
        self.model.zero_grad(set_to_none=True)
        return Alone(pixels, finite)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train like TRL; only tensors are read from a checkpoint of DeepSpeed."""
        if self.is_deepspeed_enabled:
            read_tensors_only()
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward pass of a batch, pack by pack."""
        return self.pack_step.add(model, inputs, num_items_in_batch, self.state.global_step + 1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's loss of a pack; its metrics are averaged over packs for the next log, as in TRL.

        Learned tokens are counted over all ranks, and DDP takes the mean of their gradients: hence the factor.
        """
        found = self.objective(model(**inputs, use_cache=False), num_items_in_batch)
        self._note(found, inputs["position_ids"].shape[1])
        return found.loss if num_items_in_batch is None else found.loss * self.accelerator.num_processes

    def _note(self, found: Outcome, tokens: int) -> None:
        """Count a pack's tokens, and store its metrics for the next log, where TRL averages them over packs."""
        # All numbers of all ranks in one exchange, and one wait for the GPU.
        mine = torch.stack([x.float() for x in (found.learned.new_tensor(tokens), found.learned, *found.sums.values())])
        every = self.accelerator.gather(mine[None]).sum(0)
        every[2:] /= every[1].clamp(min=1)
        seen, _, *means = every.tolist()
        for name, mean in zip(found.sums, means, strict=True):
            self._metrics["train"][name].append(mean)
        self._total_train_tokens += int(seen)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _say(self, line: str) -> None:
        """Print a line above the bar, and add it to the ledger."""
        tqdm.write(line)
        with Journal(Path(str(self.args.output_dir)) / LEDGER_FILE, begins=b"", durable=False) as journal:
            journal.append((line + "\n").encode())

    def rehearse(self) -> None:
        """Try the largest batches of the data before the first step, so that a run fails at once and not at step 4,000.

        Packs are halved if necessary; nothing is learned, and the random state is restored.

        Raises:
            InputError: One sample, or the state of the optimizer, does not fit.
        """
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        lengths, images = self.stage.train.lengths, self.stage.train.images
        held = moments(self.args.optimizer, self.optimizer, self.model, self.args.device)
        for longest in largest(lengths, images, self.args.per_device_train_batch_size):
            batch = self.data_collator([self.train_dataset[index] for index in longest])  # type: ignore[index]
            with torch.random.fork_rng():
                self.training_step(self.model, batch, batch["labels"].ne(IGNORE_INDEX).sum().to(self.args.device))
            self.model.zero_grad(set_to_none=True)
            self.pack_step.taken()
        del held
        self._metrics, self._total_train_tokens = metrics, tokens

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """Add a held-out batch to the means of `evaluation_loop`; transformers would average over batches."""
        for name, value in self.sums(model, inputs).items():
            self._held_out[name] += value
        return None, None, None

    def sums(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, float]:
        """Return loss and metrics of a held-out batch, see `held_out.sums`."""
        with self._looking(), self.compute_loss_context_manager():
            return held_out.sums(self.objective, model, batch, self._prepare_inputs)

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Evaluate like transformers, but with means over all held-out learned tokens of all ranks."""
        self._held_out: dict[str, float] = defaultdict(float)
        output: Any = super().evaluation_loop(*arguments, **named)
        found = held_out.means(self._held_out)
        output.metrics[f"{named.get('metric_key_prefix', 'eval')}_loss"] = found.pop("loss")
        self._metrics["eval"] |= {name: [value] for name, value in found.items()}
        self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]
        return output

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save before an evaluation of the same step, while transformers evaluates first.

        An evaluation that fails (memory, a missing image) then costs no step, and the same command resumes after it
        instead of repeating it forever. If the evaluation affects the content of a checkpoint (schedulers that follow
        the held-out loss, the best metric), it is written once more; if it decides whether there is one, transformers'
        order is kept.
        """
        control = self.control
        first = control.should_save and control.should_evaluate and self.args.save_strategy != SaveStrategy.BEST
        if first:
            control.should_evaluate = False
            super()._maybe_log_save_evaluate(*args, **kwargs)
            control = self.control  # callbacks may have replaced it
            control.should_evaluate, control.should_save = True, self.args.metric_for_best_model is not None
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the held-out loss, and the share of held-out questions that are answered correctly.

        The random state is restored: a run that resumes after an evaluation draws what it would have drawn.
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
        """Return the number of tokens of all packs trained on, over all ranks, since this process started."""
        return int(self._total_train_tokens)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the trained weights as files; `state_dict` is given for a sharded model."""
        if self.args.should_save:
            self.contents.write(self.model, Path(output_dir or str(self.args.output_dir)), state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: TRL's describes another way of training; `qllava merge` writes a correct one."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save like transformers, but through `writer`, or raise NotFinite if a weight is not finite."""
        check_weights(self.model, self.state.global_step)
        # The writer removes checkpoints over the limit.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            self.writer.write(
                self.state.global_step,
                partial(super()._save_checkpoint, model, trial),
                optim=self.args.optimizer,
                computed=self.computed,
                limit=limit,
                # If weights or state are sharded, or the best checkpoint is tracked.
                waiting=bool(self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.metric_for_best_model),
            )
        finally:
            self.args.save_total_limit = limit

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.writer.aside or super()._get_output_dir(trial))

    def save_now(self) -> None:
        """Save the last computed step unless it is saved already."""
        if self.state.global_step != self.writer.step:
            self._save_checkpoint(self.model_wrapped, None)

    def check_start(self, checkpoint: Path) -> None:
        """Check that an intact checkpoint can be resumed in this run, or raise an InputError."""
        engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else ""
        self.contents.check(checkpoint, engine)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a projector without adapter; transformers loads an adapter, and what FSDP shards."""
        if self.is_fsdp_enabled or self.contents.adapter:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.contents.load_projector(self.model, Path(resume_from_checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the scale of fp16's loss, unless this device computes in another type."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)
