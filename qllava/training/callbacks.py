"""Callbacks of the training loop: write metrics, update the progress bar, report checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from qllava.training.durable import processes
from qllava.training.durable.checkpoints import append_line
from qllava.training.memory import recompute
from qllava.training.trainer import LlavaTrainer


class Metrics(TrainerCallback):
    """Writes what the trainer logs to `metrics.jsonl`, one line per report."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append one line and flush it, so that a killed run keeps it."""
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        line = {"stage": self.stage, "step": state.global_step, "total_steps": state.max_steps, **numbers}
        processes.by_main(partial(append_line, self.path, line))


class Begin(TrainerCallback):
    """Sets up recomputation after transformers has prepared the model, and on a GPU tries the largest batches."""

    def __init__(self, trainer: LlavaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set up recomputation and rehearse, before the first step."""
        if args.recompute_layers is not None:
            llava: Any = self.trainer.assembled.model
            recompute(llava.model.language_model, args.recompute_layers)
        if args.device.type == "cuda":
            self.trainer.rehearse()


class Saved(TrainerCallback):
    """Calls a function after each checkpoint."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Call the function after a checkpoint is complete."""
        self.call()


class Progress(TrainerCallback):
    """Progress bar of steps, with the loss and the remaining time."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar."""
        hidden = not processes.is_main()
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.title, unit=" steps", disable=hidden
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar by one step."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the losses and the exact match."""
        shown = {"loss": "loss", "eval_loss": "held-out loss", "eval_exact_match": "exact match"}
        found = {label: f"{logs[key]:.3f}" for key, label in shown.items() if logs and key in logs}
        if logs and "eval_exact_match" in logs:
            low, high = (round(100 * logs[f"eval_exact_match_{end}"]) for end in ("low", "high"))
            found["exact match"] += f" of {int(logs['eval_exact_match_n'])} ({low}-{high} %)"
        if found and self.bar is not None:
            self.bar.set_postfix(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """End the bar's line, so that the next output starts on a new line."""
        if self.bar is not None:
            self.bar.close()
