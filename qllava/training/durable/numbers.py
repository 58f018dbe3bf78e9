"""Numbers that are not as they should be: what is not finite ends the run and is traced; loss spikes are told of.

A step is looked at once, before the optimizer touches a weight (`Guard`). When its loss or its gradient is NaN or
infinite, the trained weights are looked at first, and then the samples of the step once more, each alone, so that
the one sentence can name the tensor, or the sample and its image.
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
    """The loss, a gradient or a weight is NaN or infinite: the run has ended, and no checkpoint holds it."""


@dataclass(frozen=True)
class Alone:
    """What a sample does alone: whether its pixel values are finite, and its loss (or its gradient)."""

    pixels: bool
    result: bool


def traced(
    what: str, step: int, model: nn.Module, samples: Sequence[Mapping[str, Any]], look: Callable[[Any], Alone] | None
) -> NotFinite:
    """The error of a step that is not finite; it names the weight that was so before, or the samples that do it.

    what: "The loss is nan". samples: `id` and `images` (paths) of each sample of the step. look: looks at one of them
    alone; None where it cannot be, and all are named.
    """
    where = f"{what} at step {step}"
    if name := not_finite(model):
        return NotFinite(
            f"{where}, because the weight {name} is not finite since the step before; {_UNTOUCHED} Lower the learning "
            "rate, and choose another output_dir."
        )
    found = [(sample, look(sample)) for sample in samples] if look else []
    guilty = [_named(sample, alone.pixels) for sample, alone in found if not (alone.pixels and alone.result)]
    if guilty:
        return NotFinite(
            f"{where}, because of {shown(guilty)}; {_UNTOUCHED} With an image that is mended the same command "
            "continues; with other examples, or a lower learning rate, choose another output_dir."
        )
    alone = ", none of which does it alone" if look else ""
    ids = shown([str(sample["id"]) for sample in samples])
    return NotFinite(
        f"{where}, with the samples {ids}{alone}; {_UNTOUCHED} Lower the learning rate, and choose another output_dir."
    )


def _named(sample: Mapping[str, Any], pixels: bool) -> str:
    images = ", ".join(str(path) for path in sample["image_files"])
    became = "" if pixels else ", whose pixel values are not finite"
    return f"the sample {sample['id']}" + (f" (image {images}{became})" if images else "")


def not_finite(model: nn.Module) -> str | None:
    """The name of the first trained weight with a value that is NaN or infinite."""
    learned = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return next((name for name, weight in learned if not torch.isfinite(weight).all()), None)


def check_weights(model: nn.Module, step: int) -> None:
    """Before a save. Raises NotFinite when a trained weight is not finite: such a checkpoint is worth nothing."""
    if name := not_finite(model):
        raise NotFinite(
            f"The weight {name} is not finite after step {step}, which is therefore not saved; the checkpoints before "
            "it are untouched. Lower the learning rate, and choose another output_dir."
        )


class Spikes:
    """Knows the losses of the last 64 steps, and which one lies far above them; the run goes on.

    Far is more than 6 standard deviations over the median, the deviation taken from the median of distances (so that
    one spike does not hide the next), and more than twice the median. Nothing is said in the first 16 steps.
    """

    def __init__(self, path: Path, stage: str) -> None:
        """Args:
        path: where spikes are written, a line of JSON each.
        stage: as in metrics.jsonl.
        """
        self.path, self.stage = path, stage
        self.losses: deque[float] = deque(maxlen=_WINDOW)

    def usual(self, loss: float) -> float | None:
        """The median of the steps before when this one's loss is a spike, else None; takes the loss in."""
        before = np.array(self.losses)
        self.losses.append(loss)
        if len(before) < _FEWEST:
            return None
        median = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(before - median)))
        return median if loss > max(median + _DEVIATIONS * deviation, _TIMES * median) else None

    def tell(self, step: int, loss: float, usual: float, ids: Sequence[str]) -> None:
        """Say a spike on the screen and write it down. Raises InputError when it cannot be written."""
        tqdm.write(f"The loss jumped to {loss:.3g} at step {step} (usually {usual:.3g}), with {shown(ids)}.")
        append_line(self.path, {"stage": self.stage, "step": step, "loss": loss, "usual": usual, "ids": list(ids)})


def shown(names: Sequence[str], most: int = 8) -> str:
    """Names for a sentence: the first ones, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Guard:
    """Looks at the numbers of every optimizer step before a weight is touched."""

    def __init__(self, spikes: Spikes, look: Callable[[Mapping[str, Any], bool], Alone]) -> None:
        """Begin before the first step.

        Args:
            spikes: The losses so far.
            look: Computes one sample alone, its loss or, where the flag is set, its gradient.
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
        """Check a step, in all processes; a spike is reported, and the run continues.

        Args:
            step: Its number.
            model: What is trained.
            losses: Of this process's batches; they are read once, because each look makes a GPU wait.
            norm: Of the gradient of all processes.
            samples: This process's samples of the step, with `id` and `images`.
            searching: Asked where the norm is not finite: whether that may be how fp16 finds its scale.

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
        """End the run, in all processes, at a step whose loss or gradient is not finite. Raises NotFinite.

        loss, mine: of all processes and of this one. samples: this one's.
        """
        lost = not math.isfinite(loss)
        # A gradient is the sum over all processes, so nobody knows whose it was.
        suspects = processes.every(list(samples) if not (lost and math.isfinite(mine)) else [])
        what = f"The loss is {loss}" if lost else "A gradient is not finite"
        # In several processes each would have to look at as many samples as the others.
        look = None if processes.several() else lambda sample: self._look(sample, not lost)
        error = traced(what, step, model, suspects, look)
        with processes.together():
            raise error
