"""Effect of the concept-balanced filter: figures, a table for the terminal, and a page with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qllava import page
from qllava.page import Series
from qllava.synthesis.concepts import Index

_MOST_CUT = 12  # concepts in the table of those that lost most captions
_POINTS = 60  # points of a curve, evenly spaced on its logarithmic axis


@dataclass(frozen=True)
class Settings:
    """Settings of the choice of captions."""

    chunker: str
    """Method of finding phrases, as in `--concepts`."""
    about: str
    """Description of the method, with versions."""
    min_count: int
    """Smallest number of captions of a concept that is not ignored."""
    max_per_concept: int
    """Number of captions drawn for a frequent concept."""
    seed: int
    """Seed of the draws."""


@dataclass(frozen=True)
class Band:
    """Concepts of similar frequency.

    A mention is a pair of a concept and a caption that contains it.
    """

    least: int
    """Smallest number of captions of the input that contain such a concept."""
    most: int
    """Largest number of captions of the input that contain such a concept."""
    concepts: int
    """Number of these concepts."""
    before: int
    """Mentions of these concepts in the input."""
    after: int
    """Mentions of these concepts in the captions that were kept."""


@dataclass(frozen=True)
class Cut:
    """A concept with the number of captions that contain it."""

    concept: str
    """Name of the concept."""
    before: int
    """Captions of the input that contain it."""
    after: int
    """Captions that contain it and were kept."""


@dataclass(frozen=True)
class Balance:
    """Figures of the filter; `before` is the input, `after` the captions that were kept."""

    settings: Settings
    """Settings of the choice."""
    captions_before: int
    """Number of captions in the input."""
    captions_after: int
    """Number of captions that were kept."""
    without_concept: int
    """Captions left out because none of their concepts has `min_count` captions."""
    concepts_before: int
    """Number of distinct concepts in the input."""
    concepts_after: int
    """Number of distinct concepts in the captions that were kept."""
    concepts_counted: int
    """Concepts of the input with at least `min_count` captions; all of them remain."""
    bands: tuple[Band, ...]
    """All concepts by their frequency in the input, the rarest first."""
    most_cut: tuple[Cut, ...]
    """Concepts that lost most captions, the largest loss first, in alphabetical order if the loss is the same."""
    ranks_before: tuple[tuple[int, int], ...]
    """Points (rank, captions that contain the concept of this rank) of the input; rank 1 is the most frequent."""
    ranks_after: tuple[tuple[int, int], ...]
    """The same points for the captions that were kept."""

    def as_json(self) -> dict[str, Any]:
        """Return all figures under the names above, as `qllava filter --json` prints them."""
        return asdict(self)


def balance_of(index: Index, kept: NDArray[np.bool_], settings: Settings) -> Balance:
    """Return the figures of a choice; `kept` (C) marks the captions in it."""
    before, after = index.counts, index.counts_among(kept)
    counted = before >= settings.min_count
    reached = np.zeros(index.captions, dtype=np.bool_)
    reached[index.holders[np.repeat(counted, before)]] = True
    return Balance(
        settings=settings,
        captions_before=index.captions,
        captions_after=int(kept.sum()),
        without_concept=int((~reached).sum()),
        concepts_before=len(before),
        concepts_after=int((after > 0).sum()),
        concepts_counted=int(counted.sum()),
        bands=_bands(before, after, settings),
        most_cut=_most_cut(index.concepts, before, after),
        ranks_before=_ranks(before),
        ranks_after=_ranks(after),
    )


def _bands(before: NDArray[np.int64], after: NDArray[np.int64], settings: Settings) -> tuple[Band, ...]:
    """Return bands below the first threshold, up to the second, up to ten times that, and so on; some may be empty."""
    largest = int(before.max(initial=0))
    edges = [settings.min_count - 1] if settings.min_count > 1 else []
    most = settings.max_per_concept
    while not edges or edges[-1] < largest:
        if not edges or most > edges[-1]:
            edges.append(most)
        most *= 10
    bands, least = [], 1
    for edge in edges:
        inside = (least <= before) & (before <= edge)
        bands.append(Band(least, edge, int(inside.sum()), int(before[inside].sum()), int(after[inside].sum())))
        least = edge + 1
    return tuple(bands)


def _most_cut(names: Sequence[str], before: NDArray[np.int64], after: NDArray[np.int64]) -> tuple[Cut, ...]:
    lost = before - after
    # Include all ties with the last of the table, so that the alphabet decides and not the order in the file.
    least = np.sort(lost)[-_MOST_CUT:][0] if len(lost) else 0
    cuts = [Cut(names[n], int(before[n]), int(after[n])) for n in np.flatnonzero((lost >= least) & (lost > 0)).tolist()]
    return tuple(sorted(cuts, key=lambda cut: (cut.after - cut.before, cut.concept))[:_MOST_CUT])


def _ranks(counts: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    ordered = np.sort(counts[counts > 0])[::-1]
    if not len(ordered):
        return ()
    ranks = np.unique(np.geomspace(1, len(ordered), _POINTS).round().astype(np.int64))
    return tuple((int(rank), int(ordered[rank - 1])) for rank in ranks)


def as_text(figures: Balance) -> str:
    """Return the figures as lines for the terminal."""
    settings = figures.settings
    lines = [
        f"Concepts by {settings.chunker}: {settings.about}.",
        "",
        f"{'':24}{'before':>12}{'after':>12}{'left':>9}",
        _line("captions", figures.captions_before, figures.captions_after),
        _line("distinct concepts", figures.concepts_before, figures.concepts_after),
        "",
        f"{'captions of a concept':24}{'concepts':>12}{'mentions':>12}{'share':>9}{'after':>12}{'share':>9}",
    ]
    total_before, total_after = (sum(getattr(b, key) for b in figures.bands) for key in ("before", "after"))
    for band in figures.bands:
        lines.append(
            f"{_range(band):24}{band.concepts:>12,}{band.before:>12,}{_share(band.before, total_before):>9}"
            f"{band.after:>12,}{_share(band.after, total_after):>9}"
        )
    if figures.most_cut:
        lines += ["", f"{'most cut':24}{'before':>12}{'after':>12}{'left':>9}"]
        lines += [_line(_short(cut.concept), cut.before, cut.after) for cut in figures.most_cut]
    return "\n".join([*lines, "", *_remarks(figures)])


def _line(name: str, before: int, after: int) -> str:
    return f"{name:24}{before:>12,}{after:>12,}{_share(after, before):>9}"


def _range(band: Band) -> str:
    return f"{band.least:,}" if band.least == band.most else f"{band.least:,} to {band.most:,}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _short(concept: str) -> str:
    return concept if len(concept) <= 22 else f"{concept[:19]}..."


def _remarks(figures: Balance) -> list[str]:
    """Return remarks that complete the tables."""
    settings = figures.settings
    remarks = [
        f"Concepts with at least {settings.min_count:,} captions, all of which are kept: {figures.concepts_counted:,}. "
        f"Captions without any of these concepts, which were left out: {figures.without_concept:,}."
    ]
    if not figures.captions_after:
        remarks.append("Nothing was kept; a lower --min-count keeps rarer concepts.")
    return remarks


def html(figures: Balance, source: str) -> str:
    """Return the figures as a page; `source` is the name of the input."""
    settings = figures.settings
    tiles = [
        ("Captions before", f"{figures.captions_before:,}"),
        ("Captions after", f"{figures.captions_after:,}"),
        ("Concepts before", f"{figures.concepts_before:,}"),
        ("Concepts after", f"{figures.concepts_after:,}"),
    ]
    total_before, total_after = (sum(getattr(b, key) for b in figures.bands) for key in ("before", "after"))
    bands = [
        (
            _range(band),
            f"{band.concepts:,}",
            f"{band.before:,}",
            _share(band.before, total_before),
            f"{band.after:,}",
            _share(band.after, total_after),
        )
        for band in figures.bands
    ]
    cuts = [(c.concept, f"{c.before:,}", f"{c.after:,}", _share(c.after, c.before)) for c in figures.most_cut]
    curves = [Series("before", figures.ranks_before), Series("after", figures.ranks_after)]
    how = (
        f"A concept is a noun phrase ({settings.about}), counted once per caption. Concepts with fewer than "
        f"{settings.min_count:,} captions are ignored. Of concepts with up to {settings.max_per_concept:,} captions, "
        f"all captions are kept. Of all others, {settings.max_per_concept:,} captions are drawn at random "
        f"(seed {settings.seed}), in addition to those that other concepts keep."
    )
    head = ("Captions of a concept", "Concepts", "Mentions before", "Share", "Mentions after", "Share")
    sections = [
        page.section("What was kept", page.tiles(tiles), page.paragraph(how), *map(page.paragraph, _remarks(figures))),
        page.section(
            "How often each concept occurs",
            page.line_chart("Captions of a concept, by its rank", curves, x="rank", log=True, log_x=True),
            page.paragraph(
                "Rank 1 is the most frequent concept, before and after. Both axes are logarithmic.", muted=True
            ),
        ),
        page.section("By frequency", page.table(head, bands)),
        page.section("Most cut", page.table(("Concept", "Captions before", "After", "Left"), cuts)),
    ]
    lead = f"Effect of the concept-balanced filter on {source}: rare concepts are kept, frequent ones are reduced."
    return page.page("Captions, balanced by concept", lead, sections, footer="Written by qllava filter.")
