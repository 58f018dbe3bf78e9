r"""Conversations, and their rendering as text with the spans that are learned.

A template is data: the strings around a turn. The same object renders the text for training and writes the chat
template that is saved with the model, so training, serving and other programs cannot differ. The learned spans are
recorded while the text is written, not searched for afterwards:

    <s>A chat ... questions. USER: <image>\nWhat is it? ASSISTANT: A red bus.</s>USER: Where? ASSISTANT: Here.</s>
                                                                  ^^^^^^^^^^^^^^^                       ^^^^^^^^^^

A span begins at the separator before the answer (a sentencepiece token contains its leading space, and a generation
prompt ends without it) and ends after the end of turn, so that a model learns to stop.

Standard library only. An invalid conversation raises ValueError; the caller knows the file and the id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

IMAGE_TOKEN = "<image>"

# LLaMA's spelling, in which the templates below are written. They mean the tokenizer's own tokens: `render`
# replaces them by those, and a chat template uses `bos_token` and `eos_token`.
BOS = "<s>"
EOS = "</s>"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    """Speaker of the turn."""
    content: str
    """Text, with one `<image>` for each image of a user's turn."""
    learned: bool = True
    """Whether the model is trained to give an answer; otherwise it is only read."""


@dataclass(frozen=True)
class Conversation:
    """Alternating turns of user and assistant, beginning with the user.

    Raises:
        ValueError: The turns do not alternate, or the user does not begin.
    """

    turns: tuple[Turn, ...]
    """One or more turns; the last is the assistant's in training and the user's in a prompt."""
    system: str | None = None
    """System prompt; None for the template's own, an empty string for none."""

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("the conversation has no turns")
        for number, turn in enumerate(self.turns, start=1):
            expected = "user" if number % 2 else "assistant"
            if turn.role not in ("user", "assistant"):
                raise ValueError(f"turn {number} has the role {turn.role!r}; only user and assistant take turns")
            if turn.role != expected:
                before = f"follows another turn of the {turn.role}" if number > 1 else "begins the conversation"
                raise ValueError(f"turn {number} is the {turn.role}'s and {before}; user and assistant alternate")


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation."""

    text: str
    """Text with one `<image>` for each image."""
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) of each answer, in order, also of answers whose turn is not learned; the encoder leaves
    those out."""
    contents: tuple[tuple[int, int], ...]
    """Characters [start, end) of each system prompt, question and answer, which the template did not write; no control
    token may come from there."""


class _Writer:
    """Text under construction, with the spans that the template did not write."""

    def __init__(self, bos: str, eos: str) -> None:
        self.bos, self.eos = bos, eos
        self.text = ""
        self.contents: list[tuple[int, int]] = []

    def own(self, string: str) -> None:
        """Append a string of the template."""
        self.text += string.replace(BOS, self.bos).replace(EOS, self.eos)

    def content(self, string: str) -> None:
        """Append text of a user or a data set."""
        self.contents.append((len(self.text), len(self.text) + len(string)))
        self.text += string


@dataclass(frozen=True)
class Template:
    """The strings around a turn."""

    name: str
    """Name, as in a recipe's `template`."""
    begin: str = ""
    """Text before everything else."""
    system: str = ""
    """Default system prompt of a conversation; empty for none."""
    system_start: str = ""
    """Text before a system prompt."""
    system_end: str = ""
    """Text after a system prompt."""
    user_start: str = ""
    """Text before a question."""
    user_end: str = ""
    """Text after a question."""
    assistant_start: str = ""
    """Text before an answer; a generation prompt ends with it."""
    separator: str = ""
    """Text between `assistant_start` and an answer, learned with it."""
    end_of_turn: str = EOS
    """Text after an answer, learned with it."""
    after_turn: str = ""
    """Text after the end of turn, not learned."""
    next_round: str = ""
    """Text before each question but the first."""
    controls: tuple[str, ...] = ()
    """Strings that must be single control tokens of the tokenizer, besides begin and end of text."""
    strip: bool = False
    """Whether white space around contents is removed. Needed if neither a control token nor a space separates the
    template from an answer, because white space of both would become one token."""
    images_only: bool = False
    """Whether only the images of a question are kept, for one question with one answer (captions)."""

    def strings(self) -> tuple[str, ...]:
        """Return all strings that the template itself writes, except the system prompt."""
        return (
            self.begin,
            self.system_start,
            self.system_end,
            self.user_start,
            self.user_end,
            self.assistant_start,
            self.separator,
            self.end_of_turn,
            self.after_turn,
            self.next_round,
        )

    def render(
        self, conversation: Conversation, *, generation_prompt: bool = False, bos: str = BOS, eos: str = EOS
    ) -> Rendered:
        """Write a conversation as text.

        Args:
            conversation: The conversation.
            generation_prompt: Whether the conversation ends with the user, and the text with the start of an answer.
            bos: Begin of text of the tokenizer, which replaces LLaMA's.
            eos: End of text of the tokenizer, which replaces LLaMA's.

        Raises:
            ValueError: The last turn has the wrong role, or the conversation does not fit the template.
        """
        self._check(conversation, generation_prompt)
        writer = _Writer(bos, eos)
        spans = []
        writer.own(self.begin)
        system = self._said(self.system if conversation.system is None else conversation.system)
        if system:
            writer.own(self.system_start)
            writer.content(system)
            writer.own(self.system_end)
        for index, turn in enumerate(conversation.turns):
            if turn.role == "user":
                writer.own(self.next_round if index else "")
                writer.own(self.user_start)
                writer.content(self._asked(turn.content))
                writer.own(self.user_end)
            else:
                writer.own(self.assistant_start)
                start = len(writer.text)
                writer.own(self.separator)
                writer.content(self._said(turn.content))
                writer.own(self.end_of_turn)
                spans.append((start, len(writer.text)))
                writer.own(self.after_turn)
        if generation_prompt:
            writer.own(self.assistant_start)
        return Rendered(writer.text, tuple(spans), tuple(writer.contents))

    def chat_template(self) -> str:
        """Return the template as a Jinja chat template, with {% generation %} around learned text.

        Contents may be strings, or lists of parts, which are joined as in `joined`.
        """
        said = " | trim" if self.strip else ""
        asked = "'<image>' * content(message).count('<image>')" if self.images_only else f"content(message){said}"
        lines = [
            *_CONTENT,
            f"{{%- if messages[0]['role'] == 'system' -%}}{{%- set system = content(messages[0]){said} -%}}",
            "{%- set turns = messages[1:] -%}",
            f"{{%- else -%}}{{%- set system = {json.dumps(self.system)} -%}}",
            "{%- set turns = messages -%}{%- endif -%}",
            _jinja(self.begin),
            f"{{%- if system -%}}{_jinja(self.system_start)}{{{{- system -}}}}{_jinja(self.system_end)}{{%- endif -%}}",
            "{%- for message in turns -%}",
            "{%- if message['role'] == 'user' -%}",
            f"{{%- if not loop.first -%}}{_jinja(self.next_round)}{{%- endif -%}}" if self.next_round else "",
            f"{_jinja(self.user_start)}{{{{- {asked} -}}}}{_jinja(self.user_end)}",
            "{%- elif message['role'] == 'assistant' -%}",
            _jinja(self.assistant_start),
            f"{{%- generation -%}}{_jinja(self.separator)}{{{{- content(message){said} -}}}}{_jinja(self.end_of_turn)}",
            f"{{%- endgeneration -%}}{_jinja(self.after_turn)}",
            "{%- else -%}{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{_jinja(self.assistant_start)}{{%- endif -%}}",
        ]
        return "\n".join(line for line in lines if line)

    def _check(self, conversation: Conversation, generation_prompt: bool) -> None:
        last = conversation.turns[-1].role
        if generation_prompt and last != "user":
            raise ValueError("the conversation ends with the assistant, so there is nothing to answer")
        if not generation_prompt and last != "assistant":
            raise ValueError("the conversation ends with the user, so it has no answer to learn")
        if self.images_only and (len(conversation.turns) > 2 or IMAGE_TOKEN not in conversation.turns[0].content):
            raise ValueError(
                f"template {self.name} takes an image and its caption; this is a longer conversation, or has no image"
            )

    def _said(self, content: str) -> str:
        return content.strip() if self.strip else content

    def _asked(self, content: str) -> str:
        return IMAGE_TOKEN * content.count(IMAGE_TOKEN) if self.images_only else self._said(content)


def ask(question: str, images: int = 1) -> str:
    """Return a question about images as a user's turn: the images first, each followed by a newline."""
    return (f"{IMAGE_TOKEN}\n" * images + question).strip() if images else question


# A space is written between two parts, except next to white space, brackets and punctuation, and in scripts without
# spaces (from U+2E80 on: Chinese, Japanese).
_OPENING = " \t\r\n([{"
_CLOSING = " \t\r\n.,;:!?)]}'%\u2019\u2026"
_NO_SPACES = "\u2e80"

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of text parts, in chat APIs and in transformers."""
IMAGE_PARTS = ("image", "image_url", "input_image")
"""Types of image parts."""


def joined(parts: Sequence[str | None]) -> str:
    """Join content parts (a text, or None for an image) into the content of a turn, every image at its place.

    A single image comes first, as in `ask`. Several keep their places; those before all words are each followed by a
    newline. Words of different parts never touch: `["Is", None, "darker than", None, "?"]` is
    `Is <image> darker than <image>?`. `Template.chat_template` does the same in Jinja.
    """
    images = parts.count(None)
    text, words = "", False
    for part in parts:
        piece = part if part is not None else "" if images == 1 else IMAGE_TOKEN if words else f"{IMAGE_TOKEN}\n"
        words = words or bool(part and part.strip())
        if text and piece and text[-1] not in _OPENING and piece[0] not in _CLOSING:
            text += " " if text[-1] < _NO_SPACES and piece[0] < _NO_SPACES else ""
        text += piece
    if images == 1:
        return ask(text.strip())
    return text.strip() if images else text


# `joined` as a macro of a chat template.
_CONTENT = (
    "{%- macro content(message) -%}",
    "{%- if message['content'] is string -%}{{- message['content'] -}}",
    "{%- else -%}{%- set said = namespace(text='', images=0, words=false) -%}",
    f"{{%- for part in message['content'] if part['type'] in {list(IMAGE_PARTS)} -%}}",
    "{%- set said.images = said.images + 1 -%}{%- endfor -%}",
    "{%- for part in message['content'] -%}{%- set piece = '' -%}",
    f"{{%- if part['type'] in {list(TEXT_PARTS)} -%}}{{%- set piece = part['text'] -%}}",
    f"{{%- elif part['type'] in {list(IMAGE_PARTS)} and said.images > 1 -%}}",
    "{%- set piece = '<image>' if said.words else '<image>\\n' -%}{%- endif -%}",
    f"{{%- if part['type'] in {list(TEXT_PARTS)} and (part['text'] | trim) -%}}",
    "{%- set said.words = true -%}{%- endif -%}",
    f"{{%- if said.text and piece and said.text[-1] not in {json.dumps(_OPENING)}",
    f" and piece[0] not in {json.dumps(_CLOSING)}",
    f" and said.text[-1] < {json.dumps(_NO_SPACES)} and piece[0] < {json.dumps(_NO_SPACES)} -%}}",
    "{%- set said.text = said.text ~ ' ' -%}{%- endif -%}",
    "{%- set said.text = said.text ~ piece -%}{%- endfor -%}",
    "{%- if said.images == 1 -%}{%- set said.text = '<image>\\n' ~ (said.text | trim) -%}{%- endif -%}",
    "{{- (said.text | trim) if said.images else said.text -}}{%- endif -%}",
    "{%- endmacro -%}",
)


def _jinja(string: str) -> str:
    """Return a Jinja expression that prints a string of a template; "" for an empty string."""
    names = {BOS: "bos_token", EOS: "eos_token"}
    pieces = [names.get(piece, json.dumps(piece)) for piece in re.split(f"({BOS}|{EOS})", string) if piece]
    return "{{- " + " ~ ".join(pieces) + " -}}" if pieces else ""


PLAIN = Template(name="plain", begin=BOS, end_of_turn="\n", images_only=True)

# The two system prompts are part of the formats that Vicuna 1.x and LLaVA's LLaMA-2 models were trained on.
VICUNA_V1 = Template(
    name="vicuna_v1",
    begin=BOS,
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_end=" ",
    user_start="USER: ",
    user_end=" ",
    assistant_start="ASSISTANT:",
    separator=" ",
)

LLAMA_2 = Template(
    name="llama_2",
    begin=f"{BOS}[INST] ",
    system="You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.",
    system_start="<<SYS>>\n",
    system_end="\n<</SYS>>\n\n",
    user_end=" [/INST]",
    separator=" ",
    end_of_turn=f" {EOS}",
    next_round=f"{BOS}[INST] ",
)

LLAMA_3 = Template(
    name="llama_3",
    begin="<|begin_of_text|>",
    system_start="<|start_header_id|>system<|end_header_id|>\n\n",
    system_end="<|eot_id|>",
    user_start="<|start_header_id|>user<|end_header_id|>\n\n",
    user_end="<|eot_id|>",
    assistant_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end_of_turn="<|eot_id|>",
    controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    strip=True,
)

CHATML = Template(
    name="chatml",
    system_start="<|im_start|>system\n",
    system_end="<|im_end|>\n",
    user_start="<|im_start|>user\n",
    user_end="<|im_end|>\n",
    assistant_start="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    after_turn="\n",
    controls=("<|im_start|>", "<|im_end|>"),
    strip=True,
)

TEMPLATES = {template.name: template for template in (PLAIN, VICUNA_V1, LLAMA_2, LLAMA_3, CHATML)}
