"""Conversion of records into examples; the format of a record is recognized, not declared.

    LLaVA     {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}
    messages  {"id", "images", "messages": [{"role": "user" | "assistant", "content"}, ...]}
    question  {"id", "image", "question", "answer", "type"}
    Alpaca    {"instruction", "input", "output", "history", "system"}
    caption   {"image", "caption"}

ShareGPT's records are LLaVA's. A record names no image, one, or a list of them, relative to the image folder, and its
questions contain one `<image>` for each; `keys` lists the aliases of every key, and `turns` reads the conversation.
`id` and `type` may be missing.

Two rules are LLaVA's own: `<image>` moves to the start of its turn and is followed by a newline, and outer white space
of the turn is removed; a leading turn that is not the human's is dropped (a system prompt is kept as such). If one turn
has several images, they stay where they are: their places may have a meaning ("is <image> left of <image>?").

Every other problem is a `RecordError` with file, line or example, id, what was expected and what to do.
"""

from __future__ import annotations

import base64
import binascii
import os
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from qllava.conversation import IMAGE_TOKEN, Conversation, Turn, ask
from qllava.data.keys import KINDS, Keys, images_named, is_said, keys_of, obey
from qllava.data.problems import Place, Problem, RecordError, Unusable, check_unicode, is_unicode
from qllava.data.records import is_folder, read_records
from qllava.data.turns import Said, alpaca, caption, conversation, kind_of, listed, question
from qllava.data.unpacked import bytes_or_path, unpack

_COMMON = ("id", "image", "system", "type")


@dataclass(frozen=True)
class Example:
    """One example of a data file, checked."""

    id: str
    """Id of the example, or its place in the file if it has none."""
    images: tuple[Path, ...]
    """Paths of the images in the order of their `<image>`; each exists."""
    conversation: Conversation
    """Conversation that begins with the user and ends with the assistant; no turn is empty."""
    place: Place
    """Place of the example in its file, for messages: "train.json, example 3"."""
    type: str | None = None
    """Kind of question, if the record names it."""
    lost: bool = False
    """Whether a leading turn that was not the human's was dropped."""
    unread: tuple[str, ...] = ()
    """Keys of the record that have a value and are not read, in order."""

    @property
    def where(self) -> str:
        """Place and id, as messages begin."""
        return f"{self.place}, id {self.id}"

    def problem(self, kind: str, problem: str, hint: str) -> RecordError:
        """Return an error about this example."""
        return RecordError(Problem(kind, problem, hint, self.place, self.id))


def read_examples(path: Path, image_folder: Path | None = None) -> list[Example]:
    """Read a data file; images are in `image_folder`, or in the folder of the file.

    Raises:
        InputError: An example cannot be used; the message is about the first one.
    """
    folder = ImageFolder(image_folder if image_folder is not None else folder_of(path))
    examples = [to_example(record, place, folder) for place, record in read_records(path)]
    if not examples:
        raise no_records(path)
    return examples


def read_these(path: Path, image_folder: Path | None, wanted: Collection[int]) -> list[Example]:
    """Return the examples of a file with these indices, counted from 0, in the file's order."""
    folder = ImageFolder(image_folder if image_folder is not None else folder_of(path))
    return [
        to_example(record, place, folder)
        for number, (place, record) in enumerate(read_records(path))
        if number in wanted
    ]


def folder_of(path: Path) -> Path:
    """Return the default image folder of a data file: the folder of the file, or the data folder itself."""
    return path if is_folder(path) else path.parent


def count_of(images: int) -> str:
    """Return a number of images for messages, as "1 image" or "2 images"."""
    return f"{images} image" if images == 1 else f"{images} images"


def no_records(path: Path) -> RecordError:
    """Return the error for a file without examples."""
    return RecordError(
        Problem("no examples", "the file contains no examples", "give it at least one conversation", Place(str(path)))
    )


class ImageFolder:
    """Folder of images; names that lead out of it are refused."""

    def __init__(self, folder: Path) -> None:
        self._root = os.path.normpath(folder.absolute())
        self._present: dict[str, Path] = {}
        self._spelled: dict[Path, dict[str, str]] = {}

    def find(self, name: Any) -> Path:
        """Return the path of an image.

        Args:
            name: A file name relative to the folder, a `file://` or `data:` URL, the bytes of an image, the
                {"bytes", "path"} of Hugging Face, or the Path of an image that was unpacked from a container.

        Raises:
            Unusable: The name leads out of the folder, or the image is missing.
        """
        name = bytes_or_path(name)
        if isinstance(name, bytes):
            return unpack(name)
        if isinstance(name, Path):
            return name
        if not isinstance(name, str) or not name:
            problem = "the image must be a file name or a list of file names"
            raise Unusable("image names", problem, "write it as text")
        if name in self._present:
            return self._present[name]
        if name.startswith("data:"):
            return unpack(_data_of(name))
        shown = repr(name if len(name) <= 200 else name[:200] + "...")
        path = url2pathname(urlsplit(name).path) if name.startswith("file:///") else name
        if "://" in path:
            raise Unusable("image missing", f"the image {shown} is an address", "download it, and name the file")
        # Links are not resolved: a link in the folder that points elsewhere was put there by the folder's owner.
        full = Path(os.path.normpath(Path(self._root, path)))
        if not is_unicode(str(full)):
            raise Unusable("image missing", f"the path of the image {shown} is not UTF-8", "rename the file or folder")
        if not full.is_relative_to(self._root):
            problem = f"the image {shown} is outside the image folder {self._root}"
            raise Unusable("image outside", problem, "give its path relative to that folder")
        found = full if _is_file(full) else self._spelled_otherwise(full)
        if found is None:
            problem = f"the image {shown} is not in the image folder {self._root}"
            raise Unusable("image missing", problem, "add it or give the right folder")
        return self._present.setdefault(name, found)

    def has(self, name: str) -> Path | None:
        """Return the path of an image if there is a file of this name in the folder; else None."""
        try:
            return None if "://" in name or name.startswith("data:") else self.find(name)
        except Unusable:
            return None

    def _spelled_otherwise(self, full: Path) -> Path | None:
        """Find a file whose name looks the same: "é" is one character (NFC) or two (NFD, as macOS writes names)."""
        if str(full).isascii():
            return None
        found = Path(self._root)
        for part in full.relative_to(self._root).parts:
            if found not in self._spelled:
                names = [file.name for file in found.iterdir()] if found.is_dir() else []
                self._spelled[found] = {unicodedata.normalize("NFC", n): n for n in names if not n.isascii()}
            found = found / self._spelled[found].get(unicodedata.normalize("NFC", part), part)
        return found if _is_file(found) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a file name (pixels in base64, for one), or with a NUL in it
        return False


def _data_of(url: str) -> bytes:
    """Return the bytes of a `data:` URL."""
    head, comma, data = url.partition(",")
    try:
        if not comma:
            raise ValueError
        return base64.b64decode(data, validate=True) if head.endswith(";base64") else unquote_to_bytes(data)
    except (ValueError, binascii.Error):
        raise Unusable("image names", f"the data URL {url[:40]!r}... cannot be decoded", "write it again") from None


def to_example(record: Any, place: Place, folder: ImageFolder) -> Example:
    """Check one record and convert it into an Example.

    Args:
        record: Value read from a data file; anything but an object is refused.
        place: Place of the record, for messages.
        folder: Folder of the images that the record names.

    Raises:
        RecordError: The record cannot be used.
    """
    id: str | None = None
    try:
        if not isinstance(record, dict):
            problem = f"an example is a JSON object, not {kind_of(record)}"
            raise Unusable("not an example", problem, "see the formats in docs/data.md")
        keys = keys_of(record)
        id = _id(keys.get("id"))
        obeyed = obey(record)
        said, read = _said(keys)
        images = tuple(folder.find(image) for image in _images(keys, said))
        conversation = _checked(_system(keys, said), said.turns, len(images))
        type = keys.get("type")
        if type is not None and not isinstance(type, str):
            raise Unusable("type", f"the type is {kind_of(type)}", "give it as text")
        check_unicode(type or "", "the type", "type")
        unread = {key: v for key, v in keys.unread(read).items() if key not in obeyed} | said.unread
        _check_unread(unread, images, folder, place)
    except Unusable as error:
        raise RecordError(Problem(error.kind, error.problem, error.hint, place, id)) from None
    except ValueError as error:  # of Conversation itself
        problem, _, hint = str(error).partition("; ")
        raise RecordError(Problem("turns", problem, hint, place, id)) from None
    name = place.within if id is None else id
    return Example(name, images, conversation, place, type, said.lost, tuple(unread))


def _id(id: Any) -> str | None:
    """Return the id of a record as text; None if it has none."""
    if id is None or id == "":
        return None
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise Unusable("id", f"the id is {kind_of(id)}", "give it as text or a whole number")
    check_unicode(str(id), "the id", "id")
    return str(id)


def _said(keys: Keys) -> tuple[Said, tuple[str, ...]]:
    """Return the turns of a record of any kind, and the meanings of the keys that are read."""
    told = [kind for kind in KINDS if kind in keys.values and (kind != "question" or keys.spelled[kind] == "question")]
    found = [kind for kind in told if keys.get(kind) is not None] or told
    if len(found) > 1:
        raise _not_a_record(" and ".join(found))
    if found and found[0] != "question":
        return conversation(keys.get(found[0]), found[0], keys.spelled[found[0]]), (*_COMMON, found[0])
    images = len(_listed(keys))
    if "question" in keys.values:
        if keys.spelled["question"] == "instruction" or is_said(keys.get("history")):
            return alpaca(keys, images), (*_COMMON, "question", "input", "answer", "history")
        return question(keys, images), (*_COMMON, "question", "answer")
    # A line of LLaVA's question files has its question under text: {"question_id", "image", "text"}.
    asks = (keys.spelled.get("caption"), keys.spelled.get("id")) == ("text", "question_id")
    if "caption" in keys.values and images and not asks:
        return caption(keys, images), (*_COMMON, "caption")
    raise _not_a_record("none of them")


def _not_a_record(had: str) -> Unusable:
    problem = f"an example has one of the keys {', '.join(KINDS)}, this one has {had}"
    return Unusable("not an example", problem, "see the formats in docs/data.md")


def _listed(keys: Keys) -> list[Any]:
    """Return the images that the record names as a list; null, "" and [] mean no images."""
    if keys.spelled.get("image") == "image" and "images" in keys.rest:
        raise Unusable("image names", "the example has both image and images", "keep one")
    given = listed(keys.get("image"))
    if not is_said(given):
        return []
    return given if isinstance(given, list) else [given]


def _images(keys: Keys, said: Said) -> list[Any]:
    """Return the images that the record names, or those that its content parts name."""
    listed = _listed(keys)
    if listed and said.images:
        problem = f"the images are named under {keys.spelled['image']} and in the content parts"
        raise Unusable("image names", problem, "keep one")
    return listed or said.images


def _system(keys: Keys, said: Said) -> str | None:
    """Return the system prompt, from a system turn or a key of the record; a blank one counts as none."""
    system = keys.get("system")
    if system is not None and not isinstance(system, str):
        raise Unusable("turns", f"the system prompt is {kind_of(system)}", "give it as text")
    if system is None or not system.strip():
        return said.system
    if said.system not in (None, system):
        problem = f"the record has a system turn and another prompt under {keys.spelled['system']!r}"
        raise Unusable("turns", problem, "keep one")
    return system


def _check_unread(unread: dict[str, Any], images: tuple[Path, ...], folder: ImageFolder, place: Place) -> None:
    """Raise Unusable for a key that is not read and names an image that the record does not show otherwise."""
    for key, value in unread.items():
        for name in images_named(value):
            beside = ImageFolder(Path(place.file).parent)
            found = name if isinstance(name, Path) else folder.has(name) or beside.has(name)
            if found is not None and found not in images:
                what = "contains an image" if isinstance(name, Path) else f"names the image {name[:200]!r}"
                problem = f"the key {key!r} is not read and {what}"
                raise Unusable("image not read", problem, "put it under 'images', or remove the key")


def _checked(system: str | None, turns: list[Turn], images: int) -> Conversation:
    """Return the conversation with `<image>` in its place, or raise Unusable if roles, images or text do not fit."""
    if not turns:
        raise Unusable("turns", "the conversation has no turn of the human", "write a question and an answer")
    placed = tuple(replace(t, content=_image_first(t.content)) if t.role == "user" else t for t in turns)
    conversation = Conversation(placed, system)
    if placed[-1].role == "user":
        problem = "the conversation ends with the user, so it has no answer to learn"
        raise Unusable("turns", problem, "add it or drop the turn")
    for number, turn in enumerate(placed, start=1):
        check_unicode(turn.content, f"turn {number}")
        if not turn.content.strip():
            what = "question" if turn.role == "user" else "answer"
            raise Unusable("empty", f"turn {number} is an empty {what}", "write it or drop the example")
        if turn.role == "assistant" and IMAGE_TOKEN in turn.content:
            problem = f"turn {number} is an answer with {IMAGE_TOKEN} in it"
            raise Unusable("images", problem, "images belong in questions")
    if system is not None:
        check_unicode(system, "the system prompt")
        if IMAGE_TOKEN in system:
            raise Unusable("images", f"the system prompt contains {IMAGE_TOKEN}", "images belong in questions")
    if not any(turn.learned for turn in placed if turn.role == "assistant"):
        raise Unusable("nothing learned", "no answer of this conversation is used for training", "remove the record")
    marks = sum(turn.content.count(IMAGE_TOKEN) for turn in placed)
    if marks != images:
        problem = f"the questions hold {marks} {IMAGE_TOKEN}, the example names {count_of(images)}"
        raise Unusable("images", problem, "make them equal")
    return conversation


def _image_first(content: str) -> str:
    if content.count(IMAGE_TOKEN) != 1:
        return content
    return ask(content.replace(IMAGE_TOKEN, "").strip())
