"""The peak memory of everything that a run does, phase by phase, before the run starts.

| phase | contents of its peak |
|---|---|
| before | the weights; loading them, or the answers before the first step |
| step | what `memory.step` counts: weights, gradients, the optimizer's state, activations |
| evaluation | weights, adapter and the optimizer's state; the held-out loss, or the answers during the run |
| chat | weights and adapter; one question with one image |

A phase that a run does not have counts 0. Questions are answered in batches that fit (`inference.memory`): the figure
is that of the largest batch that the limit allows by the rule used in the run, and a phase does not fit if one question
does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qllava.image_layout import ImageLayout
from qllava.inference.batches import MOST, SHARE
from qllava.inference.memory import answering, prompts_that_fit
from qllava.training.memory.fake import loss_of_pack
from qllava.training.memory.step import CONTEXT, FRAGMENTS, NCCL, Estimate, Setup, measured_once, measuring

PHASES = ("before", "step", "evaluation", "chat")
TEXT_OF_A_QUESTION = 64
"""Tokens of a planned question, in addition to those of its image."""
CHAT_TOKENS = 256
"""Maximum tokens of an answer in `qllava chat`."""
_QUANTIZING = {"cuda": 2.7, "cpu": 14.5}
"""Bytes per value of a weight while it is quantized to 4 bit: on a GPU the 16-bit weight and the packed one; on a CPU
bitsandbytes computes in fp32, with copies."""


@dataclass(frozen=True)
class Asking:
    """Questions and held-out samples with which a run evaluates its model."""

    before: int = 0
    """Questions answered before the first step."""
    during: int = 0
    """Questions answered at each evaluation."""
    new_tokens: int = 48
    """Maximum tokens of an answer during the run."""
    held_out_tokens: int = 0
    """Tokens of a batch of held-out samples whose loss is computed; 0 for no evaluation."""


@dataclass(frozen=True)
class Phase:
    """A phase of a run: memory that is held throughout, and temporary memory."""

    fixed: int
    """Bytes held throughout, CUDA's context included."""
    passing: int = 0
    """Peak of the temporary bytes, answers excluded."""
    questions: int = 0
    """Questions answered at once if memory allows it."""
    new_tokens: int = 0
    """Maximum tokens of each answer."""

    def peak(self, setup: Setup, limit: int | None = None) -> int:
        """Return the bytes of the phase; answers fill what `limit` leaves, and come one at a time without a limit."""
        passing = self.passing
        if self.questions:
            share = SHARE if setup.device == "cuda" else 1
            free = 0 if limit is None else int(share * (limit - self.fixed))
            passing = max(passing, _answers(setup, self.questions, self.new_tokens, free))
        lost = FRAGMENTS if setup.device == "cuda" else 0.0
        return self.fixed + int((1 + lost) * passing)


def phases_of(setup: Setup, step: Estimate, asking: Asking) -> dict[str, Phase]:
    """Return the memory of every phase of a run.

    Args:
        setup: Everything that decides the memory of a step.
        step: Estimate of the step.
        asking: Questions and held-out samples of the run.

    Returns:
        Phases by the names of `PHASES`; a phase that the run does not have holds nothing.
    """
    context = CONTEXT if setup.device == "cuda" else 0
    sent = NCCL if setup.device == "cuda" and setup.processes > 1 else 0
    weights, projector, lora = (step.resident[part] for part in ("weights", "projector", "LoRA"))
    model = weights + projector + lora + context
    # The adapter is created after the weights are loaded.
    loading = max(0, _loading(setup) - projector - lora)
    before = Phase(model + sent, loading, min(asking.before, MOST), asking.new_tokens)
    evaluation = Phase(0)
    if asking.held_out_tokens:
        held = model + step.parts["optimizer"] + step.buckets + sent
        passing = _held_out_loss(setup, min(asking.held_out_tokens, setup.tokens_per_pack))
        evaluation = Phase(held, passing, min(asking.during, MOST), asking.new_tokens)
    # Stage 1 trains a projector alone, which cannot answer questions.
    chat = Phase(model, 0, 1, CHAT_TOKENS) if setup.lora else Phase(0)
    return dict(zip(PHASES, (before, Phase(step.peak_bytes), evaluation, chat), strict=True))


def _answers(setup: Setup, asked: int, new_tokens: int, free: int) -> int:
    """Return the bytes of as many simultaneous answers as fit into `free`, but of one at least."""
    length = ImageLayout.of_config(setup.config).tokens + TEXT_OF_A_QUESTION
    held: dict[str, Any] = {"training": bool(setup.lora), "load_in_4bit": setup.load_in_4bit}
    lengths, images = [length] * asked, [1] * asked
    fit = prompts_that_fit(setup.config, lengths, new_tokens, images, setup.weights_in, free, **held) if free > 0 else 0
    count = max(1, fit)
    return answering(setup.config, lengths[:count], new_tokens, images[:count], setup.weights_in, **held).peak


def _loading(setup: Setup) -> int:
    """Return the bytes that loading needs besides the weights: quantizing one, or growing an embedding table."""
    text: Any = setup.config.text_config
    table = text.vocab_size * text.hidden_size * setup.weights_in.itemsize
    packed = int(_QUANTIZING[setup.device] * text.hidden_size * text.intermediate_size) if setup.load_in_4bit else 0
    return max(int(table), packed)


@measured_once
def _held_out_loss(setup: Setup, tokens: int) -> int:
    """Return the bytes needed in addition while the loss of a batch of held-out samples is computed.

    Nothing is kept for a backward pass, so two layers are enough to extrapolate to any number.
    """
    with measuring(setup, 2, 0, tokens) as (model, tracker, pack):
        return loss_of_pack(model.eval(), tracker, pack, setup.dtype)
