"""Batch sizes for answering: as many prompts as fit into memory, and fewer after it has run out.

`memory.prompts_that_fit` says what a batch takes; here is what may be taken, and what to do when it was too much all
the same (another program, fragments of the allocator, a kernel with a workspace of its own).
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from qllava.config import InputError
from qllava.image_layout import ImageLayout
from qllava.inference.memory import answering, prompts_that_fit
from qllava.models.errors import out_of_memory
from qllava.models.positions import positions_of

T = TypeVar("T")
MOST = 32
"""Prompts at once, however much memory there is: more are hardly faster, and a batch lasts as long as its longest."""
SHARE = 0.9
"""Of a GPU's free memory; the rest is lost between the allocator's blocks, and in workspaces of the libraries."""
SHARE_OF_HOST = 0.5
"""Of a computer's available memory, which other programs want too."""
_UNKNOWN = 2 << 30
"""Bytes that are assumed to be free where the system does not say."""
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Room:
    """How much memory answering may take, and what was learned about it; one object for all answers of a run."""

    most: int = MOST
    """Prompts at once; halved for good when memory runs out."""
    limit: int | None = None
    """Bytes that all tensors on the device may take, the model's included; None for all that is free."""
    agree: Callable[[int], int] = int
    """Makes one number of those of several processes, so that all of them form the same batches."""
    beside: Callable[[], int] = int
    """Bytes that are held beside the model and its gradients, where torch does not count them (on a CPU): such as an
    optimizer's state."""
    halves: bool = True
    """Whether a batch that was too large is tried again in halves; not where other processes wait for its end."""

    def free(self, model: Any) -> int:
        """Bytes that answers may take beyond what is allocated now."""
        device = model.device
        free = _free_on_gpu(device) if device.type == "cuda" else int(SHARE_OF_HOST * available())
        if self.limit is not None:
            cuda = device.type == "cuda"
            taken = torch.cuda.memory_allocated(device) if cuda else _held_by(model) + self.beside()
            free = min(free, int((SHARE if cuda else 1) * (self.limit - taken)))
        return self.agree(max(free, 0))

    def halve(self, count: int) -> None:
        """Answer at most half as many at once from here on, because so many were too many; says so."""
        self.most = count // 2
        line = f"Out of memory with batches of {count} questions; using at most {self.most} from now on."
        tqdm.write(line, file=sys.stderr)


class Batches:
    """Prompts that wait for their answers, the longest first, and how many of them are answered at once."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        room: Room,
        *,
        sampling: bool = False,
    ) -> None:
        """Args:
        model: A LlavaForConditionalGeneration, bare or inside peft.
        prompts: Ids, image tokens expanded.
        max_new_tokens: The most tokens of an answer; fewer where the model's context ends before.
        room: How much memory may be used, and how many prompts at once.
        sampling: Whether answers are drawn.
        """
        self._model, self._room, self._free = model, room, room.free(model)
        self._held = {
            "training": hasattr(model, "peft_config"),
            # Not `is_loaded_in_4bit`, a mark that is taken away before training.
            "load_in_4bit": any(hasattr(weight, "quant_state") for weight in model.parameters()),
            "sampling": sampling,
        }
        self._dtype = model.get_output_embeddings().weight.dtype
        self._lengths = [len(prompt) for prompt in prompts]
        context = positions_of(model.config.get_text_config())
        self._allowed = [min(max_new_tokens, context - length) for length in self._lengths]
        each, mark = ImageLayout.of_config(model.config).tokens, model.config.image_token_index
        self._images = [list(prompt).count(mark) // each for prompt in prompts]
        # The longest first: what does not fit at all is met before time was spent on the others.
        self.waiting = sorted(range(len(prompts)), key=lambda i: self._lengths[i], reverse=True)

    def next(self) -> tuple[list[int], int]:
        """Which prompts are answered next, at least one, and the most tokens of their answers.

        Where the context ends early, an answer has less space; only prompts with the same space share a batch, so that
        an answer does not depend on what else was asked.
        """
        new_tokens = self._allowed[self.waiting[0]]
        alike = [i for i in self.waiting[: self._room.most] if self._allowed[i] == new_tokens]
        lengths, images = [self._lengths[i] for i in alike], [self._images[i] for i in alike]
        fits = prompts_that_fit(self._model.config, lengths, new_tokens, images, self._dtype, self._free, **self._held)
        return alike[: max(fits, 1)], new_tokens

    def answered(self, batch: Sequence[int]) -> None:
        """Take prompts out of the line."""
        gone = set(batch)
        self.waiting = [i for i in self.waiting if i not in gone]

    def too_large(self, batch: Sequence[int], names: Sequence[str]) -> None:
        """Ask fewer at once from here on. Raises InputError where fewer cannot be asked.

        names: What each prompt is called in a message; "question 3" where it is empty.
        """
        if len(batch) > 1 and self._room.halves:
            self._room.halve(len(batch))
            return
        first = batch[0]
        need = answering(
            self._model.config,
            [self._lengths[i] for i in batch],
            self._allowed[first],
            [self._images[i] for i in batch],
            self._dtype,
            **self._held,
        )
        what = names[first] if names else f"question {first + 1}"
        others = f" and {len(batch) - 1} others at once" if len(batch) > 1 else ""
        raise InputError(
            f"Not enough memory to answer {what} of {self._lengths[first]:,} tokens{others}. Besides the model "
            f"it needs about {_size(need.peak)}, and {_size(self._free)} are available. Use fewer images or a "
            "shorter conversation, allow fewer tokens for the answer, load the model in 4 bit, or close other programs."
        )


def attempt(call: Callable[[], T]) -> T | None:
    """Call; None when memory has run out, and by then nothing is alive of what the call had made.

    An exception's traceback holds the frames of all functions that it came through, and their tensors with them: on a
    full GPU a second attempt beside them would fail as well.
    """
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
    # Not inside the except block: there Python itself holds the exception.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def available() -> int:
    """Bytes of the computer's memory that can be taken without swapping; in a container what is left of its limit."""
    found = [size for size in (_available_in_linux(), _left_in_container()) if size is not None]
    if found:
        return max(min(found), 0)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not Linux
        return _UNKNOWN


def _available_in_linux() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _left_in_container() -> int | None:
    """Of the memory of a control group (version 2); its cached files can be given up."""
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return int(limit) - int(used) + cached
    except (OSError, ValueError, IndexError):  # no container, or "max"
        return None


def _free_on_gpu(device: torch.device) -> int:
    """What the driver has, and what torch's allocator keeps without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE * (torch.cuda.mem_get_info(device)[0] + unused))


def _held_by(model: Any) -> int:
    """Bytes of a model's tensors, the scales of its 4-bit weights, and the gradients."""
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    packed = [state for p in model.parameters() if (state := getattr(p, "quant_state", None))]
    states = [*packed, *(state.state2 for state in packed if state.nested)]
    scales = (tensor for state in states for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
    return sum(tensor.nbytes for group in (model.parameters(), model.buffers(), gradients, scales) for tensor in group)


def _size(size: float) -> str:
    return f"{size / (1 << 30):.1f} GB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MB"
