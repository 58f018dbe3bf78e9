"""Cases of data files that are broken, in every way that the reader must report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.broken_data import DOCS, FORM, FORMATS, SOUND, Case, lines


def no_json(text: str, reason: str, line: int, *, samples: int = 0, file: str = "train.json") -> Case:
    return Case(text, f"{file}, line {line}: this is not valid JSON ({reason}); {FORM}.",
                line=line, samples=samples, file=file)  # fmt: skip


def unreadable(reason: str, content: Any, said: str = "check its name") -> Case:
    return Case(content, f"{{folder}}/train.json: the data file cannot be read ({reason}); {said}.")


def both_ways(path: Path) -> None:
    """Make a symbolic link that leads back to itself through another link."""
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
