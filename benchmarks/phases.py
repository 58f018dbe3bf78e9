"""Measured and planned peak memory of every phase of a preset's run on a GPU, under a cap.

The run is `train_stage` itself: two steps and an evaluation, with random NF4 weights that are made on the device, so
that nothing is downloaded. The phase `before` therefore covers the answers before the first step, without the loading.
Each case runs in its own process, because a cap and an allocator's memory belong to a process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.samples import make_processor, make_texts
from benchmarks.systems import prepare_records
from benchmarks.weights import random_llava
from qllava.config import InputError
from qllava.conversation import CHATML
from qllava.data.encode import Encoder
from qllava.data.formats import read_examples
from qllava.image_layout import ImageLayout
from qllava.inference.chat import Chat
from qllava.models.adapter import add_lora, train_projector_only
from qllava.models.assemble import Assembled, prepare_for_training
from qllava.models.errors import out_of_memory
from qllava.models.lora import Lora
from qllava.models.outline import Recipe
from qllava.models.shapes import shapes_of
from qllava.training import memory, samples, scores
from qllava.training.memory.phases import CHAT_TOKENS, PHASES
from qllava.training.settings import Settings, parse
from qllava.training.stage import train_stage
from qllava.training.stages import ALIGNMENT, INSTRUCTION, Stage
from qllava.training.trainer import LlavaTrainer

TINY_TOKENS = 512
"""Length of samples and packs on a CPU; with the tiny model's 16 tokens per image, 8,192 would be 250 images a pack."""


@dataclass(frozen=True)
class Case:
    """Measurement that one process makes."""

    preset: str
    """Path of the preset's YAML."""
    cap_gb: int
    """GB of GPU memory that the process may take, its CUDA context included."""
    device: str
    """cuda or cpu; on a CPU nothing is measured, and a tiny model checks that the code runs."""
    folder: str
    """Folder that the process may write to."""


class Peaks:
    """Peak GPU memory of the process in each phase, in bytes: its CUDA context and what torch has reserved."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.phase = ""
        self.bytes: dict[str, int] = {}
        self.context = 0
        if self.cuda:
            torch.zeros(1, device="cuda")
            free, self.total = torch.cuda.mem_get_info()
            self.context = self.total - free - torch.cuda.memory_reserved()

    def cap(self, size: int) -> None:
        """Limit the process to a size in bytes, as a smaller GPU would."""
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (size - self.context) / self.total))

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Count memory for a phase; a phase within another counts for itself alone."""
        before = self.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: str) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            if self.phase:
                taken = self.context + torch.cuda.max_memory_reserved()
                self.bytes[self.phase] = max(self.bytes.get(self.phase, 0), taken)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase


def lines_of(case: Case) -> list[dict[str, Any]]:
    """Measure a case in its own process (on a CPU in this one), and return a line for each phase."""
    if case.device == "cpu":
        return measure(case)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


def measure(case: Case) -> list[dict[str, Any]]:
    """Measure a case in this process, and return planned and measured GB (2^30 bytes) of each phase."""
    settings = _settings(case)
    config = shapes.tiny() if case.device == "cpu" else shapes_of(settings.model).config
    lora = None if Path(case.preset).stem.endswith("_pretrain") else Lora.of_settings(settings.model)
    planned = _planned(settings, config, lora, case.cap_gb * memory.GB)
    peaks = Peaks(case.device)
    peaks.cap(case.cap_gb * memory.GB)
    why = ""
    try:
        _run(case, settings, config, lora, peaks)
    except (RuntimeError, InputError) as error:
        if not (out_of_memory(error) or isinstance(error, InputError)):
            raise
        why = str(error).splitlines()[0][:100]
    return [
        {
            "preset": Path(case.preset).stem,
            "cap_gb": case.cap_gb,
            "phase": phase,
            "planned_gb": planned[phase] / memory.GB,
            "measured_gb": peaks.bytes[phase] / memory.GB if phase in peaks.bytes else None,
            "ended_by": why,
        }
        for phase in PHASES
        if planned[phase]
    ]


def _settings(case: Case) -> Settings:
    """Return the preset's settings, for two steps and one evaluation."""
    line = ["--config", case.preset, "--fit_memory", f"{case.cap_gb}GB", "--max_steps", "2", "--eval_steps", "2"]
    line += ["--save_strategy", "no", "--dataloader_num_workers", "0", "--report_to", "none"]
    if case.device == "cpu":
        line += ["--use_cpu", "true", "--lora_r", "4", "--per_device_train_batch_size", "2", "--eval_questions", "1"]
        line += ["--max_length", str(TINY_TOKENS)]
    settings = parse(line, output_dir=str(Path(case.folder) / "run"), nano={})
    settings.train.learning_rate, settings.train.projector_lr = 1e-4, 2e-5
    return settings


def _planned(settings: Settings, config: Any, lora: Lora | None, limit: int) -> dict[str, int]:
    """Return the bytes of each phase that `qllava plan` computes for this run."""
    train = settings.train
    setup = memory.setup_of(train, config, lora, load_in_4bit=settings.model.load_in_4bit)
    asking = scores.asking_of(train, lora, held_out=scores.expects_held_out(settings))
    least = setup.tokens_per_pack
    most = TINY_TOKENS if train.use_cpu else None
    try:
        return memory.fit(
            setup, limit, asking=asking, least_tokens=least, most_tokens=most, fixed=memory.settled(train)
        ).phases
    except memory.DoesNotFit as refusal:
        return refusal.plan.phases


def _run(case: Case, settings: Settings, config: Any, lora: Lora | None, peaks: Peaks) -> None:
    """Run all phases."""
    folder, train = Path(case.folder), settings.train
    model = random_llava(config, device=case.device, dtype=torch.bfloat16 if peaks.cuda else torch.float32)
    recipe = Recipe(None, "random", "random", "mlp2x_gelu", config.vision_feature_layer, "pad", CHATML.name, True)
    assembled = Assembled(model, make_processor(config), recipe)
    prepare_for_training(model)
    encoder = Encoder(
        assembled.processor.tokenizer, CHATML, config.image_token_index, ImageLayout.of_config(config), 1 << 30
    )
    batch, side = train.per_device_train_batch_size, config.vision_config.image_size
    images = folder / "images"
    texts = make_texts(images, side=side, samples_per_image=1.95, samples_per_step=batch, steps=2, seed=0)
    rows = prepare_records(texts, encoder, folder)
    examples = scores.spaced(read_examples(folder / "rows.json", images), scores.SHOWN) if lora else []
    evaluates = str(getattr(train.eval_strategy, "value", train.eval_strategy)) != "no"
    adapted = add_lora(assembled, lora) if lora else train_projector_only(assembled)
    run = Path(str(train.output_dir))
    run.mkdir(parents=True)
    if evaluates and lora:
        with peaks.inside("before"):
            samples.before(run, adapted, assembled, examples, scores.room_for(train))
    held_out, asked = (rows, examples) if evaluates else (None, [])
    kind = INSTRUCTION if lora else ALIGNMENT
    stage = Stage(kind, CHATML, rows, held_out, asked, run, train, {})
    with _evaluations(peaks), peaks.inside("step"):
        train_stage(stage, adapted, assembled)
    if lora:
        with peaks.inside("chat"):
            chat = Chat(adapted.eval(), assembled.processor, "random")
            chat.answer(texts[0].image, texts[0].question, max_new_tokens=CHAT_TOKENS)


@contextmanager
def _evaluations(peaks: Peaks) -> Iterator[None]:
    """Count the memory of evaluations as their own phase."""
    plain: Callable[..., Any] = LlavaTrainer.evaluate

    def evaluate(own: LlavaTrainer, *args: Any, **named: Any) -> Any:
        with peaks.inside("evaluation"):
            return plain(own, *args, **named)

    LlavaTrainer.evaluate = evaluate  # type: ignore[method-assign]
    try:
        yield
    finally:
        LlavaTrainer.evaluate = plain  # type: ignore[method-assign]
