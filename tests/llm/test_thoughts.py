"""Thoughts are no training data: of every family of models, with and without the mark that opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qllava.data.contexts import Context
from qllava.evaluation.asking import Answered, Judge
from qllava.evaluation.judge import read_scores
from qllava.llm.completions import read_reply
from qllava.llm.store import Call, Reply
from qllava.llm.thoughts import answer_of
from qllava.synthesis.replies import judge

CONTEXT = Context("1", "1.jpg", ("A dog runs.",), ())
THOUGHTS = "The user wants a description. A cat? No."
ANSWER = "A dog runs across the scene."
CALL = Call("m", ({"role": "user", "content": "?"},), {"max_tokens": 50}, "1")


@pytest.mark.parametrize(
    "text",
    [
        ANSWER,
        f"\ufeff{ANSWER}\n",
        f"<think>{THOUGHTS}</think>\n\n{ANSWER}",
        f"{THOUGHTS}</think>{ANSWER}",
        f"{THOUGHTS}</think> Wait. {THOUGHTS}</think>\n{ANSWER}",
        f"<think></think>{ANSWER}",
        f"<THINK>{THOUGHTS}</THINK>{ANSWER}",
        f"<thinking>{THOUGHTS}</thinking>{ANSWER}",
        f"<thought>\n{THOUGHTS}\n</thought>\n{ANSWER}",
        f"<reasoning>{THOUGHTS}</reasoning>{ANSWER}",
        f"<seed:think>{THOUGHTS}</seed:think>{ANSWER}",
        f"[THINK]{THOUGHTS}[/THINK]{ANSWER}",
        f"\u25c1think\u25b7{THOUGHTS}\u25c1/think\u25b7{ANSWER}",
        f"<|begin_of_thought|>{THOUGHTS}<|end_of_thought|>\n<|begin_of_solution|>\n{ANSWER}\n<|end_of_solution|>",
        f"<|START_THINKING|>{THOUGHTS}<|END_THINKING|><|START_RESPONSE|>{ANSWER}<|END_RESPONSE|>",
        f"<|channel>thought\n{THOUGHTS}<channel|>{ANSWER}",
        f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
        f"<think>{THOUGHTS}</think><answer>{ANSWER}</answer>",
    ],
)
def test_the_answer_is_left(text: str) -> None:
    assert answer_of(text) == ANSWER
    assert judge(Reply(text, "stop", 1, 1), None, CONTEXT).turns == (("", ANSWER),)


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{THOUGHTS}",
        f"{THOUGHTS}</think>",
        f"[THINK]{THOUGHTS}",
        f"<|channel|>analysis<|message|>{THOUGHTS}<|end|>",
        f"<thought>{THOUGHTS}</thought>\n",
    ],
)
def test_thoughts_alone_are_no_answer(text: str) -> None:
    assert answer_of(text) == ""
    assert judge(Reply(text, "stop", 1, 1), None, CONTEXT).reason == "empty"


def test_a_mark_that_is_left_somewhere_is_noticed() -> None:
    assert judge(Reply(f"{ANSWER} <think> And then.", "stop", 1, 1), None, CONTEXT).reason == "markup"


@pytest.mark.parametrize(
    "message",
    [
        {"content": ANSWER, "reasoning_content": THOUGHTS},
        {"content": ANSWER, "reasoning": THOUGHTS},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHTS}]},
                _text := {"type": "text"},
            ]
        },
    ],
)
def test_a_field_of_thoughts_is_not_read(message: dict[str, Any]) -> None:
    _text["text"] = ANSWER
    body = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert read_reply(body, CALL).text == ANSWER


def test_thoughts_in_their_field_are_paid() -> None:
    body = {"choices": [{"message": {"content": None, "reasoning_content": "x" * 30}, "finish_reason": "length"}]}
    read = read_reply(json.dumps(body).encode(), CALL)
    assert (read.text, read.finish_reason, read.completion_tokens) == ("", "length", 30)


def test_a_judge_thinks_aloud_and_one_score_counts() -> None:
    text = 'Maybe {"first": 3, "second": 9}? No.</think>{"first": 8, "second": 7}'
    answered = Answered(Judge("m", store=Path("unused")), (CALL,), (Reply(text, "stop", 1, 1),), 1)
    assert [read_scores(said or "") for said in answered.texts()] == [(8.0, 7.0)]
