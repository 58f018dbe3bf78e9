"""Prompts: who sees what, in which form; changed files, and what a change asks again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qllava.config import InputError
from qllava.data.contexts import Box, Context
from qllava.synthesis import prompting
from qllava.synthesis.prompting import DEFAULT_TYPES, STYLES, Prompts, shown
from qllava.synthesis.replies import from_blocks, parse

OWN = Path(prompting.__file__).parent / "prompts"
CONTEXT = Context("7", "7.jpg", ("A cat.", "It sleeps."), (Box("cat", (0.1, 0.25, 1 / 3, 1.0)),))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(OWN, tmp_path / "prompts")
    return tmp_path / "prompts"


def test_a_conversation_gets_captions_and_the_others_boxes_too() -> None:
    assert shown(CONTEXT, "conversation") == "A cat.\nIt sleeps."
    for type_ in ("detail", "reasoning"):
        assert shown(CONTEXT, type_) == "A cat.\nIt sleeps.\n\ncat: [0.100, 0.250, 0.333, 1.000]"
    assert shown(Context("8", "8.jpg", ("A cat.",), ()), "detail") == "A cat."


@pytest.mark.parametrize("type_", DEFAULT_TYPES)
@pytest.mark.parametrize("schema", [True, False])
def test_messages_are_system_examples_and_the_image(type_: str, schema: bool) -> None:
    prompt = Prompts().prompt(type_)
    messages = prompt.messages(CONTEXT, schema=schema)
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * len(prompt.examples), "user"]
    assert messages[-1]["content"] == shown(CONTEXT, type_)
    assert ("JSON" in messages[0]["content"]) == (schema and type_ != "detail")
    for message in messages[2::2][: len(prompt.examples)]:
        if type_ == "detail":
            assert not parse(message["content"])
        else:
            assert message["content"].startswith("{") == schema
            assert parse(message["content"])


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_told_to_the_teacher_and_makes_another_version(style: str) -> None:
    for type_ in ("conversation", "reasoning"):
        plain, styled = Prompts().prompt(type_), Prompts().prompt(type_, style)
        assert styled.system == f"{plain.system}\n\n{(OWN / f'styles/{style}.txt').read_text().strip()}"
        assert styled.version.startswith(f"{type_}+{style}-")
    assert Prompts().prompt("detail", style) == Prompts().prompt("detail")  # its question is drawn from a list


def test_a_changed_file_changes_the_version_of_its_own_type(copy: Path) -> None:
    before = {type_: Prompts(copy).prompt(type_).version for type_ in DEFAULT_TYPES}
    assert before == {type_: Prompts().prompt(type_).version for type_ in DEFAULT_TYPES}
    path = copy / "reasoning.txt"
    path.write_text(path.read_text().replace("sensible person", "reasonable person"))
    after = {type_: Prompts(copy).prompt(type_).version for type_ in DEFAULT_TYPES}
    assert {type_ for type_ in DEFAULT_TYPES if before[type_] != after[type_]} == {"reasoning"}


def test_what_is_not_sent_asks_nothing_again(copy: Path) -> None:
    """A remark at the head of a file, the questions of descriptions, and how many turns are let pass."""
    before = {type_: Prompts(copy).prompt(type_).version for type_ in DEFAULT_TYPES}
    for type_ in DEFAULT_TYPES:
        path = copy / f"{type_}.txt"
        path.write_text("A remark.\n" + path.read_text().replace("2-8", "3-6"))
    (copy / "detail_questions.txt").write_text("What is there?\n")
    assert {type_: Prompts(copy).prompt(type_).version for type_ in DEFAULT_TYPES} == before
    assert Prompts(copy).prompt("conversation").turns == (3, 6)
    assert Prompts(copy).question("detail", CONTEXT) == "What is there?"


def test_a_file_that_is_missing_is_taken_from_our_own(copy: Path) -> None:
    (copy / "detail.txt").unlink()
    assert Prompts(copy).prompt("detail") == Prompts().prompt("detail")


def test_questions_are_drawn_by_the_image_and_all_of_them() -> None:
    prompts = Prompts()
    drawn = [prompts.question("detail", Context(str(n), "", ("x",), ())) for n in range(500)]
    assert drawn == [Prompts().question("detail", Context(str(n), "", ("x",), ())) for n in range(500)]
    assert len(set(drawn)) == 16
    assert len({prompts.question("naive", Context(str(n), "", ("x",), ())) for n in range(500)}) == 11


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("## system", "system"), "one section `## system`"),
        (lambda text: text.replace("\n## reply", "\n## context", 1), "`## reply` after each `## context`"),
        (lambda text: text.replace("2-8", "some"), "smallest and largest number of questions"),
        (lambda text: text.replace("2-8", "8-2"), "smallest and largest number of questions"),
        (lambda text: text.replace("Answer: He is", "He is"), "reply 1 is not written"),
    ],
)
def test_a_text_that_is_no_prompt_is_refused(copy: Path, change: object, said: str) -> None:
    assert callable(change)
    path = copy / "conversation.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=rf"conversation\.txt: .*{said}"):
        Prompts(copy).prompt("conversation")


def test_a_mistyped_name_and_an_empty_list_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "detail_questions.txt").write_text("\n")
    with pytest.raises(InputError, match="has no question"):
        Prompts(copy).question("detail", CONTEXT)
    (copy / "reasonning.txt").write_text("x")
    with pytest.raises(InputError, match=r"contains reasonning\.txt\. Name the files of prompts as "):
        Prompts(copy)
    with pytest.raises(InputError, match="is not a folder"):
        Prompts(tmp_path / "nowhere")


def test_blocks_are_what_the_files_hold() -> None:
    for type_ in ("conversation", "reasoning"):
        prompt = Prompts().prompt(type_)
        assert prompt.turns is not None
        for _, reply in prompt.examples:
            assert prompt.turns[0] <= len(from_blocks(reply)) <= prompt.turns[1]
