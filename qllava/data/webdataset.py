"""Reader of WebDataset tars: NAME.json, or NAME.txt with a caption, and the image NAME.jpg."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from qllava.data.keys import IMAGE_SUFFIXES, KINDS, keys_of
from qllava.data.problems import DAMAGE, OnProblem, Place, Problem, broken
from qllava.data.unpacked import unpack

Records = Iterator[tuple[Place, Any]]

# Members that are not read, except to report them, or to refuse the record.
_NOT_SHOWN = dict.fromkeys((".mp4", ".webm", ".avi", ".mov", ".mkv"), "video")
_NOT_SHOWN |= dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".m4a"), "audio")
_READ = {*IMAGE_SUFFIXES, ".json", ".txt"}


class _Member(NamedTuple):
    """A file in a tar, named as NAME.PART.jpg."""

    key: str
    """Name of the sample, as NAME."""
    part: str
    """Text between name and suffix, as PART; it may be a number, or empty."""
    suffix: str
    """Suffix, as .jpg."""
    data: bytes | None
    """Bytes of the file; None if the tar does not contain them as such (a link, or a sparse file of any size)."""


class _Broken(Exception):
    """Error: the rest of the tar cannot be read."""


def read_tar(path: Path, on_problem: OnProblem) -> Records:
    """Yield the records of a tar; corrupt data ends it with a problem."""
    number = 0
    try:
        for key, found in groupby(_members(path), key=lambda member: member.key):
            number += 1
            members = list(found)
            if any(member.suffix in _READ for member in members):
                yield from _sample(key, members, Place(str(path), row=number), on_problem)
            else:  # a README, for one
                number -= 1
    except _Broken as error:  # the sample that was being read may lack a part, so it is not used
        on_problem(broken("tar", str(error), Place(str(path), row=max(number, 1))))


def _members(path: Path) -> Iterator[_Member]:
    """Yield the files of a tar that belong to samples, with their bytes; no file is written under a name of the tar."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in _headers(tar, size):
                    name = PurePosixPath(member.name)
                    first, *parts = name.name.split(".")
                    suffix = name.suffix.lower()
                    # A name that begins with a dot is not a sample: operating systems add such files.
                    if not first:
                        continue
                    if suffix not in _READ:
                        yield _Member(str(name.with_name(first)), "", suffix, None)
                        continue
                    plain = member.isreg() and not member.issparse()
                    opened = tar.extractfile(member) if plain else None
                    data = None if opened is None else opened.read()
                    yield _Member(str(name.with_name(first)), ".".join(parts[:-1]), suffix, data)
                # To tarfile, a corrupt header is the end of the tar, and so is the end of the first of two joined tars.
                if tar.offset >= size:
                    raise _Broken("the file is truncated")
                file.seek(tar.offset)
                if any(piece.strip(b"\0") for piece in iter(lambda: file.read(1 << 20), b"")):
                    raise _Broken("a header is corrupt or truncated, or another tar was appended")
        except (tarfile.TarError, *DAMAGE) as error:
            raise _Broken(str(error)) from None


def _headers(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar of `size` bytes, except folders; raise _Broken if one exceeds it or goes backwards."""
    end = -1
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all in memory
        if member.size < 0 or tar.offset <= end:
            raise _Broken("a member has a negative size")
        end = tar.offset
        if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
            raise _Broken("the file is truncated")
        if not member.isdir():
            yield member


def _sample(key: str, members: list[_Member], place: Place, on_problem: OnProblem) -> Records:
    """Yield the record of one sample; nothing, and a problem, if it has none."""

    def report(problem: str, hint: str) -> None:
        on_problem(Problem("sample", problem, hint, place, key))

    others = sorted({member.suffix for member in members} - {*_READ, ""})
    members = [member for member in members if member.suffix in _READ]
    files = [(member.suffix, member.part, member.data) for member in members if member.data is not None]
    if len(files) < len(members):
        return report("the sample contains a link, or a sparse file", "pack the file itself")
    records, captions = ([data for suffix, _, data in files if suffix == wanted] for wanted in (".json", ".txt"))
    images = [(part, data) for suffix, part, data in files if suffix in IMAGE_SUFFIXES]
    if all(re.fullmatch("[0-9]{1,9}", part) for part, _ in images):  # else in the order of the tar
        images.sort(key=lambda image: int(image[0]))
    if len(records) > 1 or len(captions) > 1:
        return report("the sample has several .json or .txt files", "keep one of each")
    if not records and not captions:
        problem = "the sample has neither a .json that contains its example nor a .txt that contains its caption"
        return report(problem, "pack one of them directly beside its images")
    try:
        record = json.loads(records[0]) if records else {}
        caption = captions[0].decode("utf-8-sig").strip() if captions else ""
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        what = "caption" if isinstance(error, UnicodeDecodeError) and not records else ".json"
        return report(f"the sample's {what} cannot be read ({reason})", "write an example as JSON, all text in UTF-8")
    if not isinstance(record, dict):
        yield place, record  # `formats` says what is wrong with it
        return
    keys = keys_of(record)
    if keys.get("id") is None:
        record = record | {"id": key}
    if captions and keys.spelled.keys() & {*KINDS}:
        record[".txt"] = caption
    elif captions:  # a .json with a caption may contain other facts about the image
        if not images:
            return report("the sample has a caption and no image", "pack it directly beside its image")
        record = {name: value for name, value in record.items() if name not in ("caption", "text")} | {
            "caption": caption
        }
    if images:
        record.pop("image", None)
        record["images"] = [unpack(data) for _, data in images]
    yield place, record | {_NOT_SHOWN.get(suffix, suffix): True for suffix in others}
