"""Answers of the further questions are worked out again here, from the words of the question and the geometry alone."""

from __future__ import annotations

import inspect
import random
import re
from collections import Counter

import pytest

from qllava.nano import further, language
from qllava.nano.scenes import COLOURS, UNSEEN_PAIRS, Scene, Shape, sample_scene
from tests.nano.test_language import meant, place, width

PLACE = r"(?:at|in|on) the (?:top left|top right|bottom left|bottom right|top|bottom|left|right|centre)"

VALUE = "red|orange|yellow|green|blue|purple|small|medium|large"


def named(scene: Scene, name: str) -> list[Shape]:
    """The shapes that "the red circle", "the largest shape" and so on name, none where it names unknown things."""
    if found := re.fullmatch("the (largest|smallest) shape", name):
        widths = [width(s) for s in scene.shapes]
        extreme = max(widths) if found[1] == "largest" else min(widths)
        return [s for s, w in zip(scene.shapes, widths, strict=True) if abs(w - extreme) < 1]
    try:
        return meant(scene, name)
    except AssertionError:
        return []


def listed(values: list[str]) -> str:
    values = list(dict.fromkeys(values))
    return ", ".join(values[:-1]) + " and " + values[-1] if len(values) > 1 else values[0] if values else "nothing"


def attribute(shape: Shape, name: str) -> str:
    return place(shape) if name == "place" else str(getattr(shape, name))


def truth(scene: Scene, question: str) -> str:
    shapes = scene.shapes
    if found := re.fullmatch(r"Are there more than (\w+) shapes\?", question):
        return "yes" if len(shapes) > ("no", "one", "two", "three", "four", "five").index(found[1]) else "no"
    if question == "Which shapes are there?":
        return listed([f"{s.colour} {s.form}" for s in shapes])
    if found := re.fullmatch(r"Are (all|both) shapes (\w+)\?", question):
        assert found[1] == "all" or len(shapes) == 2
        return "yes" if all(found[2] in (s.colour, s.size) for s in shapes) else "no"
    if found := re.fullmatch(r"Are there any (\w+)\?", question):
        return "yes" if meant(scene, re.sub("(?<=cross)es$|s$", "", found[1])) else "no"
    if found := re.fullmatch(rf"Is there an? (\w+)(?: shape)? ({PLACE})\?", question):
        where = re.sub("^(at|on|in) the ", "", found[2])
        there = [s for s in shapes if place(s) == where or (where != "centre" and where in place(s).split())]
        return "yes" if any(found[1] in (s.colour, s.form, s.size) for s in there) else "no"
    if found := re.fullmatch(r"Is (the .+?) (?:an? )?(\w+) or (?:an? )?(\w+)\?", question):
        (one,) = named(scene, found[1])
        (answer,) = {found[2], found[3]} & {one.colour, one.form, one.size}
        return answer
    if found := re.fullmatch(
        r"Which is (larger|smaller|higher|lower|further left|further right), (.+) or (.+)\?", question
    ):
        (a,), (b,) = named(scene, found[2]), named(scene, found[3])
        first, second = {
            "larger": (width(a), width(b)), "smaller": (width(b), width(a)), "higher": (b.y // 32, a.y // 32),
            "lower": (a.y // 32, b.y // 32), "further left": (b.x // 32, a.x // 32),
            "further right": (a.x // 32, b.x // 32),
        }[found[1]]  # fmt: skip
        assert first != second
        return f"the {(a if first > second else b).colour} {(a if first > second else b).form}"
    if found := re.fullmatch(r"What is (the \w+ shape)\?", question):
        (one,) = named(scene, found[1])
        return language.article(f"{one.size} {one.colour} {one.form}")
    if question == "How many colours are there?":
        return str(len({s.colour for s in shapes}))
    if found := re.fullmatch(r"Which (colour|form)s are there\?", question):
        return listed([getattr(s, found[1]) for s in shapes])
    if found := re.fullmatch(r"Which shape is (the largest|the smallest)\?", question):
        (one,) = named(scene, f"{found[1]} shape")
        return f"the {one.colour} {one.form}"
    if found := re.fullmatch(r"Which colours do the (\w+) have\?", question):
        return listed([s.colour for s in meant(scene, re.sub("(?<=cross)es$|s$", "", found[1]))])
    if found := re.fullmatch(r"Which shapes are (\w+)\?", question):
        if found[1] in COLOURS:
            return listed([s.form for s in shapes if s.colour == found[1]])
        return listed([f"{s.colour} {s.form}" for s in shapes if s.size == found[1]])
    if found := re.fullmatch(r"Do all shapes have the same (\w+)\?", question):
        return "yes" if len({attribute(s, found[1]) for s in shapes}) == 1 else "no"
    if found := re.fullmatch(r"Do (the .+) and (the .+) have the same (\w+)\?", question):
        (a,), (b,) = named(scene, found[1]), named(scene, found[2])
        return "yes" if attribute(a, found[3]) == attribute(b, found[3]) else "no"
    if found := re.fullmatch(r"Are there more (.+) than (.+)\?", question):
        a, b = (len(meant(scene, re.sub("(?<=cross)es$|s$", "", one))) for one in found.groups())
        return "yes" if a > b else "no"
    if found := re.fullmatch(r"What is (above|below|left of|right of) (the .+)\?", question):
        (here,) = named(scene, found[2])
        edge = {"above": (1, 1, -1), "below": (1, 1, 1), "left of": (0, 0, -1), "right of": (0, 0, 1)}[found[1]]
        axis, _, sign = edge
        third = [int((s.y if axis else s.x) // 32) for s in shapes]
        mine = int((here.y if axis else here.x) // 32)
        others = [s for s, at in zip(shapes, third, strict=True) if sign * (at - mine) > 0]
        return listed([language.article(f"{s.colour} {s.form}") for s in others])
    if found := re.fullmatch(rf"What is ({PLACE})\?", question):
        words = re.sub("^(at|on|in) the ", "", found[1])
        there = [s for s in shapes if place(s) == words]
        if words in ("top", "bottom", "left", "right"):
            there = there or [s for s in shapes if words in place(s).split()]
        return listed([language.article(f"{s.size} {s.colour} {s.form}") for s in there])
    if found := re.fullmatch(r"Is there (an? (.+)|anything (\w+))\?", question):
        if found[3]:
            return "yes" if any(found[3] in (s.colour, s.size) for s in shapes) else "no"
        return "yes" if named(scene, f"the {found[2]}") else "no"
    if found := re.fullmatch(r"How many (.+) are there\?", question):
        return str(len(named(scene, "the " + re.sub("(?<=cross)es$|s$", "", found[1]))))
    if found := re.fullmatch(r"(?:What (\w+) is|Where is) (the .+)\?", question):
        there = named(scene, found[2])
        values = [attribute(s, found[1] or "place") for s in there]
        return listed(values) if there else f"There is no {found[2].removeprefix('the ')}."
    found = re.fullmatch(rf"Is (the (?:[a-z ]+? {PLACE}|[a-z ]+?)) (an? \w+|{VALUE}|{PLACE})\?", question)
    assert found, f"a question of no known form: {question}"
    (one,) = named(scene, found[1])
    said = re.sub("^(?:an?|(?:at|on|in) the) ", "", found[2])
    return "yes" if said in (one.colour, one.form, one.size, place(one)) else "no"


@pytest.mark.parametrize("kind", [ask for ask, _ in further._KINDS], ids=lambda ask: ask.__name__)
def test_every_answer_is_true(kind: object) -> None:
    answers: Counter[str] = Counter()
    for seed in range(400):
        rng = random.Random(f"further-{seed}")
        scene = sample_scene(rng)
        pair = kind(scene, rng)  # type: ignore[operator]
        if pair is not None:
            assert truth(scene, pair[0]) == pair[1], (pair, language.full_caption(scene))
            answers[pair[1]] += 1
    assert sum(answers.values()) >= 80
    if set(answers) <= {"yes", "no"} and kind is not further._more:
        assert min(answers.values()) > 0.2 * sum(answers.values())


def test_a_follow_up_asks_what_was_asked_before() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        scene = sample_scene(rng)
        asked = rng.choice(("colour", "form", "size", "place"))
        question, answer = further.follow_up(scene, rng, asked)
        (one,) = named(scene, question.removeprefix("And ").removesuffix("?"))
        assert attribute(one, asked) == answer
        assert answer not in question.replace("shape", ""), "it is not given away"


def test_pairs_that_no_training_image_shows_are_not_asked_about() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        question, answer = further.ask(sample_scene(rng), rng)
        for colour, form in UNSEEN_PAIRS:
            assert f"{colour} {form}" not in question + answer


def test_all_kinds_are_drawn() -> None:
    rng = random.Random(0)
    drawn = Counter(kind for (kind,) in (rng.choices(further._ASKERS, further._SHARES) for _ in range(5000)))
    functions = {one for name, one in vars(further).items() if name.startswith("_") and inspect.isfunction(one)}
    assert set(drawn) == {one for one in functions if list(inspect.signature(one).parameters) == ["scene", "rng"]}
    for kind, share in zip(further._ASKERS, further._SHARES, strict=True):
        assert drawn[kind] / 5000 == pytest.approx(share / sum(further._SHARES), rel=0.3)
