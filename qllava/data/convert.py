"""`Example` -> a row of a data file, in LLaVA's form or as messages.

Reading the row again gives the same example, place excepted. What was lost when the first row was read (a leading turn
that was not the human's) stays lost.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qllava.data.formats import Example

_SIDES = {"system": "system", "user": "human", "assistant": "gpt"}


def llava_row(example: Example, image_folder: Path) -> dict[str, Any]:
    """The example as {"id", "image", "conversations", "type"}; one picture is a name, several are a list.

    image_folder: the names of pictures are relative to it. Raises RowError for a picture that lies elsewhere.
    """
    names = _names(example, image_folder)
    image = {"image": names[0] if len(names) == 1 else names} if names else {}
    turns = [{"from": _SIDES[role], "value": content, **unlearned} for role, content, unlearned in _said(example)]
    return {"id": example.id, **image, "conversations": turns, **_type(example)}


def messages_row(example: Example, image_folder: Path) -> dict[str, Any]:
    """The example as {"id", "images", "messages", "type"}; each content is a text, so that `<image>` keeps its place.

    image_folder: the names of pictures are relative to it. Raises RowError for a picture that lies elsewhere.
    """
    names = _names(example, image_folder)
    images = {"images": names} if names else {}
    turns = [{"role": role, "content": content, **unlearned} for role, content, unlearned in _said(example)]
    return {"id": example.id, **images, "messages": turns, **_type(example)}


def _said(example: Example) -> list[tuple[str, str, dict[str, int]]]:
    """Role, content, and of an answer that is not learned the key that says so."""
    conversation = example.conversation
    said: list[tuple[str, str, dict[str, int]]] = []
    if conversation.system is not None:
        said.append(("system", conversation.system, {}))
    return said + [(t.role, t.content, {} if t.learned else {"weight": 0}) for t in conversation.turns]


def _type(example: Example) -> dict[str, str]:
    return {} if example.type is None else {"type": example.type}


def _names(example: Example, image_folder: Path) -> list[str]:
    root = Path(os.path.normpath(image_folder.absolute()))
    names = []
    for image in example.images:
        full = Path(os.path.normpath(image.absolute()))
        if not full.is_relative_to(root):
            problem = f"the picture {str(image)!r} lies outside the image folder {root}"
            raise example.problem("picture outside", problem, "copy it there, or give its folder")
        names.append(full.relative_to(root).as_posix())
    return names
