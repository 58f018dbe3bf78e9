"""Prompts: text files become the messages of a call.

    prompts/conversation.txt    the three response types: what the teacher is told to do, and worked examples
    prompts/detail.txt
    prompts/reasoning.txt
    prompts/styles/NAME.txt     one of seven styles of instruction, added to what the teacher is told
    prompts/*_questions.txt     a question a line: detail's and naive's are drawn, not written by the teacher

A user copies the folder, changes it, and names it (`--prompts`); a file that is missing there is taken from here. The
version of a prompt is a hash of what is sent of it, so a changed file asks again, for its own type only.

What each type gets to see, in these very forms (LLaVA, arXiv 2304.08485):

    conversation             A man rides a horse.          the captions, one a line
                             A rider on a brown horse.
    detail, reasoning        ...                           the captions, an empty line, and the boxes
                             person: [0.412, 0.352, 0.531, 0.813]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qllava.config import InputError
from qllava.data.contexts import Context
from qllava.llm.store import Message
from qllava.synthesis.replies import BLOCKS, JSON_FORM, Turns, as_blocks, as_json, from_blocks

DEFAULT_TYPES = ("conversation", "detail", "reasoning")
STYLES = ("task", "steps", "format", "length", "unbiased", "perspectives", "clear")

_OWN = Path(__file__).parent / "prompts"
_QUESTIONS = {"detail": "detail_questions.txt", "naive": "naive_questions.txt"}
_FILES = {f"{kind}.txt" for kind in DEFAULT_TYPES} | set(_QUESTIONS.values()) | {f"styles/{s}.txt" for s in STYLES}


@dataclass(frozen=True)
class Prompt:
    """How a teacher is asked for one response type."""

    type: str
    version: str  # "reasoning-6f1c02a94b3d", or "reasoning+steps-..."
    system: str
    examples: tuple[tuple[str, str], ...]  # context and reply; the reply as blocks, or the whole text of a description
    turns: tuple[int, int] | None  # fewest and most questions of a reply; None: the reply is a text

    def messages(self, context: Context, *, schema: bool) -> tuple[Message, ...]:
        """The messages that ask about an image; `schema`: for a reply in JSON, otherwise as blocks."""
        return (*_opening(self, schema), {"role": "user", "content": shown(context, self.type)})


@cache
def _opening(prompt: Prompt, schema: bool) -> tuple[Message, ...]:
    """What all calls of a prompt begin with: what is to be done, and the worked examples."""
    form = "" if prompt.turns is None else f"\n\n{JSON_FORM if schema else BLOCKS}"
    messages = [{"role": "system", "content": prompt.system + form}]
    for seen, reply in prompt.examples:
        said = reply if prompt.turns is None else (as_json if schema else as_blocks)(from_blocks(reply))
        messages += [{"role": "user", "content": seen}, {"role": "assistant", "content": said}]
    return tuple(messages)


class Prompts:
    """The prompts of a run: built-in, or changed by the user."""

    def __init__(self, folder: Path | None = None) -> None:
        """Raises InputError where there is none of the expected files, or one is not a prompt."""
        self._folder = folder
        if folder is not None:
            _check_names(folder)

    def prompt(self, type_: str, style: str | None = None) -> Prompt:
        """The prompt of a response type, in a style. Raises InputError for a file that cannot be used."""
        path = self._path(f"{type_}.txt")
        parts = _sections(_read(path))
        names = [name for name, _ in parts]
        bodies = dict(parts)
        seen = [body for name, body in parts if name == "context"]
        replies = [body for name, body in parts if name == "reply"]
        pairs = [name for name in names if name in ("context", "reply")]
        if names.count("system") != 1 or pairs != ["context", "reply"] * len(seen) or names.count("turns") > 1:
            raise InputError(
                f"{path}: a prompt has one part `## system`, and each `## context` is followed by its `## reply`; "
                "see the file of this name in qllava's own prompts."
            )
        turns = None if type_ == "detail" else _range(bodies.get("turns", ""), path)
        for number, reply in enumerate(replies, start=1):
            if turns is not None and not from_blocks(reply):
                raise InputError(
                    f"{path}: reply {number} is not written as Question: / === / Answer: blocks; write it so."
                )
        system, name = bodies["system"], type_
        if style is not None and type_ in ("conversation", "reasoning"):
            system, name = f"{system}\n\n{_read(self._path(f'styles/{style}.txt'))}", f"{type_}+{style}"
        sent = json.dumps([system, seen, replies, "" if turns is None else [BLOCKS, JSON_FORM]])
        version = f"{name}-{hashlib.sha256(sent.encode()).hexdigest()[:12]}"
        return Prompt(type_, version, system, tuple(zip(seen, replies, strict=True)), turns)

    def question(self, type_: str, context: Context) -> str:
        """The question of a detailed description or a naive example, drawn by the image's id."""
        path = self._path(_QUESTIONS[type_])
        questions = [line.strip() for line in _read(path).splitlines() if line.strip()]
        if not questions:
            raise InputError(f"{path}: it has no question; write one per line.")
        return questions[draw(f"{type_} {context.id}", len(questions))]

    def _path(self, name: str) -> Path:
        changed = self._folder / name if self._folder is not None else None
        return changed if changed is not None and changed.is_file() else _OWN / name


def shown(context: Context, type_: str) -> str:
    """What the teacher sees of an image: captions, and boxes except for a conversation."""
    return "\n".join(context.captions) if type_ == "conversation" else context.text


def draw(name: str, count: int) -> int:
    """A number below `count` that belongs to a name, the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) % count


def example_turns(prompt: Prompt) -> Iterable[Turns]:
    """The worked replies as questions and answers; a description has no question."""
    for _, reply in prompt.examples:
        yield (("", reply),) if prompt.turns is None else from_blocks(reply)


def _check_names(folder: Path) -> None:
    """A file whose name is mistyped would be passed over in silence."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; copy {_OWN}, change the copy, and give its path to --prompts.")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")}
    if there - _FILES or not there:
        wrong = ", ".join(sorted(there - _FILES)) or "no text file at all"
        raise InputError(f"{folder} holds {wrong}; the files of prompts are {', '.join(sorted(_FILES))}.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the prompt cannot be read ({error}); save it as UTF-8 text.") from error


def _sections(text: str) -> list[tuple[str, str]]:
    """The parts of a prompt file: the name after ##, and the text below it."""
    pieces = re.split(r"^## *([a-z]+) *$", text, flags=re.MULTILINE)
    return [(name, body.strip()) for name, body in zip(pieces[1::2], pieces[2::2], strict=True)]


def _range(text: str, path: Path) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(
            f"{path}: `## turns` must be the fewest and most questions of a reply, as 2-8; it is {text!r}."
        )
    return int(match[1]), int(match[2])
