"""Every page that is made from data shows what the data says as text: a script in a row is words on the page."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qllava.conversation import CHATML, Conversation, Turn
from qllava.data.contexts import Box, Context
from qllava.data.encode import Encoder
from qllava.data.formats import Example
from qllava.data.inspect import html as inspect_html
from qllava.data.inspect import show
from qllava.data.problems import Place
from qllava.evaluation.agreement import compare
from qllava.evaluation.judgments import ORDERS, Judgment
from qllava.evaluation.pages import agreement_page
from qllava.evaluation.vqa import failures_page, score
from qllava.experiments import report as ablation_report
from qllava.experiments.ablation import Grid, Measured, Variant
from qllava.synthesis.balance import Settings, balance_of
from qllava.synthesis.balance import html as balance_html
from qllava.synthesis.concepts import index_phrases
from qllava.synthesis.report import write_report as write_synthesis
from qllava.training.report import write_report
from qllava.voting.votes import Vote
from tests.house_rules import CODE, name
from tests.security.test_source import dotted
from tests.test_page import HOSTILE, Reader
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_tokenizer


def example(answer: str = HOSTILE) -> Example:
    turns = (Turn("user", HOSTILE), Turn("assistant", answer))
    return Example(HOSTILE, (), Conversation(turns=turns), Place("rows.json", row=1), HOSTILE)


def of_inspect(folder: Path) -> str:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([*CHATML.controls, "<image>"], special_tokens=True)
    shown = show(example(), Encoder(tokenizer, CHATML, tokenizer.get_vocab()["<image>"], IMAGE_LAYOUT), None)
    assert shown is not None
    return inspect_html([shown], title=HOSTILE, about=[(HOSTILE, HOSTILE)])


def of_failures(folder: Path) -> str:
    return failures_page([example("yes")], score([example("yes")], [HOSTILE]), HOSTILE, HOSTILE)


def of_agreement(folder: Path) -> str:
    said = {"left": HOSTILE, "right": HOSTILE}
    votes = [Vote(id=str(n), question=HOSTILE, pictures=(), answers=said, vote="left", rater=HOSTILE) for n in range(4)]
    judgments = [Judgment(vote.id, order, "left", HOSTILE) for vote in votes for order in ORDERS]
    return agreement_page(compare(votes, judgments, resamples=5))


def of_run(folder: Path) -> str:
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    sample = {"image": "1.png"} | dict.fromkeys(("question", "truth", "before", "after"), HOSTILE)
    (folder / "samples.json").write_text(json.dumps([sample, {**sample, "image": HOSTILE}]))
    (folder / "results.json").write_text(json.dumps({"stage2": 0.5, "by_type": {HOSTILE: 0.5}}))
    (folder / "metrics.jsonl").write_text(json.dumps({"stage": HOSTILE, "step": 1, "total_steps": 2, "loss": 1.0}))
    for file in ("run.yaml", "ledger.txt"):
        (folder / file).write_text(HOSTILE)
    return write_report(folder).read_text(encoding="utf-8")


def of_ablation(folder: Path) -> str:
    grid = Grid((Variant(HOSTILE, None, {}, "", HOSTILE),), (1,))
    measured = [Measured(HOSTILE, 1, ((1, 0.4), (2, 0.5)), (0.4, 0.6))]
    return ablation_report.write(folder, grid, measured).read_text(encoding="utf-8")


def of_synthesis(folder: Path) -> str:
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    said = [{"from": "human", "value": f"<image>\n{HOSTILE}"}, {"from": "gpt", "value": HOSTILE}]
    rows: list[dict[str, Any]] = [{"id": HOSTILE, "image": "1.png", "type": HOSTILE, "conversations": said}]
    contexts = [Context(HOSTILE, "1.png", (HOSTILE,), (Box(HOSTILE, (0.1, 0.1, 0.4, 0.4)),))]
    write_synthesis(rows, contexts, folder / "page.html", folder)
    return (folder / "page.html").read_text(encoding="utf-8")


def of_filter(folder: Path) -> str:
    index = index_phrases([[HOSTILE]] * 4)
    return balance_html(balance_of(index, np.array([True, False] * 2), Settings("simple", HOSTILE, 1, 1, 0)), HOSTILE)


PAGES: dict[str, Callable[[Path], str]] = {
    "qllava/data/inspect.py": of_inspect,
    "qllava/evaluation/pages.py": of_agreement,
    "qllava/evaluation/vqa.py": of_failures,
    "qllava/synthesis/balance.py": of_filter,
    "qllava/synthesis/report.py": of_synthesis,
    "qllava/experiments/report.py": of_ablation,
    "qllava/training/report.py": of_run,
}


@pytest.mark.parametrize("maker", PAGES)
def test_a_script_in_the_data_is_words_on_the_page(maker: str, tmp_path: Path) -> None:
    html = PAGES[maker](tmp_path)
    reader = Reader(html)
    assert "<script" not in html and reader.open == []
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    assert "alert(" in "".join(reader.words), "the data is shown"


def test_no_page_is_left_out() -> None:
    """Whoever makes a page stands above."""
    makers = set()
    for path in CODE:
        called = {dotted(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        makers |= {name(path)} if "page.page" in called else set()
    assert makers == set(PAGES)
