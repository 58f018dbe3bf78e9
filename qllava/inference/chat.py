"""`Chat`: a loaded model and its processor, to which questions and images are given.

The prompt is written with the chat template that was saved with the model, and images are prepared by its own
processor, so that a question looks exactly as in training. Answers are greedy by default.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import GenerationConfig, LlavaProcessor, LogitsProcessorList

from qllava.conversation import Conversation
from qllava.inference.batches import MOST, Batches, Room, attempt
from qllava.inference.generate import (
    Pieces,
    answer_prompts,
    choosers,
    continue_prompts,
    generation_settings,
)
from qllava.inference.given import GivenImage, as_list
from qllava.inference.prompts import Prompt, prompt_of, user_turn
from qllava.models.recommended import Decoding, recommended


@dataclass(frozen=True)
class Chat:
    """A loaded model that answers questions; usable from several threads, because it stores no conversation."""

    model: Any
    """LlavaForConditionalGeneration, bare or inside peft, in eval mode on its device."""
    processor: LlavaProcessor
    """Processor with tokenizer, image processor and saved chat template."""
    name: str
    """Name under which the model was loaded, for display."""
    recommended_sampling: bool = False
    """Whether `reply` uses the model's recommended sampling; other methods never do."""

    def answer(
        self,
        images: GivenImage | Sequence[GivenImage] | None,
        question: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        system: str | None = None,
    ) -> str:
        """Answer one question about no, one or several images.

        Raises:
            InputError: An image or the question cannot be used.
        """
        prompt = self.prompt(*_asked(images, question, system))
        return self.complete([prompt], max_new_tokens=max_new_tokens, temperature=temperature)[0]

    def stream(
        self,
        images: GivenImage | Sequence[GivenImage] | None,
        question: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        system: str | None = None,
    ) -> Iterator[str]:
        """Answer like `answer`, piece by piece. Closing the iterator stops the computation."""
        asked = _asked(images, question, system)
        return self.reply(*asked, max_new_tokens=max_new_tokens, temperature=temperature)

    def reply(
        self,
        conversation: Conversation,
        images: Sequence[GivenImage],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        seed: int | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Stream the next answer of a conversation that ends with a question.

        Input is checked at the call, before the first piece is requested. The model runs in its own thread; closing the
        iterator (or leaving the loop by an exception) stops it at the next token, and so does setting `stop`, even if
        nobody reads the pieces. An error in the thread is raised here.

        Args:
            conversation: The conversation.
            images: The images of all its turns, in order, one for each `<image>`.
            max_new_tokens: Maximum tokens of the answer.
            temperature: 0 for the most likely tokens. If `recommended_sampling` is set, the model's own limits and
                penalties apply as well, and None means its own temperature; otherwise None means 0.
            seed: Seed of sampling; the same seed gives the same answer whatever else the process computes.
            stop: Event that stops the answer.

        Raises:
            InputError: The conversation or an image cannot be used.
        """
        prompt = self.prompt(conversation, images)
        decoding = self.recommended if self.recommended_sampling else Decoding()
        decoding = decoding if temperature is None else replace(decoding, temperature=temperature)
        ids = [prompt.input_ids]
        settings = generation_settings(self.model, self.processor.tokenizer, ids, max_new_tokens, decoding.temperature)
        return self._stream(prompt, settings, choosers(decoding, seed), stop or threading.Event())

    @property
    def recommended(self) -> Decoding:
        """Return the decoding that the model's `generation_config` recommends; used only if the user asks for it."""
        return recommended(self.model.generation_config)

    def answer_batch(
        self,
        pairs: Sequence[tuple[GivenImage | Sequence[GivenImage] | None, str]],
        *,
        max_new_tokens: int = 256,
        batch_size: int = MOST,
        system: str | None = None,
    ) -> list[str]:
        """Answer many (images, question) pairs greedily, in order; in fp32 the same text as one by one.

        Batches are as large as memory allows, with at most `batch_size` pairs.
        """
        prompts = [self.prompt(*_asked(images, question, system)) for images, question in pairs]
        return self.complete(prompts, max_new_tokens=max_new_tokens, room=Room(batch_size))

    def prompt(self, conversation: Conversation, images: Sequence[GivenImage]) -> Prompt:
        """Return the model's input: ids with the image tokens expanded, and the pixels. See `prompt_of`."""
        return prompt_of(self.processor, conversation, images)

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        room: Room | None = None,
        names: Sequence[str] = (),
        done: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Return the answers to prompts made by `prompt`, in order; see `answer_prompts` for the arguments."""
        return answer_prompts(
            self.model,
            self.processor.tokenizer,
            [prompt.input_ids for prompt in prompts],
            [prompt.pixel_values for prompt in prompts],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            room=room,
            names=names,
            done=done,
        )

    def _stream(
        self, prompt: Prompt, settings: GenerationConfig, choose: LogitsProcessorList, stop: threading.Event
    ) -> Iterator[str]:
        closed = threading.Event()
        pieces = Pieces(self.processor.tokenizer)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                call = partial(
                    continue_prompts,
                    self.model,
                    [prompt.input_ids],
                    [prompt.pixel_values],
                    settings,
                    stop=(stop, closed),
                    pieces=pieces,
                    choose=choose,
                )
                if attempt(call) is None:
                    batches = Batches(self.model, [prompt.input_ids], settings.max_new_tokens, Room())
                    batches.too_large([0], ["the question"])
            except BaseException as error:  # any error must reach the reader of the stream
                failure.append(error)
            finally:
                pieces.queue.put(None)  # always, because the reader waits for it

        thread = threading.Thread(target=work, name="qllava-generate", daemon=True)
        thread.start()
        try:
            while (piece := pieces.queue.get()) is not None:
                yield piece
        finally:
            closed.set()
            thread.join()
        if failure:
            raise failure[0]


def _asked(
    images: GivenImage | Sequence[GivenImage] | None, question: str, system: str | None
) -> tuple[Conversation, list[GivenImage]]:
    """Return one question as a conversation, and its images."""
    given = as_list(images)
    return Conversation((user_turn(question, len(given)),), system), given
