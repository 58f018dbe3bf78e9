"""Which objects a text names: forms and plurals, words inside others, and how often honest answers are accused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qllava.data.contexts import Context, read_contexts
from qllava.synthesis.objects import CATEGORIES, named, unsupported


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two hot dogs.", {"hot dog"}),
        ("A dog, hot from the sun.", {"dog"}),
        ("a TEDDY BEAR and a bear", {"teddy bear", "bear"}),
        ("An orange cat bears a resemblance to a remote cousin, a trained one", {"cat"}),
        ("He ties his shoes.", set()),
        ("knives, benches, buses, mice and wine glasses", {"knife", "bench", "bus", "mouse", "wine glass"}),
        ("men's bicycles", {"person", "bicycle"}),
        ("scatter, carpet, cupboard, businessman", set()),
        ("", set()),
    ],
)
def test_what_is_named(text: str, expected: set[str]) -> None:
    assert named(text) == expected


def test_every_category_is_named_by_some_word() -> None:
    assert len(set(CATEGORIES)) == 80
    restricted = {"person", "train", "bear", "tie", "sports ball", "orange", "bed", "mouse", "remote", "sink", "book"}
    assert {category for category in CATEGORIES if category not in named(category)} <= restricted
    assert {category for category in CATEGORIES if unsupported(f"a {category}", [category], [])} == set()


@pytest.mark.parametrize(
    ("answer", "captions", "categories", "expected"),
    [
        ("A dog and a cat.", ["A puppy."], ["cat"], set()),
        ("A dog and a cat.", ["A puppy."], [], {"cat"}),
        ("A woman on a couch.", ["Someone on a sofa."], [], set()),
        ("A suitcase.", ["Luggage on the floor."], [], set()),
        ("A dog.", ["Hot dogs on a plate."], [], {"dog"}),
    ],
)
def test_other_words_are_evidence(answer: str, captions: list[str], categories: list[str], expected: set[str]) -> None:
    assert unsupported(answer, captions, categories) == expected


def test_captions_are_told_apart_from_captions_of_another_image(coco_contexts: Path) -> None:
    """What people said of an image is never accused, what they said of another image nearly always."""
    contexts = read_contexts(coco_contexts)

    def accused(answer: str, context: Context) -> bool:
        return bool(unsupported(answer, context.captions, [box.category for box in context.boxes]))

    answers = [" ".join(context.captions) for context in contexts]
    assert not [n for n, context in enumerate(contexts) if accused(answers[n], context)]
    shifted = [
        accused(answers[(n + shift) % len(answers)], context)
        for shift in range(3, len(answers), 9)
        for n, context in enumerate(contexts)
    ]
    assert sum(shifted) > 0.85 * len(shifted)


def test_answers_of_others_are_told_apart_from_answers_to_another_image(shared_data: Path) -> None:
    """LLaVA-Bench: the reference answer to an image is never accused, the one to another image nearly always."""

    def lines(name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in (shared_data / name).read_text(encoding="utf-8").splitlines()]

    contexts = {str(c["image"]): c for c in lines("coco_contexts.jsonl")}
    questions = lines("llava_bench_coco_questions.jsonl")
    answers = [str(r["text"]) for r in lines("llava_bench_coco_reference.jsonl")]

    def accused(answer: str, image: object) -> bool:
        context = contexts[str(image)]
        boxes: object = context["instances"]
        captions: object = context["captions"]
        assert isinstance(boxes, list)
        assert isinstance(captions, list)
        return bool(unsupported(answer, captions, [box["category"] for box in boxes]))

    known = [n for n, q in enumerate(questions) if q["image"] in contexts]
    assert len(known) >= 40
    assert not [n for n in known if accused(answers[n], questions[n]["image"])]
    swapped = [
        accused(answers[(n + shift) % len(answers)], questions[n]["image"])
        for shift in range(3, len(answers), 9)
        for n in known
        if questions[(n + shift) % len(answers)]["image"] != questions[n]["image"]
    ]
    assert sum(swapped) > 0.85 * len(swapped)
