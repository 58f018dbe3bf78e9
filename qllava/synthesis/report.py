"""Quality of instruction data as one page: types, lengths, openings, objects, duplicates and samples.

    write_report(examples, contexts, Path("report.html"), image_folder)

The hallucination rate is that of CHAIR (Rohrbach et al. 2018) over answers: the share of named objects that neither a
caption nor a box of the image names, with each object counted once per example. `objects` defines the objects and their
names: COCO's eighty categories, found by their words. A sentence that denies something ("No dog is there.") names no
object. Examples of an image without a context are excluded from the rate, and counted.
"""

from __future__ import annotations

import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qllava import page
from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN
from qllava.data.contexts import Context
from qllava.data.images import open_image
from qllava.page import Bar, Html
from qllava.synthesis.objects import CATEGORIES, named, unsupported

SAMPLES = 20
_OPENING = 3  # first words of a question
_SHOWN = 15
_IMAGE = 320  # pixels of the longer side of a sample
_LENGTHS = (1, 3, 7, 15, 31, 63, 127)
_SENTENCE = re.compile(r"[^.!?]+[.!?]*")
_DENIAL = re.compile(r"\b(no|not|none|neither|nor|without|never|nothing|nobody|cannot)\b|n['\u2019]t\b", re.IGNORECASE)


@dataclass
class Quality:
    """Counts over examples."""

    rows: int = 0
    """Number of examples."""
    images: int = 0
    """Number of distinct images."""
    answers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Number of words of each answer, by type."""
    examples_of: Counter[str] = field(default_factory=Counter)
    """Number of examples, by type."""
    openings: Counter[str] = field(default_factory=Counter)
    """Number of questions, by their first words."""
    named: Counter[str] = field(default_factory=Counter)
    """Number of examples that name an object, by object."""
    unsupported: Counter[str] = field(default_factory=Counter)
    """Number of examples that name an object without a caption or box that supports it, by object."""
    present: Counter[str] = field(default_factory=Counter)
    """Number of images whose captions or boxes name an object, by object."""
    lying: int = 0
    """Number of examples that name at least one unsupported object."""
    without_context: int = 0
    """Number of examples of an image without a context."""
    repeated_rows: int = 0
    """Number of examples with the same text about the same image as an earlier example."""
    repeated_questions: int = 0
    """Number of questions that were asked about the same image before, in the same words."""

    @property
    def questions(self) -> int:
        """Number of questions in all examples."""
        return sum(self.openings.values())

    @property
    def hallucination_rate(self) -> float | None:
        """Share of unsupported among named objects, each counted once per example; None if no object is named."""
        total = sum(self.named.values())
        return sum(self.unsupported.values()) / total if total else None

    def as_json(self) -> dict[str, Any]:
        """Return the main figures."""
        return {
            "rows": self.rows,
            "pictures": self.images,
            "questions": self.questions,
            "types": dict(self.examples_of),
            "objects_named": sum(self.named.values()),
            "hallucination_rate": self.hallucination_rate,
            "rows_with_hallucination": self.lying,
            "repeated_rows": self.repeated_rows,
            "repeated_questions": self.repeated_questions,
        }


def measure(rows: Sequence[Mapping[str, Any]], contexts: Sequence[Context]) -> Quality:
    """Count over examples in LLaVA's format; the context of an example is found by the name of its image."""
    quality = Quality()
    by_image = {context.image: context for context in contexts}
    seen_rows: set[tuple[object, ...]] = set()
    asked: set[tuple[str, str]] = set()
    for row in rows:
        pairs, image = _pairs(row), str(row.get("image", ""))
        quality.rows += 1
        quality.examples_of[_type(row)] += 1
        quality.answers[_type(row)] += [len(answer.split()) for _, answer in pairs]
        quality.openings.update(" ".join(question.split()[:_OPENING]) for question, _ in pairs)
        quality.repeated_rows += (image, *pairs) in seen_rows
        seen_rows.add((image, *pairs))
        for question, _ in pairs:
            quality.repeated_questions += (image, question) in asked
            asked.add((image, question))
        if (context := by_image.get(image)) is None:
            quality.without_context += 1
        else:
            _objects(quality, " ".join(answer for _, answer in pairs), context)
    used = {str(row.get("image", "")) for row in rows}
    quality.images = len(used)
    for image in used & by_image.keys():
        context = by_image[image]
        boxes = {*context.categories} & set(CATEGORIES)
        quality.present.update(boxes | named("\n".join(context.captions)))
    return quality


def _objects(quality: Quality, answers: str, context: Context) -> None:
    said = " ".join(part for part in _SENTENCE.findall(answers) if not _DENIAL.search(part))
    wrong = unsupported(said, context.captions, context.categories)
    quality.named.update(named(said))
    quality.unsupported.update(wrong)
    quality.lying += bool(wrong)


def _type(row: Mapping[str, Any]) -> str:
    return str(row.get("type") or "no type")


def _pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the questions, without the image token, and their answers."""
    said = [str(turn["value"]).replace(IMAGE_TOKEN, "").strip() for turn in row["conversations"]]
    return list(zip(said[::2], said[1::2], strict=False))


def write_report(
    rows: Sequence[Mapping[str, Any]], contexts: Sequence[Context], path: Path, image_folder: Path | None = None
) -> Quality:
    """Write the page and return its figures.

    Args:
        rows: Examples in LLaVA's format.
        contexts: Contexts that the examples were made from.
        path: File of the page.
        image_folder: Folder of the images of the samples shown; missing images are left out.

    Raises:
        OSError: The page cannot be written; its previous content is then unchanged.
    """
    quality = measure(rows, contexts)
    sections = [
        page.section("At a glance", page.tiles(_figures(quality)), *_warnings(quality)),
        page.section("Types and lengths", _types(quality), page.bar_chart(_lengths(quality))),
        _openings(quality),
        _objects_section(quality),
        page.section("Samples", *_samples(rows, {one.image: one for one in contexts}, image_folder)),
    ]
    lead = "Contents and wording of the examples, and objects that they name although the image does not show them."
    page.write_page(path, page.page("Instruction data", lead, sections, footer="Written by qllava synthesize."))
    return quality


def _figures(quality: Quality) -> list[tuple[str, str]]:
    rate = quality.hallucination_rate
    return [
        ("Examples", f"{quality.rows:,}"),
        ("Images", f"{quality.images:,}"),
        ("Questions", f"{quality.questions:,}"),
        ("Hallucination rate", "none named" if rate is None else page.percent(rate)),
        ("Repeated examples", f"{quality.repeated_rows:,}"),
        ("Repeated questions", f"{quality.repeated_questions:,}"),
    ]


def _warnings(quality: Quality) -> list[Html]:
    out = []
    if quality.without_context:
        text = f"{quality.without_context:,} examples have an image without a context; their objects were not checked."
        out.append(page.callout(text, "warning"))
    out.append(
        page.paragraph(
            "A repeated example has the same text about the same image as an earlier one. A repeated question was "
            "asked about its image before, in the same words.",
            muted=True,
        )
    )
    return out


def _types(quality: Quality) -> Html:
    head = ("Type", "Examples", "Questions", "Words of an answer: median", "95 % have at most", "longest")
    lines = []
    for type_, count in sorted(quality.examples_of.items()):
        words = sorted(quality.answers[type_]) or [0]
        p95 = words[round(0.95 * (len(words) - 1))]
        lines.append((type_, count, len(quality.answers[type_]), statistics.median(words), p95, words[-1]))
    return page.table(head, lines)


def _lengths(quality: Quality) -> list[Bar]:
    """Return the share of answers by their number of words."""
    words = [length for lengths in quality.answers.values() for length in lengths]
    bars, low = [], 0
    for high in (*_LENGTHS, None):
        inside = sum(low < length and (high is None or length <= high) for length in words)
        name = f"more than {low} words" if high is None else "1 word" if high == 1 else f"{low + 1} to {high} words"
        bars.append(Bar(name, inside / len(words) if words else 0.0))
        low = high or low
    return bars


def _openings(quality: Quality) -> Html:
    shown = quality.openings.most_common(_SHOWN)
    bars = [Bar(f"{words} \u2026", count / quality.questions, f"{count:,} questions") for words, count in shown]
    note = f"There are {len(quality.openings):,} different openings of {_OPENING} words; the most frequent are shown."
    most = shown[0][1] / quality.questions if shown else 1.0
    return page.section("First words of questions", page.paragraph(note), page.bar_chart(bars, maximum=most))


def _objects_section(quality: Quality) -> Html:
    total, wrong = sum(quality.named.values()), sum(quality.unsupported.values())
    text = (
        "The objects are COCO's eighty categories, found by their words. An object counts as named if an answer of an "
        "example names it, once per example; sentences that deny something are ignored. It counts as unsupported if no "
        "caption and no box of the image names it. The hallucination rate is the share of unsupported among named "
        f"objects: {wrong:,} of {total:,}, in {quality.lying:,} examples."
    )
    order = sorted(quality.named, key=lambda one: (-quality.unsupported[one], -quality.named[one], one))
    lines = [(one, quality.present[one], quality.named[one], quality.unsupported[one]) for one in order[: 2 * _SHOWN]]
    head = ("Object", "Images that show it", "Examples that name it", "Unsupported")
    never = sorted(set(quality.present) - set(quality.named))
    parts = [page.paragraph(text)]
    parts += [page.table(head, lines)] if lines else [page.callout("No answer names one of these objects.")]
    if never:
        parts.append(page.details(f"Present but never named: {len(never)}", page.paragraph(", ".join(never))))
    return page.section("Objects named and objects present", *parts)


def _samples(
    rows: Sequence[Mapping[str, Any]], contexts: Mapping[str, Context], image_folder: Path | None
) -> list[Html]:
    """Return examples drawn at random with a fixed seed; equal steps could hit the same type every time."""
    chosen = [rows[at] for at in sorted(random.Random(0).sample(range(len(rows)), min(SAMPLES, len(rows))))]
    return [_exhibit(row, contexts.get(str(row.get("image", ""))), image_folder) for row in chosen] or [
        page.paragraph("There are no examples.", muted=True)
    ]


def _exhibit(row: Mapping[str, Any], context: Context | None, image_folder: Path | None) -> Html:
    images, name = [], str(row.get("image", ""))
    if image_folder is not None and name and (image_folder / name).is_file():
        try:
            images.append((page.image(open_image(image_folder / name), name, longest=_IMAGE), name))
        except InputError:  # the check of the data reports it; here the sample is shown without its image
            images = []
    said = [page.verdicts([("Question", question, None), ("Answer", answer, None)]) for question, answer in _pairs(row)]
    if context is not None:
        known = [page.paragraph(caption) for caption in context.captions]
        boxes = [(box.category, *(f"{value:.3f}" for value in box.bbox)) for box in context.boxes]
        known += [page.table(("Category", "x1", "y1", "x2", "y2"), boxes)] if boxes else []
        said.append(page.details("Captions and boxes of the image", *known))
    return page.exhibit(f"{row.get('id', name)}: {_type(row)}", images, *said)
