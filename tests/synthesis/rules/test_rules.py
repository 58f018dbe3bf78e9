"""What rules say of an image is true to its annotation by a checker of the tests' own; nothing unsure is asked."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qllava.data.contexts import Box, Context, read_contexts
from qllava.data.formats import read_examples
from qllava.synthesis.objects import CATEGORIES
from qllava.synthesis.rules.examples import detail, reasons, write
from qllava.synthesis.rules.questions import questions
from qllava.synthesis.rules.view import View
from qllava.synthesis.sources import contexts_of
from qllava.synthesis.words import article, attributes, counted, plural, sentence, well_formed
from tests.synthesis.rules.checker import Checker, description, steps

ALL = ("conversation", "detail", "reasoning", "naive")
NEVER = re.compile(r"\b(captions?|annotat\w*|bounding|coordinates?)\b|\d\.\d", re.IGNORECASE)


def pairs(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Questions without the image, and answers."""
    said = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def checker(context: Context) -> Checker:
    """The annotation, as plain values."""
    boxes = [{"category": box.category, "bbox": list(box.bbox)} for box in context.boxes]
    return Checker(list(context.captions), boxes, complete=context.complete, crowds=context.crowds)


def make(
    *boxes: tuple[str, tuple[float, float, float, float]],
    said: str = "A scene.",
    complete: bool = False,
    crowds: tuple[str, ...] = (),
) -> Context:
    """A context of these boxes and crowds, with one caption."""
    return Context("1", "1.jpg", (said,), tuple(Box(*box) for box in boxes), complete, crowds)


def asked(context: Context, sort: str) -> list[tuple[str, str]]:
    """Text and brief answer of every question of a sort."""
    return sorted((q.text, q.brief) for q in questions(View(context), random.Random(0)).get(sort, []))


def everything(context: Context) -> list[str]:
    """Every question and answer that a context may give, of all types."""
    said = [
        text for one in questions(View(context), random.Random(0)).values() for q in one for text in (q.text, q.answer)
    ]
    said += [text for pair in reasons(View(context)) for text in pair]
    return [*said, detail(View(context), random.Random(0))]


A, B, C = (0.05, 0.05, 0.25, 0.25), (0.7, 0.7, 0.95, 0.95), (0.4, 0.4, 0.6, 0.6)


class TestTheFortyOfTheBench:
    @pytest.fixture(scope="class")
    def contexts(self, coco_contexts: Path) -> list[Context]:
        return read_contexts(coco_contexts)

    def test_enough_questions_about_distinct_facts_and_every_answer_true(self, contexts: list[Context]) -> None:
        assert len(contexts) == 40
        for context in contexts:
            for seed in range(5):
                (row,) = write(context, ["conversation"], seed=seed)
                facts = [checker(context).fact(*pair) for pair in pairs(row)]
                assert len(set(facts)) == len(facts), f"{context.id}: {facts}"
                assert len(facts) >= min(6, 2 + len(context.boxes)), context.id

    def test_every_question_that_there_is(self, contexts: list[Context]) -> None:
        for context in contexts:
            for brief in (True, False):
                (row,) = write(context, ["conversation"], brief=brief, turns=1000)
                facts = [checker(context).fact(*pair) for pair in pairs(row)]
                assert len(set(facts)) == len(facts)

    def test_reasons_and_descriptions(self, contexts: list[Context]) -> None:
        reasons = held = 0
        for context in contexts:
            for seed in range(10):
                for row in write(context, ["detail", "reasoning"], seed=seed):
                    ((question, answer),) = pairs(row)
                    if row["type"] == "reasoning":
                        steps(checker(context), question, answer)
                        reasons += 1
                    else:
                        held += description(checker(context), answer)
        assert reasons >= 200 and held >= 200

    def test_no_word_of_how_the_image_was_known(self, contexts: list[Context]) -> None:
        for context in contexts:
            for row in write(context, ALL):
                assert not [answer for _, answer in pairs(row) if NEVER.search(answer)]

    def test_wording_varies_and_both_verdicts_occur(self, contexts: list[Context]) -> None:
        said = [pair for one in contexts for row in write(one, ["conversation"]) for pair in pairs(row)]
        first = Counter(" ".join(question.split()[:3]) for question, _ in said)
        assert len(first) >= 12
        assert sum(answer.startswith("No,") for _, answer in said) >= 20

    def test_the_rows_are_read_by_the_recipes(self, contexts: list[Context], tmp_path: Path) -> None:
        rows = [row for one in contexts for row in write(one, ALL)]
        for row in rows:
            (tmp_path / row["image"]).touch()
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        examples = read_examples(tmp_path / "rows.json")
        assert len({one.id for one in examples}) == len(examples) == len(rows)


class TestNano:
    def test_every_answer_is_true(self) -> None:
        sorts: Counter[str] = Counter()
        for context in contexts_of("nano:150"):
            for brief in (True, False):
                (row,) = write(context, ["conversation"], brief=brief, turns=1000)
                facts = [checker(context).fact(*pair) for pair in pairs(row)]
                assert len(set(facts)) == len(facts)
                sorts.update(fact[0] for fact in facts)
            for row in write(context, ["reasoning"]):
                steps(checker(context), *pairs(row)[0])
        assert set(sorts) == {"there", "count", "place", "colour", "form", "size", "relation", "comparison"}

    def test_verdicts_are_balanced(self) -> None:
        rows = [row for one in contexts_of("nano:300") for row in write(one, ["conversation"], brief=True)]
        said = Counter(answer for row in rows for _, answer in pairs(row))
        assert 0.85 < said["yes"] / said["no"] < 1.2

    def test_the_same_on_any_machine_and_in_any_order(self) -> None:
        """Python's hashes differ between processes; a set's order must not be seen."""
        code = "from qllava.synthesis.sources import contexts_of as r; "
        code += "from qllava.synthesis.rules.examples import write as w; "
        code += "import json, sys; ones = r('nano:20'); ones = ones[::-1] if sys.argv[1] == '2' else ones; "
        code += f"print(json.dumps(sorted([w(one, {ALL}) for one in ones], key=str)))"
        out = {
            subprocess.run(
                [sys.executable, "-c", code, seed], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
            ).stdout
            for seed in ("1", "2")
        }
        assert len(out) == 1

    def test_another_seed_says_other_things(self) -> None:
        (context,) = contexts_of("nano:1")
        assert write(context, seed=1) == write(context, seed=1) != write(context, seed=2)


def test_animals_whose_boxes_are_complete() -> None:
    context = make(("cat", A), ("sheep", B), ("red dog", C), said="Animals.", complete=True)
    verdicts = set()
    for seed in range(20):
        (row,) = write(context, ["conversation"], seed=seed, turns=100)
        facts = [checker(context).fact(*pair) for pair in pairs(row)]
        assert len(set(facts)) == len(facts)
        verdicts.update(answer.split()[0] for _, answer in pairs(row))
    assert {"Yes,", "No,"} <= verdicts


class TestCrowds:
    """One box of a crowd holds many: the category is there, there is more than one, and nothing else is known."""

    @pytest.mark.parametrize("complete", [False, True])
    @pytest.mark.parametrize("boxes", [0, 1, 3])
    def test_a_category_with_a_crowd_is_never_counted(self, boxes: int, complete: bool) -> None:
        people = [("person", bbox) for bbox in (A, B, C)[:boxes]]
        context = make(*people, ("dog", A), complete=complete, crowds=("person",))
        said = everything(context)
        assert not [
            text for text in said if re.search(r"how many people|more people|\bthe person\b", text, re.IGNORECASE)
        ]
        assert not [text for text in said if re.search(r"(?<!more than )\b(one|two|three|no) (person|people)\b", text)]
        assert [brief for _, brief in asked(context, "presence")] == ["yes", "yes"], "nothing is known to be absent"
        assert [brief for _, brief in asked(context, "several")] == ["yes"]
        for pair in (
            (q.text, q.answer) for found in questions(View(context), random.Random(0)).values() for q in found
        ):
            if pair[1] not in context.captions:
                Checker(
                    ["A scene."],
                    [{"category": b.category, "bbox": list(b.bbox)} for b in context.boxes],
                    crowds=("person",),
                ).fact(*pair)

    def test_without_a_crowd_they_are_counted(self) -> None:
        assert [text for text in everything(make(("person", A), ("dog", B))) if "the person" in text]


UNCOUNTED = ("skis", "scissors", "broccoli", "luggage", "trees", "sunglasses", "people", "red glasses")


class TestGrammar:
    @pytest.mark.parametrize("complete", [False, True])
    @pytest.mark.parametrize("boxes", [1, 2, 3])
    @pytest.mark.parametrize("category", UNCOUNTED)
    def test_what_has_no_singular_or_no_plural_is_counted_in_no_branch(
        self, category: str, boxes: int, complete: bool
    ) -> None:
        noun = category.split()[-1]
        context = make(*[(category, bbox) for bbox in (A, B, C)[:boxes]], ("cat", A), complete=complete)
        said = everything(context)
        counts = rf"\b(how many|more|than|one|two|three|several|the|the red|a|an|all the other) {noun}\b|\b{noun}e?s\b"
        assert not [text for text in said if re.search(counts, text, re.IGNORECASE)]
        verb = "is" if noun in ("broccoli", "luggage") else "are"
        assert any(re.search(rf"^Yes, there {verb} (?:red )?{noun}\.$", text) for text in said)

    @pytest.mark.parametrize("complete", [False, True])
    @pytest.mark.parametrize("boxes", [1, 2, 3])
    def test_every_category_of_coco(self, boxes: int, complete: bool) -> None:
        """Articles, verbs and plurals agree, whatever the category."""
        wrong = re.compile(
            r"\ba [aeio]|\ban [^aeiou]|\b[Tt]here is (?:two|three)\b|\b[Tt]here are (?:one|an?)\b|  "
            r"|\b(?:skiss|scissorss|sheeps|persons|childs|mans|knifes|mouses|broccolis|buss|benchs|glasss)\b"
            r"|\bone (?:people|sheeps|[a-z]+ses)\b|^[a-z]"
        )
        for category in CATEGORIES:
            context = make(*[(category, bbox) for bbox in (A, B, C)[:boxes]], ("owl", C), complete=complete)
            assert not [text for text in everything(context) if wrong.search(text)]

    def test_words_whose_plural_is_their_singular_are_counted(self) -> None:
        said = everything(make(("sheep", A), ("sheep", B), ("sheep", C), ("dog", A), complete=True))
        assert "There are three sheep." in said and not [text for text in said if "sheeps" in text]
        assert "There is one sheep." in everything(make(("sheep", A), said="A sheep."))

    def test_names_that_sentences_give_to_categories(self) -> None:
        said = " ".join(everything(make(("dining table", A), ("tv", B))))
        assert "the table" in said and "the TV" in said and "The TV is" in said
        assert "dining" not in said and "tv" not in said


class TestWhatIsNotAsked:
    def test_absence_only_where_boxes_are_complete(self) -> None:
        assert [brief for _, brief in asked(make(("cat", A)), "presence")] == ["yes"]
        assert "no" in {brief for _, brief in asked(make(("cat", A), complete=True), "presence")}

    @pytest.mark.parametrize(
        ("noun", "boxes", "said", "count"),
        [
            ("cat", 2, "Two cats.", 2),
            ("cat", 2, "A cat and a dog.", 2),
            ("cat", 2, "Three cats.", None),
            ("cat", 1, "A row of cats.", None),
            ("cat", 1, "A cat looks at another cat.", None),
            ("cat", 2, "A group of cats.", None),
            ("cat", 3, "A group of cats.", 3),
            ("cat", 10, "Cats.", None),
            ("donut", 4, "Three doughnuts.", None),
            ("donut", 4, "A couple of small doughnuts.", None),
            ("person", 4, "Two men, and others.", 4),
            ("person", 3, "Two men, and others.", None),
            ("person", 3, "A man, a woman and other people.", None),
            ("person", 1, "Two men.", None),
            ("person", 1, "A man and a woman.", None),
            ("person", 3, "Two people.", None),
            ("dining table", 1, "Tables and chairs.", None),
            ("skis", 2, "Two people with skis.", None),
            ("scissors", 1, "Scissors.", None),
            ("broccoli", 1, "Broccoli.", None),
            ("luggage", 1, "Luggage.", None),
            ("trees", 1, "A park.", None),
            ("sheep", 1, "A sheep.", 1),
            ("sheep", 1, "Sheep in a field.", None),
            ("person", 1, "A crowd watches.", None),
            ("cow", 1, "Cattle graze.", None),
            ("pizza", 2, "Two slices of pizza.", None),
        ],
    )
    def test_numbers_that_captions_speak_against(self, noun: str, boxes: int, said: str, count: int | None) -> None:
        assert View(make(*[(noun, A)] * boxes, said=said)).count(noun) == count

    def test_a_complete_image_knows_its_numbers(self) -> None:
        view = View(make(("cat", A), ("cat", B), said="Five cats.", complete=True))
        assert view.count("cat") == 2 and view.count("dog") == 0

    def test_a_name_that_may_mean_another(self) -> None:
        view = View(make(("cat", A), ("cat", B), ("dog", C)))
        assert [view.names(thing) for thing in view.things] == [[], [], ["the dog"]]
        view = View(make(("cat", A), said="Several cats."))
        assert view.names(view.things[0]) == []

    def test_a_name_by_place_or_colour_that_may_mean_another(self) -> None:
        near_a_line = (0.2, 0.2, 0.4, 0.4)
        for other, named in ((("blue ring", B), True), (("blue ring", near_a_line), False), (("thing", A), False)):
            view = View(make(("red circle", A), other, complete=True))
            assert ("the shape at the top left" in view.names(view.things[0])) == named
        view = View(make(("red circle", A), ("red thing", B), complete=True))
        assert view.names(view.things[0]) == ["the circle", "the red circle", "the shape at the top left"]

    def test_a_name_by_a_colour_that_another_does_not_tell(self) -> None:
        names = [
            View(make(("red circle", A), (other, B), complete=True)) for other in ("circle", "ring", "blue circle")
        ]
        assert [view.names(view.things[0], frozenset({"place"})) for view in names] == [
            [],
            ["the circle", "the red circle"],
            ["the red circle", "the red shape"],
        ]

    def test_a_place_near_a_line_or_over_all(self) -> None:
        for bbox, place in {
            (0.0, 0.0, 0.2, 0.2): "top left",
            (0.4, 0.4, 0.6, 0.6): "centre",
            (0.25, 0.0, 0.43, 0.2): None,
            (0.1, 0.4, 0.9, 0.6): None,
            (0.7, 0.1, 0.9, 0.9): None,
        }.items():
            view = View(make(("cat", bbox)))
            assert view.place(view.things[0]) == place

    def test_relations_only_of_what_is_apart(self) -> None:
        view = View(make(("cat", (0.0, 0.0, 0.3, 0.5)), ("dog", (0.31, 0.4, 0.6, 0.9)), ("bird", (0.4, 0.0, 0.6, 0.2))))
        cat, dog, bird = view.things
        assert view.apart(cat, dog) == {}
        assert view.apart(cat, bird) == {"x": "left of"}
        assert view.apart(dog, bird) == {"y": "below"}

    def test_sizes_only_where_areas_differ(self) -> None:
        assert asked(make(("cat", (0, 0, 0.4, 0.4)), ("dog", (0.5, 0.5, 1, 0.9))), "comparison") == []
        assert asked(make(("cat", (0, 0, 0.4, 0.4)), ("dog", (0.5, 0.5, 0.7, 0.7))), "comparison")

    def test_a_colour_that_some_do_not_tell(self) -> None:
        context = make(("red circle", A), ("circle", B), complete=True)
        assert not [text for text, _ in asked(context, "count") if "red" in text]

    def test_a_kind_that_a_category_may_be_of(self) -> None:
        context = make(("cat", A), ("wombat", B), complete=True)
        assert not [text for text, _ in asked(context, "count") if "animal" in text]
        assert [brief for text, brief in asked(make(("cat", A), complete=True), "count") if "animal" in text] == ["1"]

    def test_a_sort_that_another_category_may_be_called(self) -> None:
        context = make(("cat", A), ("puppy", B), complete=True)
        for seed in range(30):
            found = questions(View(context), random.Random(seed))
            assert not [q for sort in ("presence", "count") for q in found[sort] if re.search("dogs?", q.text)]

    def test_nothing_known_but_a_caption(self) -> None:
        rows = write(make(), ALL)
        assert [row["type"] for row in rows] == ["conversation", "detail", "naive"]
        assert write(make(complete=True), ["conversation", "detail"])[0]["type"] == "detail"

    def test_a_type_that_is_none(self) -> None:
        with pytest.raises(ValueError, match="not a response type"):
            write(make(), ["poem"])


class TestWords:
    def test_attributes(self) -> None:
        assert attributes("large red circle") == ("large", "red", "circle")
        assert attributes("orange") == (None, None, "orange")
        assert attributes("Teddy Bear") == (None, None, "teddy bear")

    def test_plurals_articles_and_numbers(self) -> None:
        nouns = ("person", "wine glass", "couch", "knife", "berry", "toy", "skis", "cross")
        many = ["people", "wine glasses", "couches", "knives", "berries", "toys", "skis", "crosses"]
        assert [plural(noun) for noun in nouns] == many
        assert [article(noun) for noun in ("apple", "cat", "skis", "unicycle")] == [
            "an apple",
            "a cat",
            "skis",
            "a unicycle",
        ]
        assert [counted(n, "person") for n in (0, 1, 2, 13)] == ["no people", "one person", "two people", "13 people"]

    def test_articles_by_sound(self) -> None:
        words = (
            "hour hand",
            "uniform",
            "unimportant man",
            "SUV",
            "TV",
            "useful tool",
            "one-way sign",
            "umbrella",
            "urinal",
        )
        assert [article(word).split()[0] for word in words] == ["an", "a", "an", "an", "a", "a", "a", "an", "a"]

    def test_plurals_of_compounds(self) -> None:
        words = (
            "fireman",
            "human",
            "ottoman",
            "bookshelf",
            "steak knife",
            "schoolchild",
            "goldfish",
            "TV",
            "hair drier",
        )
        many = ["firemen", "humans", "ottomans", "bookshelves", "steak knives", "schoolchildren", "goldfish", "TVs"]
        assert [plural(word) for word in words] == [*many, "hair driers"]

    def test_captions_with_mistakes(self) -> None:
        wrong = ("A man on a a bus.", "A apple on a table.", "Three giraffe's near a tree.", "A red an orange bus.")
        assert not [text for text in (*wrong, "Two dogs laying down.", "Bus.") if well_formed(text)]
        assert well_formed("An hour hand, a one-way sign and two sheep.")

    def test_sentences(self) -> None:
        assert sentence("a cat \n sits") == "A cat sits."
        assert sentence("WOMAN SITTING.") == "Woman sitting."
