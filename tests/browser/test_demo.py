"""The demo in a real browser: upload, ask, watch it grow, stop, edit, compare, vote."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qllava.inference import load
from qllava.pages.talk import TROUBLE
from qllava.voting.votes import VoteFile
from tests.commands import Command
from tests.pages.server import ARTIFACTS, computes, endless_model, kept_by, served, wait_until
from tests.tiny_models import make_image, make_tiny_llava

pytestmark = pytest.mark.browser
ANSWER = "#chat .bot.message"
PHONE = {"width": 390, "height": 780}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Its answers end with its context: each token is drawn, so shorter ones than the usual 512 show the same.
    return make_tiny_llava(tmp_path_factory.mktemp("demo") / "model", context=256)


@pytest.fixture(scope="module")
def demo(model: Path) -> Iterator[str]:
    other = make_tiny_llava(model.parent / "other", seed=1, context=256)
    with served(model, "--compare", str(other)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Command, Path]]:
    folder = tmp_path_factory.mktemp("endless")
    with served(endless_model(folder / "model"), watched=True) as (address, process):
        yield address, process, folder


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A JPEG with the size and the turn of a phone's."""
    turned = Image.Exif()
    turned[0x0112] = 6
    make_image("red", (1600, 1200)).save(tmp_path / "photo.jpg", exif=turned)
    return tmp_path / "photo.jpg"


def ask(page: Any, text: str, image: Path | None = None, box: str = "#question") -> None:
    if image is not None:
        page.set_input_files(f"{box} input[type=file]", image)
        page.locator(f"{box} .thumbnail-item").first.wait_for()
    page.locator(f"{box} textarea").fill(text)
    page.locator(f"{box} textarea").press("Enter")


def answered(page: Any) -> bool:
    """Whether the last answer is whole: how fast it came stands below it, and no wheel turns there."""
    return "token" in page.locator("#pace").inner_text()


def settled(page: Any) -> str:
    """The last answer, once it is drawn to its end."""
    wait_until(lambda: answered(page), 60)
    said = ""
    while said != page.locator(ANSWER).last.inner_text():
        said = page.locator(ANSWER).last.inner_text()
        page.wait_for_timeout(500)
    return said


def letters(text: str) -> str:
    """What survives a browser unchanged: a random model also says control characters and half characters."""
    return "".join(character for character in text if character.isascii() and character.isalnum())


@pytest.mark.parametrize(("scheme", "size"), [("light", {"width": 1100, "height": 850}), ("dark", PHONE)])
def test_a_photograph_is_answered(
    browser: Any, demo: str, model: Path, photograph: Path, scheme: str, size: dict[str, int]
) -> None:
    expected = load(str(model)).answer(photograph, "What colour is it?", max_new_tokens=512)
    page = browser.new_page(color_scheme=scheme, viewport=size)
    elsewhere: list[str] = []
    page.on("request", lambda r: None if r.url.startswith((demo, "data:", "blob:")) else elsewhere.append(r.url))
    page.goto(demo)
    assert len(letters(expected)) > 20
    ask(page, "What colour is it?", photograph)
    assert letters(settled(page)) == letters(expected)
    assert "tokens" in page.locator("#pace").inner_text()
    image = page.locator("#chat .user img").first
    assert image.evaluate("i => [i.naturalWidth, i.naturalHeight]") == [1200, 1600], "shown upright"
    # Nothing stands out of the window, and what is typed into can be reached without scrolling sideways.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    box = page.locator("#question textarea").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"demo-{scheme}.png")
    assert not elsewhere
    page.close()


def test_what_is_no_image_is_said_in_words_and_the_chat_goes_on(browser: Any, demo: str, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("Dear reader")
    page = browser.new_page()
    page.goto(demo)
    page.set_input_files("#question input[type=file]", tmp_path / "letter.png")
    wait_until(lambda: "letter.png is not an image" in page.locator("body").inner_text(), 60)
    ask(page, "x" * 110_000)
    wait_until(lambda: TROUBLE in page.locator("#chat").inner_text(), 60)
    ask(page, "What is it?")
    wait_until(lambda: answered(page), 60)
    assert page.locator("#chat").inner_text().count(TROUBLE) == 1
    page.close()


def test_an_upload_goes_with_a_page_that_is_closed_without_a_question(
    browser: Any, demo: str, model: Path, photograph: Path
) -> None:
    before = set(kept_by(model))
    page = browser.new_page()
    page.goto(demo)
    page.set_input_files("#question input[type=file]", photograph)
    page.locator("#question .thumbnail-item").first.wait_for()
    assert len(set(kept_by(model)) - before) == 1
    page.close()
    wait_until(lambda: set(kept_by(model)) <= before, 10)


def test_an_empty_page_offers_images_and_questions(browser: Any, demo: str) -> None:
    page = browser.new_page(viewport=PHONE)
    page.goto(demo)
    page.locator("#chat .example").first.click()
    wait_until(lambda: answered(page) and page.locator("#chat .user img").count() == 1, 60)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#asked .example").nth(1).click()
    wait_until(lambda: page.locator("#vote-left").is_enabled(), 60)
    assert page.locator("#asked .user img").count() == 1 and not page.locator("#left img, #right img").count()
    page.close()


def test_a_file_that_is_too_large_is_said_in_words(browser: Any, demo: str, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(50_000_000))
    page = browser.new_page()
    page.goto(demo)
    page.set_input_files("#question input[type=file]", tmp_path / "large.png")
    wait_until(lambda: "exceed the maximum allowed size of 20" in page.locator("body").inner_text(), 60)
    page.close()


def test_an_image_is_pasted(browser: Any, demo: str) -> None:
    data = io.BytesIO()
    make_image("blue", (200, 100)).save(data, "png")
    page = browser.new_page()
    page.goto(demo)
    page.locator("#question textarea").evaluate(
        """(box, bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
            box.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
        }""",
        list(data.getvalue()),
    )
    page.locator("#question .thumbnail-item").first.wait_for()
    ask(page, "What is it?")
    wait_until(lambda: page.locator("#chat .user img").count() == 1 and answered(page), 60)
    page.close()


def test_text_grows_and_stop_ends_the_models_thread(browser: Any, endless: tuple[str, Command, Path]) -> None:
    address, process, folder = endless
    page = browser.new_page()
    page.goto(address)
    ask(page, "Talk")
    wait_until(lambda: page.locator(ANSWER).count() > 0, 60)
    first = page.locator(ANSWER).last.inner_text()
    wait_until(lambda: len(page.locator(ANSWER).last.inner_text()) > len(first), 30)
    assert computes(process, folder)
    page.locator("#question .stop-button").click()
    wait_until(lambda: not computes(process, folder), 2)
    said = page.locator(ANSWER).last.inner_text()
    assert said
    # It goes on: the same box takes the next question.
    page.locator("#question .submit-button").wait_for()
    ask(page, "And now?")
    wait_until(lambda: page.locator("#chat .user.message").count() == 2 and page.locator(ANSWER).count() == 2, 60)
    page.locator("#question .stop-button").click()
    wait_until(lambda: not computes(process, folder), 2)
    page.close()


def test_a_closed_page_ends_the_models_thread(browser: Any, endless: tuple[str, Command, Path]) -> None:
    address, process, folder = endless
    page = browser.new_page()
    page.goto(address)
    ask(page, "Talk")
    wait_until(lambda: page.locator(ANSWER).count() > 0, 60)
    page.close()
    wait_until(lambda: not computes(process, folder), 10)


def test_a_question_is_edited_and_asked_again_and_the_chat_cleared(browser: Any, demo: str) -> None:
    page = browser.new_page()
    page.goto(demo)
    ask(page, "What is it?")
    first = settled(page)
    page.locator("#chat button[aria-label='Retry']").click()
    wait_until(lambda: not answered(page), 60)
    assert settled(page) == first  # greedy
    page.locator("#chat button[aria-label='Edit']").first.click()
    page.locator("#chat textarea").fill("How many <shapes> are there?")
    page.locator("#chat button[aria-label='Submit']").click()
    wait_until(lambda: "How many <shapes>" in page.locator("#chat .user.message").inner_text(), 60)
    assert settled(page) != first and page.locator(ANSWER).count() == 1
    page.locator("#chat button[aria-label='Clear']").click()
    wait_until(lambda: page.locator("#chat .user.message").count() == 0, 30)
    page.close()


@pytest.mark.parametrize("size", [{"width": 1100, "height": 900}, PHONE], ids=["wide", "phone"])
def test_two_models_are_compared_and_the_vote_is_in_the_file(
    browser: Any, demo: str, model: Path, photograph: Path, size: dict[str, int]
) -> None:
    before = len(VoteFile(model.parent / "votes.jsonl").votes)
    page = browser.new_page(viewport=size)
    page.goto(demo)
    page.get_by_role("tab", name="Compare").click()
    assert page.locator("#vote-left").is_disabled()
    ask(page, "What colour is it?", photograph, "#pair")
    wait_until(lambda: page.locator("#vote-left").is_enabled(), 60)
    assert "Left was" not in page.locator("#result").inner_text(), "no names before the vote"
    cut = "all => all.filter(one => one.scrollWidth > one.clientWidth).map(one => one.innerText)"
    assert page.locator("#votes button").evaluate_all(cut) == [], "no label is cut off"
    narrowest = min(page.locator(side).bounding_box()["width"] for side in ("#left", "#right"))
    assert narrowest > 300, "an answer has room beside or below the other"
    page.locator("#vote-left").click()
    wait_until(lambda: "Left was" in page.locator("#result").inner_text(), 30)
    assert page.locator(".user img").count() == 1, "image and question are shown once"
    assert "vote" not in page.locator("#result").inner_text(), "a tally of one vote says nothing"
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"compare-{'phone' if size is PHONE else 'wide'}.png")
    (vote,) = VoteFile(model.parent / "votes.jsonl").votes[before:]
    assert (vote.question, vote.vote) == ("What colour is it?", "left")
    wait_until(
        lambda: letters(page.locator("#left .bot.message").last.inner_text()) == letters(vote.answers["left"]), 30
    )
    assert set(vote.models.values()) == {"model", "other"} and len(vote.pictures) == 1
    assert page.locator("#vote-left").is_disabled()
    page.close()


def test_the_card_says_what_the_model_is(browser: Any, demo: str) -> None:
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(demo)
    page.get_by_role("tab", name="About").click()
    wait_until(lambda: "parameters" in page.locator("#card").inner_text(), 30)
    assert "model" in page.locator("#card").inner_text() and "other" in page.locator("#card").inner_text()
    page.close()
