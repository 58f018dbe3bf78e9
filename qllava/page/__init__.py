"""One self-contained HTML page from text, tables, charts and images.

Everything is inline: one style sheet (light and dark, narrow and wide), charts as SVG, images as data URIs; no script,
no font and no address outside the file, so that a page can be mailed or stored with a checkpoint for years.

Two kinds of string keep the escaping correct (`markupsafe`). A plain `str` is text; `Html` is markup made by a function
of this package. Templates and `join` escape plain text, so a `str` in the place of markup is a type error for mypy, and
text on the page, never an injection.

    body = section("Loss", paragraph("Falls."), line_chart("Loss", [Series("training", [(1, 2.5), (2, 1.9)])]))
    write_page(Path("report.html"), page("A run", "What it learned.", [body]))
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qllava.files import write_whole
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
    "image",
    "section",
    "table",
    "tiles",
    "verdicts",
    "write_page",
]


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    label: str
    """Name next to the bar."""
    value: float
    """Value, which is its length."""
    note: str = ""
    """Text in small print below the name."""
    interval: tuple[float, float] | None = None
    """95 % confidence interval, drawn as a line and written below the value."""
    n: int | None = None
    """Number of observations, written below the value."""
    faint: bool = False
    """Draw the bar in grey: a baseline beside results."""


def join(parts: Iterable[Html]) -> Html:
    """Join pieces of markup."""
    return Html("\n").join(parts)


def paragraph(text: str, *, muted: bool = False) -> Html:
    """Return a paragraph of text; `muted` for a less important remark."""
    return Html('<p class="muted">{}</p>' if muted else "<p>{}</p>").format(text)


def code(text: str, *, wrap: bool = False) -> Html:
    """Return text in a fixed-width box; a long line scrolls, or wraps with `wrap`, as for a command."""
    return Html('<pre class="wrap">{}</pre>' if wrap else "<pre>{}</pre>").format(text)


def callout(text: str, kind: Literal["note", "good", "warning"] = "note") -> Html:
    """Return a sentence that stands out."""
    return Html('<p class="callout {}">{}</p>').format(kind, text)


def details(summary: str, *parts: Html) -> Html:
    """Return optional content, hidden until the summary is clicked."""
    return Html("<details><summary>{}</summary>\n{}\n</details>").format(summary, join(parts))


def group(*parts: Html) -> Html:
    """Return parts that belong together, separated from the next group."""
    return Html("<div>{}</div>").format(join(parts))


def section(title: str, *parts: Html) -> Html:
    """Return a part of a page with a title."""
    return Html("<section><h2>{}</h2>\n{}\n</section>").format(title, join(parts))


def grid(*parts: Html) -> Html:
    """Return parts in columns if there is space, else one below the other."""
    return Html('<div class="grid">\n{}\n</div>').format(join(parts))


def tiles(values: Sequence[tuple[str, str]]) -> Html:
    """Return headline figures: (label, value) pairs, the value already formatted."""
    cell = Html("<div><dt>{}</dt><dd>{}</dd></div>")
    return Html('<dl class="tiles">{}</dl>').format(Html("").join(cell.format(*pair) for pair in values))


def percent(value: float) -> str:
    """Format a share between 0 and 1: 0.934 becomes "93.4 %", with a space that keeps both on one line."""
    return f"{100 * value:.1f}\u00a0%"


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]], *, caption: str = "") -> Html:
    """Return a table; numbers are aligned to the right with four significant digits, text is unchanged.

    Raises:
        ValueError: A row is longer or shorter than `head`, which is a mistake of the caller.
    """
    for line, row in enumerate(rows, start=1):
        if len(row) != len(head):
            raise ValueError(f"row {line} of the table has {len(row)} cells, its head has {len(head)}")
    numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(head))]
    marks = [Html(' class="number"' if right else "") for right in numeric]
    top = _cells("<th{}>{}</th>", marks, head)
    body = join(Html("<tr>{}</tr>").format(_cells("<td{}>{}</td>", marks, row)) for row in rows)
    title = Html("<caption>{}</caption>").format(caption) if caption else ""
    return Html('<div class="scroll"><table>{}<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody></table></div>').format(
        title, top, body
    )


def _cells(form: str, marks: Sequence[Html], values: Sequence[str | float]) -> Html:
    texts = [value if isinstance(value, str) else number(value) for value in values]
    return Html("").join(Html(form).format(*pair) for pair in zip(marks, texts, strict=True))


def _width(value: float, maximum: float) -> float:
    """Return the length of a value in percent of a full bar."""
    return 100 * min(max(value / maximum, 0.0), 1.0) if math.isfinite(value) else 0.0


def bar_chart(bars: Sequence[Bar], *, maximum: float = 1.0) -> Html:
    """Return horizontal bars with their values as percentages; `maximum` is the value of a full bar."""
    if maximum <= 0:
        raise ValueError(f"the value of a full bar must be above 0, not {maximum}")
    rows = []
    for bar in bars:
        note = Html("<small>{}</small>").format(bar.note) if bar.note else ""
        width = _width(bar.value, maximum)
        track = Html('<span{} style="width:{:.2f}%"></span>').format(Html(' class="faint"' if bar.faint else ""), width)
        said = [f"n = {bar.n:,}"] if bar.n is not None else []
        if bar.interval is not None:
            low, high = (_width(end, maximum) for end in bar.interval)
            track += Html('<i style="left:{:.2f}%;width:{:.2f}%"></i>').format(low, high - low)
            said.insert(0, f"{percent(bar.interval[0]).split()[0]} to {percent(bar.interval[1])}")
        small = Html("<small>{}</small>").format(", ".join(said)) if said else ""
        row = Html(
            '<div class="bar"><span class="name">{}{}</span><span class="track">{}</span>'
            '<span class="value">{}{}</span></div>'
        )
        rows.append(row.format(bar.label, note, track, percent(bar.value), small))
    return Html('<div class="bars">\n{}\n</div>').format(join(rows))


def image(image: Image, alt: str, *, longest: int = 480) -> Html:
    """Return an image inside the page, as PNG, shrunk if its longer side has more than `longest` pixels.

    Small drawings keep sharp pixels when the page enlarges them, photographs are smoothed.
    """
    shown = image.convert("RGB")
    if max(shown.size) > longest:
        shown.thumbnail((longest, longest))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    small = Html(' class="pixels"' if max(shown.size) <= 160 else "")
    return Html('<img{} src="data:image/png;base64,{}" alt="{}">').format(small, data, alt)


def card(image: Html, *parts: Html) -> Html:
    """Return an image with its related parts; a `gallery` consists of cards."""
    form = Html('<article class="card"><div class="frame">{}</div><div class="text">{}</div></article>')
    return form.format(image, join(parts))


def gallery(cards: Sequence[Html]) -> Html:
    """Return cards in rows, as many per row as fit."""
    return Html('<div class="gallery">\n{}\n</div>').format(join(cards))


def legend(marks: Sequence[tuple[Html, str]]) -> Html:
    """Return the signs of a page and their meanings."""
    line = Html("<dt>{}</dt><dd>{}</dd>")
    return Html('<dl class="legend">{}</dl>').format(Html("").join(line.format(*pair) for pair in marks))


def exhibit(title: str, images: Sequence[tuple[Html, str]], *parts: Html) -> Html:
    """Return one item for close inspection: its parts, and (image, caption) to the side, or above on a narrow screen.

    Without images the parts take the whole width.
    """
    figure = Html("<figure>{}<figcaption>{}</figcaption></figure>")
    figures = Html("").join(figure.format(*pair) for pair in images)
    side = Html('<div class="side">{}</div>').format(figures) if images else ""
    form = '<article class="exhibit"><h3>{}</h3><div class="halves">{}<div>{}</div></div></article>'
    return Html(form).format(title, side, join(parts))


def verdicts(lines: Sequence[tuple[str, str, bool | None]]) -> Html:
    """Return lines of (label, answer, right, wrong or not judged), marked by colour and sign, never by colour alone."""
    out = []
    for label, answer, right in lines:
        kind, sign = {True: ("right", "\u2713"), False: ("wrong", "\u2717"), None: ("plain", "")}[right]
        shown = answer if answer.strip() else Html('<i class="muted">nothing</i>')
        line = Html('<dt>{}</dt><dd class="{}">{}<span class="sign">{}</span></dd>')
        out.append(line.format(label, kind, shown, sign))
    return Html('<dl class="verdicts">{}</dl>').format(Html("").join(out))


def page(title: str, lead: str, sections: Sequence[Html], *, footer: str = "") -> str:
    """Return a whole document: the title, one sentence about the content, and the sections."""
    end = Html("<footer>{}</footer>").format(footer) if footer else ""
    document = Html(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<title>{0}</title>\n<style>{1}</style>\n</head>\n<body>\n<main>\n"
        '<header><h1>{0}</h1><p class="lead">{2}</p></header>\n'
        "{3}\n{4}</main>\n</body>\n</html>\n"
    )
    return str(document.format(title, _style(), lead, join(sections), end))


def write_page(path: Path, html: str) -> None:
    """Write a page completely or not at all, so that a browser never reads half of one; may raise OSError."""
    write_whole(path, html)


def _style() -> Html:
    return Html(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
