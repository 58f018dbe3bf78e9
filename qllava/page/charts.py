"""Charts as SVG: curves and intervals, on linear or logarithmic axes, with a tooltip for each mark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import escape

from qllava.page.markup import Html, number

# Width and height of a chart in its own units, and the margins for the axes. Two charts share the width of a wide
# screen and one fills a phone, so that a unit is about a pixel in both and the labels stay readable.
_WIDTH, _HEIGHT = 380, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 38
# A logarithmic axis shows values above this; ten to the power of a lower tick would be 0 in floating point.
_LOWEST_LOG = 1e-300


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    """Name in the legend."""
    points: Sequence[tuple[float, float]]
    """(x, y) pairs in the order of x; those that are not finite are left out."""
    faint: bool = False
    """Whether the line is thin and pale, for raw values behind a smoothed line."""
    marks: bool = False
    """Whether only points are drawn, for exceptions of another line."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str = "step",
    share: bool = False,
    log: bool = False,
    log_x: bool = False,
) -> Html:
    """Return lines on common axes, with a legend if there are several.

    Up to 80 points of a line have a tooltip with their value. If there is nothing to draw, or a single point, the
    result is a sentence instead of an empty frame.

    Args:
        title: Title of the chart.
        series: The lines.
        x: Name of the horizontal axis.
        share: Whether the vertical axis is fixed to 0 to 100 %.
        log: Whether the vertical axis is logarithmic; values that are not above 0 are left out.
        log_x: The same for the horizontal axis.
    """
    drawn = [replace(s, points=[p for p in s.points if _drawable(p, log, log_x)]) for s in series]
    drawn = [s for s in drawn if s.points]
    head = f"<figcaption>{escape(title)}</figcaption>"
    if not drawn:
        return Html(f'<figure class="chart">{head}<p class="muted">No finite values to draw.</p></figure>')
    xs = [px for s in drawn for px, _ in s.points]
    if min(xs) == max(xs):  # the value says more than a dot in an empty frame
        values = ", ".join(f"{s.label} {_value(py, share)}" for s in drawn for _, py in s.points)
        said = f"{escape(values)} at {escape(x)} {number(xs[0])}. A curve needs two points."
        return Html(f'<figure class="chart">{head}<p class="muted">{said}</p></figure>')
    ys = [py for s in drawn for _, py in s.points]
    x_axis = _Axis.over(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, log=log_x)
    if share:
        y_axis = _Axis(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP, False)
    else:
        y_axis = _Axis.over(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, log=log, pad=0.05)
    whole = not log_x and all(float(px).is_integer() for px in xs)
    frame = _frame(x_axis, y_axis, x, share, whole=whole)
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
        f'aria-label="{escape(title)}">{frame}{"".join(lines)}</svg></figure>'
    )


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]], low: float, high: float) -> Html:
    """Return figures with their intervals, one per line: (label, value, from, to), on an axis from `low` to `high`."""
    left, line = 150, 30
    axis, bottom = _Axis(low, high, left, _WIDTH - _RIGHT, False), _TOP + line * len(rows)
    parts = []
    for tick in axis.ticks(6):
        at = axis.place(tick)
        parts.append(f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="x" x="{at:.1f}" y="{bottom + 17}">{number(tick)}</text>')
    for place, (label, value, start, end) in enumerate(rows):
        y = _TOP + line * (place + 0.5)
        tip = escape(f"{label}: {number(value)}, 95 % interval {number(start)} to {number(end)}")
        parts.append(f'<text class="y" x="{left - 10}" y="{y + 4:.1f}">{escape(label)}</text>')
        whisker = f"{axis.place(start):.1f},{y:.1f} {axis.place(end):.1f},{y:.1f}"
        parts.append(f'<polyline class="s1" points="{whisker}"/>')
        parts.append(
            f'<circle class="s1" cx="{axis.place(value):.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>'
        )
    return Html(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {bottom + 26}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _drawable(point: tuple[float, float], log: bool, log_x: bool) -> bool:
    return all(
        math.isfinite(value) and (not logarithmic or value > _LOWEST_LOG)
        for value, logarithmic in zip(point, (log_x, log), strict=True)
    )


def _colours(series: Sequence[Series]) -> list[int]:
    """Return the number of each line's colour; a faint line has the colour of the next full one, its smoothed form."""
    numbers, current = [], 1
    for s in series:
        numbers.append(current)
        if not s.faint:
            current = current % 6 + 1
    return numbers


@dataclass(frozen=True)
class _Axis:
    """Map from values to positions; `log` in powers of ten."""

    low: float
    """Value at `start`."""
    high: float
    """Value at `end`."""
    start: float
    """Position of `low`, in the chart's units."""
    end: float
    """Position of `high`, in the chart's units."""
    log: bool = False
    """Whether the axis is logarithmic."""

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float, *, log: bool = False, pad: float = 0.0) -> _Axis:
        """Return an axis for all values, with `pad` of its length free at both ends, and never of length 0."""
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12:
            half = abs(low) * 0.1 or 0.5
            low, high = low - half, high + half
        room = pad * (high - low)
        bottom = low - room
        # A curve that comes close to zero is shown down to zero, and padding never makes a negative axis.
        if pad and not log and low >= 0 and (low < 0.4 * high or bottom < 0):
            bottom = 0.0
        return cls(bottom, high + room, start, end, log)

    def place(self, value: float) -> float:
        """Return the position of a value, in the chart's units."""
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """Return round values (1, 2 or 5 times a power of ten) inside the axis, about `wanted` of them."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            fine = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            all_ticks = [m * 10.0**p for p in powers for m in fine]
            # The smallest powers are zero in floating point.
            return [t for t in all_ticks if t > 0 and self.low - 1e-9 <= math.log10(t) <= self.high + 1e-9]
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def _frame(x_axis: _Axis, y_axis: _Axis, x: str, share: bool, *, whole: bool) -> str:
    """Return grid lines, tick labels and the name of the horizontal axis; `whole`: only whole numbers on that axis."""
    parts = []
    for tick in y_axis.ticks(5):
        at = y_axis.place(tick)
        label = f"{100 * tick:.0f} %" if share else _tick(tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 7}" y="{at + 4:.1f}">{label}</text>')
    for tick in x_axis.ticks(6):
        if whole and not tick.is_integer():
            continue
        parts.append(f'<text class="x" x="{x_axis.place(tick):.1f}" y="{_HEIGHT - _BOTTOM + 17}">{_tick(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="x name" x="{middle:.0f}" y="{_HEIGHT - 4}">{escape(x)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    """Format a number for the space of a margin: 100k, 2M."""
    if 1e5 <= abs(value) < 1e12:
        return f"{value / 1e6:,.6g}M" if abs(value) >= 1e6 else f"{value / 1e3:.6g}k"
    return number(value)


def _value(value: float, share: bool) -> str:
    return f"{100 * value:.1f} %" if share else number(value)


def _line(series: Series, colour: int, x_axis: _Axis, y_axis: _Axis, share: bool) -> str:
    """Return one line, and its points if they are few enough to be distinguished."""
    places = [(x_axis.place(px), y_axis.place(py)) for px, py in series.points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    kind = f"s{colour}{' faint' if series.faint else ''}"
    drawn = f'<polyline class="{kind}" points="{path}"/>' if len(places) > 1 and not series.marks else ""
    if series.faint and len(places) > 1:
        return drawn
    radius = 4 if series.marks else 2.6 if len(places) <= 20 else 0 if len(places) > 80 else 1.2
    if radius == 0:
        return drawn
    for (px, py), (at_x, at_y) in zip(series.points, places, strict=True):
        tip = escape(f"{series.label}, {number(px)}: {_value(py, share)}")
        drawn += f'<circle class="{kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="{radius}"><title>{tip}</title></circle>'
    return drawn
