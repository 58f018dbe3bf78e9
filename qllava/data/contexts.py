"""Contexts: captions and boxes of images, from which a teacher model writes examples and which a judge reads.

    Context
      id        "000000296284"
      image     "000000296284.jpg"
      captions  ("A donut shop is full of ...", ...)
      boxes     (Box("donut", (0.37, 0.584, 0.504, 0.709)), ...)
                         x1    y1     x2     y2   of width and height, from the upper left corner
      crowds    ("person",): one box holds an unknown number of these, so that they cannot be counted

`read_contexts` reads them from

    a JSON list or JSONL    {"id", "image", "captions": [...], "boxes": [{"category", "bbox"}], "complete"}; the id may
                            be missing, the boxes may be named `instances`, `complete` is false by default; a box with
                            `"iscrowd": 1` is a crowd
    COCO's annotations      captions_NAME.json and instances_NAME.json in one folder, or that folder
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qllava.config import InputError
from qllava.data import coco
from qllava.data.problems import Place, Problem, Unusable, is_unicode
from qllava.data.records import read_records

_ROUNDING = 0.0015
"""How far outside of 0..1 a coordinate of three decimals may be because of rounding."""
_SHOWN = 20


@dataclass(frozen=True)
class Box:
    """One annotated object."""

    category: str
    """Name of the object's category."""
    bbox: tuple[float, float, float, float]
    """x1, y1, x2, y2 between 0 and 1, as fractions of width and height."""


@dataclass(frozen=True)
class Context:
    """Description of one image, and all that a teacher or a judge gets of it."""

    id: str
    """Id of the image."""
    image: str
    """File name of the image, relative to the image folder."""
    captions: tuple[str, ...]
    """Captions of the image."""
    boxes: tuple[Box, ...]
    """Annotated objects."""
    complete: bool = False
    """Whether the boxes cover all visible objects, so that an object without a box is not in the image."""
    crowds: tuple[str, ...] = ()
    """Categories of which one box holds many objects (COCO's `iscrowd`): present, but not countable."""

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories of the boxes and crowds, in order; a category may repeat."""
        return (*(box.category for box in self.boxes), *self.crowds)

    @property
    def text(self) -> str:
        """Captions, one per line, and after an empty line the boxes; only the captions if there are no boxes."""
        captions = "\n".join(self.captions)
        boxes = [f"{box.category}: [{', '.join(f'{edge:.3f}' for edge in box.bbox)}]" for box in self.boxes]
        return "\n".join([f"{captions}\n", *boxes]) if boxes else captions


def read_contexts(path: Path) -> list[Context]:
    """Read contexts from a file or a folder of COCO's annotations (see the module's docstring).

    Raises:
        InputError: The source has problems; each is on one line and names file, line and id.
    """
    problems: list[Problem] = []
    read = coco.read_records if coco.is_coco(path) else read_records
    contexts: dict[str, Context] = {}
    for place, record in read(path, problems.append):
        try:
            context = _context(record)
            if context.id in contexts:
                raise Unusable("id", "another image has the same id", "give each image an id of its own")
            contexts[context.id] = context
        except Unusable as error:
            problems.append(Problem(error.kind, error.problem, error.hint, place, _said_id(record)))
    if not contexts and not problems:
        problem, hint = "the file contains no images", "give it captions and boxes of at least one image"
        problems.append(Problem("no contexts", problem, hint, Place(str(path))))
    if problems:
        more = len(problems) - _SHOWN
        lines = [str(problem) for problem in problems[:_SHOWN]]
        raise InputError("\n".join([*lines, f"And {more:,} more."] if more > 0 else lines))
    return list(contexts.values())


def _said_id(record: Any) -> str | None:
    """Return the id of a record of any type, for messages; None if it has none."""
    id_ = record.get("id") if isinstance(record, dict) else None
    return str(id_) if isinstance(id_, str | int) else None


def _context(record: Any) -> Context:
    """Check one context, or raise Unusable with all its problems."""
    if not isinstance(record, dict):
        raise Unusable("not a context", "a context is a JSON object", "write image, captions and boxes")
    wrong: list[str] = []
    image, id_ = record.get("image"), record.get("id")
    if not isinstance(image, str) or not _names_a_file(image):
        wrong.append("image must be the name of a file")
        image = ""
    if id_ is None:
        id_ = str(PurePosixPath(image).with_suffix("")) if image else "of the image"
    if isinstance(id_, bool) or not isinstance(id_, str | int) or str(id_) == "":
        wrong.append("id must be text or a whole number")
    captions = record.get("captions")
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        wrong.append("captions must be a list of at least one text")
        captions = []
    complete = record.get("complete", False)
    if not isinstance(complete, bool):
        wrong.append("complete must be true or false")
    boxes, crowds = _boxes(record, wrong)
    said = [image, str(id_), *(c for c in captions if isinstance(c, str)), *(box.category for box in boxes), *crowds]
    wrong += [f"{text!a} contains half a character (a lone surrogate)" for text in said if not is_unicode(text)]
    if wrong:
        raise Unusable("context", "; ".join(wrong), "see docs/synthesis.md for the format")
    return Context(str(id_), image, tuple(c.strip() for c in captions), tuple(boxes), complete, crowds)


def _names_a_file(image: str) -> bool:
    """Return whether a name can be that of a file: "..", "photos/", "" and names with a NUL cannot."""
    last = image.rpartition("/")[2]
    return bool(last.strip()) and last not in (".", "..") and "\0" not in image


def _boxes(record: dict[str, Any], wrong: list[str]) -> tuple[list[Box], tuple[str, ...]]:
    """Return the boxes of a context, and the categories of its crowds; their problems are added to `wrong`."""
    keys = [key for key in ("boxes", "instances") if key in record]
    given = record[keys[0]] if len(keys) == 1 else None
    if not isinstance(given, list):
        twice = "boxes and instances are two names for one list; keep one"
        wrong.append(twice if len(keys) > 1 else "boxes must be a list, [] if no object is annotated")
        return [], ()
    boxes: list[Box] = []
    crowds: set[str] = set()
    for number, one in enumerate(given, start=1):
        one = one if isinstance(one, dict) else {}
        category, bbox, crowd = one.get("category"), one.get("bbox"), one.get("iscrowd", False)
        if not isinstance(category, str) or not category.strip():
            wrong.append(f"box {number} needs a category")
        elif crowd not in (False, True):  # 0 and 1 are equal to these
            wrong.append(f"box {number} ({category}): iscrowd must be 0 or 1")
        elif crowd:
            crowds.add(category.strip())
        elif not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(value) for value in bbox):
            wrong.append(f"box {number} ({category}) needs a bbox of four numbers")
        elif not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in bbox):
            wrong.append(f"box {number} ({category}) reaches outside of 0..1: {bbox}")
        elif not (bbox[0] < bbox[2] and bbox[1] < bbox[3]):
            wrong.append(f"box {number} ({category}) has no area, x1 < x2 and y1 < y2 do not hold: {bbox}")
        else:
            x1, y1, x2, y2 = (min(max(float(value), 0.0), 1.0) for value in bbox)
            boxes.append(Box(category.strip(), (x1, y1, x2, y2)))
    return boxes, tuple(sorted(crowds))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
