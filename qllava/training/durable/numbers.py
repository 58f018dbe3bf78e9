"""Checks of numbers: values that are not finite end the run and are traced; loss spikes are reported.

A step is checked once, before the optimizer changes a weight (`Guard`). If its loss or its gradient is NaN or infinite,
the trained weights are checked first, and then each sample of the step is computed alone, so that the message can name
the tensor, or the sample and its image.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qllava.config import InputError
from qllava.training.durable import processes
from qllava.training.durable.checkpoints import append_line

_WINDOW, _FEWEST = 64, 16
_DEVIATIONS, _TIMES = 6.0, 2.0
_UNTOUCHED = "no weight was changed and no checkpoint touched."


class NotFinite(InputError):
    """Error: the loss, a gradient or a weight is NaN or infinite; the run ends, and no checkpoint has the value."""


@dataclass(frozen=True)
class Alone:
    """Result of computing a sample alone."""

    pixels: bool
    """Whether its pixel values are finite."""
    result: bool
    """Whether its loss, or its gradient, is finite."""


def traced(
    what: str, step: int, model: nn.Module, samples: Sequence[Mapping[str, Any]], look: Callable[[Any], Alone] | None
) -> NotFinite:
    """Return the error of a step that is not finite; it names the weight that already was, or the responsible samples.

    Args:
        what: What is not finite, such as "The loss is nan".
        step: Number of the step.
        model: The model that is trained.
        samples: `id` and `images` (paths) of each sample of the step.
        look: Computes one of them alone; None if that is not possible, and all are named.
    """
    where = f"{what} at step {step}"
    if name := not_finite(model):
        return NotFinite(
            f"{where}, because the weight {name} is not finite since the previous step; {_UNTOUCHED} Lower the "
            "learning rate, and choose another output_dir."
        )
    found = [(sample, look(sample)) for sample in samples] if look else []
    guilty = [_named(sample, alone.pixels) for sample, alone in found if not (alone.pixels and alone.result)]
    if guilty:
        return NotFinite(
            f"{where}, because of {shown(guilty)}; {_UNTOUCHED} If an image is corrupt, replace it and run "
            "the same command to resume. For other examples or a lower learning rate, choose another output_dir."
        )
    alone = ", none of which causes it alone" if look else ""
    ids = shown([str(sample["id"]) for sample in samples])
    return NotFinite(
        f"{where}, with the samples {ids}{alone}; {_UNTOUCHED} Lower the learning rate, and choose another output_dir."
    )


def _named(sample: Mapping[str, Any], pixels: bool) -> str:
    images = ", ".join(str(path) for path in sample["image_files"])
    became = "" if pixels else ", whose pixel values are not finite"
    return f"the sample {sample['id']}" + (f" (image {images}{became})" if images else "")


def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first trained weight with a value that is NaN or infinite; None if there is none."""
    learned = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return next((name for name, weight in learned if not torch.isfinite(weight).all()), None)


def check_weights(model: nn.Module, step: int) -> None:
    """Raise NotFinite before a save if a trained weight is not finite, because the checkpoint would be useless."""
    if name := not_finite(model):
        raise NotFinite(
            f"The weight {name} is not finite after step {step}, which is therefore not saved; the checkpoints before "
            "it are untouched. Lower the learning rate, and choose another output_dir."
        )


class Spikes:
    """Detector of loss spikes over the last 64 steps; the run continues after a spike.

    A spike is more than 6 standard deviations above the median, the deviation estimated from the median of distances
    (so that one spike does not hide the next), and more than twice the median. The first 16 steps are never reported.
    """

    def __init__(self, path: Path, stage: str) -> None:
        """Start without any losses.

        Args:
            path: File to which spikes are written, a line of JSON each.
            stage: Name of the stage, as in metrics.jsonl.
        """
        self.path, self.stage = path, stage
        self.losses: deque[float] = deque(maxlen=_WINDOW)

    def usual(self, loss: float) -> float | None:
        """Record a step's loss; return the median of the steps before if it is a spike, else None."""
        before = np.array(self.losses)
        self.losses.append(loss)
        if len(before) < _FEWEST:
            return None
        median = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(before - median)))
        return median if loss > max(median + _DEVIATIONS * deviation, _TIMES * median) else None

    def tell(self, step: int, loss: float, usual: float, ids: Sequence[str]) -> None:
        """Print a spike and append it to the file, or raise an InputError if that cannot be written."""
        tqdm.write(f"The loss jumped to {loss:.3g} at step {step} (usually {usual:.3g}), with {shown(ids)}.")
        append_line(self.path, {"stage": self.stage, "step": step, "loss": loss, "usual": usual, "ids": list(ids)})


def shown(names: Sequence[str], most: int = 8) -> str:
    """Format names for a sentence: the first ones, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Guard:
    """Check of the numbers of every optimizer step before a weight is changed."""

    def __init__(self, spikes: Spikes, look: Callable[[Mapping[str, Any], bool], Alone]) -> None:
        """Start before the first step.

        Args:
            spikes: Detector of loss spikes.
            look: Computes one sample alone: its loss or, if the flag is set, its gradient.
        """
        self._spikes, self._look = spikes, look

    def check(
        self,
        step: int,
        model: nn.Module,
        losses: Sequence[Tensor],
        norm: float,
        samples: Sequence[Mapping[str, Any]],
        searching: Callable[[], bool] = lambda: False,
    ) -> None:
        """Check a step, on all ranks; a spike is reported, and the run continues.

        Args:
            step: Number of the step.
            model: The model that is trained.
            losses: Losses of this rank's batches; read once, because each read makes the GPU wait.
            norm: Norm of the gradient over all ranks.
            samples: This rank's samples of the step, with `id` and `images`.
            searching: Called if the norm is not finite: whether fp16's loss scaling may be the cause.

        Raises:
            NotFinite: The loss or the gradient is not finite.
        """
        mine = torch.stack(list(losses)).sum().item()
        loss = processes.mean(mine)
        if not (math.isfinite(loss) and (math.isfinite(norm) or searching())):
            self._end(step, model, loss, mine, samples)
        if (usual := self._spikes.usual(loss)) is not None:
            ids = processes.every([str(sample["id"]) for sample in samples])
            processes.by_main(partial(self._spikes.tell, step, loss, usual, ids))

    def _end(
        self, step: int, model: nn.Module, loss: float, mine: float, samples: Sequence[Mapping[str, Any]]
    ) -> NoReturn:
        """End the run, on all ranks, at a step whose loss or gradient is not finite.

        Args:
            step: Number of the step.
            model: The model that is trained.
            loss: Loss over all ranks.
            mine: Loss of this rank.
            samples: This rank's samples.

        Raises:
            NotFinite: Always.
        """
        lost = not math.isfinite(loss)
        # A gradient is the sum over all ranks, so its source is unknown.
        suspects = processes.every(list(samples) if not (lost and math.isfinite(mine)) else [])
        what = f"The loss is {loss}" if lost else "A gradient is not finite"
        # With several ranks each would have to compute the same number of samples.
        look = None if processes.several() else lambda sample: self._look(sample, not lost)
        error = traced(what, step, model, suspects, look)
        with processes.together():
            raise error
