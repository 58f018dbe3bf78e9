"""Prompts: text files that become the messages of a call.

    prompts/conversation.txt    the three response types: the teacher's instructions, and worked examples
    prompts/detail.txt
    prompts/reasoning.txt
    prompts/styles/NAME.txt     one of seven styles of instruction, added to the teacher's instructions
    prompts/*_questions.txt     one question per line, for detail and naive: drawn, not written by the teacher

Users can copy the folder, change the copy, and pass it with `--prompts`; files that are missing there are taken from
here. The version of a prompt is a hash of what is sent of it, so after a change only its own type is requested again.

Input of the teacher for each type, in exactly this format (LLaVA, arXiv 2304.08485):

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
    """Prompt of one response type."""

    type: str
    """Response type."""
    version: str
    """Version, such as "reasoning-6f1c02a94b3d" or "reasoning+steps-..."."""
    system: str
    """Instructions to the teacher, the system message."""
    examples: tuple[tuple[str, str], ...]
    """Worked examples as context and reply; a reply is written as blocks, or as the text of a description."""
    turns: tuple[int, int] | None
    """Smallest and largest number of questions in a reply; None if the reply is plain text."""

    def messages(self, context: Context, *, schema: bool) -> tuple[Message, ...]:
        """Return the messages that ask about an image, for a reply in JSON if `schema`, otherwise as blocks."""
        return (*_opening(self, schema), {"role": "user", "content": shown(context, self.type)})


@cache
def _opening(prompt: Prompt, schema: bool) -> tuple[Message, ...]:
    """Return the first messages of all calls of a prompt: the instructions and the worked examples."""
    form = "" if prompt.turns is None else f"\n\n{JSON_FORM if schema else BLOCKS}"
    messages = [{"role": "system", "content": prompt.system + form}]
    for seen, reply in prompt.examples:
        said = reply if prompt.turns is None else (as_json if schema else as_blocks)(from_blocks(reply))
        messages += [{"role": "user", "content": seen}, {"role": "assistant", "content": said}]
    return tuple(messages)


class Prompts:
    """Prompts of a run, built in or changed by the user."""

    def __init__(self, folder: Path | None = None) -> None:
        """Check the user's folder of prompts, if there is one.

        Raises:
            InputError: The folder has none of the expected files, or a file with another name.
        """
        self._folder = folder
        if folder is not None:
            _check_names(folder)

    def prompt(self, type_: str, style: str | None = None) -> Prompt:
        """Return the prompt of a response type, in a style.

        Raises:
            InputError: A file of the prompt cannot be used.
        """
        path = self._path(f"{type_}.txt")
        parts = _sections(_read(path))
        names = [name for name, _ in parts]
        bodies = dict(parts)
        seen = [body for name, body in parts if name == "context"]
        replies = [body for name, body in parts if name == "reply"]
        pairs = [name for name in names if name in ("context", "reply")]
        if names.count("system") != 1 or pairs != ["context", "reply"] * len(seen) or names.count("turns") > 1:
            raise InputError(
                f"{path}: a prompt must have one section `## system`, at most one `## turns`, and a `## reply` after "
                "each `## context`. Compare the file with the one of the same name in qllava's own prompts."
            )
        turns = None if type_ == "detail" else _range(bodies.get("turns", ""), path)
        for number, reply in enumerate(replies, start=1):
            if turns is not None and not from_blocks(reply):
                raise InputError(
                    f"{path}: reply {number} is not written as blocks. Write it as Question: / === / Answer: blocks."
                )
        system, name = bodies["system"], type_
        if style is not None and type_ in ("conversation", "reasoning"):
            system, name = f"{system}\n\n{_read(self._path(f'styles/{style}.txt'))}", f"{type_}+{style}"
        sent = json.dumps([system, seen, replies, "" if turns is None else [BLOCKS, JSON_FORM]])
        version = f"{name}-{hashlib.sha256(sent.encode()).hexdigest()[:12]}"
        return Prompt(type_, version, system, tuple(zip(seen, replies, strict=True)), turns)

    def question(self, type_: str, context: Context) -> str:
        """Return the question of a detailed description or a naive example, drawn by the image's id."""
        path = self._path(_QUESTIONS[type_])
        questions = [line.strip() for line in _read(path).splitlines() if line.strip()]
        if not questions:
            raise InputError(f"{path}: the file has no question. Write one question per line.")
        return questions[draw(f"{type_} {context.id}", len(questions))]

    def _path(self, name: str) -> Path:
        changed = self._folder / name if self._folder is not None else None
        return changed if changed is not None and changed.is_file() else _OWN / name


def shown(context: Context, type_: str) -> str:
    """Return the text that the teacher sees of an image: captions, and boxes except for a conversation."""
    return "\n".join(context.captions) if type_ == "conversation" else context.text


def draw(name: str, count: int) -> int:
    """Return a number below `count` that depends only on the name, the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) % count


def example_turns(prompt: Prompt) -> Iterable[Turns]:
    """Yield the worked replies as questions and answers; a description has an empty question."""
    for _, reply in prompt.examples:
        yield (("", reply),) if prompt.turns is None else from_blocks(reply)


def _check_names(folder: Path) -> None:
    """Raise an error if the folder has an unknown file, because a mistyped name would be ignored silently."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; copy {_OWN}, change the copy, and give its path to --prompts.")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")}
    if there - _FILES or not there:
        wrong = ", ".join(sorted(there - _FILES)) or "no text file at all"
        raise InputError(
            f"{folder} contains {wrong}. Name the files of prompts as these are named: {', '.join(sorted(_FILES))}."
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the prompt cannot be read ({error}); save it as UTF-8 text.") from error


def _sections(text: str) -> list[tuple[str, str]]:
    """Return the sections of a prompt file: the name after ##, and the text below it."""
    pieces = re.split(r"^## *([a-z]+) *$", text, flags=re.MULTILINE)
    return [(name, body.strip()) for name, body in zip(pieces[1::2], pieces[2::2], strict=True)]


def _range(text: str, path: Path) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(
            f"{path}: `## turns` is {text!r}. It must give the smallest and largest number of questions, such as 2-8."
        )
    return int(match[1]), int(match[2])
