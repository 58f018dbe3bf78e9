"""`Chat`: a loaded model and its processor, asked in words and pictures.

The prompt is made by the chat template that was saved with the model and the picture by its own processor, so that
what is asked here looks exactly like what was learned. Greedy by default.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jinja2
import torch
from transformers import GenerationConfig, LlavaProcessor, LogitsProcessorList

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN, Conversation, Turn, ask
from qllava.inference.batches import MOST, Batches, Room, attempt
from qllava.inference.generate import (
    Pieces,
    answer_prompts,
    choosers,
    continue_prompts,
    generation_settings,
)
from qllava.inference.given import Picture, as_list, open_picture
from qllava.models.recommended import Decoding, recommended


@dataclass(frozen=True)
class Prompt:
    """One question as the model reads it: what a chat template and a processor make of a conversation."""

    input_ids: list[int]  # S ids, the image tokens expanded
    pixel_values: torch.Tensor | None  # (I, 3, H, W), None without pictures


@dataclass(frozen=True)
class Chat:
    """A loaded model that answers. One `Chat` may be used from several threads; it keeps no conversation itself."""

    model: Any  # LlavaForConditionalGeneration, bare or inside peft, in eval mode on its device
    processor: LlavaProcessor  # its tokenizer, image processor and saved chat template
    name: str  # what was loaded, for people
    recommended_sampling: bool = False  # whether `reply` decodes as the model recommends; all else never does

    def answer(
        self,
        images: Picture | Sequence[Picture] | None,
        question: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        system: str | None = None,
    ) -> str:
        """Answer one question about no, one or several pictures. Raises InputError for a broken picture or question."""
        pictures = as_list(images)
        conversation = Conversation(turns=(user_turn(question, len(pictures)),), system=system)
        prompt = self.prompt(conversation, pictures)
        return self.complete([prompt], max_new_tokens=max_new_tokens, temperature=temperature)[0]

    def stream(
        self,
        images: Picture | Sequence[Picture] | None,
        question: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        system: str | None = None,
    ) -> Iterator[str]:
        """`answer`, piece by piece. Closing the iterator ends the computation."""
        pictures = as_list(images)
        conversation = Conversation(turns=(user_turn(question, len(pictures)),), system=system)
        return self.reply(conversation, pictures, max_new_tokens=max_new_tokens, temperature=temperature)

    def reply(
        self,
        conversation: Conversation,
        images: Sequence[Picture],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        seed: int | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Stream the next answer of a conversation that ends with a question.

        `images` are the pictures of all its turns, in order, one for each `<image>`. Input is checked at the call,
        before the first piece is asked for. The model works in a thread of its own; closing the iterator (or leaving
        the loop by an exception) stops it at the next token, and so does `stop`, set by anyone, even if nobody reads
        on. An error in the thread is raised here. Above temperature 0, the same `seed` gives the same answer whatever
        else the process computes.

        Tokens are chosen by `temperature` alone (None: 0, the likeliest), except where `recommended_sampling` is set:
        then the model's own limits and penalties hold as well, and None takes its own temperature.
        """
        prompt = self.prompt(conversation, images)
        decoding = self.recommended if self.recommended_sampling else Decoding()
        decoding = decoding if temperature is None else replace(decoding, temperature=temperature)
        ids = [prompt.input_ids]
        settings = generation_settings(self.model, self.processor.tokenizer, ids, max_new_tokens, decoding.temperature)
        return self._stream(prompt, settings, choosers(decoding, seed), stop or threading.Event())

    @property
    def recommended(self) -> Decoding:
        """How the model's `generation_config` recommends to decode; nothing of it is used unless it is asked for."""
        return recommended(self.model.generation_config)

    def answer_batch(
        self,
        pairs: Sequence[tuple[Picture | Sequence[Picture] | None, str]],
        *,
        max_new_tokens: int = 256,
        batch_size: int = MOST,
        system: str | None = None,
    ) -> list[str]:
        """Answer many (pictures, question) pairs greedily, in order; in fp32 the same text as one by one.

        As many at once as fit into memory, and at most `batch_size`.
        """
        prompts = []
        for images, question in pairs:
            pictures = as_list(images)
            conversation = Conversation(turns=(user_turn(question, len(pictures)),), system=system)
            prompts.append(self.prompt(conversation, pictures))
        return self.complete(prompts, max_new_tokens=max_new_tokens, room=Room(batch_size))

    def prompt(self, conversation: Conversation, images: Sequence[Picture]) -> Prompt:
        """What the model reads: ids with the image tokens expanded, and the pixels.

        Raises InputError when the text spells one of the tokenizer's control tokens (it would become one), when
        pictures and `<image>` marks differ in number, or when a picture cannot be opened.
        """
        if conversation.turns[-1].role != "user":
            raise ValueError("the conversation ends with the assistant, so there is nothing to answer")
        control = _control_tokens(self.processor.tokenizer)
        if IMAGE_TOKEN in (conversation.system or ""):
            raise InputError(f"The instructions contain {IMAGE_TOKEN}, which stands for a picture; leave it out.")
        for text in (conversation.system or "", *(turn.content for turn in conversation.turns)):
            spelled = [token for token in control if token in text.replace(IMAGE_TOKEN, "")]
            if spelled:
                raise InputError(
                    f"The text contains {spelled[0]!r}, a control token of this model; spell it differently."
                )
        marks = sum(turn.content.count(IMAGE_TOKEN) for turn in conversation.turns)
        if marks != len(images):
            raise InputError(f"The questions hold {marks} {IMAGE_TOKEN} for {len(images)} pictures; make them equal.")
        text = _render(self.processor, conversation)
        bos = self.processor.tokenizer.bos_token
        encoded = self.processor(
            text=[text],
            images=[open_picture(image) for image in images] or None,
            add_special_tokens=not (bos and text.startswith(bos)),  # else a template that writes BOS gets two
            return_tensors="pt",
        )
        return Prompt(encoded["input_ids"][0].tolist(), encoded.get("pixel_values"))

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
        """The answers to prompts that `prompt` made, in order; see `answer_prompts` for the arguments."""
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
            except BaseException as error:  # whatever it is, the one who reads the stream must hear of it
                failure.append(error)
            finally:
                pieces.queue.put(None)  # always: the reader waits for it

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


def user_turn(question: str, pictures: int) -> Turn:
    """A question after its pictures, as a turn. Raises InputError for an empty one, or one that spells `<image>`."""
    if not question.strip():
        raise InputError("The question is empty; write what you want to know.")
    if IMAGE_TOKEN in question:
        raise InputError(f"The question contains {IMAGE_TOKEN}, which stands for a picture; leave it out.")
    return Turn(role="user", content=ask(question, pictures))


def _control_tokens(tokenizer: Any) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens, IMAGE_TOKEN})


def _render(processor: LlavaProcessor, conversation: Conversation) -> str:
    """The text of a conversation with a generation prompt, by the chat template that was saved with the model.

    Our templates take a turn as one string, as it was learned. llava-hf's take a list of parts and put a line break
    after each picture themselves. A probe tells which kind it is.
    """
    if not processor.chat_template:
        raise InputError("This model has no chat template; add the one it was trained with as chat_template.jinja.")
    probe = f"{IMAGE_TOKEN}\nprobe"
    try:
        whole = probe in processor.apply_chat_template([{"role": "user", "content": probe}])
    except (jinja2.TemplateError, TypeError):
        whole = False
    said: list[tuple[str, str]] = [] if conversation.system is None else [("system", conversation.system)]
    said += [(turn.role, turn.content) for turn in conversation.turns]
    messages: list[Any] = [{"role": role, "content": text if whole else _parts(text)} for role, text in said]
    rendered: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    return rendered


def _parts(text: str) -> list[dict[str, str]]:
    """`<image>\\nWhat?` as the list of parts that llava-hf's chat templates take."""
    first, *rest = text.split(IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
