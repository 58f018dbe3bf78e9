"""The list of what visitors asked, and how answers to it are judged."""

from __future__ import annotations

from collections import Counter

from qllava.nano.unknown import SENTENCE
from tests.nano.visitors import SCENES, Asked, is_right, read, repeats


def test_the_list_asks_each_scene_about_shapes_and_about_anything_else() -> None:
    asked = read()
    assert len(asked) == len({(one.image, one.question) for one in asked}) == 200
    assert Counter(one.about_shapes for one in asked) == {True: 150, False: 50}
    assert all((SCENES / one.image).is_file() for one in asked)
    assert min(Counter(one.image for one in asked).values()) > 60
    for one in asked:
        assert bool(one.right) == one.about_shapes and (one.right == ("*",)) == bool(one.names)


def test_answers_are_judged_by_their_words() -> None:
    count = Asked("1.png", "how many?", True, ("2", "two"))
    assert is_right(count, "2") and is_right(count, "Two.") and not is_right(count, "3") and not is_right(count, "2 3")
    named = Asked("1.png", "what is it?", True, ("red circle",))
    assert is_right(named, "a red circle") and is_right(named, "The red circle.") and not is_right(named, "a circle")
    all_of_it = Asked("1.png", "describe", True, ("*",), (("small", "red", "circle", "top left"), ("large", "ring")))
    said = "There are 2 shapes: a small red circle at the top left, a large blue ring on the right."
    assert is_right(all_of_it, said) and not is_right(all_of_it, said.replace("small", "medium"))


def test_anything_else_is_answered_by_the_sentence_alone() -> None:
    other = Asked("1.png", "who are you?", False, ())
    assert is_right(other, SENTENCE) and not is_right(other, "yes") and not is_right(other, f"{SENTENCE} {SENTENCE}")


def test_repetitions_are_found() -> None:
    assert repeats("0" * 30) and repeats("a red star " * 6) and repeats("no, " * 12)
    assert not repeats(SENTENCE) and not repeats("There are 2 shapes: a small red ring at the top, a small red star.")
