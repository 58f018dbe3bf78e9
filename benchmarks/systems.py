"""The three systems that are compared, each started as its user would, with the same model and the same samples.

    trl        TRL's SFTTrainer with its own collator and its defaults: layers are recomputed in the backward pass, a
               batch is padded to its longest sample. Only settings that it needs to run, or to compute the same, are
               changed: no truncation at `max_length`, only answers are learned (`assistant_only_loss`), samples in the
               given order
    trl_tuned  the same with the best settings that were found for it: batch size, recomputation, samples by length
    qllava     LlavaTrainer

All start with the same frozen weights, LoRA and projector, and have the same learning rate, optimizer and samples per
optimizer step. On a CPU all compute in fp32; on a GPU in bf16, where TRL also keeps the trained weights in bf16, as it
does for every 4-bit model.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, Image, List
from torch import nn
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks import shapes
from benchmarks.samples import Text, as_conversation, as_messages, make_processor, read_texts, within_steps
from benchmarks.weights import random_llava
from benchmarks.whole_head import compute_whole_head
from qllava.conversation import CHATML
from qllava.data.collate import Collator
from qllava.data.encode import IGNORE_INDEX, Encoder
from qllava.image_layout import ImageLayout
from qllava.models.adapter import add_lora
from qllava.models.assemble import Assembled, prepare_for_training
from qllava.models.lora import Lora
from qllava.models.outline import Recipe
from qllava.training.callbacks import Begin
from qllava.training.data import Part, Prepared, prepare
from qllava.training.durable.order import loader
from qllava.training.fitting import fitted
from qllava.training.settings import TrainConfig
from qllava.training.stages import INSTRUCTION, Stage
from qllava.training.trainer import LlavaTrainer

SYSTEMS = ("trl", "trl_tuned", "qllava")
LEARNING_RATE = 1e-3
EVERY_LAYER = 1000


@dataclass(frozen=True)
class Job:
    """Training of one process."""

    system: Literal["trl", "trl_tuned", "qllava"]
    """The system that trains."""
    shape: str
    """Name of a function of `shapes`."""
    device: str
    """cpu or cuda."""
    folder: str
    """Folder that the process may write to."""
    texts: str
    """File of the samples, in the order of the steps."""
    samples_per_step: int
    """Samples of an optimizer step."""
    batch: int = 1
    """Samples in a forward pass of TRL's model."""
    recompute: bool | None = True
    """Whether layers are recomputed in the backward pass; None: qllava decides by the memory of the GPU."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of qllava's TrainConfig."""
    whole_head: bool = False
    """Whether qllava's head computes all positions, to measure what that costs."""
    lora_r: int = 16
    """Rank of LoRA; alpha is twice the rank."""
    memory: int | None = None
    """Bytes of GPU memory that the process may take; None: all."""
    half: bool = False
    """Whether a GPU computes in fp16 with loss scaling, as one without bf16 does."""

    @property
    def dtype(self) -> torch.dtype:
        """Type that the layers compute in."""
        if self.device == "cpu":
            return torch.float32
        return torch.float16 if self.half else torch.bfloat16


@dataclass
class System:
    """A trainer before its first step."""

    trainer: Any
    """Trainer of the kind of transformers'."""
    rows: Prepared
    """Samples, in the order in which this system sees them."""
    digest: str
    """SHA-256 of all trained weights, to check that all systems start equally."""
    collator: Collator
    """Collator that makes a padded batch of samples."""


class InOrder(LlavaTrainer):
    """LlavaTrainer that takes the samples in the given order, which is that of `steps_of` already."""

    def get_train_dataloader(self) -> Any:
        """Return a loader whose batches are the optimizer steps."""
        samples: Any = self.train_dataset
        steps = BatchSampler(SequentialSampler(samples), self.args.per_device_train_batch_size, drop_last=False)
        return loader(samples, steps, self.data_collator, self.args)


def build(job: Job, callbacks: Sequence[TrainerCallback]) -> System:
    """Return the system of a job, ready to train."""
    texts = read_texts(Path(job.texts))
    if job.system != "qllava":
        order = "sorted" if job.system == "trl_tuned" else "shuffled"
        texts = within_steps(texts, job.samples_per_step, order, seed=0)
    config = getattr(shapes, job.shape)()
    model = random_llava(config, device=job.device, dtype=job.dtype)
    processor = make_processor(config)
    recipe = Recipe(None, "random", "random", "mlp2x_gelu", config.vision_feature_layer, "pad", CHATML.name, True)
    assembled = Assembled(model, processor, recipe)
    encoder = Encoder(processor.tokenizer, CHATML, config.image_token_index, ImageLayout.of_config(config), 1 << 30)
    rows = prepare_records(texts, encoder, Path(job.folder))
    if job.system == "qllava":
        prepare_for_training(model)
    set_seed(0)
    adapted = add_lora(assembled, Lora(job.lora_r, 2 * job.lora_r))
    digest = _digest(adapted)
    make = _qllava if job.system == "qllava" else _trl
    trainer = make(job, adapted, assembled, rows, texts)
    for callback in callbacks:
        trainer.add_callback(callback)
    return System(trainer, rows, digest, Collator(processor.tokenizer.pad_token_id, processor.image_processor))


def _qllava(job: Job, model: Any, assembled: Assembled, rows: Prepared, texts: list[Text]) -> Any:
    config = TrainConfig(
        **_common(job, len(texts)),
        per_device_train_batch_size=job.samples_per_step,
        gradient_checkpointing=job.recompute is None,
        recompute_layers=None if job.recompute is None else job.recompute * EVERY_LAYER,
        projector_lr=LEARNING_RATE,
        **job.changes,
    )
    if job.whole_head:
        compute_whole_head(assembled.model)
    # As `train_stage` starts a run: settings that fit the memory are chosen, and rehearsed on a GPU.
    stage, _ = fitted(Stage(INSTRUCTION, CHATML, rows, None, [], Path(job.folder), config, {}), model, assembled)
    trainer = InOrder(model, assembled, stage)
    trainer.add_callback(Begin(trainer))
    return trainer


def _trl(job: Job, model: Any, assembled: Assembled, rows: Prepared, texts: list[Text]) -> Any:
    # With this flag TRL casts trained weights to bf16, which an fp32 model on a CPU cannot use.
    model.is_loaded_in_4bit = job.device == "cuda"
    config = SFTConfig(
        **_common(job, len(texts)),
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.samples_per_step // job.batch,
        gradient_checkpointing=bool(job.recompute),
        max_length=None,
        assistant_only_loss=True,
        train_sampling_strategy="sequential",
    )
    # Images are opened when a batch needs them, as in qllava.
    dataset = Dataset.from_list([as_messages(text) for text in texts]).cast_column("images", List(Image()))
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=assembled.processor)


def _common(job: Job, samples: int) -> dict[str, Any]:
    return {
        "output_dir": job.folder,
        "max_steps": samples // job.samples_per_step,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "bf16": job.dtype == torch.bfloat16,
        "fp16": job.dtype == torch.float16,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device == "cuda",
    }


def prepare_records(texts: Sequence[Text], encoder: Encoder, folder: Path) -> Prepared:
    """Write samples to `rows.json` in a folder, and return the data that a run of qllava reads from it."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["QLLAVA_CACHE"] = str(folder / "cache")
    path = folder / "rows.json"
    path.write_text(json.dumps([as_conversation(n, text) for n, text in enumerate(texts)]), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        return prepare([Part(path, Path(texts[0].image).parent)], encoder, seed=0, skip_check=True)[0]


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def mean_loss(system: System, numbers: Sequence[int], device: str) -> float:
    """Return the mean loss over the learned tokens, one sample at a time by the model's plain forward pass."""
    model = system.trainer.model
    base = model.get_base_model()
    dtype = base.lm_head.weight.dtype
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for number in numbers:
        batch = system.collator([system.rows.dataset[int(number)]])
        labels = batch.pop("labels")[0, 1:].to(device)
        inputs = {key: value.to(device) for key, value in batch.items() if key != "ids"}
        with torch.autocast(device, dtype=dtype, enabled=device == "cuda"):
            hidden = base.model(**inputs, use_cache=False).last_hidden_state[0, :-1]
            learned = labels != IGNORE_INDEX
            logits = nn.functional.linear(hidden[learned], base.lm_head.weight)
        total += float(nn.functional.cross_entropy(logits.float(), labels[learned], reduction="sum"))
        count += int(learned.sum())
    model.train(was_training)
    return total / count
