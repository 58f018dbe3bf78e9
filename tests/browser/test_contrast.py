"""axe-core looks at the demo and at a report: contrast, names and roles; light and dark, laptop and phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qllava import page as pages
from qllava.page import Bar, Series, write_page
from qllava.pages.compare import tally_bar
from qllava.pages.page import STYLE
from qllava.voting.votes import Tally
from tests.pages.server import ARTIFACTS, served, wait_until
from tests.tiny_models import make_image, make_tiny_llava

pytestmark = pytest.mark.browser
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 780}
LOOKS = [("light", LAPTOP), ("dark", LAPTOP), ("light", PHONE), ("dark", PHONE)]
NAMES = ["laptop", "laptop-dark", "phone", "phone-dark"]
# (rule, part of the selector) that Gradio's own components break, and that no setting or style of ours can mend.
FROM_GRADIO = [
    ("button-name", ".image-container"),  # an image in a chatbot is a button without words that opens it in large
    ("aria-required-children", ".examples"),  # a chatbot's examples are buttons inside a list
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Its answers end with its context: each token is drawn, so shorter ones than the usual 512 show the same.
    return make_tiny_llava(tmp_path_factory.mktemp("demo") / "model", context=256)


@pytest.fixture(scope="module")
def demo(model: Path) -> Iterator[str]:
    with served(model) as (address, _):
        yield address


def violations(page: Any) -> list[str]:
    """Every element that breaks a rule, where the rule is about contrast or its breach is serious."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    # Nothing is in motion: half-faded text has half its contrast.
    page.add_style_tag(content="*, *::before, *::after { transition: none !important; animation: none !important; }")
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{rule['id']} ({rule['impact']}) {node['target']}: {node['failureSummary']}"
        for rule in found
        if rule["impact"] in ("serious", "critical") or rule["id"] == "color-contrast"
        for node in rule["nodes"]
        if not any(rule["id"] == known and part in str(node["target"]) for known, part in FROM_GRADIO)
    ]


CONTRAST = """([selector, pseudo]) => {
    const element = document.querySelector(selector);
    const parts = colour => colour.match(/[0-9.]+/g).map(Number);
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    let behind = element, ground = [0, 0, 0, 0];
    while (behind && (ground.length > 3 && ground[3] < 1)) {
        ground = parts(getComputedStyle(behind).backgroundColor);
        behind = behind.parentElement;
    }
    const [a, b] = [light(parts(getComputedStyle(element, pseudo).color)), light(ground)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def contrast(page: Any, selector: str, pseudo: str | None = None) -> float:
    """The contrast of an element's text to the first solid ground behind it; axe leaves placeholders out."""
    return float(page.evaluate(CONTRAST, [selector, pseudo]))


def test_the_check_finds_what_is_hard_to_read(browser: Any) -> None:
    page = browser.new_page()
    page.set_content(
        "<html lang='en'><title>A</title><main><h1 style='color:#999'>Grey</h1><img src='x'></main></html>"
    )
    assert fits(page)
    found = violations(page)
    assert len(found) == 2 and "color-contrast" in found[0] + found[1] and "image-alt" in found[0] + found[1]
    cover = "<p style='position: absolute; top: 0; left: 80%; width: 90%; height: 90%; background: white'></p>"
    page.set_content(f"<p id='box'><img id='a' width='1200' height='400' src='x'></p>{cover}")
    assert covered(page, "#a") and not fits(page)
    page.close()


@pytest.mark.parametrize(("scheme", "size"), LOOKS, ids=NAMES)
def test_the_demo_can_be_read_by_all(
    browser: Any, demo: str, tmp_path: Path, scheme: str, size: dict[str, int], request: pytest.FixtureRequest
) -> None:
    look = request.node.callspec.id
    ARTIFACTS.mkdir(exist_ok=True)
    page = browser.new_page(color_scheme=scheme, viewport=size)
    found: dict[str, list[str]] = {}

    def shoot(state: str) -> None:
        found[state] = violations(page)
        assert fits(page), state
        page.screenshot(path=ARTIFACTS / f"demo-{state}-{look}.png")

    page.goto(demo)
    page.locator("#chat .example").first.wait_for()
    shoot("empty")
    assert contrast(page, "#question textarea", "::placeholder") >= 4.5
    assert contrast(page, "#tabs button[aria-selected=true]") >= 4.5
    page.locator("#chat .example").first.click()
    wait_until(lambda: "token" in page.locator("#pace").inner_text(), 60)
    shoot("chat")
    for at in (0, 150):
        page.evaluate(f"window.scrollTo(0, {at})")
        page.locator("#chat .user img").scroll_into_view_if_needed()
        assert not covered(page, "#chat .user img"), "the image can be seen and clicked"
    page.get_by_text("Settings").first.click()
    shoot("settings")
    page.get_by_role("tab", name="About").click()
    wait_until(lambda: "parameters" in page.locator("#card").inner_text(), 30)
    shoot("about")
    page.get_by_role("tab", name="Compare").click()
    page.locator("#asked .example").first.wait_for()
    shoot("compare-empty")
    page.locator("#asked .example").first.click()
    wait_until(lambda: page.locator("#vote-left").is_enabled(), 60)
    shoot("compare")
    page.locator("#vote-left").click()
    wait_until(lambda: "Left was" in page.locator("#result").inner_text(), 30)
    shoot("voted")
    page.close()
    broken = [f"{state}: {line}" for state, lines in found.items() for line in lines]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_tally_can_be_read_by_all(browser: Any, scheme: str) -> None:
    """It is shown from ten votes on; here without a server that would have to collect them."""
    bar = tally_bar(Tally(("mine", "the other"), (9, 4), 2, 3), ("mine", "the other"))
    style = STYLE.read_text(encoding="utf-8")
    body = f"<main class='gradio-container'><h1>Compare</h1><div id='result'>{bar}</div></main>"
    page = browser.new_page(viewport=PHONE)
    page.set_content(
        f"<html lang='en' class='{scheme}'><title>Tally</title><style>{style}</style><body>{body}</body></html>"
    )
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"tally-{scheme}.png", clip={"x": 0, "y": 0, "width": 390, "height": 200})
    found = violations(page)
    widths = page.evaluate("[...document.querySelectorAll('.tally .bar span')].map(one => one.offsetWidth)")
    assert not found and fits(page)
    assert widths == pytest.approx([sum(widths) * share / 18 for share in (9, 2, 3, 4)], abs=1)
    page.close()


def covered(page: Any, selector: str) -> bool:
    """Whether something else than an element, or what is in it or around it, is seen at its corners or its middle."""
    return bool(
        page.locator(selector).first.evaluate(
            """element => {
                const box = element.getBoundingClientRect();
                const places = [[0.5, 0.5], [0.05, 0.05], [0.6, 0.05], [0.05, 0.95], [0.95, 0.95]];
                return places.some(([x, y]) => {
                    const top = document.elementFromPoint(box.x + x * box.width, box.y + y * box.height);
                    return top !== null && !top.contains(element) && !element.parentElement.contains(top);
                });
            }"""
        )
    )


def fits(page: Any) -> bool:
    """Whether nothing can be scrolled sideways."""
    return bool(
        page.evaluate(
            """() => {
                window.scrollTo(1000, window.scrollY);
                const moved = window.scrollX > 0;
                window.scrollTo(0, window.scrollY);
                const all = [document.documentElement, document.body, ...document.querySelectorAll("gradio-app, main")];
                return !moved && all.every(one => one.scrollWidth <= window.innerWidth + 1);
            }"""
        )
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part that `qllava.page` can make."""
    image = pages.image(make_image("red", (60, 40)), "a red image")
    lines = [Series("training", [(1, 2.5), (2, 1.9)]), Series("held out", [(1, 2.6), (2, 2.0)])]
    said = [("before", "blue", False), ("after", "red", True), ("asked", "", None)]
    parts = [
        pages.paragraph("Text."),
        pages.paragraph("A remark.", muted=True),
        *(pages.callout(f"A {kind}.", kind) for kind in ("note", "good", "warning")),  # type: ignore[arg-type]
        pages.tiles([("Accuracy", "93.4 %"), ("Questions", "100")]),
        pages.table(["Name", "Value"], [["a", 1.5], ["b", 2.5]], caption="What it says"),
        pages.bar_chart([Bar("colour", 0.9, "asked", (0.8, 0.95), 100), Bar("count", 0.1, faint=True)]),
        pages.grid(pages.line_chart("Loss", lines), pages.code("qllava check data.json")),
        pages.details("More", pages.code("a line that is far too long for a phone " * 5)),
        pages.gallery([pages.card(image, pages.verdicts(said))]),
        pages.exhibit("A sample", [(image, "photo.jpg")], pages.paragraph("Tokens.")),
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, pages.page("A run", "What it learned.", [pages.section("All", *parts)], footer="qllava"))
    return path


@pytest.mark.parametrize(("scheme", "size"), LOOKS, ids=NAMES)
def test_a_report_can_be_read_by_all(
    browser: Any, report: Path, scheme: str, size: dict[str, int], request: pytest.FixtureRequest
) -> None:
    page = browser.new_page(color_scheme=scheme, viewport=size)
    page.goto(report.as_uri())
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"report-{request.node.callspec.id}.png", full_page=True)
    found = violations(page)
    assert fits(page)
    page.close()
    assert not found, "\n".join(found)
