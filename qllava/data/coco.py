"""Reader of COCO's annotations: captions and boxes of each image.

    captions_val2014.json     images:      {id, file_name, width, height}
                              annotations: {image_id, caption}
    instances_val2014.json    annotations: {image_id, category_id, bbox: [x, y, width, height] in pixels, iscrowd}
                              categories:  {id, name}

A box of a crowd (`iscrowd`) is marked as such: it holds an unknown number of objects, so its category cannot be
counted. A box without area, of which train2017 has two, is left out. Boxes become corners between 0 and 1.

The files are read by `json` alone: pycocotools builds the same tables, must be compiled, and prints to stdout; what it
adds (masks, the scores of detectors) is not needed here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qllava.config import InputError
from qllava.data.problems import OnProblem, Place, Problem

_EDGE = 1.0
"""Pixels by which a COCO outline may exceed the image's edge; it is clipped there, and more is an error."""
_MALFORMED = (KeyError, TypeError, ValueError, ZeroDivisionError)


def is_coco(path: Path) -> bool:
    """Return whether a path is COCO's own layout: a folder, or one of its files by name."""
    return path.is_dir() or (path.suffix == ".json" and path.name.startswith(("captions_", "instances_")))


def read_records(path: Path, on_problem: OnProblem) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield the images of a pair of files as {id, image, captions, boxes}, unchecked.

    Args:
        path: One of the two files, or a folder that holds one pair.
        on_problem: Called with the problem of each entry that cannot be read.

    Raises:
        InputError: A whole file cannot be used.
    """
    captions_path, instances_path = _pair(path)
    said, marked = _load(captions_path, "images"), _load(instances_path, "categories")
    at = Place(str(captions_path))
    sizes: dict[Any, tuple[float, float]] = {}
    names: dict[Any, Any] = {}
    for number, image in enumerate(said["images"], start=1):
        try:
            names[image["id"]], sizes[image["id"]] = image["file_name"], (image["width"], image["height"])
        except _MALFORMED as error:
            on_problem(_malformed("image", number, error, at, "id, file_name, width, height"))
    captions: dict[Any, list[Any]] = defaultdict(list)
    for number, one in enumerate(said["annotations"], start=1):
        try:
            captions[one["image_id"]].append(one["caption"])
        except _MALFORMED as error:
            on_problem(_malformed("annotation", number, error, at, "image_id, caption"))
    boxes = _boxes(marked, sizes, Place(str(instances_path)), on_problem)
    for id_, name in names.items():
        yield at, {"id": id_, "image": name, "captions": captions[id_], "boxes": boxes[id_]}


def _boxes(
    marked: dict[str, Any], sizes: dict[Any, tuple[float, float]], at: Place, on_problem: OnProblem
) -> dict[Any, list[dict[str, Any]]]:
    """Return the boxes of each image that has captions; others are not needed."""
    boxes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    try:
        categories = {one["id"]: one["name"] for one in marked["categories"]}
    except _MALFORMED as error:
        raise InputError(f"{at}: each of the categories needs an id and a name ({error!r}); check the file.") from error
    for number, one in enumerate(marked["annotations"], start=1):
        try:
            if one["image_id"] in sizes and 0 not in one["bbox"][2:]:
                bbox, crowd = _corners(one["bbox"], *sizes[one["image_id"]]), one.get("iscrowd", 0)
                category = categories[one["category_id"]]
                boxes[one["image_id"]].append({"category": category, "bbox": bbox, "iscrowd": crowd})
        except _MALFORMED as error:
            on_problem(_malformed("annotation", number, error, at, "image_id, a listed category_id, bbox"))
    return boxes


def _corners(bbox: list[float], across: float, down: float) -> list[float]:
    """Convert x, y, width and height in pixels to x1, y1, x2, y2 as fractions of the image's width and height."""
    x, y, width, height = bbox
    x2, y2 = x + width, y + height
    x2, y2 = (min(x2, across) if x2 <= across + _EDGE else x2), (min(y2, down) if y2 <= down + _EDGE else y2)
    return [x / across, y / down, x2 / across, y2 / down]


def _malformed(what: str, number: int, error: Exception, at: Place, needed: str) -> Problem:
    return Problem(what, f"{what} {number} cannot be read ({error!r})", f"it needs {needed}", at)


def _pair(path: Path) -> tuple[Path, Path]:
    """Return captions_NAME.json and instances_NAME.json, or raise InputError if one is missing or NAME is unclear."""
    if path.is_dir():
        found = sorted(path.glob("captions_*.json"))
        if len(found) != 1:
            had = f"{len(found)} of them" if found else "none"
            raise InputError(
                f"{path}: expected one captions_NAME.json in this folder, found {had}; name the file itself."
            )
        path = found[0]
    name = path.name.partition("_")[2]
    pair = path.with_name(f"captions_{name}"), path.with_name(f"instances_{name}")
    for file in pair:
        if not file.is_file():
            raise InputError(f"{file} is missing: COCO's annotations are a pair of files; put both into one folder.")
    return pair


def _load(path: Path, beside: str) -> dict[str, Any]:
    """Load a file that has the lists `annotations` and `beside`, without outlines, which are 90% of its size."""
    try:
        with path.open(encoding="utf-8") as file:
            read = json.load(file, object_hook=_without_outline)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: this cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(read, dict) or not all(isinstance(read.get(key), list) for key in ("annotations", beside)):
        raise InputError(f"{path}: expected COCO's lists `annotations` and `{beside}` in it; check the file.")
    return read


def _without_outline(one: dict[str, Any]) -> dict[str, Any]:
    one.pop("segmentation", None)
    return one
