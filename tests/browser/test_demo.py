"""The demo: its page in a real browser, and the two shapes in which Gradio tells what was said."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.app import MAX_NEW_TOKENS, TROUBLE, conversation_of, nano_examples, responder
from qllava.conversation import Turn
from qllava.inference import Chat, load
from tests.browser.conftest import ARTIFACTS, served, wait_until
from tests.tiny_models import make_picture, make_tiny_llava, make_tiny_model, make_tiny_processor

ANSWER = "#chat .bot"


@pytest.fixture(scope="module")
def chat() -> Chat:
    processor = make_tiny_processor()
    return Chat(make_tiny_model(processor), processor, "tiny")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def demo(model: Path) -> Iterator[str]:
    with served(model) as (address, _):
        yield address


def ask(page: Any, text: str, picture: Path | None = None) -> None:
    if picture is not None:
        page.set_input_files("input[type=file]", picture)
        page.get_by_role("button", name="Remove").or_(page.locator(".thumbnail-item")).first.wait_for()
    page.locator("textarea").fill(text)
    page.keyboard.press("Enter")


def letters(text: str) -> str:
    """What survives a browser unchanged: a random model also says control characters and half characters."""
    return "".join(character for character in text if character.isascii() and character.isalnum())


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_is_answered_in_the_browser(
    browser: Any, demo: str, model: Path, tmp_path: Path, scheme: str
) -> None:
    make_picture("red", (300, 200)).save(tmp_path / "red.png")
    expected = load(str(model)).answer(tmp_path / "red.png", "What colour is it?", max_new_tokens=MAX_NEW_TOKENS)
    page = browser.new_page(color_scheme=scheme)
    elsewhere: list[str] = []
    page.on(
        "request",
        lambda request: None if request.url.startswith((demo, "data:", "blob:")) else elsewhere.append(request.url),
    )
    page.goto(demo)
    assert len(letters(expected)) > 20
    ask(page, "What colour is it?", tmp_path / "red.png")
    wait_until(lambda: letters(expected) == letters(page.locator(ANSWER).last.inner_text()), 60)
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"demo-{scheme}.png")
    assert not elsewhere
    page.close()


@pytest.mark.browser
def test_what_is_no_picture_is_said_in_words_and_the_chat_goes_on(browser: Any, demo: str, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("Dear reader")
    page = browser.new_page()
    page.goto(demo)
    ask(page, "What is it?", tmp_path / "letter.png")
    wait_until(lambda: "no picture" in page.locator(ANSWER).last.inner_text(), 60)
    ask(page, "What is it?")
    wait_until(lambda: page.locator(ANSWER).count() == 2 and page.locator(ANSWER).last.inner_text().strip(), 60)
    assert TROUBLE not in page.locator(ANSWER).last.inner_text()
    page.close()


@pytest.mark.browser
def test_stop_stops_the_computation(browser: Any, tmp_path: Path) -> None:
    with served(endless_model(tmp_path / "model")) as (address, process):
        page = browser.new_page()
        page.goto(address)
        ask(page, "Talk")
        wait_until(lambda: page.locator(ANSWER).count() and len(page.locator(ANSWER).last.inner_text()) > 20, 60)
        busy = cpu_share(page, process)
        page.locator(".stop-button").click()
        page.wait_for_timeout(1000)
        assert busy > 0.05  # of a machine that may be busy with other things
        assert cpu_share(page, process) < busy / 3
        page.close()


def endless_model(folder: Path) -> Path:
    """A model that computes for long and never says its end token."""
    processor = make_tiny_processor()
    model = make_tiny_model(processor, context=2048, layers=48)
    model.lm_head.weight.data[processor.tokenizer.eos_token_id] = 0.0  # a logit of 0 is never the largest
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def cpu_share(page: Any, process: subprocess.Popen[bytes]) -> float:
    """Processor time per second of the demo's process, over two seconds."""

    def used() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    page.wait_for_timeout(2000)
    return (used() - before) / 2


def test_both_shapes_of_history_give_the_same_conversation(tmp_path: Path) -> None:
    picture = str(tmp_path / "a.png")
    from_page = [
        {
            "role": "user",
            "content": [{"type": "file", "file": {"path": picture}}, {"type": "text", "text": "What?"}],
            "metadata": None,
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A &lt;b> & 3 < 4."}], "metadata": None},
    ]
    from_client = [
        {"role": "user", "content": {"path": picture}},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A &lt;b> & 3 < 4."},
    ]
    expected = ([Turn("user", "<image>\nWhat?"), Turn("assistant", "A <b> & 3 < 4.")], [Path(picture)])
    assert conversation_of(from_page) == expected
    assert conversation_of(from_client) == expected


def test_questions_without_an_answer_are_left_out() -> None:
    history = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "There is no such picture", "metadata": {"title": TROUBLE}},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "Stopped before the first word"},
    ]
    assert conversation_of(history) == ([Turn("user", "And now?"), Turn("assistant", "A circle.")], [])


def test_answers_grow_and_are_no_markup(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ["Look: <img ", "src='http://x/y'> &lt; 3 < 4"]
    monkeypatch.setattr(Chat, "reply", lambda *_, **__: iter(pieces))
    said = list(responder(chat)({"text": "?", "files": []}, []))
    assert said == ["Look: &lt;img ", "Look: &lt;img src='http://x/y'> &amp;lt; 3 < 4"]
    history = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said[-1]}]
    assert conversation_of(history)[0][1].content == "".join(pieces)


def test_faults_are_said_in_words(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = responder(chat)({"text": "What?", "files": [str(tmp_path / "gone.png")]}, [])
    assert "gone.png" in message.content and message.metadata["title"] == TROUBLE
    (message,) = responder(chat)({"text": " ", "files": []}, [])
    assert "question is empty" in message.content

    def out_of_memory(*_: object, **__: object) -> Iterator[str]:
        yield "A"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Chat, "reply", out_of_memory)
    *_, message = responder(chat)({"text": "What?", "files": []}, [])
    assert "out of memory" in message.content


def test_nano_examples_are_questions_about_drawn_pictures(tmp_path: Path) -> None:
    examples = nano_examples(tmp_path)
    assert len(examples) == 3
    assert all(example["text"].endswith("?") and Path(example["files"][0]).is_file() for example in examples)
