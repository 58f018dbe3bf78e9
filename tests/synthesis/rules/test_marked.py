"""What a reader marked: the rules still give the answers that were marked true, and none that was not."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from qllava.data.contexts import Context, read_contexts
from qllava.synthesis.rules.examples import detail, reasons
from qllava.synthesis.rules.questions import questions
from qllava.synthesis.rules.view import View
from tests.synthesis.rules.marked import SIZE, draw, marked, pool, refused


@pytest.fixture(scope="module")
def contexts(coco_contexts: Path) -> list[Context]:
    """The forty of the bench."""
    return read_contexts(coco_contexts)


def test_the_list_is_whole_and_nearly_all_of_it_true() -> None:
    marks = Counter(one["mark"] for one in marked())
    assert set(marks) <= {"true", "false", "ungrammatical"} and marks.total() == SIZE
    assert marks["true"] >= 0.99 * SIZE
    assert all(one.get("why") for one in (*marked(), *refused()) if one["mark"] != "true")


def test_the_list_is_that_of_these_rules(contexts: list[Context]) -> None:
    """A change of the rules that changes the sample asks for a new list, marked from scratch."""
    given = pool(contexts)
    assert sorted(draw(contexts)) == sorted((one["id"], one["question"]) for one in marked())
    assert {(one["id"], one["question"]): one["answer"] for one in marked()} == {
        key: given[key].text for key in draw(contexts)
    }


def test_answers_marked_true_are_still_given_and_others_never(contexts: list[Context]) -> None:
    said: dict[str, list[str]] = {}
    for context in contexts:
        view = View(context)
        texts = said.setdefault(context.id, [answer for _, answer in reasons(view)])
        for seed in range(8):
            rng = random.Random(seed)
            texts += [one.answer for found in questions(view, rng).values() for one in found]
            texts.append(detail(view, rng))
    for one in refused():
        assert not [text for text in said[one["id"]] if one["says"].lower() in text.lower()], one
