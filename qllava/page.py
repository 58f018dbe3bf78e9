"""One self-contained HTML page from text, tables, charts and pictures.

Everything is inline: one style sheet (light and dark, narrow and wide), charts as SVG, pictures as data URIs; no
script, no font and no address outside the file, so a page can be mailed or kept beside a checkpoint for years.

Two kinds of string keep the escaping right. A plain `str` is text and is escaped here; `Html` is markup that a function
of this file made. Handing a `str` where markup is expected is a type error, not an injection.

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
from typing import TYPE_CHECKING, Literal, NewType

if TYPE_CHECKING:
    from PIL.Image import Image

Html = NewType("Html", str)

# Width and height of a chart in its own units, and the margins that hold the axes. Two charts stand side by side on a
# wide screen and one fills a phone, so that a unit is about a pixel in both and the labels stay readable.
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 38
# A logarithmic axis shows values above this; ten to the power of a lower tick would be 0 in floating point.
_LOWEST_LOG = 1e-300


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    `label` names it in the legend; `points` are (x, y) pairs in the order of x, of which the ones that are not finite
    are left out; `faint` draws it thin and pale, for raw values behind a smoothed line.
    """

    label: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


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
    for number, row in enumerate(rows, start=1):
        if len(row) != len(head):
            raise ValueError(f"row {number} of the table has {len(row)} cells, its head has {len(head)}")
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
    return escape(value) if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    """A number as a person writes it: at most four significant digits, no trailing zeros, no minus zero."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}"


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


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str = "step",
    share: bool = False,
    log: bool = False,
    log_x: bool = False,
) -> Html:
    """Lines over a common axis, with a legend when there is more than one.

    `share` fixes the vertical axis to 0 to 100 %; `log` makes it logarithmic, and `log_x` the horizontal one, where
    values that are not above 0 are left out. Up to 80 points of a line carry their value as a tooltip. Nothing to draw
    gives a sentence, not an empty frame.
    """
    drawn = [Series(s.label, [p for p in s.points if _drawable(p, log, log_x)], s.faint) for s in series]
    drawn = [s for s in drawn if s.points]
    head = f"<figcaption>{escape(title)}</figcaption>"
    if not drawn:
        return Html(f'<figure class="chart">{head}<p class="muted">No finite values to draw.</p></figure>')
    xs = [px for s in drawn for px, _ in s.points]
    ys = [py for s in drawn for _, py in s.points]
    x_axis = _Axis.over(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, log=log_x)
    if share:
        y_axis = _Axis(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP, False)
    else:
        y_axis = _Axis.over(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, log=log, pad=0.05)
    frame = _frame(x_axis, y_axis, x, share)
    colours = _colours(drawn)
    lines = [_line(s, c, x_axis, y_axis, share) for s, c in zip(drawn, colours, strict=True)]
    key = ""
    if len(drawn) > 1:
        names = "".join(
            f'<span class="k{c}{" faint" if s.faint else ""}">{escape(s.label)}</span>'
            for s, c in zip(drawn, colours, strict=True)
        )
        key = f'<div class="key">{names}</div>'
    return Html(
        f'<figure class="chart">{head}{key}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{frame}{"".join(lines)}</svg></figure>'
    )


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]], low: float, high: float) -> Html:
    """Figures with their intervals below each other: (label, value, from, to), on an axis from `low` to `high`."""
    left, line = 150, 30
    axis, bottom = _Axis(low, high, left, _WIDTH - _RIGHT, False), _TOP + line * len(rows)
    parts = []
    for tick in axis.ticks(6):
        at = axis.place(tick)
        parts.append(f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="x" x="{at:.1f}" y="{bottom + 17}">{_number(tick)}</text>')
    for number, (label, value, start, end) in enumerate(rows):
        y = _TOP + line * (number + 0.5)
        tip = escape(f"{label}: {_number(value)}, 95 % interval {_number(start)} to {_number(end)}")
        parts.append(f'<text class="y" x="{left - 10}" y="{y + 4:.1f}">{escape(label)}</text>')
        whisker = f"{axis.place(start):.1f},{y:.1f} {axis.place(end):.1f},{y:.1f}"
        parts.append(f'<polyline class="s1" points="{whisker}"/>')
        parts.append(
            f'<circle class="s1" cx="{axis.place(value):.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>'
        )
    return Html(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {bottom + 26}" '
        f'role="img" aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg></figure>'
    )


def _drawable(point: tuple[float, float], log: bool, log_x: bool) -> bool:
    return all(
        math.isfinite(value) and (not logarithmic or value > _LOWEST_LOG)
        for value, logarithmic in zip(point, (log_x, log), strict=True)
    )


def _colours(series: Sequence[Series]) -> list[int]:
    """The number of each line's colour; a faint line shares it with the next full one, which it belongs to."""
    numbers, current = [], 1
    for s in series:
        numbers.append(current)
        if not s.faint:
            current = current % 6 + 1
    return numbers


@dataclass(frozen=True)
class _Axis:
    """From values to places: `low` lies at `start`, `high` at `end`; `log` in powers of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float, *, log: bool = False, pad: float = 0.0) -> _Axis:
        """An axis that holds all values, `pad` of its length free at both ends, and never of length 0."""
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12:
            half = abs(low) * 0.1 or 0.5
            low, high = low - half, high + half
        room = pad * (high - low)
        bottom = low - room
        # A curve that comes down near to zero is shown down to zero; and padding never makes a negative axis.
        if pad and not log and low >= 0 and (low < 0.4 * high or bottom < 0):
            bottom = 0.0
        return cls(bottom, high + room, start, end, log)

    def place(self, value: float) -> float:
        """Where a value lies, in the chart's units."""
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """Round values (1, 2 or 5 times a power of ten) inside the axis, about `wanted` of them."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            fine = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            all_ticks = [m * 10.0**p for p in powers for m in fine]
            # The smallest powers are zero to a computer.
            return [t for t in all_ticks if t > 0 and self.low - 1e-9 <= math.log10(t) <= self.high + 1e-9]
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def _frame(x_axis: _Axis, y_axis: _Axis, x: str, share: bool) -> str:
    """Grid lines, tick labels and the name of the horizontal axis."""
    parts = []
    for tick in y_axis.ticks(5):
        at = y_axis.place(tick)
        label = f"{100 * tick:.0f} %" if share else _tick(tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 7}" y="{at + 4:.1f}">{label}</text>')
    for tick in x_axis.ticks(6):
        parts.append(f'<text class="x" x="{x_axis.place(tick):.1f}" y="{_HEIGHT - _BOTTOM + 17}">{_tick(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="x name" x="{middle:.0f}" y="{_HEIGHT - 4}">{escape(x)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    """A number in the room that a margin leaves: 100k, 2M."""
    if 1e5 <= abs(value) < 1e12:
        return f"{value / 1e6:,.6g}M" if abs(value) >= 1e6 else f"{value / 1e3:.6g}k"
    return _number(value)


def _line(series: Series, colour: int, x_axis: _Axis, y_axis: _Axis, share: bool) -> str:
    """One line, and its points where they are few enough to be told apart."""
    places = [(x_axis.place(px), y_axis.place(py)) for px, py in series.points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    kind = f"s{colour}{' faint' if series.faint else ''}"
    drawn = f'<polyline class="{kind}" points="{path}"/>' if len(places) > 1 else ""
    if series.faint and len(places) > 1:
        return drawn
    radius = 2.6 if len(places) <= 20 else 0 if len(places) > 80 else 1.2
    if radius == 0:
        return drawn
    for (px, py), (at_x, at_y) in zip(series.points, places, strict=True):
        value = f"{100 * py:.1f} %" if share else _number(py)
        tip = escape(f"{series.label}, {_number(px)}: {value}")
        drawn += f'<circle class="{kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="{radius}"><title>{tip}</title></circle>'
    return drawn


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
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
