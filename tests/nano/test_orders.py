"""Answers with reasons in both orders: equal in all but the order, and readable by one pattern."""

from __future__ import annotations

import re

from qllava.evaluation.vqa import read_answer, reader
from qllava.nano.dataset import scene_of
from qllava.nano.language import article
from qllava.nano.orders import reasoned_record

READ = reader(r"The answer is ([^.]+)\.")


def test_both_orders_ask_and_say_the_same() -> None:
    reworded = 0
    for number in range(50):
        id_ = f"train-{number:06d}"
        first, last = (
            reasoned_record(id_, reason_first=reason_first)["conversations"] for reason_first in (False, True)
        )
        asked = [turn["value"] for turn in first[::2]]
        assert asked == [turn["value"] for turn in last[::2]]
        assert all(re.search(r"[?.!] Say why\.$", text) for text in asked)
        reworded += sum(not re.match(r"(<image>\n)?(What|Where|How|Is)\b.*\? Say why\.$", text) for text in asked)
        assert first[0]["value"].count("<image>") == 1 and not any("<image>" in turn["value"] for turn in first[2::2])
        for one, other in zip(first[1::2], last[1::2], strict=True):
            assert one["value"].startswith("The answer is ") and other["value"].endswith(".")
            assert sorted(one["value"].split()) == sorted(other["value"].split())
            assert not other["value"].startswith("The answer is ")
            answer = read_answer(READ, one["value"])
            assert answer is not None and read_answer(READ, other["value"]) == answer
            assert other["value"].endswith(f"The answer is {answer}.")
    assert reworded > 50, "asked in anyone's words, as the test questions are"


def test_what_a_row_says_is_in_its_image() -> None:
    for number in range(20):
        id_ = f"train-{number:06d}"
        shapes = {article(f"{s.size} {s.colour} {s.form}") for s in scene_of(id_).shapes}
        for turn in reasoned_record(id_, reason_first=True)["conversations"][1::2]:
            if turn["value"].startswith("There is a"):
                said = turn["value"].removeprefix("There is ").split(" and ")
                assert all(any(words.startswith(shape) for shape in shapes) for words in said)
