"""The report counts what it says it counts, and its page holds nothing from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qllava.data.contexts import Box, Context
from qllava.synthesis.report import measure, write_report
from qllava.synthesis.rules.examples import write

BOX = (0.1, 0.1, 0.4, 0.4)
CONTEXTS = [
    Context("1", "1.png", ("A dog on a lawn.",), (Box("dog", BOX), Box("frisbee", BOX))),
    Context("2", "2.png", ("A kitchen.",), (Box("oven", BOX),)),
]


def row(image: str, *said: str, type_: str = "conversation") -> dict[str, Any]:
    """A LLaVA example of questions and answers in turn."""
    sides = ("human", "gpt")
    turns = [
        {"from": sides[at % 2], "value": f"<image>\n{value}" if at == 0 else value} for at, value in enumerate(said)
    ]
    return {"id": f"{image}-{type_}", "image": image, "type": type_, "conversations": turns}


def test_what_is_counted() -> None:
    first = row(
        "1.png", "What is there?", "A dog and a cat.", "Is there a horse?", "No, there is no horse. A dog plays."
    )
    second = row("2.png", "What is there now?", "An oven, and a giraffe. It isn't a zebra.", type_="detail")
    quality = measure([first, first, second, row("3.png", "What?", "A bear.")], CONTEXTS)
    assert (quality.rows, quality.images, quality.questions) == (4, 3, 6)
    assert quality.examples_of == {"conversation": 3, "detail": 1}
    assert quality.named == {"dog": 2, "cat": 2, "oven": 1, "giraffe": 1}
    assert quality.unsupported == {"cat": 2, "giraffe": 1}
    assert quality.hallucination_rate == pytest.approx(3 / 6)
    assert (quality.lying, quality.without_context) == (3, 1)
    assert (quality.repeated_rows, quality.repeated_questions) == (1, 2)
    assert quality.present == {"dog": 1, "frisbee": 1, "oven": 1} and "frisbee" not in quality.named
    assert quality.openings["What is there"] == 1 and quality.openings["What is there?"] == 2


def test_nothing_named_is_no_rate() -> None:
    assert measure([row("1.png", "Well?", "Yes.")], CONTEXTS).hallucination_rate is None
    assert measure([], []).as_json()["hallucination_rate"] is None


def test_rules_name_only_what_is_there() -> None:
    rows = [one for context in CONTEXTS for one in write(context, ("conversation", "detail", "reasoning", "naive"))]
    assert measure(rows, CONTEXTS).hallucination_rate == 0.0


def test_the_page(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    rows = [row("1.png", "A <b>question</b>?", "Yes, a dog.")] * 30 + [row("2.png", "Last?", "A giraffe.")] * 30
    quality = write_report(rows, CONTEXTS, tmp_path / "report.html", tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('<article class="exhibit">') == 20
    shown = text.count("1.png-conversation: conversation</h3>")
    assert 0 < shown < 20 and text.count("<img") == text.count('src="data:image/png') == shown
    assert "http" not in text and "<b>question" not in text
    assert "30 of 60, in 30 examples" in text
    assert quality.repeated_rows == 58
    assert not list(tmp_path.glob(".*.partial"))


def test_an_empty_page_without_images(tmp_path: Path) -> None:
    write_report([], [], tmp_path / "report.html")
    assert "There are no examples" in (tmp_path / "report.html").read_text(encoding="utf-8")
