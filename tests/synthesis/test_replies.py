"""Replies: both forms are read, halves are not, and every rule finds what it is there for and nothing else."""

from __future__ import annotations

import json

import pytest

from qllava.data.contexts import Box, Context
from qllava.llm.store import Reply
from qllava.synthesis.prompting import DEFAULT_TYPES, Prompts, example_turns
from qllava.synthesis.replies import RULES, as_blocks, as_json, from_blocks, judge, parse, repair_request

CONTEXT = Context(
    "1",
    "1.jpg",
    ("A man walks his dog past a red car.", "Somebody with a dog on a street."),
    (Box("person", (0.1, 0.2, 0.3, 0.9)), Box("dog", (0.3, 0.6, 0.5, 0.9)), Box("car", (0.5, 0.3, 1.0, 0.7))),
)
TURNS = (("What does the man do?", "He walks his dog."), ("What colour is the car?", "It is red."))


def reply(text: str, finish_reason: str = "stop", refusal: str | None = None) -> Reply:
    return Reply(text, finish_reason, 1, 1, refusal)


def reason(*turns: tuple[str, str], context: Context = CONTEXT) -> str | None:
    return judge(reply(as_json(turns)), (1, 8), context).reason


@pytest.mark.parametrize("write", [as_json, as_blocks])
def test_what_is_written_is_read(write: object) -> None:
    assert callable(write)
    assert parse(write(TURNS)) == TURNS
    assert judge(reply(write(TURNS)), (2, 8), CONTEXT).turns == TURNS
    assert judge(reply(write(TURNS)), (2, 8), CONTEXT).reason is None


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{as_json(TURNS)}\n```",
        json.dumps([{"question": q, "answer": a} for q, a in TURNS], indent=2),
        "Here you are:\n\n" + as_blocks(TURNS) + "\n===\n",
        as_blocks(TURNS).replace("Question:", "**Question:**").replace("Answer:", "**Answer:**"),
        as_blocks(TURNS).replace("\n===\n", "\n"),
        as_blocks(TURNS).replace("Question: ", "Question:\n").replace("Answer: ", "Answer:\n"),
        "<think>Question: what would be good?</think>\n" + as_json(TURNS),
        "Question: what would be good?\nAnswer: this.</think>\n" + as_json(TURNS),
        "\ufeff" + as_json(TURNS),
        "\ufeff" + as_blocks(TURNS),
        "Here is the JSON:\n\n```json\n" + as_json(TURNS) + "\n```\nLet me know what else you need.",
        "\ufeffSure.\n```\n" + as_json(TURNS) + "\n```",
        "Here it is: " + as_json(TURNS),
        "Of course:\n```text\n" + as_blocks(TURNS) + "\n```",
        as_json(TURNS) + "\nLet me know what else you need.",
    ],
)
def test_how_models_really_write_it_is_read(text: str) -> None:
    assert judge(reply(text), (2, 8), CONTEXT).turns == TURNS


@pytest.mark.parametrize(
    "text",
    [
        as_json(TURNS)[:-20],
        as_blocks(TURNS).rpartition("Answer:")[0],
        as_blocks(TURNS).rpartition(":")[0] + ":",
        "Answer: yes\n===\nQuestion: is it?",
        '{"turns": [{"question": "What?"}]}',
        '{"turns": [{"question": "What?", "answer": " "}]}',
        '{"turns": "none"}',
        "The man walks his dog.",
        "[" * 5000,
        '{"a":' * 100_000,
        '{"turns": ' + "9" * 5000 + "}",
        "Two of them: " + as_json(TURNS) + " or " + as_json(TURNS),
        "```json\n" + as_json(TURNS) + "\n```\n```json\n" + as_json(TURNS) + "\n```",
        "7",
    ],
)
def test_half_a_reply_is_none(text: str) -> None:
    assert judge(reply(text), (1, 8), CONTEXT).reason == "unparsed"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (reply(as_json(TURNS), "length"), "truncated"),
        (reply("", "stop", "I cannot."), "refused"),
        (reply("", "content_filter"), "refused"),
        (reply("I'm sorry, but I can't help with that."), "refused"),
        (reply("I\u2019m sorry, but I can\u2019t help with that."), "refused"),
        (reply("As an AI language model, I do not see pictures."), "refused"),
        (reply(as_json((("What is it?", "Sorry, I cannot see the picture."),))), "refused"),
        (reply("  "), "empty"),
        (reply("<think>It is a dog, I will say that it"), "empty"),
        (reply("<think>It is a dog, I will say that it", "length"), "truncated"),
        (reply("It is a dog.</think>"), "empty"),
        (reply(as_json((("What is it?", "A \ud83d dog."),))), "characters"),
        (reply(as_json((("What is it?", "A \ufffd dog."),))), "characters"),
        (reply(as_json((("What is it?", "A dog. [/THINK]"),)) + "\n"), "unparsed"),
        (reply("<html>", "unreadable"), "unreadable"),
        (reply(as_json(TURNS * 5)), "turns"),
    ],
)
def test_a_reply_that_is_none(given: Reply, expected: str) -> None:
    assert judge(given, (1, 8), CONTEXT).reason == expected


def test_the_number_of_turns_is_that_of_the_prompt() -> None:
    assert judge(reply(as_json(TURNS)), (1, 1), CONTEXT).reason == "turns"
    assert judge(reply(as_json(TURNS[:1])), (2, 8), CONTEXT).reason == "turns"
    assert judge(reply(as_json(TURNS[:1])), (1, 1), CONTEXT).reason is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The caption says that it is red.", "captions"),
        ("Going by the provided descriptions, it is red.", "captions"),
        ("According to the sentences it is red.", "captions"),
        ("Its bounding box is the largest.", "boxes"),
        ("The boxes show that it is on the right.", "boxes"),
        ("It begins at 0.500 and ends at the edge.", "coordinates"),
        ("It lies at [0.5, 0.3, 1.0, 0.7].", "coordinates"),
        ("Its coordinates are on the right.", "coordinates"),
        ("It is parked next to a bicycle.", "object"),
        ("Two cats sit on it.", "object"),
        ("It is red, see <image>.", "markup"),
        ("It is red.</s>", "markup"),
        ("It lies at (0, 0.25), or near to it.", "coordinates"),
        ("The man and the dog: [1, 1].", None),
        ("It is 3.5 metres long, in the context of a street.", None),
        ("It is near to the man, who has his dog with him.", None),
    ],
)
def test_what_an_answer_may_not_say(answer: str, expected: str | None) -> None:
    assert reason(("What about the car?", answer)) == expected
    assert judge(reply(answer), None, CONTEXT).reason == expected  # a description


def test_markup_is_found_however_it_is_spelled() -> None:
    text = as_json((("What is it?", "A car, see <image>."),)).replace("<", "\\u003c")
    assert judge(reply(text), (1, 1), CONTEXT).reason == "markup"


@pytest.mark.parametrize("answer", ["I can not only see a car.", "We can see a car.", "Sorry to say, the car is red."])
def test_what_only_sounds_like_a_refusal(answer: str) -> None:
    assert reason(("What is there?", answer)) is None


def test_what_a_caption_names_may_be_named() -> None:
    """A cardboard box, and a drawing with a caption, are things that an image can show."""
    shown = Context("2", "2.jpg", ("A cat in a box below a poster with a caption.",), ())
    assert reason(("Where is the cat?", "It sits in a box, below a poster with a caption."), context=shown) is None
    assert reason(("Where is the cat?", "Its bounding box is the largest."), context=shown) == "boxes"


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("What colour is the red car?", "The car is red.", "self-answered"),
        ("Is the man walking his dog on the street?", "The man is walking his dog.", "self-answered"),
        ("Is the car red?", "The car in the picture is red.", "self-answered"),
        ("What colour is the car?", "The car is red.", None),
        ("Is the car red?", "Yes, the car is red.", None),
        ("Is the car red or blue?", "Red.", None),
        ("How many dogs are there?", "There is one dog, on the left.", None),
        ("Where is it?", "There it is.", None),  # says nothing, but does not repeat the question
    ],
)
def test_a_question_that_holds_its_answer(question: str, answer: str, expected: str | None) -> None:
    assert reason((question, answer)) == expected


def test_one_question_twice() -> None:
    assert reason(("What is red?", "The car."), ("what is red", "A car.")) == "repeated"


def test_all_that_is_wrong_is_told_and_the_first_rule_counts() -> None:
    verdict = judge(reply(as_json((("What?", "The caption names a zebra at 0.100."),))), (2, 8), CONTEXT)
    assert [broken.rule for broken in verdict.broken] == ["turns", "captions", "coordinates", "object"]
    assert verdict.reason == "turns"
    request = repair_request(verdict.broken)
    assert "zebra" in request
    assert "coordinates" in request
    assert "2 to 8 were asked for" in request


def test_every_rule_is_documented() -> None:
    from qllava.synthesis import replies

    assert all(f"\n    {rule} " in (replies.__doc__ or "") for rule in RULES)


@pytest.mark.parametrize("type_", DEFAULT_TYPES)
def test_our_own_worked_examples_keep_every_rule(type_: str) -> None:
    prompt = Prompts().prompt(type_)
    assert len(prompt.examples) in (2, 3)
    for (seen, _), turns in zip(prompt.examples, example_turns(prompt), strict=True):
        said, _, marked = seen.partition("\n\n")
        boxes = []
        for line in marked.splitlines():
            category, _, numbers = line.partition(": ")
            x1, y1, x2, y2 = json.loads(numbers.replace("[0.", "[0."))
            assert 0 <= x1 < x2 <= 1
            assert 0 <= y1 < y2 <= 1
            boxes.append(Box(category, (x1, y1, x2, y2)))
        assert bool(boxes) == (type_ != "conversation")
        context = Context("example", "example.jpg", tuple(said.splitlines()), tuple(boxes))
        text = turns[0][1] if prompt.turns is None else as_blocks(tuple(turns))
        assert judge(reply(text), prompt.turns, context).broken == ()
        assert prompt.turns is None or from_blocks(text) == turns
