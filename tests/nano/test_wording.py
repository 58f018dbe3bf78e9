"""Other words for a plain question name the same things, and none of them is left without other words."""

from __future__ import annotations

import random
import re

import pytest

from qllava.nano import further, language, patterns, talk, unknown, wording
from qllava.nano.scenes import COLOURS, FORMS, sample_scene

KEPT = re.compile(rf"\b({'|'.join((*COLOURS, *FORMS))})(?:e?s)?\b")
SAME = {
    "violet": "purple", "disc": "circle", "dot": "circle", "plus sign": "cross", "plus": "cross", "hoop": "ring",
    "donut": "ring", "box": "square",
}  # fmt: skip


def things(text: str) -> list[str]:
    """The colours and forms that a question names, in order, by their plain words."""
    text = text.lower()
    for other, plain in SAME.items():
        text = re.sub(rf"\b{other}(es|s)?\b", plain, text)
    return KEPT.findall(text)


def test_the_same_things_are_named_in_the_same_order_or_the_other() -> None:
    different = set()
    for seed in range(4000):
        rng = random.Random(seed)
        scene = sample_scene(rng)
        asked = language.ask(scene, rng.choice(language.TYPES), rng)
        plain = asked.text if asked and seed % 2 else further.ask(scene, rng)[0]
        other = wording.reword(plain, rng, noise=0.0)
        assert sorted(things(other)) == sorted(things(plain)), (plain, other)
        assert "{" not in other and "(" not in other and "|" not in other and "  " not in other
        different.add(other)
    assert len(different) > 3500, "hardly two are the same"


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="no other words are known for 'What is love\\?'"):
        wording.reword("What is love?", random.Random(0))


def test_every_pattern_can_be_drawn() -> None:
    for plain in ("Describe the picture.", "Which colours are there?", "Which forms are there?"):
        drawn = {wording.reword(plain, random.Random(seed), noise=0.0) for seed in range(1500)}
        assert len(drawn) > 40
    for asked, templates in patterns.ASKED:
        parts = ["shape"] * asked.groups
        for template in templates:
            said = template.format(*parts, a="a", c="c", seen="", tell="t", give="g")
            assert wording._draw(said, random.Random(0)) and said.count("(") == said.count(")"), template


def test_a_careless_question_is_still_the_question() -> None:
    """At most a letter is wrong, and a polite word more."""
    text = "What colour is the circle?"
    said = {wording.careless(text, random.Random(seed)) for seed in range(500)}
    assert len(said) > 100 and any(one == text.lower().rstrip("?") for one in said)
    for one in said:
        words = re.findall(r"[a-z]+", one.lower())
        assert sum(word in words for word in ("what", "colour", "is", "the", "circle")) >= 4, one


def test_a_typo_changes_one_word_by_one_letter() -> None:
    for seed in range(300):
        changed = wording._typo("the orange triangle", random.Random(seed))
        assert abs(len(changed) - len("the orange triangle")) <= 1 and changed.startswith("the ")
    assert wording._typo("a b c", random.Random(0)) == "a b c"


def test_strange_questions_are_many_and_about_no_shape() -> None:
    rng = random.Random(0)
    said = [unknown.ask(rng) for _ in range(5000)]
    assert len(set(said)) > 4000 and all(one.strip() for one in said)
    named = [one for one in said if re.search(rf"\b({'|'.join((*FORMS, 'shape', 'shapes'))})s?\b", one.lower())]
    assert not named, named[:5]
    assert not any(slot in one for one in said for slot in unknown._DRAWN)


def test_conversations_have_all_kinds() -> None:
    rng = random.Random(1)
    pairs = [pair for _ in range(300) for pair in talk.turns(sample_scene(rng), rng, 10)]
    assert len(pairs) == 3000
    assert 0.04 < sum(answer == unknown.SENTENCE for _, answer in pairs) / 3000 < 0.12
    assert any(re.match("(and|what about|how about)", question.lower()) for question, _ in pairs)
    assert sum(question.startswith("What colour is the ") for question, _ in pairs) > 20, "some stay plain"
    asked, answer = talk.detail(sample_scene(rng), rng)
    assert asked and answer.startswith("There are ")
    asked, answer = talk.reasoning(sample_scene(rng), rng)
    assert " So the answer is " in answer
