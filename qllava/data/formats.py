"""Files of conversations -> `Example`. What a row is is recognized, not declared.

    LLaVA     {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}
    messages  {"id", "images", "messages": [{"role": "user" | "assistant", "content"}, ...]}
    question  {"id", "image", "question", "answer", "type"}

A file is a JSON list of such rows, or has one row per line (JSONL). A row names no picture, one, or a list of them,
relative to the image folder, and its questions hold one `<image>` for each. `image` and `images` mean the same; `id`
and `type` may be missing.

Two rules are LLaVA's own: `<image>` moves to the start of its turn, is followed by a newline, and the turn loses its
outer white space; a leading turn that is not the human's is dropped (a system prompt is kept as such). Where one
turn holds several pictures, they stay where they are: their places may mean something ("is <image> left of <image>?").

Everything else that is wrong is an `InputError` with file, line or row, id, what was expected and what to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN, Conversation, Turn, ask

_KINDS = ("conversations", "messages", "question")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One row of a data file, checked.

    id: the row's own, or its place in the file.
    images: the pictures in the order of their `<image>`; each exists.
    conversation: begins with the user, ends with the assistant; every answer says something.
    source: where it stands, for messages: "train.json, row 3".
    type: the kind of question, where the row tells it.
    """

    id: str
    images: tuple[Path, ...]
    conversation: Conversation
    source: str
    type: str | None = None


def read_examples(path: Path, image_folder: Path | None = None) -> list[Example]:
    """Read a data file; pictures lie in `image_folder`, or beside the file.

    Raises InputError for the first row that cannot be used.
    """
    pictures = Pictures(image_folder if image_folder is not None else path.parent)
    examples = [to_example(row, source, pictures) for source, row in read_rows(path)]
    if not examples:
        raise InputError(f"{path}: the file holds no rows; give it at least one conversation.")
    return examples


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON list or a JSONL file as (source, value), unchecked.

    Raises InputError when the file cannot be read, is empty or is no JSON; JSONL rows before a bad line are yielded.
    """
    try:
        # Not str.splitlines: it also splits at U+2028 and others, which may stand unescaped inside a JSON string.
        with path.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):
                for number, row in enumerate(_parse(file.read(), path.name, 1), start=1):
                    yield f"{path.name}, row {number}", row
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path.name}, line {number}", _parse(line.rstrip(), path.name, number)
    except OSError as error:
        raise InputError(f"{path}: the data file cannot be read ({error.strerror}); check its name.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the data file is not UTF-8 text ({error.reason}); save it as UTF-8.") from error


def _parse(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}, line {line + error.lineno - 1}: this is not valid JSON ({error.msg}, column {error.colno}); "
            "a data file is a JSON list of rows, or one row per line."
        ) from error


class Pictures:
    """A folder of pictures, which no name may leave."""

    def __init__(self, folder: Path) -> None:
        self._root = os.path.normpath(folder.absolute())
        self._present: dict[str, Path] = {}

    def find(self, name: str) -> Path:
        """The path of a picture. Raises ValueError when the name leaves the folder or nothing is there."""
        if name in self._present:
            return self._present[name]
        if "://" in name:
            raise ValueError(f"the picture {name!r} is an address; download it, and name the file")
        # By the letters of the path only: a link inside the folder that points elsewhere was put there by its owner.
        full = Path(os.path.normpath(Path(self._root, name)))
        if not full.is_relative_to(self._root):
            raise ValueError(f"the picture {name!r} lies outside the image folder {self._root}; name it relative to it")
        try:
            there = full.is_file()
        except OSError:  # too long for a file name: pixels in base64, for one
            there = False
        if not there:
            raise ValueError(
                f"the picture {name[:200]!r} is not in the image folder {self._root}; add it or give the right folder"
            )
        return self._present.setdefault(name, full)


def to_example(row: Any, source: str, pictures: Pictures) -> Example:
    """Check one row and bring it into the one form. Raises InputError with the source and the row's id."""
    if not isinstance(row, dict):
        raise InputError(f"{source}: a row is a JSON object, not {_kind(row)}; see the formats in the documentation.")
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise InputError(f"{source}: the id is {_kind(name)}; give it as text or a number.")
    id = str(name) if name is not None else source.rpartition(", ")[2]
    where = f"{source}, id {name}" if name is not None else source
    try:
        system, turns = _turns(row)
        images = tuple(pictures.find(image) for image in _image_names(row))
        conversation = _checked(system, turns, len(images))
        kind = row.get("type")
        if kind is not None and not isinstance(kind, str):
            raise ValueError(f"the type is {_kind(kind)}; give it as text")
    except ValueError as error:
        raise InputError(f"{where}: {error}.") from error
    return Example(id, images, conversation, source, kind)


def _turns(row: dict[str, Any]) -> tuple[str | None, list[Turn]]:
    """System prompt and turns of any kind of row, the leading turn of the wrong side dropped."""
    found = [key for key in _KINDS if key in row]
    if len(found) != 1:
        had = " and ".join(found) or "none of them"
        raise ValueError(f"a row has one of the keys {', '.join(_KINDS)}, this one has {had}; see the formats")
    if found == ["question"]:
        question, answer = _text(row, "question"), _text(row, "answer")
        if IMAGE_TOKEN not in question:
            question = ask(question, len(_image_names(row)))
        return None, [Turn("user", question), Turn("assistant", answer)]
    role_key, content_key = ("from", "value") if found == ["conversations"] else ("role", "content")
    said = row[found[0]]
    if not isinstance(said, list) or not said:
        raise ValueError(f"{found[0]} must be a list of turns, not {_kind(said)}; write a question and an answer")
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(said, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is {_kind(turn)}; write an object with {role_key!r} and {content_key!r}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(
                f"turn {number} has {role_key!r}: {role!r}; expected "
                + ("human or gpt" if role_key == "from" else "user or assistant")
            )
        content = turn.get(content_key)
        if found == ["messages"] and isinstance(content, list):
            content = _joined(content, number)
        if not isinstance(content, str):
            raise ValueError(f"turn {number} has no text under {content_key!r}; write it there")
        turns.append((_ROLES[role], content))
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    if turns and turns[0][0] == "assistant":
        turns.pop(0)
    if any(role == "system" for role, _ in turns):
        raise ValueError("a system prompt stands after another turn; move it to the start")
    return system, [Turn("user" if role == "user" else "assistant", content) for role, content in turns]


def _joined(parts: list[Any], number: int) -> str:
    """A content given as a list of parts: pictures first, as the chat template writes it."""
    texts, images = [], 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            images += 1
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(
                f'turn {number} has a part that is neither {{"type": "image"}} nor {{"type": "text", '
                '"text": ...}; write it as one of them, and name the pictures under images'
            )
    return ask("".join(texts), images)


def _image_names(row: dict[str, Any]) -> list[str]:
    """The names of a row's pictures, from `image` or `images`; null, "" and [] are none."""
    given = [row[key] for key in ("image", "images") if row.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise ValueError("the row has both image and images; keep one")
    names = given[0] if given else []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("the picture must be a file name or a list of file names; write it as text")
    return names


def _checked(system: str | None, turns: list[Turn], images: int) -> Conversation:
    """The conversation, `<image>` at its place. Raises ValueError when roles, pictures or words do not fit."""
    if not turns:
        raise ValueError("the conversation has no turn of the human; write a question and an answer")
    placed = tuple(Turn(turn.role, _image_first(turn.content)) if turn.role == "user" else turn for turn in turns)
    conversation = Conversation(placed, system)
    if placed[-1].role == "user":
        raise ValueError("the conversation ends with the user, so there is no answer to learn; add it or drop the turn")
    for number, turn in enumerate(placed, start=1):
        if not turn.content.strip():
            what = "question" if turn.role == "user" else "answer"
            raise ValueError(f"turn {number} is an empty {what}; write it or drop the row")
        if turn.role == "assistant" and IMAGE_TOKEN in turn.content:
            raise ValueError(f"turn {number} is an answer with {IMAGE_TOKEN} in it; pictures belong into questions")
    if system is not None and IMAGE_TOKEN in system:
        raise ValueError(f"the system prompt holds {IMAGE_TOKEN}; pictures belong into questions")
    marks = sum(turn.content.count(IMAGE_TOKEN) for turn in placed)
    if marks != images:
        raise ValueError(f"the questions hold {marks} {IMAGE_TOKEN}, the row names {images} pictures; make them equal")
    return conversation


def _image_first(content: str) -> str:
    if content.count(IMAGE_TOKEN) != 1:
        return content
    return ask(content.replace(IMAGE_TOKEN, "").strip())


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"the {key} is {'missing' if key not in row else _kind(value)}; write it as text")
    return value


def _kind(value: Any) -> str:
    """A JSON value in words."""
    if value is None:
        return "null"
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")
