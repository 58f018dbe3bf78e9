"""Generation of answers from token ids and pixels: batches, streaming, and stopping.

Shapes in this file:

  B prompts in a batch, S tokens (padded on the left), I images, H x W pixels
"""

from __future__ import annotations

import copy
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from qllava.config import InputError
from qllava.inference.batches import Batches, Room, attempt
from qllava.models.positions import positions_of
from qllava.models.recommended import Decoding


class StopOn(StoppingCriteria):
    """Stops a generation at the next token after one of the events is set, in any thread."""

    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return, after each token, whether each sequence is finished, (B,)."""
        return torch.full(
            (input_ids.shape[0],),
            any(event.is_set() for event in self.events),
            dtype=torch.bool,
            device=input_ids.device,
        )


class SeededSampling(LogitsProcessor):
    """Sampling from the softmax at a temperature, with its own random generator (the Gumbel-max trick).

    After adding noise -log(-log u), the largest logit is a sample from their softmax. transformers' sampling uses the
    generator that the whole process shares, so that simultaneous answers could not be reproduced.
    """

    def __init__(self, temperature: float, seed: int | None = None) -> None:
        """Seed the generator.

        Args:
            temperature: Divisor of the logits.
            seed: Seed of the samples; None takes one from torch's own generator.
        """
        self.temperature = temperature
        drawn = int(torch.randint(2**62, ())) if seed is None else seed
        self.generator = torch.Generator().manual_seed(drawn)  # on the CPU, for the same samples on every device

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logits (B, V) with noise; the largest of each sequence is its sample."""
        noise = torch.rand(scores.shape, generator=self.generator, dtype=torch.float64).clamp_min_(1e-300)
        noise = noise.log_().neg_().log_().neg_().to(scores.device, torch.float32)
        return noise.add_(scores.float() / self.temperature)


def choosers(decoding: Decoding, seed: int | None) -> LogitsProcessorList:
    """Return the processors of the logits before the largest is chosen; none for greedy decoding.

    Samples come from the same distribution with or without a seed.

    Raises:
        InputError: Values of the decoding are not possible.
    """
    found: list[LogitsProcessor] = []
    try:
        if decoding.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
        if decoding.no_repeat_ngram_size:
            found.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
        if decoding.temperature > 0:
            found.append(TemperatureLogitsWarper(float(decoding.temperature)))
            found += [TopKLogitsWarper(decoding.top_k)] if decoding.top_k else []
            found += [TopPLogitsWarper(float(decoding.top_p))] if decoding.top_p < 1 else []
            found += [MinPLogitsWarper(float(decoding.min_p))] if decoding.min_p else []
            found += [TypicalLogitsWarper(float(decoding.typical_p))] if decoding.typical_p < 1 else []
            found.append(SeededSampling(1.0, seed))
    except ValueError as error:
        raise InputError(
            f"The model's recommended sampling values are invalid ({error}). Remove --sampling."
        ) from error
    return LogitsProcessorList(found)


class Pieces(BaseStreamer):
    """Streamer of one sequence: token ids in, pieces of text out; the joined pieces are exactly the answer.

    All ids so far are decoded at every step. transformers' own streamer decodes from the last line break on, where
    a sentencepiece decoder drops the space at the beginning of a line.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.queue: queue.Queue[str | None] = queue.Queue()
        self._tokenizer = tokenizer
        self._ids: list[int] | None = None  # None until `generate` has put the prompt
        self._sent = 0

    def put(self, value: torch.Tensor) -> None:
        """Accept the prompt (the first call, ignored) or the next token, and queue text that is now certain."""
        if self._ids is None:
            self._ids = []
            return
        self._ids.extend(value.reshape(-1).tolist())
        text = decode_answer(self._tokenizer, self._ids)
        if not text.endswith("\ufffd"):  # an incomplete character: the rest of its bytes comes with the next token
            self._send(text)

    def end(self) -> None:
        """Queue the remaining text."""
        self._send(decode_answer(self._tokenizer, self._ids or []))

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self.queue.put(text[self._sent :])
            self._sent = len(text)


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: Sequence[torch.Tensor | None],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    room: Room | None = None,
    names: Sequence[str] = (),
    done: Callable[[int], object] | None = None,
) -> list[str]:
    """Answer encoded prompts with a model in memory: the trainer's held-out questions, and every batch of `Chat`.

    Prompts are sorted by length and padded on the left, so that little padding is computed and all answers start at
    the same position; a batch ends when every sequence has ended. A batch is as large as memory allows, and is repeated
    in halves if it was too large; an answer does not depend on the other prompts of its batch. The model may be in the
    middle of training: its modes are restored, and no gradient is kept.

    Args:
        model: A LlavaForConditionalGeneration, bare or inside peft.
        tokenizer: Its tokenizer.
        prompts: Ids that end with the generation prompt, image tokens expanded.
        pixel_values: Per prompt (I, 3, H, W) or None; a lazy sequence is read one batch at a time.
        max_new_tokens: Maximum tokens of an answer; fewer if the model's context ends before.
        temperature: 0 for greedy answers.
        room: Memory limit and batch size; one object for several calls remembers the sizes that did not fit.
        names: Name of each prompt in a message; "question 3" if empty.
        done: Called with the number of prompts answered after each batch.

    Returns:
        The answers in the order of the prompts, without special tokens, stripped.

    Raises:
        InputError: A prompt leaves no room for an answer, or memory does not suffice for one prompt alone.
    """
    if len(prompts) != len(pixel_values):
        raise ValueError(f"{len(prompts)} prompts but {len(pixel_values)} entries of pixel_values")
    if not prompts:
        return []
    # Raises an error for prompts that cannot be answered before the first is computed.
    generation_settings(model, tokenizer, prompts, max_new_tokens, temperature)
    choose, answers = choosers(Decoding(temperature), None), [""] * len(prompts)
    batches = Batches(model, prompts, max_new_tokens, room or Room(), sampling=temperature > 0)
    with _eval_mode(model):
        while batches.waiting:
            batch, new_tokens = batches.next()
            some = [prompts[i] for i in batch]
            settings = generation_settings(model, tokenizer, some, new_tokens, temperature)
            rows = attempt(partial(_continue_some, model, some, pixel_values, batch, settings, choose))
            if rows is None:
                batches.too_large(batch, names)
                continue
            for i, row in zip(batch, rows, strict=True):
                answers[i] = decode_answer(tokenizer, row)
            batches.answered(batch)
            if done is not None:
                done(len(batch))
    return answers


def _continue_some(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: Sequence[torch.Tensor | None],
    batch: Sequence[int],
    settings: GenerationConfig,
    choose: LogitsProcessorList,
) -> list[list[int]]:
    """Return the new ids of a batch of prompts, whose pixels are read now."""
    rows = continue_prompts(model, prompts, [pixel_values[i] for i in batch], settings, choose=choose)
    found: list[list[int]] = rows.tolist()
    return found


def generation_settings(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Return the length limit and the end tokens for these prompts; tokens are chosen by `choosers`.

    Raises:
        InputError: The longest prompt leaves no space for an answer, or `temperature` is not possible.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise InputError(
            "The length of an answer must be at least 1 token, and the temperature at least 0. Change them."
        )
    context = positions_of(model.config.get_text_config())
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest >= context:
        raise InputError(
            f"The conversation has {longest} tokens, but the model's context is {context}. Start a new conversation."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=min(max_new_tokens, context - longest),
        eos_token_id=ends_of(model, tokenizer) or None,
        pad_token_id=pad if pad is not None else 0,
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, sorted: those of the model's generation config and of its tokenizer."""
    ends = model.generation_config.eos_token_id
    return sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})


def continue_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pixel_values: Sequence[torch.Tensor | None],
    settings: GenerationConfig,
    *,
    stop: Sequence[threading.Event] = (),
    pieces: Pieces | None = None,
    choose: LogitsProcessorList | None = None,
) -> torch.Tensor:
    """Generate after a batch of prompts, and return the new ids (B, at most max_new_tokens), padded after the end.

    Each token is the most likely one after the logits were processed by `choose` (see `choosers`).
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), settings.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    pixels = [image for image in pixel_values if image is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels).to(model.device)  # the tower converts them to its type
    criteria = StoppingCriteriaList([StopOn(*stop)] if stop else [])
    with torch.no_grad():
        out: torch.Tensor = _without_habits(model).generate(
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList() if choose is None else choose,
            stopping_criteria=criteria,
            streamer=pieces,
        )
    return out[:, width:]


def _without_habits(model: Any) -> Any:
    """Return the same model with an empty `generation_config`.

    `generate` takes every value that it was not given (penalties, sampling limits, forced tokens) from the model's own
    config, and most of them have no value for "none". This is a shallow copy, so that other threads and a later
    `save_pretrained` find the model unchanged; peft's wrapper would write into the model inside it, and its layers work
    without it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    bare = copy.copy(inner)
    bare.generation_config = GenerationConfig()
    return bare


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode ids to text: without special tokens (end and padding among them), stripped."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Set all modules to eval mode, then restore each one's mode (a frozen tower may differ from the rest)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
