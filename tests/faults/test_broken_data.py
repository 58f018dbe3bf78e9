"""Every way in which a data set may be broken, and the sentence that the user reads.

`check` raises nothing; the verdict is no; the sentence names the id, or where none can be read, file and line.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qllava.conversation import CHATML
from qllava.data.check import check
from qllava.data.encode import Encoder
from qllava.data.verdict import Verdict
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_tokenizer

HUMAN = {"from": "human", "value": "What is it?"}
SEEN = {"from": "human", "value": "<image>\nWhat is it?"}
GPT = {"from": "gpt", "value": "A bus."}
SOUND = {"id": "a1", "image": "red.png", "conversations": [SEEN, GPT]}

DOCS = "see the formats in docs/data.md"
FORM = "a data file is a JSON list of examples, or one example per line"
FORMATS = (
    "a data file is a JSON list of examples, one example per line, a table (CSV), Parquet, Arrow or a WebDataset tar"
)
HALF = "holds half of a character (a \\u escape of a surrogate without its partner); write the character whole"
REPLACE = "replace it, or remove its examples"


@dataclass(frozen=True)
class Case:
    """A broken data set.

    content: of the data file: examples of a JSON list, one a line; or its text, its bytes; or what writes it.
    said: the sentence, {folder} being the folder of the file.
    id, line: as programs read them.
    samples: the sound ones.
    file: the name of the data file.
    """

    content: list[Any] | str | bytes | Callable[[Path], object]
    said: str
    id: str | None = None
    line: int | None = None
    samples: int = 0
    file: str = "train.json"
    severity: str = "error"


def row(said: str, *turns: Any, id: Any = "x7", where: str = "id x7", **more: Any) -> Case:
    """A LLaVA example behind a sound one."""
    broken = {"conversations": list(turns), **more} | ({} if id is None else {"id": id})
    return raw(said, broken, where=where)


def raw(said: str, broken: Any, *, where: str = "id x7") -> Case:
    """Any example behind a sound one; `where` is empty when its id cannot be read."""
    place = f"train.json, example 2, {where}" if where else "train.json, example 2"
    id = where.removeprefix("id ") or None
    return Case([SOUND, broken], f"{place}: {said}.", id=id, line=3, samples=1)


def image(said: str, write: Callable[[Path], object], *, name: str = "other.png", named: bool = True) -> Case:
    """An example whose image is written by `write`; sound examples lie around it."""
    rows = [SOUND, {"id": "x7", "image": name, "conversations": [SEEN, GPT]}]

    def both(path: Path) -> None:
        write(path.parent / name)
        path.write_text(lines(rows), encoding="utf-8")

    said = f"{{folder}}/{name}: {said}" if named else said
    return Case(both, f"train.json, example 2, id x7: {said}.", id="x7", line=3, samples=2 if named else 1)


def lines(rows: list[Any]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def no_json(text: str, reason: str, line: int, *, samples: int = 0, file: str = "train.json") -> Case:
    return Case(text, f"{file}, line {line}: this is not valid JSON ({reason}); {FORM}.",
                line=line, samples=samples, file=file)  # fmt: skip


def unreadable(reason: str, content: Any, said: str = "check its name") -> Case:
    return Case(content, f"{{folder}}/train.json: the data file cannot be read ({reason}); {said}.")


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("L", size, random.Random(0).randbytes(size[0] * size[1]))


def png(size: tuple[int, int] = (30, 30)) -> bytes:
    file = io.BytesIO()
    noise(size).save(file, "PNG")
    return file.getvalue()


def claims(width: int, height: int) -> bytes:
    """The head of a PNG that says it is so large, and no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + png()[33:]


def jpeg() -> bytes:
    file = io.BytesIO()
    noise((64, 64)).save(file, "JPEG")
    return file.getvalue()


def bytes_of(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def both_ways(path: Path) -> None:
    """A link that leads to itself by another one."""
    (path.parent / "there").symlink_to(path)
    path.symlink_to(path.parent / "there")


def cut_parquet(path: Path) -> None:
    pq.write_table(pa.table({"question": ["What?"] * 50, "answer": ["That."] * 50}), path)
    path.write_bytes(path.read_bytes()[:-30])


GOOD = json.dumps(SOUND)
OTHER = json.dumps({"question": "What is it?", "answer": "A bus."})

FILES = {
    "nothing there": unreadable("No such file or directory", lambda path: None),
    "a name that is too long": Case(
        lambda path: None,
        f"{{folder}}/{'n' * 300}.json: the data file cannot be read (File name too long); check its name.",
        file=f"{'n' * 300}.json",
    ),
    "a link that leads nowhere": unreadable("No such file or directory", lambda path: path.symlink_to("gone")),
    "a link to itself": unreadable("Too many levels of symbolic links", lambda path: path.symlink_to(path)),
    "links in a circle": unreadable("Too many levels of symbolic links", both_ways),
    "a file below a file": Case(
        lambda path: path.parent.write_bytes(b""),
        "{folder}/train.json: the data file cannot be read (Not a directory); check its name.",
        file="file/train.json",
    ),
    "a pipe": Case(
        os.mkfifo, "{folder}/train.json: this is neither a file nor a folder; write the examples to a file."
    ),
    "a folder of something else": Case(
        lambda path: path.mkdir(),
        f"{{folder}}/train.json: this is a folder without data files; name a file, or a folder of Parquet, Arrow or "
        f"tar files: {FORMATS}.",
    ),
    "nothing in it": Case("", "{folder}/train.json: the file contains no examples; give it at least one conversation."),
    "white space in it": Case(
        " \n\t\n", "{folder}/train.json: the file contains no examples; give it at least one conversation."
    ),
    "only a byte order mark": Case(
        b"\xef\xbb\xbf", "{folder}/train.json: the file contains no examples; give it at least one conversation."
    ),
    "a list without examples": Case(
        "[\n]", "{folder}/train.json: the file contains no examples; give it at least one conversation."
    ),
    "a table with a header alone": Case(
        "question,answer\n",
        "{folder}/train.csv: the file contains no examples; give it at least one conversation.",
        file="train.csv",
    ),
    "a table with other columns": Case(
        "image,heading\nred.png,A bus.\n",
        f"{{folder}}/train.csv: the file is neither JSON nor a table with the columns question and answer; {FORMATS}.",
        file="train.csv",
    ),
    "a table with a short record": Case(
        "question,answer\nWhat?,That.\nAnd this?\n",
        "train.csv, line 3: the number of fields is 1, of columns 2; quote fields that hold ',' or a line break.",
        line=3, samples=1, file="train.csv",
    ),
    "prose": Case(
        "Dear model,\nplease learn.\n",
        f"{{folder}}/train.json: the file is neither JSON nor a table with the columns question and answer; {FORMATS}.",
    ),
    "binary rubbish": Case(
        bytes(range(256)) * 9,
        f"{{folder}}/train.json: the file is neither text nor Parquet, Arrow, tar; {FORMATS}.",
    ),
    "compressed": Case(
        b"\x1f\x8b\x08\0" + bytes(40),
        f"{{folder}}/train.json: the file is compressed (gzip); unpack it first: {FORMATS}.",
    ),
    "UTF-16": Case(
        lines([SOUND]).encode("utf-16"),
        "train.json, line 1: the data file is not UTF-8 text (invalid start byte); save it as UTF-8.",
        line=1,
    ),
    "latin-1": Case(
        lines([SOUND, SOUND | {"id": "Küche"}]).replace("\\u00fc", "ü").encode("latin-1"),
        "train.json, line 3: the data file is not UTF-8 text (invalid start byte); save it as UTF-8.",
        line=3,
    ),
    "a character cut off": Case(
        (GOOD + "\n" + GOOD[:-1]).encode() + "é".encode()[:1],
        "train.json, line 2: the data file is not UTF-8 text (unexpected end of data); save it as UTF-8.",
        line=2,
    ),
    "broken in the middle of a list": no_json(
        f'[\n{GOOD},\n{{"id": }},\n{GOOD}\n]', "Expecting value, column 8", 3, samples=1
    ),
    "broken inside an example of many lines": no_json(
        f'[{GOOD},\n {{\n  "id": 1\n  "image": "a.png"\n }}\n]', "Expecting ',' delimiter, column 3", 4, samples=1
    ),
    "single quotes": no_json(
        "[{'id': 'a1'}]", "Expecting property name enclosed in double quotes, column 3", 1
    ),
    "a list cut off inside an example": no_json(
        f"[\n{GOOD},\n{GOOD[:40]}", "Unterminated string starting at, column 34", 3, samples=1
    ),
    "a list cut off behind a comma": no_json(f"[\n{GOOD},\n", "Expecting value, column 1", 3, samples=1),
    "a list that is not closed": no_json(f"[\n{GOOD}\n", "Expecting ',' or ']', column 1", 3, samples=1),
    "a comma behind the last example": no_json(f"[\n{GOOD},\n]", "Expecting value, column 1", 3, samples=1),
    "no comma between examples": no_json(f"[\n{GOOD}\n{GOOD}\n]", "Expecting ',' or ']', column 1", 3, samples=1),
    "two lists": no_json(f"[\n{GOOD}\n]\n[]", "Extra data, column 1", 4, samples=1),
    "nested 100,000 deep": no_json("[" * 100_000, "nested too deeply", 1),
    "a number of 10,000 digits": no_json(
        f'[\n{GOOD},\n{{"id": {"9" * 10_000}}}]',
        "Exceeds the limit (4300 digits) for integer string conversion: value has 10000 digits",
        3,
        samples=1,
    ),
    "JSONL broken in the middle": no_json(f'{GOOD}\n{{"id": }}\n{OTHER}\n', "Expecting value, column 8", 2, samples=2,
                                          file="train.jsonl"),
    "JSONL cut off": no_json(f"{GOOD}\n{GOOD[:40]}", "Unterminated string starting at, column 34", 2, samples=1),
    "two examples in a line": no_json(
        f"{GOOD}\n\n{GOOD} {GOOD}\n", f"Extra data, column {len(GOOD) + 2}", 3, samples=1
    ),
    "JSONL nested 100,000 deep": no_json(
        f'{GOOD}\n{{"id": {"[" * 100_000}\n', "nested too deeply", 2, samples=1
    ),
    "an object over many lines": no_json(
        json.dumps({"data": [SOUND]}, indent=2), "Expecting property name enclosed in double quotes, column 2", 1
    ),
    "an object that holds the list": Case(
        json.dumps({"data": [SOUND]}),
        "train.json, line 1: an example has one of the keys conversations, messages, question, this one has none of "
        f"them; {DOCS}.",
        line=1,
    ),
    "Parquet that is cut off": Case(
        cut_parquet,
        "train.parquet, example 1: from here on the Parquet file cannot be read (Parquet magic bytes not found in "
        "footer. Either the file is corrupted or this is not a parquet file); download it or write it again.",
        file="train.parquet",
    ),
    "Parquet without the columns": Case(
        lambda path: pq.write_table(pa.table({"text": ["a"]}), path),
        f"{{folder}}/train.parquet: the table needs one of the columns conversations, messages, question; {DOCS}.",
        file="train.parquet",
    ),
}  # fmt: skip

ROWS = {
    "a list for an example": raw(f"an example is a JSON object, not a list; {DOCS}", ["a"], where=""),
    "null for an example": raw(f"an example is a JSON object, not null; {DOCS}", None, where=""),
    "a number for an example": raw(f"an example is a JSON object, not a number; {DOCS}", 1.5, where=""),
    "no known key": raw(
        f"an example has one of the keys conversations, messages, question, this one has none of them; {DOCS}",
        {"id": "x7", "caption": "A bus."},
    ),
    "two kinds in one": row(
        f"an example has one of the keys conversations, messages, question, this one has conversations "
        f"and question; {DOCS}",
        HUMAN, GPT, question="What?",
    ),
    "an id that is a list": row("the id is a list; give it as text or a whole number", HUMAN, GPT, id=[1], where=""),
    "an id with a fraction": row("the id is a number; give it as text or a whole number", HUMAN, GPT, id=1.5, where=""),
    "an id that is true": row(
        "the id is true or false; give it as text or a whole number", HUMAN, GPT, id=True, where=""
    ),
    "an id of half a character": row(f"the id {HALF}", HUMAN, GPT, id="x\ud83d", where=""),
    "an id with a line break": Case(
        [SOUND, {"id": "x\n7", "conversations": []}],
        "train.json, example 2, id 'x\\n7': conversations must be a list of turns, not an empty list; "
        "write a question and an answer.",
        id="x\n7", line=3, samples=1,
    ),
    "a type that is a number": row("the type is a number; give it as text", HUMAN, GPT, type=3),
    "no id": row(
        "turn 2 is an empty answer; write it or drop the example", HUMAN, GPT | {"value": ""}, id=None, where=""
    ),
    "conversations that are a text": raw(
        "conversations must be a list of turns, not a text; write a question and an answer",
        {"id": "x7", "conversations": "What? That."},
    ),
    "no turns": row("conversations must be a list of turns, not an empty list; write a question and an answer"),
    "a turn that is a text": row("turn 1 is a text; write an object with 'from' and 'value'", "What?", GPT),
    "a role that is unknown": row(
        "turn 1 has 'from': 'bot'; expected human or gpt", {"from": "bot", "value": "What?"}, GPT
    ),
    "a role that is an object": row(
        "turn 1 has 'from': an object; expected human or gpt", {"from": {}, "value": "What?"}, GPT
    ),
    "a role that is missing": row("turn 1 has 'from': missing; expected human or gpt", {"value": "What?"}, GPT),
    "a role of messages": raw(
        "turn 2 has 'role': 'tool'; expected user or assistant",
        {"id": "x7", "messages": [message("user", "What?"), message("tool", "That.")]},
    ),
    "two questions in a row": row(
        "turn 2 is the user's and follows another turn of the user; user and assistant alternate", HUMAN, HUMAN, GPT
    ),
    "two answers in a row": row(
        "turn 3 is the assistant's and follows another turn of the assistant; user and assistant alternate",
        HUMAN, GPT, GPT,
    ),
    "a question at the end": row(
        "the conversation ends with the user, so it has no answer to learn; add it or drop the turn",
        HUMAN, GPT, HUMAN,
    ),
    "only an answer": row("the conversation has no turn of the human; write a question and an answer", GPT),
    "only a system prompt": row(
        "the conversation has no turn of the human; write a question and an answer",
        {"from": "system", "value": "Be brief."},
    ),
    "a late system prompt": row(
        "a system prompt stands after another turn; move it to the start",
        HUMAN, {"from": "system", "value": "Be brief."}, GPT,
    ),
    "an empty answer": row("turn 2 is an empty answer; write it or drop the example", HUMAN, GPT | {"value": ""}),
    "an answer of white space": row(
        "turn 2 is an empty answer; write it or drop the example", HUMAN, GPT | {"value": " \n\u2003"}
    ),
    "an empty question": row("turn 1 is an empty question; write it or drop the example", HUMAN | {"value": "\n"}, GPT),
    "an answer that is null": row("turn 2 has no text under 'value'; write it there", HUMAN, GPT | {"value": None}),
    "an answer that is a number": row("turn 2 has no text under 'value'; write it there", HUMAN, GPT | {"value": 7}),
    "an answer that is an object": row(
        "turn 2 has no text under 'value'; write it there", HUMAN, GPT | {"value": {"a": "b"}}
    ),
    "half of a character": row(f"turn 2 {HALF}", HUMAN, GPT | {"value": "A bus \ud83d"}),
    "half of a character in a system prompt": row(
        f"the system prompt {HALF}", {"from": "system", "value": "\udc00"}, HUMAN, GPT
    ),
    "a part of another type": raw(
        'turn 1 has a part that is neither {"type": "image"} nor {"type": "text", "text": ...}; write it as one of '
        "them, and name the images under images",
        {"id": "x7", "messages": [message("user", [{"type": "video"}]), message("assistant", "A bus.")]},
    ),
    "a question without an answer": raw("the answer is missing; write it as text", {"id": "x7", "question": "What?"}),
    "an answer of a question that is null": raw(
        "the answer is null; write it as text", {"id": "x7", "question": "What?", "answer": None}
    ),
    "<image> without an image": row(
        "the questions hold 1 <image>, the example names 0 images; make them equal", SEEN, GPT
    ),
    "an image without <image>": row(
        "the questions hold 0 <image>, the example names 1 image; make them equal", HUMAN, GPT, image="red.png"
    ),
    "fewer images than <image>": row(
        "the questions hold 2 <image>, the example names 1 image; make them equal",
        *(SEEN, GPT) * 2,
        image="red.png",
    ),
    "<image> in an answer": row(
        "turn 2 is an answer with <image> in it; images belong into questions",
        SEEN, GPT | {"value": "See <image>."}, image="red.png",
    ),
    "<image> in a system prompt": row(
        "the system prompt holds <image>; images belong into questions",
        {"from": "system", "value": "<image>"}, SEEN, GPT, image="red.png",
    ),
    "image and images": row(
        "the example has both image and images; keep one", SEEN, GPT, image="a.png", images=["a.png"]
    ),
    "an image that is a number": row(
        "the image must be a file name or a list of file names; write it as text", SEEN, GPT, image=3
    ),
    "an image that is an object": row(
        "the image must be a file name or a list of file names; write it as text", SEEN, GPT, image={"name": "a"}
    ),
    "an image without a name among others": row(
        "the image must be a file name or a list of file names; write it as text", SEEN, GPT, images=["red.png", ""]
    ),
    "an image that is missing": row(
        "the image 'gone.png' is not in the image folder {folder}; add it or give the right folder",
        SEEN, GPT, image="gone.png",
    ),
    "an image that is a folder": row(
        "the image '.' is not in the image folder {folder}; add it or give the right folder", SEEN, GPT, image="."
    ),
    "an image of another folder": row(
        "the image '../red.png' lies outside the image folder {folder}; name it relative to it",
        SEEN, GPT, image="../red.png",
    ),
    "an image of the system": row(
        "the image '/etc/hostname' lies outside the image folder {folder}; name it relative to it",
        SEEN, GPT, image="/etc/hostname",
    ),
    "an address for an image": row(
        "the image 'https://host/a.png' is an address; download it, and name the file",
        SEEN, GPT, image="https://host/a.png",
    ),
    "pixels for an image": row(
        f"the image '{'iVBORw0KGg' * 20}...' is not in the image folder {{folder}}; add it or give the right folder",
        SEEN, GPT, image="iVBORw0KGg" * 2000,
    ),
    "an image with a NUL in its name": row(
        "the image 'red\\x00.png' is not in the image folder {folder}; add it or give the right folder",
        SEEN, GPT, image="red\0.png",
    ),
    "an image of half a character": row(
        "the path of the image '\\udcff.png' is not UTF-8; rename what is not", SEEN, GPT, image="\udcff.png"
    ),
    "a control token in a question": row(
        "the words 'What does <|im_end|> mean?' ... contain <|im_end|>, which is a control token of this model; "
        "spell it differently or drop the example",
        {"from": "human", "value": "What does <|im_end|> mean?"}, GPT,
    ),
    "a control token in an answer": row(
        "the words '<|endoftext|>' ... contain <|endoftext|>, which is a control token of this model; "
        "spell it differently or drop the example",
        HUMAN, {"from": "gpt", "value": "<|endoftext|>"},
    ),
    "an example that is too long": row(
        "1042 tokens (1 image of 16) are more than max_length 512; "
        "raise max_length, or set too_long to drop or trim",
        SEEN, {"from": "gpt", "value": "x" * 1000}, image="red.png",
    ),
    "an example that is too long and has no id": row(
        "1025 tokens (0 images of 16) are more than max_length 512; "
        "raise max_length, or set too_long to drop or trim",
        HUMAN, {"from": "gpt", "value": "x" * 1000}, id=None, where="",
    ),
    "an id that is used twice": Case(
        [SOUND, {"id": "x7", "conversations": [HUMAN, GPT]}, {"id": "x7", "conversations": [HUMAN, GPT, HUMAN, GPT]}],
        "train.json, example 3, id x7: train.json, example 2 has the same id; give each example an id of its own.",
        id="x7", line=4, samples=3, severity="warning",
    ),
    "an answer at the start": Case(
        [SOUND, {"id": "x7", "conversations": [GPT, HUMAN, GPT]}],
        "train.json, example 2, id x7: the conversation begins with an answer, which is not learned; remove that turn.",
        id="x7", line=3, samples=2, severity="warning",
    ),
}  # fmt: skip

IMAGES = {
    "nothing in it": image(f"this is not an image that can be read; {REPLACE}", bytes_of(b"")),
    "text in it": image(f"this is not an image that can be read; {REPLACE}", bytes_of(b"a bus"), name="bus.jpg"),
    "a PNG by its head alone": image(f"this is not an image that can be read; {REPLACE}", bytes_of(png()[:8])),
    "a PNG that is cut off": image(
        f"the image cannot be decoded (image file is truncated); {REPLACE}",
        bytes_of(png((90, 90))[:5000]),
    ),
    "a JPEG that is cut off": image(
        f"the image cannot be decoded (image file is truncated (11 bytes not processed)); {REPLACE}",
        bytes_of(jpeg()[:1500]), name="bus.jpg",
    ),
    "a PNG of 60,000 x 60,000": image(
        "a side of the image has more than 12,000 pixels; make it smaller, or cut it",
        bytes_of(claims(60_000, 60_000)),
    ),
    "a PNG of 60,000 x 3": image(
        "a side of the image has more than 12,000 pixels; make it smaller, or cut it", bytes_of(claims(60_000, 3))
    ),
    "a line": image(
        "the image has 1 x 201 pixels, one side over 200 times the other; cut it, or remove its examples",
        bytes_of(png((1, 201))),
    ),
    "a link to itself": image(
        "the image 'other.png' is not in the image folder {folder}; add it or give the right folder",
        lambda path: path.symlink_to(path), named=False,
    ),
    "a link that leads nowhere": image(
        "the image 'other.png' is not in the image folder {folder}; add it or give the right folder",
        lambda path: path.symlink_to("gone.png"), named=False,
    ),
    "a link to a text": image(
        f"this is not an image that can be read; {REPLACE}", lambda path: path.symlink_to(path.parent / "train.json")
    ),
    "a pipe": image(
        "the image 'other.png' is not in the image folder {folder}; add it or give the right folder",
        os.mkfifo, named=False,
    ),
}  # fmt: skip

CASES = {f"{group}: {name}": case for group, cases in
         {"file": FILES, "row": ROWS, "picture": IMAGES}.items() for name, case in cases.items()}  # fmt: skip


@cache
def encoder() -> Encoder:
    tokenizer = make_tiny_tokenizer()
    return Encoder(tokenizer, CHATML, tokenizer.convert_tokens_to_ids("<image>"), IMAGE_LAYOUT, max_length=512)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "red.png").write_bytes(png())
    return folder


def verdict(path: Path) -> Verdict:
    return Verdict.over([check(path, None, encoder(), progress=False)])


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_in_one_sentence(folder: Path, name: str) -> None:
    case = CASES[name]
    path = folder / case.file
    if callable(case.content):
        case.content(path)
    else:
        content = lines(case.content) if isinstance(case.content, list) else case.content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = verdict(path)
    said = case.said.replace("{folder}", str(path.parent))
    assert [str(problem) for problem in found.problems()] == [said]
    assert not found.ok
    assert "\n" not in said and said.endswith(".")
    told = json.loads(json.dumps(found.as_json()))
    (problem,) = told["problems"]
    assert (problem["id"], problem["line"], problem["file"]) == (case.id, case.line, str(path))
    assert said.endswith(f": {problem['problem']}; {problem['hint']}.")
    assert (problem["severity"], told["ok"], told["samples"]) == (case.severity, False, case.samples)
    assert said in found.text().encode().decode()


def test_there_are_enough_of_them() -> None:
    assert len({case.said.partition(": ")[2] for case in CASES.values()}) >= 40


def test_the_two_halves_of_a_duplicate(folder: Path) -> None:
    """The same example twice is learned twice, which may be meant; that its id is another's may not."""
    (folder / "train.json").write_text(lines([SOUND, SOUND]))
    found = verdict(folder / "train.json")
    assert [str(problem) for problem in found.problems()] == [
        "train.json, example 2, id a1: the example has the same text and the same images as train.json, example 1; "
        "remove one, unless it shall count twice.",
        "train.json, example 2, id a1: train.json, example 1 has the same id; give each example an id of its own.",
    ]
    assert not found.ok


def test_all_problems_are_told_together(folder: Path) -> None:
    """Examples, images and comparisons; the sound examples are still counted."""
    (folder / "bad.png").write_bytes(b"")
    rows = [
        SOUND,
        {"id": "b", "conversations": []},
        {"id": "c", "image": "bad.png", "conversations": [SEEN, GPT]},
        {"id": "c", "conversations": [HUMAN, GPT]},
        {"id": "d", "image": "bad.png", "conversations": [SEEN, GPT, HUMAN, GPT]},
    ]
    (folder / "train.json").write_text(lines(rows))
    found = verdict(folder / "train.json")
    assert [(problem.id, problem.kind) for problem in found.problems()] == [
        ("b", "turns"),
        ("c", "image broken"),
        ("c", "duplicate id"),
    ]
    assert f"{folder}/bad.png: this is not an image that can be read (2 examples show it); {REPLACE}." in found.text()
    assert (found.errors, found.as_json()["samples"]) == (2, 4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder: Path) -> None:
    (folder / "train.json").write_text(lines([SOUND]))
    (folder / "train.json").chmod(0)
    assert [str(problem) for problem in verdict(folder / "train.json").problems()] == [
        f"{folder}/train.json: the data file cannot be read (Permission denied); check its name."
    ]


@pytest.mark.parametrize("what", ["train.json", "red.png", "folder"])
def test_what_may_not_be_read_as_the_system_says_it(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Without being another user: opening the file fails, or looking into the folder that it lies in."""
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / what))
    (folder / "train.json").write_text(lines([SOUND]))
    opened, looked_at = io.open, os.stat

    def no_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, Path | str) and str(file) == str(folder / what):
            raise denied
        return opened(file, *args, **kwargs)

    def no_stat(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).startswith(str(folder)):
            raise denied
        return looked_at(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", no_open)
        patch.setattr("io.open", no_open)
        if what == "folder":
            patch.setattr("os.stat", no_stat)
        found = verdict(folder / "train.json")
    assert not found.ok
    assert [str(problem) for problem in found.problems()] == [
        f"train.json, example 1, id a1: {folder}/red.png: the image cannot be decoded (Permission denied); {REPLACE}."
        if what == "red.png"
        else f"{folder}/train.json: the data file cannot be read (Permission denied); check its name."
    ]
