"""Sources of contexts: the user's files, and the training scenes of nano.

contexts_of("contexts.jsonl")    a file or a folder of COCO's annotations (see `qllava.data.contexts`)
contexts_of("nano")              nano's training scenes
contexts_of("nano:100")          the first 100 of them
"""

from __future__ import annotations

import random
from pathlib import Path

from qllava.config import NANO, InputError
from qllava.data.contexts import Box, Context, read_contexts
from qllava.nano import dataset, language, scenes


def contexts_of(source: str | Path) -> list[Context]:
    """Return the contexts of a source.

    Raises:
        InputError: With every problem of the source, a line each, naming file, line and id.
    """
    if (count := _nano_scenes(str(source))) is not None:
        return [_of_scene(f"train-{number:06d}") for number in range(count)]
    return read_contexts(Path(source))


def image_folder(source: str | Path) -> Path:
    """Return the default folder of a source's images: that of its file; nano's images are drawn if missing."""
    if _nano_scenes(str(source)) is not None:
        return dataset.prepare().folder
    return Path(source) if Path(source).is_dir() else Path(source).parent


def _nano_scenes(source: str) -> int | None:
    """Return the number of nano's training scenes that a source names; None for another source."""
    name, colon, number = source.partition(":")
    if name != NANO:
        return None
    if not colon:
        return dataset.TRAIN_IMAGES
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= dataset.TRAIN_IMAGES):
        most = f"{dataset.TRAIN_IMAGES:,}"
        raise InputError(
            f"{source}: the number after `nano:` must be from 1 to {most} (nano's training scenes); write nano:100 "
            "for the first 100."
        )
    return int(number)


def _of_scene(id_: str) -> Context:
    """Return a training scene of nano: five captions, and each shape with size, colour and form as its category."""
    scene = dataset.scene_of(id_)
    boxes = []
    for shape in scene.shapes:
        x1, y1, x2, y2 = (value / scenes.SIZE for value in shape.box)
        boxes.append(Box(f"{shape.size} {shape.colour} {shape.form}", (x1, y1, x2, y2)))
    captions = tuple(f"{said}." for said in language.captions(scene, random.Random(f"captions-{id_}")))
    return Context(id_, f"images/{id_}.png", captions, tuple(boxes), complete=True)
