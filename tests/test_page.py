"""qllava.page: everything is escaped, nothing points outside the file, charts put values where they belong."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from qllava import page
from qllava.page import Bar, Html, Series, charts
from tests.planted import full, planted

HOSTILE = "<script>alert('x')</script> & \"quoted\""


class Reader(HTMLParser):
    """Collects the tags and the text of a page, and complains about tags that are not closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def svg(chart: Html) -> ET.Element:
    """The drawing inside a chart, which must be well-formed XML."""
    found = re.search(r"<svg.*</svg>", chart, re.DOTALL)
    assert found is not None
    return ET.fromstring(found.group())


def points(chart: Html) -> list[list[tuple[float, float]]]:
    """The places of every line."""
    lines = [node.attrib["points"].split() for node in svg(chart).iter("polyline")]
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line)] for line in lines]


def full_page(text: str) -> str:
    """A page that uses every function, with the same text at every place that takes one."""
    image = page.image(Image.new("RGB", (8, 8), "red"), text)
    return page.page(
        text,
        text,
        [
            page.section(
                text,
                page.paragraph(text),
                page.callout(text, "warning"),
                page.code(text),
                page.tiles([(text, text)]),
                page.table([text, "n"], [[text, 1.5]], caption=text),
                page.bar_chart([Bar(text, 0.5, text)]),
                page.details(text, page.paragraph(text, muted=True)),
                page.grid(page.line_chart(text, [Series(text, [(0, 1), (1, 2)]), Series(text, [(0, 2)])], x=text)),
                page.gallery([page.card(image, page.group(page.verdicts([(text, text, True)])))]),
                page.legend([(page.paragraph(text), text)]),
                page.exhibit(text, [(image, text)], page.paragraph(text)),
            )
        ],
        footer=text,
    )


def test_no_text_becomes_markup() -> None:
    html = full_page(HOSTILE)
    reader = Reader(html)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.open == []
    assert "<script" not in html
    assert any(HOSTILE in word for word in reader.words)


@given(st.text())
def test_any_text_keeps_the_page_whole(text: str) -> None:
    assert Reader(full_page(text)).open == []


@pytest.mark.parametrize("build", [page.join, page.grid, page.group, page.gallery], ids=lambda build: build.__name__)
def test_text_where_markup_is_expected_is_text(build: Callable[..., Html]) -> None:
    """Mypy refuses it; should it happen all the same, nothing is injected."""
    given: Any = (HOSTILE, page.code("fine")) if build in (page.grid, page.group) else ([HOSTILE, page.code("fine")],)
    assert "<script>" not in build(*given) and "&lt;script&gt;" in build(*given)
    assert "<pre>fine</pre>" in build(*given)


def test_the_page_needs_nothing_from_outside() -> None:
    html = full_page("plain")
    assert not re.search(r"https?://|@import|<link|<script|url\(", html)
    for _, attributes in Reader(html).tags:
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith("data:")


def test_light_dark_and_narrow_are_thought_of() -> None:
    html = full_page("plain")
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert "max-width: 34rem" in html


def test_an_image_comes_back_as_it_was() -> None:
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    html = page.image(image, "noise")
    data = re.search(r"base64,([^\"]+)", html)
    assert data is not None
    with Image.open(io.BytesIO(base64.b64decode(data.group(1)))) as back:
        assert back.format == "PNG"
        assert back.tobytes() == image.tobytes()
    assert 'class="pixels"' in html


def test_a_large_image_is_shrunk_and_the_original_left_alone() -> None:
    image = Image.new("RGB", (1200, 600), "blue")
    data = re.search(r"base64,([^\"]+)", page.image(image, "blue", longest=480))
    assert data is not None
    with Image.open(io.BytesIO(base64.b64decode(data.group(1)))) as back:
        assert back.size == (480, 240)
    assert image.size == (1200, 600)


def test_a_line_goes_where_its_values_are() -> None:
    (line,) = points(page.line_chart("rising", [Series("a", [(0, 0), (5, 0.5), (10, 1)])], share=True))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x0 < x1 < x2
    assert y0 > y1 > y2, "larger values lie higher, and y counts downwards"
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_a_logarithmic_axis_spaces_powers_of_ten_evenly() -> None:
    (line,) = points(page.line_chart("log", [Series("a", [(1, 0.001), (2, 0.1), (3, 10), (4, 0), (5, -1)])], log=True))
    heights = [y for _, y in line]
    assert len(heights) == 3, "0 and -1 have no logarithm"
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.15)


def test_both_axes_can_be_logarithmic() -> None:
    """A power law is a straight line there."""
    law = [(10.0**n, 10.0**-n) for n in range(5)]
    (line,) = points(page.line_chart("law", [Series("a", [(0, 1), *law])], log=True, log_x=True))
    assert len(line) == 5, "0 has no logarithm"
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(line, line[1:], strict=False)]
    for step in steps:
        assert step == pytest.approx(steps[0], abs=0.25)


def test_large_ticks_fit_their_margin() -> None:
    chart = page.line_chart("law", [Series("a", [(1, 1), (2, 5e6)])], log=True)
    labels = re.findall(r'<text class="y"[^>]*>([^<]*)</text>', chart)
    assert labels == ["1", "10", "100", "1,000", "10,000", "100k", "1M", "10M"]


def test_what_is_not_finite_is_left_out() -> None:
    chart = page.line_chart("loss", [Series("a", [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)])])
    assert [len(line) for line in points(chart)] == [2]
    assert "nan" not in chart and "inf" not in chart


def test_nothing_to_draw_is_said() -> None:
    assert "No finite values" in page.line_chart("loss", [Series("a", []), Series("b", [(1, math.nan)])])


def test_a_single_point_is_said_and_not_drawn() -> None:
    """A run of one step, for example."""
    chart = page.line_chart("exact match", [Series("held out", [(1, 0.5)]), Series("train", [(1, 1.0)])], share=True)
    assert "<svg" not in chart and "held out 50.0 %, train 100.0 % at step 1." in chart


def test_steps_are_whole_numbers() -> None:
    chart = page.line_chart("loss", [Series("a", [(1, 2.0), (2, 1.0), (3, 0.5)])])
    assert re.findall(r'<text class="x"[^>]*>([^<]*)</text>', chart) == ["1", "2", "3"]
    chart = page.line_chart("loss", [Series("a", [(0.5, 2.0), (2, 1.0)])])
    assert "1.5" in re.findall(r'<text class="x"[^>]*>([^<]*)</text>', chart)


def test_a_legend_only_for_several_lines() -> None:
    one = page.line_chart("t", [Series("alone", [(0, 1), (1, 2)])])
    two = page.line_chart("t", [Series("raw", [(0, 1), (1, 2)], faint=True), Series("smooth", [(0, 1), (1, 2)])])
    assert 'class="key"' not in one
    assert 'class="k1 faint">raw<' in two and 'class="k1">smooth<' in two, "a faint line has its full line's colour"


@example([6.886066512629608e-295], True)  # whose power of ten below is zero to a computer
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30), st.booleans())
def test_every_curve_stays_inside_its_frame(values: list[float], log: bool) -> None:
    chart = page.line_chart("any", [Series("a", list(enumerate(values)))], log=log)
    if "<svg" not in chart:
        assert len(values) == 1 or (log and sum(v > 1e-300 for v in values) < 2)
        return
    for line in points(chart):
        assert all(0 <= x <= 440 and 0 <= y <= 250 for x, y in line)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, length: float) -> None:
    axis = charts._Axis.over(low, low + length, 0, 100)
    ticks = axis.ticks(5)
    assert 1 <= len(ticks) <= 7
    assert all(-1e-6 <= axis.place(tick) <= 100 + 1e-6 for tick in ticks)


def test_bars_are_as_long_as_their_values() -> None:
    html = page.bar_chart([Bar("half", 0.5), Bar("over", 1.5), Bar("none", math.nan)])
    assert re.findall(r"width:([\d.]+)%", html) == ["50.00", "100.00", "0.00"]
    assert "50.0\u00a0%" in html
    with pytest.raises(ValueError, match="above 0"):
        page.bar_chart([], maximum=0)


def test_a_bar_shows_its_interval_and_a_baseline_is_grey() -> None:
    html = page.bar_chart([Bar("a", 0.9, interval=(0.8, 0.95), n=1200), Bar("chance", 0.5, faint=True)])
    assert "<small>80.0 to 95.0\u00a0%, n = 1,200</small>" in html
    assert '<i style="left:80.00%;width:15.00%"></i>' in html and html.count("<i ") == 1
    assert '<span style="width:90.00%">' in html and '<span class="faint" style="width:50.00%">' in html


def test_a_table_aligns_numbers_and_refuses_ragged_rows() -> None:
    html = page.table(["name", "n", "loss"], [["a", 12345, 0.123456], ["b", 2, 1.0]])
    assert '<td class="number">12,345</td>' in html
    assert '<td class="number">0.1235</td>' in html
    assert "<td>a</td>" in html
    with pytest.raises(ValueError, match="row 2 of the table has 1 cells, its head has 2"):
        page.table(["a", "b"], [["1", "2"], ["1"]])


def test_right_and_wrong_are_marked_by_sign_too() -> None:
    html = page.verdicts([("Truth", "red", None), ("Before", "", False), ("After", "red", True)])
    assert html.count("\u2713") == 1 and html.count("\u2717") == 1
    assert "nothing" in html, "an empty answer is shown as one"


def test_an_exhibit_without_images_leaves_no_room_for_them() -> None:
    image = page.image(Image.new("RGB", (8, 8)), "dark")
    assert page.exhibit("t", [(image, "one"), (image, "two")]).count("<figure>") == 2
    assert "side" not in page.exhibit("t", [], page.paragraph("words"))


@pytest.mark.parametrize("operation", ["write", "rename"])
def test_writing_replaces_the_page_as_a_whole(tmp_path: Path, operation: Any) -> None:
    path = tmp_path / "report.html"
    page.write_page(path, "first")
    page.write_page(path, "second \u2713")
    assert path.read_text(encoding="utf-8") == "second \u2713"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

    with planted(operation, f"{tmp_path}/*", full), pytest.raises(OSError, match="No space"):
        page.write_page(path, "third")
    assert path.read_text(encoding="utf-8") == "second \u2713"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_an_interval_lies_on_its_axis() -> None:
    chart = page.interval_chart(HOSTILE, [("kappa", 0.0, -0.5, 0.5), (HOSTILE, 1.0, 1.0, 1.0)], -1, 1)
    drawing = svg(chart)
    circles = [float(c.attrib["cx"]) for c in drawing.iter("circle")]
    whiskers = [[float(p.split(",")[0]) for p in line.attrib["points"].split()] for line in drawing.iter("polyline")]
    assert circles[0] == pytest.approx(sum(whiskers[0]) / 2, abs=0.1)
    assert circles[1] - circles[0] == pytest.approx(2 * (whiskers[0][1] - circles[0]), abs=0.3)
    assert whiskers[1] == [circles[1]] * 2
    Reader(chart)
    assert "<script" not in chart


def test_a_long_command_wraps_and_a_listing_scrolls() -> None:
    assert str(page.code("qllava chat", wrap=True)) == '<pre class="wrap">qllava chat</pre>'
    assert str(page.code("a  b")) == "<pre>a  b</pre>"
    assert "pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere;" in page.page("t", "l", [])


def test_a_lone_chart_is_as_wide_as_one_of_two() -> None:
    """An SVG scales with its figure, and so does its type."""
    assert "repeat(auto-fill, minmax(min(100%, 24rem), 1fr))" in page.page("t", "l", [page.grid()])
