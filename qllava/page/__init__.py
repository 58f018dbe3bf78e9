"""One self-contained HTML page from text, tables, charts and pictures.

Everything is inline: one style sheet (light and dark, narrow and wide), charts as SVG, pictures as data URIs; no
script, no font and no address outside the file, so a page can be mailed or kept beside a checkpoint for years.

Two kinds of string keep the escaping right. A plain `str` is text and is escaped here; `Html` is markup that a function
of this package made. Handing a `str` where markup is expected is a type error, not an injection.

    body = section("Loss", paragraph("Falls."), line_chart("Loss", [Series("training", [(1, 2.5), (2, 1.9)])]))
    write_page(Path("report.html"), page("A run", "What it learned.", [body]))
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qllava.page.charts import Series, interval_chart, line_chart
from qllava.page.markup import Html, number

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Bar",
    "Html",
    "Series",
    "bar_chart",
    "callout",
    "card",
    "code",
    "details",
    "exhibit",
    "gallery",
    "grid",
    "group",
    "interval_chart",
    "join",
    "legend",
    "line_chart",
    "page",
    "paragraph",
    "percent",
    "picture",
    "section",
    "table",
    "tiles",
    "verdicts",
    "write_page",
]


@dataclass(frozen=True)
class Bar:
    """One bar: `label` beside it, `value` as its length, `note` in small print below the label."""

    label: str
    value: float
    note: str = ""


def join(parts: Iterable[Html]) -> Html:
    """Markup, one after the other."""
    return Html("\n".join(parts))


def paragraph(text: str, *, muted: bool = False) -> Html:
    """A paragraph of text; `muted` for a remark of second rank."""
    start = '<p class="muted">' if muted else "<p>"
    return Html(f"{start}{escape(text)}</p>")


def code(text: str) -> Html:
    """Text as it stands, in a fixed-width box that scrolls by itself when a line is too long."""
    return Html(f"<pre>{escape(text)}</pre>")


def callout(text: str, kind: Literal["note", "good", "warning"] = "note") -> Html:
    """A sentence that must not be missed."""
    return Html(f'<p class="callout {kind}">{escape(text)}</p>')


def details(summary: str, *parts: Html) -> Html:
    """Something that is there for who asks: closed until the summary is clicked."""
    return Html(f"<details><summary>{escape(summary)}</summary>\n{join(parts)}\n</details>")


def group(*parts: Html) -> Html:
    """Parts that belong together and are parted from the next such group."""
    return Html(f"<div>{join(parts)}</div>")


def section(title: str, *parts: Html) -> Html:
    """A titled part of a page."""
    return Html(f"<section><h2>{escape(title)}</h2>\n{join(parts)}\n</section>")


def grid(*parts: Html) -> Html:
    """Parts side by side where there is room, below each other where there is not."""
    return Html(f'<div class="grid">\n{join(parts)}\n</div>')


def tiles(values: Sequence[tuple[str, str]]) -> Html:
    """Headline figures: (label, value) pairs, the value already formatted."""
    cells = (f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in values)
    return Html(f'<dl class="tiles">{"".join(cells)}</dl>')


def percent(value: float) -> str:
    """A share between 0 and 1 as text: 0.934 becomes "93.4 %", with the space that keeps both on one line."""
    return f"{100 * value:.1f}\u00a0%"


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]], *, caption: str = "") -> Html:
    """A table; numbers are aligned to the right and shown with four significant digits, text as it is.

    A row that is longer or shorter than `head` is a mistake of the caller and raises ValueError.
    """
    for line, row in enumerate(rows, start=1):
        if len(row) != len(head):
            raise ValueError(f"row {line} of the table has {len(row)} cells, its head has {len(head)}")
    numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(head))]
    mark = [' class="number"' if right else "" for right in numeric]
    top = "".join(f"<th{m}>{escape(name)}</th>" for m, name in zip(mark, head, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{m}>{_cell(cell)}</td>" for m, cell in zip(mark, row, strict=True)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll"><table>{title}<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _cell(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else number(value)


def bar_chart(bars: Sequence[Bar], *, maximum: float = 1.0) -> Html:
    """Horizontal bars with their values as percentages; `maximum` is the value of a full bar."""
    if maximum <= 0:
        raise ValueError(f"the value of a full bar must be above 0, not {maximum}")
    rows = []
    for bar in bars:
        width = 100 * min(max(bar.value / maximum, 0.0), 1.0) if math.isfinite(bar.value) else 0.0
        note = f"<small>{escape(bar.note)}</small>" if bar.note else ""
        rows.append(
            f'<div class="bar"><span class="name">{escape(bar.label)}{note}</span>'
            f'<span class="track"><span style="width:{width:.2f}%"></span></span>'
            f'<span class="value">{escape(percent(bar.value))}</span></div>'
        )
    return Html('<div class="bars">\n' + "\n".join(rows) + "\n</div>")


def picture(image: Image, alt: str, *, longest: int = 480) -> Html:
    """A picture inside the page, as PNG; a larger one is shrunk until its longer side has `longest` pixels.

    Small drawings keep their hard pixels when the page enlarges them, photographs are smoothed.
    """
    shown = image.convert("RGB")
    if max(shown.size) > longest:
        shown.thumbnail((longest, longest))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    small = ' class="pixels"' if max(shown.size) <= 160 else ""
    return Html(f'<img{small} src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}">')


def card(image: Html, *parts: Html) -> Html:
    """A picture with what belongs to it; cards stand in a `gallery`."""
    return Html(
        f'<article class="card"><div class="frame">{image}</div><div class="text">{join(parts)}</div></article>'
    )


def gallery(cards: Sequence[Html]) -> Html:
    """Cards beside each other, as many as fit."""
    return Html(f'<div class="gallery">\n{join(cards)}\n</div>')


def legend(marks: Sequence[tuple[Html, str]]) -> Html:
    """Signs of a page and what they mean."""
    lines = (f"<dt>{mark}</dt><dd>{escape(meaning)}</dd>" for mark, meaning in marks)
    return Html(f'<dl class="legend">{"".join(lines)}</dl>')


def exhibit(title: str, pictures: Sequence[tuple[Html, str]], *parts: Html) -> Html:
    """One thing to look at closely: what belongs to it, and (picture, caption) beside it, or above on a narrow screen.

    Without pictures the parts take the whole width.
    """
    figures = (f"<figure>{image}<figcaption>{escape(said)}</figcaption></figure>" for image, said in pictures)
    side = f'<div class="side">{"".join(figures)}</div>' if pictures else ""
    halves = f'<div class="halves">{side}<div>{join(parts)}</div></div>'
    return Html(f'<article class="exhibit"><h3>{escape(title)}</h3>{halves}</article>')


def verdicts(lines: Sequence[tuple[str, str, bool | None]]) -> Html:
    """Lines of (label, answer, right or wrong or not judged): the mark is colour and sign, never colour alone."""
    out = []
    for label, answer, right in lines:
        kind, sign = {True: ("right", "\u2713"), False: ("wrong", "\u2717"), None: ("plain", "")}[right]
        shown = escape(answer) if answer.strip() else '<i class="muted">nothing</i>'
        out.append(f'<dt>{escape(label)}</dt><dd class="{kind}">{shown}<span class="sign">{sign}</span></dd>')
    return Html(f'<dl class="verdicts">{"".join(out)}</dl>')


def page(title: str, lead: str, sections: Sequence[Html], *, footer: str = "") -> str:
    """A whole document: the title, one sentence that says what is to be seen, and the sections."""
    end = f"<footer>{escape(footer)}</footer>" if footer else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>\n'
        f"{join(sections)}\n{end}</main>\n</body>\n</html>\n"
    )


def write_page(path: Path, html: str) -> None:
    """Write a page beside its place and rename it, so that a browser or a full disk never leaves half of one."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(html, encoding="utf-8")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _style() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")
