"""Keys of a record, in one table for every format and every kind of file.

    read        keys under their own name or a common alias (`image_path`, `query`, `response`, `caption`)
    refused     keys from which other tools learn something that is not learned here (`video`, `tools`, `mask`)
    obeyed      `weight`, `label`, `loss`, `train`: whether an answer is learned
    not read    all other keys; `check` counts them, and an image that only such a key names is an error

So a record is learned as it is written, or refused, and nothing that was meant to change it is ignored silently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qllava.data.problems import Unusable

SPELLINGS = {
    "id": ("id", "question_id", "sample_id", "uid"),
    "image": (
        "image", "images", "image_path", "image_paths", "image_file", "image_files", "img", "imgs", "img_path",
        "picture", "pictures", "file_name", "filename", "image_url",
    ),
    "conversations": ("conversations", "conversation"),
    "messages": ("messages",),
    "question": ("question", "query", "prompt", "instruction", "input"),
    "input": ("input",),
    "answer": ("answer", "response", "output", "completion"),
    "history": ("history",),
    "caption": ("caption", "text"),
    "system": ("system", "system_prompt"),
    "type": ("type",),
}  # fmt: skip
"""Keys of each meaning, the preferred one first. `image_id` is not among them: in other data sets it is a number."""

KINDS = ("conversations", "messages", "question")
"""Meanings that contain a conversation; a record has one of them, or an image and its caption."""

REFUSED = {
    **dict.fromkeys(("video", "videos", "audio", "audios", "speech"), "only images and text are learned"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), "tool calls are not learned"),
    **dict.fromkeys(("mask", "masks", "loss_mask", "assistant_masks"), "masks are not read; use 'weight' per turn"),
    **dict.fromkeys(("chosen", "rejected"), "preferences are not learned"),
    **dict.fromkeys(("chat_template", "chat_template_kwargs"), "the template is set for the whole run"),
}
"""Keys of a record or a turn that change what other tools learn, each with the hint for refusing it."""

REFUSED_OF_TURNS = {
    **REFUSED,
    **dict.fromkeys(("reasoning_content", "thinking"), "put the text to learn into the answer"),
    **dict.fromkeys(("image", "images"), "name images in the record, under 'images'"),
}

LEARNED = ("weight", "label", "loss", "train")
"""Keys that set whether an answer is learned."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
"""Suffixes of image names, used where nothing else marks a file name as that of an image."""

_MOST_TEXTS = 64  # maximum number of texts under a key that is not read to search for names of images
_DEEPEST = 4


@dataclass(frozen=True)
class Keys:
    """The keys of one record, by meaning."""

    values: dict[str, Any]
    """Value of each meaning; a meaning without a key is absent."""
    spelled: dict[str, str]
    """Key of each meaning, as it is written in the record."""
    rest: dict[str, Any]
    """Other keys with a value: those without a meaning, or whose meaning is taken from another key."""

    def get(self, meaning: str) -> Any:
        """Return the value of a meaning, or None."""
        return self.values.get(meaning)

    def unread(self, read: Collection[str]) -> dict[str, Any]:
        """Return the keys that remain unread if only the meanings in `read` are read, with their values."""
        keys = {key for meaning, key in self.spelled.items() if meaning in read}
        others = {k: self.values[m] for m, k in self.spelled.items() if k not in keys and is_said(self.values[m])}
        return {key: value for key, value in self.rest.items() if key not in keys} | others


def is_said(value: Any) -> bool:
    """Return whether a value has content: null, an empty text, list or object have none."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def keys_of(record: dict[str, Any]) -> Keys:
    """Sort the keys of a record by meaning; white space around a key and its case do not matter."""
    plain: dict[str, str] = {}
    for key in record:
        short = key.strip().lower()
        if short not in plain or key == short:
            plain[short] = key
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for meaning, spellings in SPELLINGS.items():
        present = [plain[name] for name in spellings if name in plain]
        if present:
            said = [key for key in present if is_said(record[key])] or [k for k in present if record[k] is not None]
            spelled[meaning] = (said or present)[0]
            values[meaning] = record[spelled[meaning]]
    taken = set(spelled.values())
    return Keys(values, spelled, {k: value for k, value in record.items() if k not in taken and is_said(value)})


def can_be_records(names: Iterable[str]) -> bool:
    """Return whether columns of these names can be records: one holds a conversation, or two a caption and an image."""
    meanings = keys_of(dict.fromkeys(names)).spelled.keys()
    return bool(meanings & {*KINDS}) or {"caption", "image"} <= meanings


def obey(record: dict[str, Any]) -> list[str]:
    """Return the keys of a record that ask for what is done anyway: to learn it, and no tools, no video.

    Raises:
        Unusable: A key asks for something unsupported, or turns learning off for the whole record.
    """
    refuse(record, REFUSED)
    # The class that an image shows is often called its label, and a number.
    found = flags(record, numbers=("weight", "loss", "train"))
    for key, learned in found.items():
        if not learned:
            problem = f"the record turns learning off for all of its turns ({key!r})"
            raise Unusable("nothing learned", problem, "remove the record, or set the key on single turns")
    return [*found, *(key for key in record if key.strip().lower() in REFUSED)]


def refuse(holder: dict[str, Any], refused: dict[str, str]) -> None:
    """Raise Unusable for the first key of a record or turn that is in the table and has a value."""
    for key, value in holder.items():
        why = refused.get(key.strip().lower())
        empty = isinstance(value, str) and value.strip().lower() in ("", "[]", "{}", "null", "none")
        if why is not None and is_said(value) and value is not False and not empty:
            raise Unusable("key refused", f"the key {key!r} is not supported", why)


def flags(holder: dict[str, Any], *, numbers: Collection[str]) -> dict[str, bool]:
    """Return the keys of a record or turn that set whether it is learned, each with its value.

    Args:
        holder: The record or turn.
        numbers: Keys in which 0 and 1 count; in the others they mean something else.

    Raises:
        Unusable: A weight is neither 0 nor 1.
    """
    found: dict[str, bool] = {}
    for key, value in holder.items():
        name = key.strip().lower()
        if name not in LEARNED:
            continue
        if isinstance(value, str):
            value = {"true": True, "false": False, "0": 0, "1": 1}.get(value.strip().lower())
        if isinstance(value, bool):
            found[key] = value
        elif isinstance(value, int | float) and name in numbers and value in (0, 1):
            found[key] = bool(value)
        elif isinstance(value, int | float) and name == "weight":
            raise Unusable(
                "key refused", f"the weight {value} is not supported", "write 1 for learned, 0 for only read"
            )
    return found


def images_named(value: Any) -> Iterator[str | Path]:
    """Yield texts in a key's value that look like names of images, and paths of images embedded in the file."""
    waiting = [(value, 0)]
    seen = 0
    while waiting and seen < _MOST_TEXTS:
        one, depth = waiting.pop()
        if isinstance(one, Path):
            yield one
        elif isinstance(one, str):
            seen += 1
            if len(one) < 1_000 and one.lower().endswith(IMAGE_SUFFIXES):
                yield one
        elif depth < _DEEPEST and isinstance(one, list | dict):
            inner = one if isinstance(one, list) else list(one.values())
            waiting += [(item, depth + 1) for item in inner[:_MOST_TEXTS]]
