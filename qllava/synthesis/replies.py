"""Questions and answers from the replies of a teacher, and the rules that they must keep.

A reply is JSON if the server supports a schema, otherwise blocks; a description is the whole text:

    {"turns": [{"question": "What is it?", "answer": "A cat."}]}          Question: What is it?
                                                                          ===
                                                                          Answer: A cat.

Both forms are accepted in every reply, because a server may accept a schema and ignore it. Each rule has a name, which
is used in the counts of a run and in the file of left-out tasks. For a broken rule, a sentence is sent to the teacher
with the request to write the reply again.

    refused        the teacher declined; only this is not requested again
    truncated      the reply reached the maximum length
    unreadable     the server's response did not follow the API
    empty          the reply has no text
    unparsed       neither JSON nor blocks, incomplete ones, or a question without an answer
    turns          too few or too many questions
    captions       mentions captions, annotations or given descriptions: the teacher must write as if it saw the image
    boxes          mentions bounding boxes; if a caption names a box, the word "box" is allowed
    coordinates    mentions or writes coordinates
    object         names an object that neither a caption nor a box names (see `objects`)
    self-answered  a question contains its answer: all content words of the answer are in the question
    repeated       a question occurs twice
    markup         contains a control token such as <image>, or the markers of a thinking block
    characters     contains an invalid character: a lone surrogate, or the replacement character U+FFFD
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from qllava.data.contexts import Context
from qllava.llm.completions import whole
from qllava.llm.store import Reply
from qllava.llm.thoughts import answer_of, holds_marks
from qllava.synthesis.objects import unsupported
from qllava.synthesis.words import word_set

Turns: TypeAlias = tuple[tuple[str, str], ...]
"""Question and answer of every turn; the question of a description is empty."""

RULES = (
    "refused",
    "truncated",
    "unreadable",
    "empty",
    "unparsed",
    "turns",
    "captions",
    "boxes",
    "coordinates",
    "object",
    "self-answered",
    "repeated",
    "markup",
    "characters",
)

BLOCKS = (
    "Write each question and its answer in this form, with a line === between two pairs, and nothing else:\n"
    "Question: the question\n===\nAnswer: the answer"
)
JSON_FORM = (
    'Reply with one JSON object and nothing else: {"turns": [{"question": "the question", "answer": "the answer"}]}'
)
RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "turns",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "turns": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                        "required": ["question", "answer"],
                        "additionalProperties": False,
                    },
                }
            },
            "required": ["turns"],
            "additionalProperties": False,
        },
    },
}

_SPEAKS_OF_CAPTIONS = re.compile(
    r"\bcaption(?:s|ed)?\b|\bannotat(?:ed|ions?)\b"
    r"|\b(?:provided|given|above) (?:sentences?|descriptions?|texts?|context|information|list)\b"
    r"|\b(?:according to|based on|from) the (?:sentences?|descriptions?)\b"
    r"|\bthe (?:sentences?|descriptions?) (?:say|mention|state|indicate|tell)s?\b",
    re.IGNORECASE,
)
_BOXES = re.compile(r"\bbox(?:es)?\b", re.IGNORECASE)
_BOUNDING = re.compile(r"\bbounding[ -]box(?:es)?\b|\bb-?box(?:es)?\b", re.IGNORECASE)
_COORDINATES = re.compile(
    r"\bcoordinates?\b|[\[(]\s*[01]?\.\d+\s*,|[\[(]\s*[01]\s*,\s*[01]?\.\d|(?<!\d)[01]?\.\d{3}(?!\d)", re.IGNORECASE
)
_MARKUP = re.compile(r"<image>|</?s>|<\|[\w ]+\|>|\[/?INST\]")
_DECLINES = re.compile(
    r"\W*(?:(?:i['\u2019]m|i am) (?:very |so |really )?sorry|(?:sorry|unfortunately|i apologi[sz]e)\b.{0,40}"
    r"\bi(?: can| am|['\u2019]m)"
    r"|i (?:can ?not(?! only)|can['\u2019]t|won['\u2019]t|will not|must decline|am unable|am not able|refuse)"
    r"|i['\u2019]m (?:unable|not able)|as an? (?:ai|artificial|language)\b)",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t]*```[ \t]*\w*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"^[ \t*#]*(Question|Answer)(?: *\d+)? *:[ *]*", re.MULTILINE | re.IGNORECASE)
_RULER = re.compile(r"^\s*={3,}\s*$", re.MULTILINE)
_LIGHT = word_set(
    """
    a an the this that these those it its he she they his her their them there here is are was were be been
    being am do does did has have had and or but of in on at to from with by for as into over under one some any
    what which who whom whose where when why how can could would will may might i you we picture image photo
    photograph scene
    """
)


@dataclass(frozen=True)
class Broken:
    """A rule that a reply breaks."""

    rule: str
    """Name of the rule, one of RULES."""
    sentence: str
    """What is wrong, in the words sent to the teacher."""


@dataclass(frozen=True)
class Verdict:
    """Content of a reply, and the rules that it breaks; it can be used if it breaks none."""

    turns: Turns
    """Questions and answers of the reply."""
    broken: tuple[Broken, ...]
    """Rules that the reply breaks."""

    @property
    def reason(self) -> str | None:
        """Name under which the reply is counted: the first broken rule in the order of RULES; None if it is usable."""
        return min((broken.rule for broken in self.broken), key=RULES.index, default=None)


def judge(reply: Reply, turns: tuple[int, int] | None, context: Context) -> Verdict:
    """Read a reply and check every rule.

    Args:
        reply: Reply of the teacher.
        turns: Smallest and largest number of questions; None for a description.
        context: Captions and boxes of the image.
    """
    text = answer_of(reply.text)
    if reply.finish_reason == "unreadable":
        return _refused("unreadable", "it did not arrive in a readable form")
    if reply.refusal is not None or reply.finish_reason == "content_filter":
        return _refused("refused", "it was declined")
    said = (("", text),) if turns is None else parse(text)
    if _DECLINES.match(text) or any(_DECLINES.match(answer) for _, answer in said):
        return _refused("refused", "it was declined")
    if reply.finish_reason == "length":
        return _refused("truncated", "it was cut off before its end, so it must become much shorter")
    if not text:
        return _refused("empty", "it was empty")
    if not said:
        return _refused("unparsed", "it was not in the form that was asked for")
    broken = [*_count(said, turns), *_source(said, context), *_questions(said)]
    if any(_MARKUP.search(part) or holds_marks(part) for pair in said for part in pair):
        broken.append(Broken("markup", "it spells a control token such as <image>"))
    if any("\ufffd" in part for pair in said for part in pair):
        broken.append(Broken("characters", "it holds an invalid character"))
    return Verdict(said, tuple(broken))


def repair_request(broken: tuple[Broken, ...]) -> str:
    """Return the message that asks the teacher to write an unusable reply again."""
    reasons = "; ".join(one.sentence for one in broken)
    return f"This cannot be used: {reasons}. Write it again as a whole, in the form that was asked for, without that."


def parse(text: str) -> Turns:
    """Return questions and answers from JSON or blocks, which may be in a fence or other text; empty if incomplete."""
    fenced = _FENCE.findall(text)
    # With two fences it is unknown which one is meant.
    plain = (fenced[0] if len(fenced) == 1 else text).strip().strip("\ufeff").strip()
    start = min((at for at in map(plain.find, "{[") if at >= 0), default=0)
    try:
        read, end = json.JSONDecoder().raw_decode(plain, start)
    except (ValueError, RecursionError):
        return from_blocks(plain)
    if isinstance(read, dict | list) and not set("{}[]") & set(plain[:start] + plain[end:]):
        return _from_json(read)
    return from_blocks(plain)


def _from_json(read: Any) -> Turns:
    listed = read.get("turns", [read]) if isinstance(read, dict) else read
    turns: list[tuple[str, str]] = []
    for one in listed if isinstance(listed, list) else []:
        pair = (one.get("question"), one.get("answer")) if isinstance(one, dict) else (None, None)
        if not (isinstance(pair[0], str) and isinstance(pair[1], str) and pair[0].strip() and pair[1].strip()):
            return ()
        turns.append((whole(pair[0]).strip(), whole(pair[1]).strip()))
    return tuple(turns)


def from_blocks(text: str) -> Turns:
    """Return questions and answers from blocks; empty if they do not alternate or one of them is empty."""
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    said = [_RULER.sub("", text[m.end() : end]).strip() for m, end in zip(marks, ends, strict=True)]
    sides = [mark[1].lower() for mark in marks]
    if sides != ["question", "answer"] * (len(sides) // 2) or not all(said):
        return ()
    return tuple(zip(said[::2], said[1::2], strict=True))


def as_blocks(turns: Turns) -> str:
    """Return questions and answers written as blocks."""
    return "\n===\n".join(f"Question: {question}\n===\nAnswer: {answer}" for question, answer in turns)


def as_json(turns: Turns) -> str:
    """Return questions and answers as JSON that follows the schema."""
    return json.dumps({"turns": [{"question": q, "answer": a} for q, a in turns]}, ensure_ascii=False)


def _refused(rule: str, sentence: str) -> Verdict:
    return Verdict((), (Broken(rule, sentence),))


def _count(said: Turns, turns: tuple[int, int] | None) -> list[Broken]:
    if turns is None or turns[0] <= len(said) <= turns[1]:
        return []
    wanted = str(turns[0]) if turns[0] == turns[1] else f"{turns[0]} to {turns[1]}"
    return [Broken("turns", f"it holds {len(said)} questions, and {wanted} were asked for")]


def _source(said: Turns, context: Context) -> list[Broken]:
    """Return the broken rules about the source of the text: captions, boxes, coordinates, unsupported objects."""
    text = "\n".join(f"{question}\n{answer}" for question, answer in said)
    known = "\n".join((*context.captions, *(box.category for box in context.boxes)))
    broken = []
    found = [match[0] for match in _SPEAKS_OF_CAPTIONS.finditer(text) if match[0].lower() not in known.lower()]
    if found:
        broken.append(Broken("captions", f'it speaks of what it was told ("{found[0]}"), not as one who sees'))
    if _BOUNDING.search(text) or (_BOXES.search(text) and not _BOXES.search(known)):
        broken.append(Broken("boxes", "it speaks of boxes"))
    if _COORDINATES.search(text):
        broken.append(Broken("coordinates", "it speaks of coordinates or writes such numbers"))
    lies = unsupported(text, context.captions, [box.category for box in context.boxes])
    if lies:
        broken.append(Broken("object", f"it names what is not known to be there: {', '.join(sorted(lies))}"))
    return broken


def _questions(said: Turns) -> list[Broken]:
    broken = []
    for question, answer in said:
        if question and " or " not in question.lower() and _weight(answer) and _weight(answer) <= _weight(question):
            broken.append(Broken("self-answered", f'the question "{question}" holds its own answer'))
            break
    asked = [" ".join(re.findall(r"\w+", question.lower())) for question, _ in said]
    if len(set(asked)) < len(asked):
        broken.append(Broken("repeated", "it asks one question twice"))
    return broken


def _weight(text: str) -> set[str]:
    """Return the content words of a text, without plural endings."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("\u2019", "'").replace("'s", ""))
    return {word[:-1] if word.endswith("s") and len(word) > 3 else word for word in words if word not in _LIGHT}
