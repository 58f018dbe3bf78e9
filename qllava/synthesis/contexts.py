"""What a teacher is told of a picture: captions and boxes.

Context
  id        "000000296284"
  image     "000000296284.jpg"
  captions  ("A donut shop is full of ...", ...)
  boxes     (Box("donut", (0.37, 0.584, 0.504, 0.709)), ...)
                     x1    y1     x2     y2   of width and height, from the upper left corner
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """One annotated object."""

    category: str
    bbox: tuple[float, float, float, float]  # x1, y1, x2, y2 between 0 and 1


@dataclass(frozen=True)
class Context:
    """One picture in words; the teacher sees nothing else of it."""

    id: str
    image: str  # the file's name, relative to the folder of the pictures
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]
