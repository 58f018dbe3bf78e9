"""Turns of a record: conversations, messages with content parts, questions, Alpaca's instructions, captions.

This module knows of images only their number: `formats` finds them, and checks the turns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qllava.conversation import IMAGE_PARTS, IMAGE_TOKEN, TEXT_PARTS, Turn, ask, joined
from qllava.data.keys import LEARNED, REFUSED_OF_TURNS, Keys, flags, is_said, refuse
from qllava.data.problems import Unusable

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_SOURCES = ("image", "path", "url", "image_url", "file", "base64", "source")
"""Keys of a content part under which chat APIs and transformers give the image itself."""


@dataclass
class Said:
    """The turns of a record, before they are checked."""

    turns: list[Turn] = field(default_factory=list)
    """Turns of user and assistant, in any order."""
    system: str | None = None
    """Text of a leading system turn."""
    lost: bool = False
    """Whether a leading turn that was not the user's was dropped."""
    images: list[Any] = field(default_factory=list)
    """Images that content parts name themselves, in order."""
    bare: int = 0
    """Number of content parts that are an image and do not name it."""
    unread: dict[str, Any] = field(default_factory=dict)
    """Values of keys of turns and parts that are not read, by keys as `messages[].name`."""

    def not_read(self, key: str, values: dict[str, Any], read: Sequence[str]) -> None:
        """Record the values under keys that are not read."""
        for name, value in values.items():
            if name not in read and is_said(value):
                self.unread.setdefault(f"{key}.{name}", value)


def conversation(value: Any, kind: str, key: str) -> Said:
    """Read a list of turns, which may be JSON in a text.

    Args:
        value: The list.
        kind: `conversations` or `messages`, which decides the keys of a turn.
        key: Key of the list as the record spells it.

    Raises:
        Unusable: A turn cannot be read.
    """
    said = Said()
    for number, turn in enumerate(_turns_of(value, key), start=1):
        if not isinstance(turn, dict):
            role_key, content_key = _names({}, kind)
            hint = f"write an object with {role_key!r} and {content_key!r}"
            raise Unusable("turns", f"turn {number} is {kind_of(turn)}", hint)
        _add_turn(said, turn, number, kind, key)
    if said.turns and said.turns[0].role == "assistant":
        said.lost = True
        said.turns.pop(0)
    if said.images and said.bare:
        problem = "some image parts name their image and some do not"
        raise Unusable("image names", problem, "name all of them in the parts, or all under images")
    return said


def _turns_of(value: Any, key: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            problem = f"the text under {key} begins with [ and is not valid JSON"
            raise Unusable("not JSON", problem, "write it as JSON") from None
    if not isinstance(value, list) or not value:
        raise Unusable(
            "turns", f"{key} must be a list of turns, not {kind_of(value)}", "write a question and an answer"
        )
    return value


def _names(turn: dict[str, Any], kind: str) -> tuple[str, str]:
    """Return the keys of role and content: those of the kind, or those of the other kind if only they are present."""
    own, other = (("from", "role"), ("value", "content")), (("role", "from"), ("content", "value"))
    pairs = own if kind == "conversations" else other
    role, content = (b if turn.get(a) is None and turn.get(b) is not None else a for a, b in pairs)
    return role, content


def _add_turn(said: Said, turn: dict[str, Any], number: int, kind: str, key: str) -> None:
    role_key, content_key = _names(turn, kind)
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        expected = "human or gpt" if role_key == "from" else "user or assistant"
        shown = repr(role) if isinstance(role, str) else kind_of(role) if role_key in turn else "missing"
        raise Unusable("roles", f"turn {number} has {role_key!r}: {shown[:80]}", f"expected {expected}")
    try:
        refuse(turn, REFUSED_OF_TURNS)
        obeyed = flags(turn, numbers=LEARNED)
    except Unusable as error:
        raise Unusable(error.kind, f"turn {number}: {error.problem}", error.hint) from None
    if len(set(obeyed.values())) > 1:
        problem = f"the keys {' and '.join(obeyed)} of turn {number} disagree on whether it is learned"
        raise Unusable("key refused", problem, "keep one")
    learned = next(iter(obeyed.values()), None)
    if learned and _ROLES[role] != "assistant":
        problem = f"turn {number} is to be learned ({next(iter(obeyed))}) but is not an answer"
        raise Unusable("key refused", problem, "only answers are learned: remove the key")
    content = turn.get(content_key)
    if isinstance(content, list):
        content = _joined(said, content, number, f"{key}[].{content_key}[]")
    if not isinstance(content, str):
        raise Unusable("no text", f"turn {number} has no text under {content_key!r}", "write it there")
    refused = (name for name in turn if name.strip().lower() in REFUSED_OF_TURNS)  # empty, or `refuse` had raised
    said.not_read(f"{key}[]", turn, (role_key, content_key, *obeyed, *refused))
    if _ROLES[role] != "system":
        said.turns.append(Turn("user" if _ROLES[role] == "user" else "assistant", content, learned is not False))
    elif number > 1:
        raise Unusable("turns", "a system prompt comes after another turn", "move it to the start")
    else:
        said.system = content


def _joined(said: Said, parts: list[Any], number: int, key: str) -> str:
    """Return content given as a list of parts as text, with every image at its place."""
    pieces: list[str | None] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind is None:  # Qwen's parts have no type; their only key is the kind
            kind = next((name for name in ("text", "image") if part.get(name) is not None), None)
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in IMAGE_PARTS:
            pieces.append(None)
            source = next((part[name] for name in _SOURCES if part.get(name) is not None), None)
            if source is None:
                said.bare += 1
            else:
                said.images.append(_named(source, is_base64=part.get("base64") == source))
        else:
            raise Unusable(
                "turns",
                f'turn {number} has a part that is neither {{"type": "image"}} nor {{"type": "text", "text": ...}}',
                "write it as one of them, and name the images under images",
            )
        said.not_read(key, part, ("type", "text", *_SOURCES))
    return joined(pieces)


def _named(source: Any, *, is_base64: bool) -> Any:
    """Return the image of an image part as a record would name it: a path, an address, a data URL."""
    if isinstance(source, dict) and isinstance(source.get("url"), str):
        return source["url"]
    if isinstance(source, dict) and source.get("type") == "base64":
        source, is_base64 = source.get("data"), True
    return f"data:;base64,{source}" if is_base64 and isinstance(source, str) else source


def question(keys: Keys, images: int) -> Said:
    """Read one question and its answer.

    Raises:
        Unusable: One of them is not a text.
    """
    asked = _text(keys, "question")
    answer = _text(keys, "answer")
    return Said([Turn("user", asked if IMAGE_TOKEN in asked else ask(asked, images)), Turn("assistant", answer)])


def alpaca(keys: Keys, images: int) -> Said:
    """Read an Alpaca record: earlier rounds under `history`, then `instruction`, and below it `input`.

    Images come first if no question contains `<image>`.

    Raises:
        Unusable: A value has the wrong type.
    """
    asked, answer = _text(keys, "question"), _text(keys, "answer")
    if keys.spelled["question"] == "instruction" and is_said(keys.get("input")):
        asked = f"{asked}\n{_text(keys, 'input')}"
    rounds = listed(keys.get("history") or [])
    if not isinstance(rounds, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(words, str) for words in pair) for pair in rounds
    ):
        raise Unusable("turns", "the history is not a list of pairs", "write [[question, answer], ...]")
    words = [*(words for pair in rounds for words in pair), asked]
    if not any(IMAGE_TOKEN in one for one in words):
        words[0] = ask(words[0], images)
    turns = [Turn("assistant" if at % 2 else "user", one) for at, one in enumerate([*words, answer])]
    return Said(turns)


def caption(keys: Keys, images: int) -> Said:
    """Read a caption as the answer to a question that consists of its images.

    Raises:
        Unusable: The caption is not a text.
    """
    return Said([Turn("user", ask("", images)), Turn("assistant", _text(keys, "caption"))])


def _text(keys: Keys, meaning: str) -> str:
    value = keys.get(meaning)
    if not isinstance(value, str):
        key = keys.spelled.get(meaning, meaning)
        raise Unusable(
            "no text", f"the {key} is {kind_of(value) if meaning in keys.spelled else 'missing'}", "write it as text"
        )
    return value


def listed(value: Any) -> Any:
    """Return the list that a text contains as JSON, as in tables; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):  # a file may be called "[1].png"
            return value
    return value


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value in words."""
    if value is None:
        return "null"
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")
