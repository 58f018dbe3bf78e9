"""The peak memory of everything that a run does, phase by phase, before it starts.

| phase | what lives at its peak |
|---|---|
| before | the weights; loading them, or the answers before the first step |
| step | what `memory.step` counts: weights, gradients, the optimizer's state, activations |
| evaluation | weights, adapter and the optimizer's state; the held-out loss, or the answers during the run |
| chat | weights and adapter; one question with one image |

A phase that a run does not have counts 0. Answers are given in batches of what fits (`inference.memory`): their figure
is that of the largest batch that the limit allows, by the rule of the run, and a phase does not fit when one question
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
"""Tokens of a question that is planned for, beside those of its image."""
CHAT_TOKENS = 256
"""The most tokens of an answer in `qllava chat`."""
_QUANTIZING = {"cuda": 2.7, "cpu": 14.5}
"""Bytes for each value of a weight while it is packed to 4 bit: on a card the weight in 16 bit and what is packed; on a
CPU bitsandbytes computes in fp32, with copies."""


@dataclass(frozen=True)
class Asking:
    """What a run asks its model beside training it."""

    before: int = 0
    """Questions answered before the first step."""
    during: int = 0
    """Questions answered at each evaluation."""
    new_tokens: int = 48
    """The most tokens of an answer during the run."""
    held_out_tokens: int = 0
    """Tokens of a batch of held-out samples whose loss is computed; 0 for no evaluation."""


@dataclass(frozen=True)
class Phase:
    """A phase of a run: what is there all the time, and what comes and goes."""

    fixed: int
    """Bytes that are held, CUDA's context included."""
    passing: int = 0
    """The most that comes and goes beside answers."""
    questions: int = 0
    """Questions that are answered at once where memory allows it."""
    new_tokens: int = 0
    """The most tokens of each answer."""

    def peak(self, setup: Setup, limit: int | None = None) -> int:
        """Bytes of the phase; answers fill what `limit` leaves, and are one at a time without it."""
        passing = self.passing
        if self.questions:
            share = SHARE if setup.device == "cuda" else 1
            free = 0 if limit is None else int(share * (limit - self.fixed))
            passing = max(passing, _answers(setup, self.questions, self.new_tokens, free))
        lost = FRAGMENTS if setup.device == "cuda" else 0.0
        return self.fixed + int((1 + lost) * passing)


def phases_of(setup: Setup, step: Estimate, asking: Asking) -> dict[str, Phase]:
    """Count what every phase of a run holds.

    Args:
        setup: What decides the memory of a step.
        step: Its estimate.
        asking: The run's questions and held-out samples.

    Returns:
        Phases by the names of `PHASES`; one that the run does not have holds nothing.
    """
    context = CONTEXT if setup.device == "cuda" else 0
    sent = NCCL if setup.device == "cuda" and setup.processes > 1 else 0
    weights, projector, lora = (step.resident[part] for part in ("weights", "projector", "LoRA"))
    model = weights + projector + lora + context
    # The adapter comes when the weights are there.
    loading = max(0, _loading(setup) - projector - lora)
    before = Phase(model + sent, loading, min(asking.before, MOST), asking.new_tokens)
    evaluation = Phase(0)
    if asking.held_out_tokens:
        held = model + step.parts["optimizer"] + step.buckets + sent
        passing = _held_out_loss(setup, min(asking.held_out_tokens, setup.tokens_per_pack))
        evaluation = Phase(held, passing, min(asking.during, MOST), asking.new_tokens)
    # A stage 1 is only a projector, which cannot be asked.
    chat = Phase(model, 0, 1, CHAT_TOKENS) if setup.lora else Phase(0)
    return dict(zip(PHASES, (before, Phase(step.peak_bytes), evaluation, chat), strict=True))


def _answers(setup: Setup, asked: int, new_tokens: int, free: int) -> int:
    """Bytes of as many of the answers at once as fit into `free`, of one at least."""
    length = ImageLayout.of_config(setup.config).tokens + TEXT_OF_A_QUESTION
    held: dict[str, Any] = {"training": bool(setup.lora), "load_in_4bit": setup.load_in_4bit}
    lengths, images = [length] * asked, [1] * asked
    fit = prompts_that_fit(setup.config, lengths, new_tokens, images, setup.weights_in, free, **held) if free > 0 else 0
    count = max(1, fit)
    return answering(setup.config, lengths[:count], new_tokens, images[:count], setup.weights_in, **held).peak


def _loading(setup: Setup) -> int:
    """Bytes beside the weights while they are loaded: the largest one is packed, or an embedding table grows."""
    text: Any = setup.config.text_config
    table = text.vocab_size * text.hidden_size * setup.weights_in.itemsize
    packed = int(_QUANTIZING[setup.device] * text.hidden_size * text.intermediate_size) if setup.load_in_4bit else 0
    return max(int(table), packed)


@measured_once
def _held_out_loss(setup: Setup, tokens: int) -> int:
    """Bytes beside what is held while the loss of a batch of held-out samples is computed.

    Nothing is kept for a way back, so that two layers tell of any number.
    """
    with measuring(setup, 2, 0, tokens) as (model, tracker, pack):
        return loss_of_pack(model.eval(), tracker, pack, setup.dtype)
