"""Batch sizes for answering: as many prompts as fit into memory, and fewer after it has run out.

`memory.prompts_that_fit` computes what a batch needs; this module decides what it may take, and handles a batch that
was too large nevertheless (because of another program, fragmentation, or a kernel with its own workspace).
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
"""Maximum prompts per batch: larger batches are hardly faster, and a batch takes as long as its longest prompt."""
SHARE = 0.9
"""Usable share of a GPU's free memory; the rest is for fragmentation and workspaces of libraries."""
SHARE_OF_HOST = 0.5
"""Usable share of the host's available memory, which other programs need too."""
_UNKNOWN = 2 << 30
"""Bytes assumed to be free if the system does not report it."""
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Room:
    """Memory limit for answering, adapted when memory runs out; one object for all answers of a run."""

    most: int = MOST
    """Maximum prompts per batch; halved for good when memory runs out."""
    limit: int | None = None
    """Limit in bytes for all tensors on the device, including the model's; None for all free memory."""
    agree: Callable[[int], int] = int
    """Combines the numbers of all ranks into one, so that all ranks form the same batches."""
    beside: Callable[[], int] = int
    """Bytes held in addition to the model and its gradients that torch does not count (on a CPU), such as an
    optimizer's state."""
    halves: bool = True
    """Whether a batch that was too large is tried again in halves; False if other ranks wait for its end."""

    def free(self, model: Any) -> int:
        """Return the bytes that answers may take in addition to what is allocated now."""
        device = model.device
        free = _free_on_gpu(device) if device.type == "cuda" else int(SHARE_OF_HOST * available())
        if self.limit is not None:
            cuda = device.type == "cuda"
            taken = torch.cuda.memory_allocated(device) if cuda else _held_by(model) + self.beside()
            free = min(free, int((SHARE if cuda else 1) * (self.limit - taken)))
        return self.agree(max(free, 0))

    def halve(self, count: int) -> None:
        """Halve the maximum batch size after `count` prompts were too many, and print it."""
        self.most = count // 2
        line = f"Out of memory with batches of {count} questions; using at most {self.most} from now on."
        tqdm.write(line, file=sys.stderr)


class Batches:
    """Queue of prompts, the longest first, divided into batches that fit into memory."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        room: Room,
        *,
        sampling: bool = False,
    ) -> None:
        """Sort the prompts.

        Args:
            model: A LlavaForConditionalGeneration, bare or inside peft.
            prompts: Token ids, image tokens expanded.
            max_new_tokens: Maximum tokens of an answer; fewer if the model's context ends before.
            room: Memory limit and batch size.
            sampling: Whether answers are sampled.
        """
        self._model, self._room, self._free = model, room, room.free(model)
        self._held = {
            "training": hasattr(model, "peft_config"),
            # Not `is_loaded_in_4bit`, a flag that is removed before training.
            "load_in_4bit": any(hasattr(weight, "quant_state") for weight in model.parameters()),
            "sampling": sampling,
        }
        self._dtype = model.get_output_embeddings().weight.dtype
        self._lengths = [len(prompt) for prompt in prompts]
        context = positions_of(model.config.get_text_config())
        self._allowed = [min(max_new_tokens, context - length) for length in self._lengths]
        each, mark = ImageLayout.of_config(model.config).tokens, model.config.image_token_index
        self._images = [list(prompt).count(mark) // each for prompt in prompts]
        # The longest first: a prompt that does not fit at all fails before time was spent on the others.
        self.waiting = sorted(range(len(prompts)), key=lambda i: self._lengths[i], reverse=True)

    def next(self) -> tuple[list[int], int]:
        """Return the indices of the next prompts, at least one, and the maximum tokens of their answers.

        If the context ends early, an answer has less space. Only prompts with the same space share a batch, so that an
        answer does not depend on the other prompts.
        """
        new_tokens = self._allowed[self.waiting[0]]
        alike = [i for i in self.waiting[: self._room.most] if self._allowed[i] == new_tokens]
        lengths, images = [self._lengths[i] for i in alike], [self._images[i] for i in alike]
        fits = prompts_that_fit(self._model.config, lengths, new_tokens, images, self._dtype, self._free, **self._held)
        return alike[: max(fits, 1)], new_tokens

    def answered(self, batch: Sequence[int]) -> None:
        """Remove prompts from the queue."""
        gone = set(batch)
        self.waiting = [i for i in self.waiting if i not in gone]

    def too_large(self, batch: Sequence[int], names: Sequence[str]) -> None:
        """Use smaller batches from here on.

        Args:
            batch: The prompts that did not fit.
            names: Name of each prompt in a message; "question 3" if empty.

        Raises:
            InputError: A smaller batch is not possible.
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
    """Call a function; return None if memory ran out, after all its tensors were freed.

    The traceback of an exception references the frames of all functions on its way, and their tensors with them: on a
    full GPU a second attempt would fail too as long as they are alive.
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
    # Not inside the except block, where Python itself references the exception.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def available() -> int:
    """Return the bytes of host memory that are available without swapping, within the limit of a container."""
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
    """Return the bytes left in a control group (version 2), whose cached files can be released; None without one."""
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return int(limit) - int(used) + cached
    except (OSError, ValueError, IndexError):  # no container, or "max"
        return None


def _free_on_gpu(device: torch.device) -> int:
    """Return the bytes free in the driver plus those that torch's allocator has reserved but does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE * (torch.cuda.mem_get_info(device)[0] + unused))


def _held_by(model: Any) -> int:
    """Return the bytes of a model's tensors, including scales of 4-bit weights, and of the gradients."""
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    packed = [state for p in model.parameters() if (state := getattr(p, "quant_state", None))]
    states = [*packed, *(state.state2 for state in packed if state.nested)]
    scales = (tensor for state in states for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
    return sum(tensor.nbytes for group in (model.parameters(), model.buffers(), gradients, scales) for tensor in group)


def _size(size: float) -> str:
    return f"{size / (1 << 30):.1f} GB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MB"
