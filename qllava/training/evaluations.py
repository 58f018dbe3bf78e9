"""Schedule of the evaluations of a stage, and settings that depend on evaluations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from transformers.trainer_utils import SaveStrategy, SchedulerType

from qllava.config import InputError, LoopConfig
from qllava.training import scores
from qllava.training.data import Prepared
from qllava.training.durable.order import samples_per_step, total_steps
from qllava.training.options.table import FOLLOWING
from qllava.training.settings import TrainConfig, name_of

_MOST = 10
"""Number of evaluations in a stage if eval_steps is not set."""
_NANO = 2
"""The same for nano's run on its own examples: each takes four seconds of the few minutes, and the table comes last."""


def refuse_unmeasured(config: TrainConfig, held_out: bool) -> None:
    """Raise an InputError if a setting needs evaluations and the run would make none."""
    name = follows(config)
    if name and not (held_out and scores.evaluates(config)):
        raise InputError(f"{name} needs evaluations during the run. Set eval_strategy and eval_file too.")


def follows(config: TrainConfig) -> str:
    """Return the setting, as written, that makes a decision based on evaluations during the run; "" for none."""
    if config.scheduler in FOLLOWING:
        return f"lr_scheduler_type {config.scheduler}"
    return "save_strategy best" if name_of(config.save_strategy) == "best" else ""


def leave_out(config: TrainConfig) -> None:
    """Remove the evaluations from the settings of a run's own stage 1; settings that need them get their defaults."""
    config.eval_strategy, config.do_eval, config.metric_for_best_model = "no", False, None
    if (scheduler := config.scheduler) in FOLLOWING:
        usual = LoopConfig.lr_scheduler_type
        config.lr_scheduler_type, config.lr_scheduler_kwargs = SchedulerType(usual), None
        print(f"Stage 1 runs no evaluations, so it uses lr_scheduler_type {usual} instead of {scheduler}.")
    if name_of(config.save_strategy) == "best":
        config.save_strategy = SaveStrategy.STEPS


def few(config: TrainConfig, samples: int) -> None:
    """Set `eval_steps` for nano's run on its own examples, unless the user has set it."""
    if scores.evaluates(config) and not config.eval_steps and not follows(config):
        config.eval_steps = max(1, total_steps(config, samples) // _NANO)


def settle(config: TrainConfig, train: Prepared, evaluation: Prepared | None, questions: int) -> None:
    """Set when held-out samples are evaluated; without any, evaluations are turned off, which transformers requires.

    Args:
        config: The loop's settings, which are changed.
        train: Training samples.
        evaluation: Held-out samples, or None.
        questions: Number of questions that each evaluation asks.
    """
    if evaluation is None:
        config.eval_on_start = False  # transformers would evaluate whatever eval_strategy says
    if not scores.evaluates(config):
        return
    if evaluation is None:
        print("No eval_file is set, so the run makes no evaluations.")
        config.eval_strategy, config.do_eval = "no", False
    elif config.eval_strategy == "steps" and not config.eval_steps:
        # Evaluations that decide something are made whatever they cost.
        count = _MOST if follows(config) else _evaluations(config, train, evaluation, questions)
        if count:
            config.eval_steps = -(-total_steps(config, len(train.lengths)) // count)
        else:
            print("One evaluation would take longer than the training, so examples are evaluated only at the end.")
            config.eval_strategy = "no"


def _evaluations(config: TrainConfig, train: Prepared, evaluation: Prepared, questions: int) -> int:
    """Return how often to evaluate if the user has not set eval_steps: ten times, or fewer if that is expensive.

    The cost is counted in tokens, so that a resumed run evaluates at the same steps: a training token counts three
    times (forward, and twice that backward), a token of a held-out sample once, and a question as its sample plus the
    maximum tokens of an answer. All evaluations together may cost as much as the training: each a tenth of it, or there
    are fewer.
    """
    lengths = train.lengths
    share = total_steps(config, len(lengths)) * samples_per_step(config) / len(lengths)
    training = 3 * int(lengths.sum()) * share
    question = float(np.mean(evaluation.lengths)) + scores.MAX_ANSWER_TOKENS
    once = int(evaluation.lengths.sum()) + questions * question
    return min(_MOST, int(training / once))


def of_samples(logged: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of an evaluation's log line for held-out samples: its loss, and TRL's averages."""
    others = ("exact_match", "runtime", "per_second")
    return {name: x for name, x in logged.items() if name.startswith("eval_") and not any(o in name for o in others)}


@contextmanager
def same_draws() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch, on the CPU and this process's GPU, at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
