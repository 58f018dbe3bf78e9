"""Rows -> `Example`. What a row is is recognized, not declared.

    LLaVA     {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}
    messages  {"id", "images", "messages": [{"role": "user" | "assistant", "content"}, ...]}
    question  {"id", "image", "question", "answer", "type"}

ShareGPT's rows are LLaVA's. A row names no picture, one, or a list of them, relative to the image folder, and its
questions hold one `<image>` for each. `image` and `images` mean the same; `id` and `type` may be missing.

Two rules are LLaVA's own: `<image>` moves to the start of its turn, is followed by a newline, and the turn loses its
outer white space; a leading turn that is not the human's is dropped (a system prompt is kept as such). Where one
turn holds several pictures, they stay where they are: their places may mean something ("is <image> left of <image>?").

Everything else that is wrong is a `RowError` with file, line or row, id, what was expected and what to do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qllava.conversation import IMAGE_TOKEN, Conversation, Turn, ask
from qllava.data.problems import HALF, Place, Problem, RowError, is_unicode
from qllava.data.rows import is_folder, read_rows

_KINDS = ("conversations", "messages", "question")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One row of a data file, checked.

    id: the row's own, or its place in the file.
    images: the pictures in the order of their `<image>`; each exists.
    conversation: begins with the user, ends with the assistant; every answer says something.
    place: where it stands, for messages: "train.json, row 3".
    type: the kind of question, where the row tells it.
    lost: a leading turn that was not the human's, and was dropped.
    """

    id: str
    images: tuple[Path, ...]
    conversation: Conversation
    place: Place
    type: str | None = None
    lost: bool = False

    @property
    def where(self) -> str:
        """The place and the id, as messages begin."""
        return f"{self.place}, id {self.id}"

    def problem(self, kind: str, problem: str, hint: str) -> RowError:
        """An error of this row."""
        return RowError(Problem(kind, problem, hint, self.place, self.id))


class _Unusable(ValueError):
    """What is wrong with a row, before it is known where the row stands: kind, problem, hint."""

    def __init__(self, kind: str, problem: str, hint: str) -> None:
        super().__init__(kind, problem, hint)


def read_examples(path: Path, image_folder: Path | None = None) -> list[Example]:
    """Read a data file; pictures lie in `image_folder`, or beside the file.

    Raises InputError for the first row that cannot be used.
    """
    pictures = Pictures(image_folder if image_folder is not None else folder_of(path))
    examples = [to_example(row, place, pictures) for place, row in read_rows(path)]
    if not examples:
        raise no_rows(path)
    return examples


def read_some(path: Path, image_folder: Path | None, count: int, total: int) -> list[Example]:
    """At most `count` of a file's `total` rows, evenly spaced; the others are not kept."""
    pictures = Pictures(image_folder if image_folder is not None else folder_of(path))
    step = max(1, -(-total // count)) if count else total + 1
    rows = enumerate(read_rows(path))
    return [to_example(row, place, pictures) for index, (place, row) in rows if index % step == 0 and count]


def folder_of(path: Path) -> Path:
    """Where the pictures of a data file lie when nothing else is said: beside it, or in the folder that it is."""
    return path if is_folder(path) else path.parent


def count_of(pictures: int) -> str:
    """A number of pictures in words: "1 picture"."""
    return f"{pictures} picture" if pictures == 1 else f"{pictures} pictures"


def no_rows(path: Path) -> RowError:
    """The error of a file that holds nothing."""
    return RowError(Problem("no rows", "the file holds no rows", "give it at least one conversation", Place(str(path))))


class Pictures:
    """A folder of pictures, which no name may leave."""

    def __init__(self, folder: Path) -> None:
        self._root = os.path.normpath(folder.absolute())
        self._present: dict[str, Path] = {}

    def find(self, name: str | Path) -> Path:
        """The path of a picture; a Path is one that a container was unpacked to, and is taken as it is.

        Raises ValueError (as a row that cannot be used) when a name leaves the folder or nothing is there.
        """
        if isinstance(name, Path):
            return name
        if name in self._present:
            return self._present[name]
        shown = repr(name if len(name) <= 200 else name[:200] + "...")
        if "://" in name:
            raise _Unusable("picture missing", f"the picture {shown} is an address", "download it, and name the file")
        # By the letters of the path only: a link inside the folder that points elsewhere was put there by its owner.
        full = Path(os.path.normpath(Path(self._root, name)))
        if not is_unicode(str(full)):
            raise _Unusable("picture missing", f"the path of the picture {shown} is not UTF-8", "rename what is not")
        if not full.is_relative_to(self._root):
            problem = f"the picture {shown} lies outside the image folder {self._root}"
            raise _Unusable("picture outside", problem, "name it relative to it")
        try:
            there = full.is_file()
        except OSError:  # too long for a file name: pixels in base64, for one
            there = False
        if not there:
            problem = f"the picture {shown} is not in the image folder {self._root}"
            raise _Unusable("picture missing", problem, "add it or give the right folder")
        return self._present.setdefault(name, full)


def to_example(row: Any, place: Place, pictures: Pictures) -> Example:
    """Check one row and bring it into the one form. Raises RowError."""
    id = (None if row.get("id") == "" else row.get("id")) if isinstance(row, dict) else None
    said = str(id) if isinstance(id, str | int) and not isinstance(id, bool) and is_unicode(str(id)) else None
    try:
        if not isinstance(row, dict):
            raise _Unusable("not a row", f"a row is a JSON object, not {_kind(row)}", "see the formats in docs/data.md")
        if isinstance(id, str) and said is None:
            raise _Unusable("id", f"the id {HALF}", "write the character whole")
        if id is not None and said is None:
            raise _Unusable("id", f"the id is {_kind(id)}", "give it as text or a whole number")
        system, turns, lost = _turns(row)
        images = tuple(pictures.find(image) for image in _image_names(row))
        conversation = _checked(system, turns, len(images))
        kind = row.get("type")
        if kind is not None and not isinstance(kind, str):
            raise _Unusable("type", f"the type is {_kind(kind)}", "give it as text")
    except _Unusable as error:
        kind, problem, hint = error.args
        raise RowError(Problem(kind, problem, hint, place, said)) from None
    except ValueError as error:  # of Conversation itself
        problem, _, hint = str(error).partition("; ")
        raise RowError(Problem("turns", problem, hint, place, said)) from None
    return Example(place.within if said is None else said, images, conversation, place, kind, lost)


def _turns(row: dict[str, Any]) -> tuple[str | None, list[Turn], bool]:
    """System prompt and turns of any kind of row, and whether a leading turn of the wrong side was dropped."""
    found = [key for key in _KINDS if row.get(key) is not None] or [key for key in _KINDS if key in row]
    if len(found) != 1:
        had = " and ".join(found) or "none of them"
        problem = f"a row has one of the keys {', '.join(_KINDS)}, this one has {had}"
        raise _Unusable("not a row", problem, "see the formats in docs/data.md")
    if found == ["question"]:
        question, answer = _text(row, "question"), _text(row, "answer")
        if IMAGE_TOKEN not in question:
            question = ask(question, len(_image_names(row)))
        return None, [Turn("user", question), Turn("assistant", answer)], False
    turns = _said(row[found[0]], found[0])
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    lost = bool(turns) and turns[0][0] == "assistant"
    if lost:
        turns.pop(0)
    if any(role == "system" for role, _ in turns):
        raise _Unusable("turns", "a system prompt stands after another turn", "move it to the start")
    return system, [Turn("user" if role == "user" else "assistant", content) for role, content in turns], lost


def _said(said: Any, key: str) -> list[tuple[str, str]]:
    """Role and content of every turn that stands under `conversations` or `messages`."""
    role_key, content_key = ("from", "value") if key == "conversations" else ("role", "content")
    if not isinstance(said, list) or not said:
        problem = f"{key} must be a list of turns, not {_kind(said)}"
        raise _Unusable("turns", problem, "write a question and an answer")
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(said, start=1):
        if not isinstance(turn, dict):
            problem = f"turn {number} is {_kind(turn)}"
            raise _Unusable("turns", problem, f"write an object with {role_key!r} and {content_key!r}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            expected = "human or gpt" if role_key == "from" else "user or assistant"
            shown = repr(role) if isinstance(role, str) else _kind(role) if role_key in turn else "missing"
            raise _Unusable("roles", f"turn {number} has {role_key!r}: {shown[:80]}", f"expected {expected}")
        content = turn.get(content_key)
        if key == "messages" and isinstance(content, list):
            content = _joined(content, number)
        if not isinstance(content, str):
            raise _Unusable("no text", f"turn {number} has no text under {content_key!r}", "write it there")
        turns.append((_ROLES[role], content))
    return turns


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
            raise _Unusable(
                "turns",
                f'turn {number} has a part that is neither {{"type": "image"}} nor {{"type": "text", "text": ...}}',
                "write it as one of them, and name the pictures under images",
            )
    return ask("".join(texts), images)


def _image_names(row: dict[str, Any]) -> list[str | Path]:
    """The names of a row's pictures, from `image` or `images`; null, "" and [] are none."""
    given = [row[key] for key in ("image", "images") if row.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise _Unusable("picture names", "the row has both image and images", "keep one")
    names = given[0] if given else []
    names = [names] if isinstance(names, str | Path) else names
    if not isinstance(names, list) or not all(isinstance(name, str | Path) and name != "" for name in names):
        raise _Unusable("picture names", "the picture must be a file name or a list of file names", "write it as text")
    return names


def _checked(system: str | None, turns: list[Turn], images: int) -> Conversation:
    """The conversation, `<image>` at its place; _Unusable when roles, pictures or words do not fit."""
    if not turns:
        raise _Unusable("turns", "the conversation has no turn of the human", "write a question and an answer")
    placed = tuple(Turn(turn.role, _image_first(turn.content)) if turn.role == "user" else turn for turn in turns)
    conversation = Conversation(placed, system)
    if placed[-1].role == "user":
        problem = "the conversation ends with the user, so there is no answer to learn"
        raise _Unusable("turns", problem, "add it or drop the turn")
    for number, turn in enumerate(placed, start=1):
        _check_text(turn.content, f"turn {number}")
        if not turn.content.strip():
            what = "question" if turn.role == "user" else "answer"
            raise _Unusable("empty", f"turn {number} is an empty {what}", "write it or drop the row")
        if turn.role == "assistant" and IMAGE_TOKEN in turn.content:
            problem = f"turn {number} is an answer with {IMAGE_TOKEN} in it"
            raise _Unusable("pictures", problem, "pictures belong into questions")
    if system is not None:
        _check_text(system, "the system prompt")
        if IMAGE_TOKEN in system:
            raise _Unusable("pictures", f"the system prompt holds {IMAGE_TOKEN}", "pictures belong into questions")
    marks = sum(turn.content.count(IMAGE_TOKEN) for turn in placed)
    if marks != images:
        problem = f"the questions hold {marks} {IMAGE_TOKEN}, the row names {count_of(images)}"
        raise _Unusable("pictures", problem, "make them equal")
    return conversation


def _check_text(text: str, what: str) -> None:
    """Refuse what JSON can spell and no tokenizer can read."""
    if not is_unicode(text):
        raise _Unusable("no text", f"{what} {HALF}", "write the character whole")


def _image_first(content: str) -> str:
    if content.count(IMAGE_TOKEN) != 1:
        return content
    return ask(content.replace(IMAGE_TOKEN, "").strip())


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        problem = f"the {key} is {'missing' if key not in row else _kind(value)}"
        raise _Unusable("no text", problem, "write it as text")
    return value


def _kind(value: Any) -> str:
    """A JSON value in words."""
    if value is None:
        return "null"
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")
