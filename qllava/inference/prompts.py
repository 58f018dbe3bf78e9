"""Prompts: a conversation becomes the model's input by the saved chat template, which alone writes control tokens.

Users and models may write text that looks like a control token: `<s>` in HTML, `<|im_end|>` in an answer about chat
formats, `<image>` in a question. It is read as ordinary text: before the template is applied, a character that occurs
in no text (U+FDD0, a noncharacter of Unicode) is inserted after its first character, so that the tokenizer finds no
control token, and the tokens of that character are removed afterwards. The model reads exactly what the user saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers import LlavaProcessor

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN, Conversation, Turn, ask
from qllava.inference.given import GivenImage, open_given
from qllava.models.errors import one_line

BREAK = "\ufdd0"
_RAISED = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors that a foreign template may raise."""


@dataclass(frozen=True)
class Prompt:
    """One question as the model's input, made from a conversation by chat template and processor."""

    input_ids: list[int]
    """S ids, with image tokens expanded."""
    pixel_values: torch.Tensor | None
    """(I, 3, H, W); None without images."""


def user_turn(question: str, images: int) -> Turn:
    """Return a question with its images as a turn; `<image>` in it is text. An empty question raises an InputError."""
    if not question.strip():
        raise InputError("The question is empty. Write a question.")
    return Turn(role="user", content=ask(as_text(question, [IMAGE_TOKEN]), images))


def as_text(text: str, tokens: Sequence[str]) -> str:
    """Insert a `BREAK` into each occurrence of one of the tokens."""
    for token in tokens:
        while len(token) > 1 and token in text:
            text = text.replace(token, token[0] + BREAK + token[1:])
    return text


def prompt_of(processor: LlavaProcessor, conversation: Conversation, images: Sequence[GivenImage]) -> Prompt:
    """Return the model's input: ids with the image tokens expanded, and the pixels.

    Args:
        processor: Processor of the model, with its chat template.
        conversation: Ends with a question. `<image>` means an image in questions (see `user_turn`), and is text
            in answers and instructions.
        images: One image for each `<image>` of the questions.

    Raises:
        InputError: The numbers of images and of `<image>` differ, an image cannot be opened, or the chat template does
            not accept the conversation.
    """
    if conversation.turns[-1].role != "user":
        raise ValueError("the conversation ends with the assistant, so there is nothing to answer")
    marks = sum(turn.content.count(IMAGE_TOKEN) for turn in conversation.turns if turn.role == "user")
    if marks != len(images):
        raise InputError(
            f"The questions contain {marks} {IMAGE_TOKEN} for {len(images)} images. Both numbers must be equal."
        )
    text = render(processor, _without_control(conversation, _control_tokens(processor.tokenizer)))
    bos = processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))  # otherwise a template that writes BOS would get two
    encoded = processor(
        text=[text],
        images=[open_given(image) for image in images] or None,
        add_special_tokens=special,
        return_tensors="pt",
    )
    ids: list[int] = encoded["input_ids"][0].tolist()
    if BREAK in text:
        each = ids.count(processor.image_token_id) // max(marks, 1)
        ids = _without_breaks(processor, text, each, special)
    return Prompt(ids, encoded.get("pixel_values"))


def render(processor: LlavaProcessor, conversation: Conversation) -> str:
    """Return the text of a conversation with a generation prompt, by the chat template saved with the model.

    qllava's templates accept a turn as one string, as in training. llava-hf's accept a list of parts and add a line
    break after each image. A trial call detects which kind it is.

    Raises:
        InputError: The model has no template, it rejects the conversation, or it ignores the instructions.
    """
    if not processor.chat_template:
        raise InputError("This model has no chat template. Add the template of its training as chat_template.jinja.")
    probe = f"{IMAGE_TOKEN}\nprobe"
    try:
        whole = probe in processor.apply_chat_template([{"role": "user", "content": probe}])
    except _RAISED:
        whole = False

    def written(said: list[tuple[str, str]]) -> str:
        messages: list[Any] = [{"role": role, "content": text if whole else _parts(text)} for role, text in said]
        text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
        return text

    turns: list[tuple[str, str]] = [(turn.role, turn.content) for turn in conversation.turns]
    instructions = [] if conversation.system is None else [("system", conversation.system)]
    try:
        rendered = written([*instructions, *turns])
    except _RAISED as error:
        if instructions and _works(written, turns):
            raise InputError(
                f"The chat template of this model accepts no system prompt: {one_line(error)}. Remove it, or write "
                "it into the question."
            ) from error
        raise InputError(
            f"The chat template of this model rejects this conversation: {one_line(error)}. Start a new one, or "
            "correct chat_template.jinja in the model's folder."
        ) from error
    if conversation.system and conversation.system.strip() not in rendered:
        raise InputError(
            "The chat template of this model ignores the system prompt, so it would have no effect. Remove it, or "
            "write it into the question."
        )
    return rendered


def _works(written: Any, turns: list[tuple[str, str]]) -> bool:
    try:
        written(turns)
    except _RAISED:
        return False
    return True


def _without_control(conversation: Conversation, control: Sequence[str]) -> Conversation:
    """Return the conversation with its control tokens as ordinary text, except `<image>` in questions."""
    others = [token for token in control if token != IMAGE_TOKEN]

    def safe(turn: Turn) -> Turn:
        if turn.role == "assistant":
            return Turn(turn.role, as_text(turn.content, control))
        pieces = [as_text(piece, others) for piece in turn.content.split(IMAGE_TOKEN)]
        return Turn(turn.role, IMAGE_TOKEN.join(pieces))

    system = None if conversation.system is None else as_text(conversation.system, control)
    return Conversation(tuple(safe(turn) for turn in conversation.turns), system)


def _without_breaks(processor: LlavaProcessor, text: str, each: int, special: bool) -> list[int]:
    """Return the ids of a text without those of its breaks, with every image token repeated `each` times."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:  # the source of a token is unknown, so the character stays, which does no harm
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    else:
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        ids = [id for id, (start, end) in pairs if text[start:end] != BREAK]
    image = processor.image_token_id
    return [id for found in ids for id in ([found] * each if found == image else [found])]


def _control_tokens(tokenizer: Any) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens, IMAGE_TOKEN})


def _parts(text: str) -> list[dict[str, str]]:
    """Return `<image>\\nWhat?` as the list of parts that llava-hf's chat templates accept."""
    first, *rest = text.split(IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
