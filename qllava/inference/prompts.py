"""From a conversation to what the model reads: by the saved chat template, with control tokens from the template alone.

What people and models write may spell a control token: `<s>` in HTML, `<|im_end|>` in an answer about chat formats,
`<image>` in a question. It is read as the text it is. A sign that no text has (U+FDD0, a noncharacter of Unicode) is
put behind its first character before the template is filled in; the tokenizer then finds no control token there, and
the tokens of the sign are taken out again. So what the model reads is what the user saw, to the letter.
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
"""What the code of a foreign template may raise."""


@dataclass(frozen=True)
class Prompt:
    """One question as the model reads it: what a chat template and a processor make of a conversation."""

    input_ids: list[int]
    """S ids, the image tokens expanded."""
    pixel_values: torch.Tensor | None
    """(I, 3, H, W), None without images."""


def user_turn(question: str, images: int) -> Turn:
    """A question after its images, as a turn; an `<image>` in it is text. Raises InputError for an empty one."""
    if not question.strip():
        raise InputError("The question is empty. Write a question.")
    return Turn(role="user", content=ask(as_text(question, [IMAGE_TOKEN]), images))


def as_text(text: str, tokens: Sequence[str]) -> str:
    """The text with a `BREAK` in whatever spells one of the tokens."""
    for token in tokens:
        while len(token) > 1 and token in text:
            text = text.replace(token, token[0] + BREAK + token[1:])
    return text


def prompt_of(processor: LlavaProcessor, conversation: Conversation, images: Sequence[GivenImage]) -> Prompt:
    """What the model reads: ids with the image tokens expanded, and the pixels.

    Args:
        processor: The model's, with its chat template.
        conversation: Ends with a question. `<image>` means an image in questions (see `user_turn`), and is text
            in answers and instructions.
        images: One for each `<image>` of the questions.

    Raises:
        InputError: Images and marks differ in number, an image cannot be opened, or the chat template does not take
            this conversation.
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
    special = not (bos and text.startswith(bos))  # else a template that writes BOS gets two
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
    """The text of a conversation with a generation prompt, by the chat template that was saved with the model.

    Our templates take a turn as one string, as it was learned. llava-hf's take a list of parts and put a line break
    after each image themselves. A probe tells which kind it is.

    Raises:
        InputError: The model has no template, it refuses the conversation, or it leaves the instructions out.
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
    """The conversation with control tokens that its words spell as text, except `<image>` in questions."""
    others = [token for token in control if token != IMAGE_TOKEN]

    def safe(turn: Turn) -> Turn:
        if turn.role == "assistant":
            return Turn(turn.role, as_text(turn.content, control))
        pieces = [as_text(piece, others) for piece in turn.content.split(IMAGE_TOKEN)]
        return Turn(turn.role, IMAGE_TOKEN.join(pieces))

    system = None if conversation.system is None else as_text(conversation.system, control)
    return Conversation(tuple(safe(turn) for turn in conversation.turns), system)


def _without_breaks(processor: LlavaProcessor, text: str, each: int, special: bool) -> list[int]:
    """The ids of a text without those of its breaks, every image token written `each` times."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:  # where a token comes from is not known: the sign stays, which harms nothing
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
    """`<image>\\nWhat?` as the list of parts that llava-hf's chat templates take."""
    first, *rest = text.split(IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
