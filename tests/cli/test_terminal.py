"""The chat in the terminal, driven by lines."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from qllava.cli.terminal import chat_loop, compare_loop
from qllava.config import InputError
from qllava.inference import Chat, Loading, Settings, loading
from qllava.voting.votes import read_votes
from tests.tiny_models import make_image, make_tiny_model, make_tiny_processor

SHORT = Settings(max_new_tokens=8)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Chat:
    processor = make_tiny_processor()
    chat = Chat(make_tiny_model(processor), processor, "tiny")
    monkeypatch.setattr(loading, "load", lambda *_, **__: chat)
    return chat


@pytest.fixture
def image(tmp_path: Path) -> Path:
    make_image("red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def talk(lines: list[str], monkeypatch: pytest.MonkeyPatch, images: list[Path] | None = None) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return chat_loop("tiny", Loading(), images=images or [], prompt=None, settings=SHORT)


def test_prompt_answers_once(chat: Chat, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = chat_loop("tiny", Loading(), images=[image], prompt="What?", settings=SHORT)
    assert status == 0
    assert capsys.readouterr().out == chat.answer(image, "What?", max_new_tokens=8) + "\n"


def test_images_commands_and_mistakes(
    chat: Chat, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/image missing.png", f"/image '{image}'", "What?", "/clear", "", "What?", "/fly", "/quit", "never"]
    assert talk(lines, monkeypatch) == 0
    captured = capsys.readouterr()
    with_image = chat.answer(image, "What?", max_new_tokens=8)
    without = chat.answer(None, "What?", max_new_tokens=8)
    assert with_image != without
    out = captured.out
    assert out.startswith(f"{with_image}\n{without}\nUnknown command /fly")
    assert "missing.png" in captured.err


def test_the_conversation_is_remembered(
    chat: Chat, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(["What?", "What?"], monkeypatch, [image])
    first, second = capsys.readouterr().out.splitlines()
    assert first != second


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[str]:
        yield "Once upon"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Chat, "reply", interrupted)
        assert talk(["Tell me a story", "And then?"], monkeypatch) == 0
    assert capsys.readouterr().out == "Once upon [stopped]\nOnce upon [stopped]\n"


def test_a_missing_image_is_noticed_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.png"):
        chat_loop("no/model/at/all", Loading(), images=[tmp_path / "missing.png"], prompt="?", settings=SHORT)


def test_a_question_is_asked_again_in_other_words_and_with_other_settings(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "What?",
        "/again",
        "/edit Where?",
        "/length 2",
        "/again",
        "/temperature warm",
        "/system Be brief.",
        "/model",
    ]
    assert talk(lines, monkeypatch) == 0
    captured = capsys.readouterr()
    out = captured.out.splitlines()
    what, where = (chat.answer(None, question, max_new_tokens=8) for question in ("What?", "Where?"))
    assert captured.out.startswith(f"{what}\n{what}\n{where}\n{chat.answer(None, 'Where?', max_new_tokens=2)}\n")
    assert any(line.startswith("Computes in") for line in out)
    assert "/temperature must be a number of at least 0, not 'warm'" in captured.err


def test_two_models_are_compared_and_the_vote_kept(
    chat: Chat, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\nhm\nl\nWhat?\ns\n"))
    votes = tmp_path / "votes.jsonl"
    settings = Settings(max_new_tokens=8, temperature=0.7)
    compare_loop(("a", "a"), Loading(), images=[image], votes=votes, settings=settings)
    (vote,) = read_votes(votes)
    out = capsys.readouterr().out
    assert vote.vote == "left" and set(vote.models.values()) == {"tiny", "tiny (temperature 0.7)"}
    assert out.count("left was") == 1 and len(vote.pictures) == 1, "a question that is skipped has no vote"


def test_sampling_as_the_model_recommends_is_asked_for(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.model.generation_config.do_sample, chat.model.generation_config.temperature = True, 9.0
    lines = ["What?", "/sampling recommended", "/again", "/sampling asked", "/again", "/sampling odd", "/model"]
    assert talk(lines, monkeypatch) == 0
    captured = capsys.readouterr()
    plain, with_it, again = captured.out.splitlines()[:3]
    assert plain == again == chat.answer(None, "What?", max_new_tokens=8) != with_it
    assert "/sampling must be asked or recommended, not 'odd'" in captured.err
    assert any(line.split()[-2:] == ["temperature", "9"] for line in captured.out.splitlines())
