"""nano's images and questions on disk, in the formats of anybody's own data.

They are made once into a cache folder (`$QLLAVA_CACHE`, else `~/.cache/qllava`) and are the same bytes everywhere:

    images/train-000000.png ...      96 x 96
    pretrain.json                    LLaVA JSON: an image and the caption that names everything in it
    train.json                       LLaVA JSON: a conversation of about ten questions per image, now and then a
                                     description or reasons; images in colours without a name, whose questions
                                     speak of none; and images without a scene, whose answers say what nano knows
    validation.json                  question, image, answer, type: looked at during the run
    test.json                        the same: the table, every type alike often
    unseen.json                      the same, about shapes whose pair of colour and form no training image shows
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from qllava import workers
from qllava.config import cache_folder
from qllava.files import whole_folder
from qllava.nano import language, strange, talk, unknown
from qllava.nano.scenes import COLOURS, UNSEEN_PAIRS, Scene, Split, nameless_colour, render, sample_scene

VERSION = 3
"""Raised whenever the files would come out different, so that an old cache is not taken for a new one."""
PRETRAIN_IMAGES = 2_000
TRAIN_IMAGES = 3_000
NAMELESS_IMAGES = 1_000
STRANGE_IMAGES = 150
QUESTIONS_PER_IMAGE = 10
VALIDATION_QUESTIONS = 160
TEST_QUESTIONS = 1_000
UNSEEN_QUESTIONS = 400
_CHUNK = 250
_Record = Callable[[int, random.Random], tuple[Image.Image, dict[str, Any]]]
"""Makes an example: its number and its own randomness -> its image, and the fields beside id and image."""


@dataclass(frozen=True)
class NanoData:
    """The paths of the files."""

    folder: Path
    """The folder that image paths are relative to."""

    @property
    def pretrain(self) -> Path:
        """Captions for stage 1."""
        return self.folder / "pretrain.json"

    @property
    def train(self) -> Path:
        """Conversations for stage 2."""
        return self.folder / "train.json"

    @property
    def validation(self) -> Path:
        """Questions that are looked at during the run."""
        return self.folder / "validation.json"

    @property
    def test(self) -> Path:
        """Questions of the table."""
        return self.folder / "test.json"

    @property
    def unseen(self) -> Path:
        """Questions about pairs that no training image shows."""
        return self.folder / "unseen.json"


def prepare(folder: Path | None = None) -> NanoData:
    """Make the files, unless they exist. The folder is written aside and renamed: if it exists, it is complete."""
    folder = folder or cache_folder() / f"nano-{VERSION}"
    if folder.is_dir():
        return NanoData(folder)
    with whole_folder(folder, Path.is_dir) as aside:
        (aside / "images").mkdir()
        with workers.pool() as pool:
            train = _draw(pool, aside, "train", TRAIN_IMAGES, _conversation_record)
            nameless = _draw(pool, aside, "nameless", NAMELESS_IMAGES, _nameless_record)
            odd = _draw(pool, aside, "strange", STRANGE_IMAGES, _strange_record)
            _write(aside / "train.json", train + nameless + odd)
            # Stage 1 sees the first of the same images: nothing is drawn for it that stage 2 does not use.
            _write(aside / "pretrain.json", [_caption_record(one["id"]) for one in train[:PRETRAIN_IMAGES]])
            held_out: dict[str, tuple[int, _Record]] = {
                "validation": (VALIDATION_QUESTIONS, partial(_question_record, split="validation", unseen=False)),
                "test": (TEST_QUESTIONS, partial(_question_record, split="test", unseen=False)),
                "unseen": (UNSEEN_QUESTIONS, partial(_question_record, split="test", unseen=True)),
            }
            for name, (count, record) in held_out.items():
                _write(aside / f"{name}.json", _draw(pool, aside, name, count, record))
    return NanoData(folder)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records), encoding="utf-8")


def _draw(pool: ProcessPoolExecutor, folder: Path, name: str, count: int, record: _Record) -> list[dict[str, Any]]:
    """Draw `count` images and make an example of each, in parallel, in order."""
    chunks = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    bar: Iterable[list[dict[str, Any]]] = pool.map(partial(_draw_chunk, folder, name, record), chunks)
    records = tqdm(bar, total=len(chunks), desc=f"Drawing {name}", unit_scale=_CHUNK, unit=" images")
    return [one for part in records for one in part]


def _draw_chunk(folder: Path, name: str, record: _Record, bounds: tuple[int, int]) -> list[dict[str, Any]]:
    out = []
    for index in range(*bounds):
        id_ = f"{name}-{index:06d}"
        image, fields = record(index, random.Random(f"nano-{id_}"))
        image.save(folder / "images" / f"{id_}.png", compress_level=1)
        out.append({"id": id_, "image": f"images/{id_}.png", **fields})
    return out


def scene_of(id_: str) -> Scene:
    """Return the scene of a training image, by its id."""
    return sample_scene(random.Random(f"nano-{id_}"))


def _caption_record(id_: str) -> dict[str, Any]:
    said = language.full_caption(scene_of(id_))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": said}]
    return {"id": id_, "image": f"images/{id_}.png", "conversations": turns}


def _conversation_record(index: int, rng: random.Random) -> tuple[Image.Image, dict[str, Any]]:
    scene = sample_scene(rng)
    pairs = talk.turns(scene, rng, QUESTIONS_PER_IMAGE - 1)
    if index % 8 == 0:
        pairs = [talk.detail(scene, rng), *pairs[:6]]
    elif index % 12 == 1:
        pairs = [*pairs[:6], talk.reasoning(scene, rng)]
    # Whatever is asked that is not about shapes must get the sentence: every conversation asks such a question, half of
    # them first, as a visitor does.
    place = 0 if rng.random() < 0.5 else rng.randrange(len(pairs) + 1)
    pairs.insert(place, (unknown.ask(rng), unknown.SENTENCE))
    return render(scene), {"conversations": _turns(pairs)}


def _nameless_record(index: int, rng: random.Random) -> tuple[Image.Image, dict[str, Any]]:
    """An image in colours that have no name, and questions that need none.

    Forms are learned from them apart from colours: a form is known by them in a colour that it was never seen in.
    """
    pairs: list[tuple[str, str]] = []
    while len(pairs) < 4:
        scene = sample_scene(rng)
        asked = language.questions(scene, rng, 4 * QUESTIONS_PER_IMAGE)
        pairs = [(talk.said(q.text, rng), q.answer) for q in asked if not COLOURS.keys() & {*q.text.split(), q.answer}]
    image = render(scene, [nameless_colour(rng) for _ in scene.shapes])
    return image, {"conversations": _turns(pairs[:QUESTIONS_PER_IMAGE])}


def _strange_record(index: int, rng: random.Random) -> tuple[Image.Image, dict[str, Any]]:
    """An image without a scene: whatever is asked, the answer says what nano knows."""
    scene = sample_scene(rng)
    asked = [talk.detail(scene, rng)[0], *(question for question, _ in talk.turns(scene, rng, 3))]
    rng.shuffle(asked)
    return strange.draw(rng), {"conversations": _turns([(question, unknown.SENTENCE) for question in asked])}


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers as LLaVA's turns; the first has the image."""
    turns = []
    for number, (asked, answered) in enumerate(pairs):
        turns.append({"from": "human", "value": f"<image>\n{asked}" if number == 0 else asked})
        turns.append({"from": "gpt", "value": answered})
    return turns


def _question_record(
    index: int, rng: random.Random, *, split: Split, unseen: bool
) -> tuple[Image.Image, dict[str, Any]]:
    """One question about one image; types take turns, so that each is asked equally often."""
    type_ = language.TYPES[index % len(language.TYPES)]
    question = None
    while question is None:
        scene = sample_scene(rng, split, unseen=unseen)
        about = next((s for s in scene.shapes if (s.colour, s.form) in UNSEEN_PAIRS), None) if unseen else None
        question = language.ask(scene, type_, rng, about=about)
    return render(scene), {"question": talk.said(question.text, rng), "answer": question.answer, "type": question.type}
