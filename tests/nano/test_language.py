"""What is said about scenes is true: every answer is worked out again here, from the geometry and the words alone."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter

import pytest

from qllava.nano import language
from qllava.nano.scenes import UNSEEN_PAIRS, Scene, Shape, Split, sample_scene

COLOUR = "red|orange|yellow|green|blue|purple"
FORM = "circle|square|triangle|cross|star|ring"
SIZE_WORD = "small|medium|large"
WHERE = "(?:at the|on the|in the) (?:top left|top right|bottom left|bottom right|top|bottom|left|right|centre)"
CELLS = {
    ("top", "left"): "top left", ("top", "middle"): "top", ("top", "right"): "top right",
    ("middle", "left"): "left", ("middle", "middle"): "centre", ("middle", "right"): "right",
    ("bottom", "left"): "bottom left", ("bottom", "middle"): "bottom", ("bottom", "right"): "bottom right",
}  # fmt: skip


def place(shape: Shape) -> str:
    """The name of the ninth of the image in which a shape's centre lies."""
    row = "top" if shape.y < 32 else "middle" if shape.y < 64 else "bottom"
    column = "left" if shape.x < 32 else "middle" if shape.x < 64 else "right"
    return CELLS[row, column]


def words(phrase: str) -> dict[str, str]:
    """What a noun phrase says: "a small red circle at the top left" -> all four."""
    pattern = (
        rf"(?:(?:a|an|the) )?(?:(?P<size>{SIZE_WORD}) )?(?:(?P<colour>{COLOUR}) )?(?P<form>{FORM}|shape)"
        rf"(?: (?P<where>{WHERE}))?"
    )
    found = re.fullmatch(pattern, phrase)
    assert found, phrase
    said = {key: value for key, value in found.groupdict().items() if value and value != "shape"}
    if "where" in said:
        said["place"] = re.sub("^(at|on|in) the ", "", said.pop("where"))
    return said


def meant(scene: Scene, phrase: str) -> list[Shape]:
    """The shapes of a scene that a noun phrase fits."""
    said = words(phrase)
    return [s for s in scene.shapes if all((place(s) if k == "place" else getattr(s, k)) == v for k, v in said.items())]


def the(scene: Scene, phrase: str) -> Shape:
    """The one shape that a phrase with "the" names; fails where it names none or several."""
    found = meant(scene, phrase)
    assert len(found) == 1, f"{phrase!r} names {len(found)} shapes of {language.full_caption(scene)}"
    return found[0]


def width(shape: Shape) -> float:
    return shape.box[2] - shape.box[0]


def truth(scene: Scene, question: str) -> str:
    """The answer, worked out from the words of the question; relations from boxes, not from places."""
    if found := re.fullmatch(r"What (colour|form|size) is (the .+)\?", question):
        return str(getattr(the(scene, found[2]), found[1]))
    if found := re.fullmatch(r"Where is (the .+)\?", question):
        return place(the(scene, found[1]))
    if found := re.fullmatch(r"How many (.+) are there\?", question):
        return str(len(meant(scene, re.sub("(?<=cross)es$|s$", "", found[1]))))
    if found := re.fullmatch(r"Is there (an? .+)\?", question):
        assert found[1].startswith("an ") == (found[1].split()[1][0] in "aeiou")
        return "yes" if meant(scene, found[1]) else "no"
    found = re.fullmatch(r"Is (the .+) (above|below|left of|right of|larger than|smaller than) (the .+)\?", question)
    assert found, f"a question of no known form: {question}"
    a, b = the(scene, found[1]), the(scene, found[3])
    assert a is not b
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    holds, fails = {
        "above": (ay2 <= by1, by2 <= ay1),
        "below": (by2 <= ay1, ay2 <= by1),
        "left of": (ax2 <= bx1, bx2 <= ax1),
        "right of": (bx2 <= ax1, ax2 <= bx1),
        "larger than": (width(a) > width(b) + 5, width(b) > width(a) + 5),
        "smaller than": (width(b) > width(a) + 5, width(a) > width(b) + 5),
    }[found[2]]
    assert holds != fails, f"neither clearly so nor clearly not: {question}"
    return "yes" if holds else "no"


def check_reason(scene: Scene, question: language.Question) -> None:
    """A reason is true, and says enough for the answer to follow from it."""
    if question.reason == "There is none.":
        assert question.type == "count" and question.answer == "0"
        return
    if found := re.fullmatch(r"There is nothing (\w+)\.", question.reason):
        assert question.answer == "no" and all(s.colour != found[1] for s in scene.shapes)
        assert found[1] in question.text
        return
    assert question.reason.startswith("There is ") and question.reason.endswith(".")
    told = [the(scene, phrase) for phrase in question.reason[len("There is ") : -1].split(" and ")]
    assert len(set(told)) == len(told)
    if question.type == "presence" and question.answer == "no":
        asked = words(re.sub(r"Is there |\?", "", question.text))
        assert told == [s for s in scene.shapes if s.colour == asked["colour"] or s.form == asked["form"]]
        return
    if question.type == "count":
        assert len(told) == int(question.answer)
    # Whoever knows only the told shapes comes to the same answer.
    assert truth(Scene(tuple(told), scene.background), question.text) == question.answer


def asked(
    type_: str, count: int, split: Split = "train", *, unseen: bool = False
) -> list[tuple[Scene, language.Question]]:
    out = []
    for seed in range(4 * count):
        rng = random.Random(f"{type_}-{split}-{unseen}-{seed}")
        scene = sample_scene(rng, split, unseen=unseen)
        question = language.ask(scene, type_, rng)
        if question is not None:
            out.append((scene, question))
        if len(out) == count:
            return out
    raise AssertionError(f"{type_} is asked in fewer than a quarter of the scenes")


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("type_", language.TYPES)
def test_every_answer_is_true_and_its_reason_leads_to_it(type_: str, unseen: bool) -> None:
    for scene, question in asked(type_, 400, unseen=unseen):
        assert question.type == type_
        assert truth(scene, question.text) == question.answer, (question, language.full_caption(scene))
        check_reason(scene, question)


def test_the_checker_finds_a_wrong_answer_and_an_unclear_question() -> None:
    ring, star = Shape("ring", "red", "small", 0, 16, 16, 0), Shape("star", "red", "large", 1, 48, 16, 0)
    scene = Scene((ring, star), 0)
    assert truth(scene, "Is the red ring left of the red star?") == "yes"
    assert truth(scene, "How many red shapes are there?") == "2"
    with pytest.raises(AssertionError, match="names 2 shapes"):
        truth(scene, "What size is the red shape?")
    with pytest.raises(AssertionError, match="neither clearly"):
        truth(scene, "Is the red ring above the red star?")
    with pytest.raises(AssertionError):
        check_reason(scene, language.Question("count", "How many red shapes are there?", "2", "There is a red ring."))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("type_", language.TYPES)
def test_nothing_said_about_ordinary_scenes_mentions_an_unseen_pair(type_: str, split: Split) -> None:
    """Not even "Is there a red star?" - "no"."""
    forbidden = re.compile("|".join(f"{colour} {form}" for colour, form in UNSEEN_PAIRS))
    for scene, question in asked(type_, 300, split):
        said = [question.text, question.reason, language.full_caption(scene)]
        said += language.captions(scene, random.Random(0))
        assert not forbidden.search(" ".join(said))


def test_a_question_can_be_asked_about_a_given_shape() -> None:
    for seed in range(300):
        rng = random.Random(f"about-{seed}")
        scene = sample_scene(rng, "test", unseen=True)
        about = rng.choice(scene.shapes)
        for type_ in ("colour", "form", "size", "place"):
            question = language.ask(scene, type_, rng, about=about)
            assert question is not None
            phrase = re.sub(r"^(What \w+|Where) is |\?$", "", question.text)
            assert the(scene, phrase) is about


@pytest.mark.parametrize("type_", ["presence", "relation", "comparison"])
def test_yes_is_as_often_right_as_no(type_: str) -> None:
    answers = Counter(question.answer for _, question in asked(type_, 2000))
    assert set(answers) == {"yes", "no"}
    assert 900 < answers["yes"] < 1100


@pytest.mark.parametrize(("type_", "answers"), [("colour", 6), ("form", 6), ("size", 3), ("place", 9)])
def test_no_answer_is_much_more_frequent_than_another(type_: str, answers: int) -> None:
    counts = Counter(question.answer for _, question in asked(type_, 1500))
    assert len(counts) == answers
    assert max(counts.values()) < 1.8 * min(counts.values())


def test_counts_reach_from_none_to_five() -> None:
    assert {question.answer for _, question in asked("count", 1500)} == set("012345")


def test_comparison_is_not_asked_where_sizes_are_alike() -> None:
    ring, star = Shape("ring", "red", "small", 0, 16, 16, 0), Shape("star", "red", "small", 1, 48, 16, 0)
    assert language.ask(Scene((ring, star), 0), "comparison", random.Random(0)) is None


def test_questions_differ_and_mix_types() -> None:
    types: Counter[str] = Counter()
    for seed in range(200):
        rng = random.Random(f"many-{seed}")
        scene = sample_scene(rng)
        questions = language.questions(scene, rng, 10)
        assert len({q.text for q in questions}) == len(questions) == 10
        assert all(truth(scene, q.text) == q.answer for q in questions)
        types.update(q.type for q in questions)
    assert set(types) == set(language.TYPES)


def test_the_words_are_those_that_the_weights_were_trained_on() -> None:
    """Whoever changes this number raises dataset.VERSION and builds nano's weights again."""
    rng = random.Random(0)
    said = [language.questions(sample_scene(rng), rng, 12) for _ in range(200)]
    assert zlib.crc32(repr([(q.text, q.answer, q.reason) for part in said for q in part]).encode()) == 1320795770


def phrases(caption: str) -> list[str]:
    return re.split(", | and ", caption)


def test_the_full_caption_says_everything_once_in_reading_order() -> None:
    for seed in range(300):
        scene = sample_scene(random.Random(f"caption-{seed}"), unseen=seed % 2 == 0)
        said = phrases(language.full_caption(scene))
        assert [the(scene, phrase) for phrase in said] == list(scene.shapes)
        assert all(set(words(phrase)) == {"size", "colour", "form", "place"} for phrase in said)
        assert all(phrase.startswith(("a small", "a medium", "a large")) for phrase in said)


def test_captions_are_true_and_leave_something_out() -> None:
    for seed in range(300):
        rng = random.Random(f"captions-{seed}")
        scene = sample_scene(rng)
        said = language.captions(scene, rng)
        assert len(said) == 5
        for caption in said:
            parts = phrases(caption)
            assert 2 <= len(parts) <= len(scene.shapes)
            assert all(meant(scene, phrase) for phrase in parts), (caption, language.full_caption(scene))
            assert all(len(words(phrase)) < 4 for phrase in parts)
            for phrase in set(parts):
                assert parts.count(phrase) <= len(meant(scene, phrase))
                assert phrase.startswith("an " if phrase.split()[1][0] in "aeiou" else "a ")


def test_a_description_counts_and_names_every_shape() -> None:
    requests = set()
    for seed in range(200):
        rng = random.Random(f"detail-{seed}")
        scene = sample_scene(rng)
        request, said = language.detail(scene, rng)
        requests.add(request)
        found = re.fullmatch(r"There are (\d) shapes: (.+)\.", said)
        assert found
        assert int(found[1]) == len(scene.shapes)
        assert [the(scene, phrase) for phrase in phrases(found[2])] == list(scene.shapes)
    assert len(requests) > 2


def test_reasoning_gives_a_true_reason_and_the_right_answer() -> None:
    for seed in range(600):
        rng = random.Random(f"reasoning-{seed}")
        scene = sample_scene(rng)
        request, said = language.reasoning(scene, rng)
        question = request.removesuffix(" Give your reasons.")
        assert question != request
        reason, answer = said.removesuffix(".").split(" So the answer is ")
        assert answer == truth(scene, question)
        type_ = "count" if question.startswith("How many") else "presence" if question.startswith("Is there") else ""
        check_reason(scene, language.Question(type_, question, answer, reason))


def test_every_word_of_a_map_is_in_the_list_and_none_is_there_twice() -> None:
    listed = language.map_words()
    assert len(set(listed)) == len(listed) == 1 + 3 * 6 * 6 * 9
    for seed in range(200):
        scene = sample_scene(random.Random(f"words-{seed}"), unseen=True)
        assert {language.word_of(s) for s in scene.shapes} <= set(listed)
    assert language.word_of(Shape("circle", "red", "large", 0, 16, 16, 0)) == "largeredcircletopleft"


def test_a_map_shows_each_shape_where_it_stands() -> None:
    for seed in range(300):
        scene = sample_scene(random.Random(f"map-{seed}"), unseen=seed % 3 == 0)
        shown = language.scene_map(scene)
        assert len(shown) == 36
        assert set(shown) - {language.MAP_BLANK} == {language.word_of(s) for s in scene.shapes}
        for patch, word in enumerate(shown):
            x1, y1 = patch % 6 * 16, patch // 6 * 16
            for shape in scene.shapes:
                left, top, right, bottom = shape.box
                inside = left <= x1 and x1 + 16 <= right and top <= y1 and y1 + 16 <= bottom
                apart = right <= x1 or x1 + 16 <= left or bottom <= y1 or y1 + 16 <= top
                assert not inside or word == language.word_of(shape)
                assert not apart or word != language.word_of(shape)
