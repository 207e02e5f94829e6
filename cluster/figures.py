"""Pages of statistics: numbers, tables and histograms, one file that needs nothing but a browser.

StatsPage(title, facts, numbers, sections)  ->  stats.html.j2  ->  stats.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import altair as alt
import numpy as np

from cluster.amounts import quantity
from cluster.report import chart_scripts, render_page
from pipelines.place import Place
from pipelines.types import spec

BINS = 32
"""Bars of a histogram at most."""

Axis = Literal["linear", "log"]


@spec
class Spread:
    """How values are spread: what a table says of them in one line."""

    name: str
    mean: float
    least: float
    low: float
    median: float
    high: float
    most: float

    @classmethod
    def of(cls, name: str, values: Sequence[float]) -> Spread:
        """Of at least one value; `low` and `high` are the 5th and the 95th percentile."""
        least, low, median, high, most = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
        return cls(name=name, mean=float(np.mean(values)), least=least, low=low, median=median, high=high, most=most)

    @property
    def cells(self) -> tuple[str, ...]:
        """The six numbers in few digits."""
        return tuple(_short(v) for v in (self.mean, self.least, self.low, self.median, self.high, self.most))


def _short(value: float) -> str:
    """Three digits, but a width of 1,280 pixels is not 1.28k."""
    return f"{value:,.0f}" if 100 <= abs(value) < 10_000 else quantity(value)


SPREAD = ("", "mean", "least", "5 %", "median", "95 %", "most")
"""What stands above the cells of a `Spread`."""


@spec
class Histogram:
    """Counts of values between neighbouring `edges`."""

    title: str
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    axis: Axis = "linear"

    @classmethod
    def of(cls, title: str, unit: str, values: Sequence[float]) -> Histogram:
        """Of at least one value: a bar for each whole number where those are few, else equal steps, or equal factors where the
        largest values dwarf the middle ones."""
        array = np.asarray(values, float)
        least, most = float(array.min()), float(array.max())
        whole = bool((array == array.round()).all())
        if whole and most - least < BINS:
            edges = np.arange(least, most + 2) - 0.5
            return cls._made(title, unit, array, edges, "linear")
        if least > 0 and most > 12 * float(np.median(array)):
            edges = np.geomspace(least, most * 1.0001, BINS + 1)
            return cls._made(title, unit, array, edges, "log")
        edges = np.histogram_bin_edges(array, bins=BINS)
        return cls._made(title, unit, array, edges, "linear")

    @classmethod
    def _made(cls, title: str, unit: str, values: Any, edges: Any, axis: Axis) -> Histogram:
        counts, _ = np.histogram(values, edges)
        rounded = tuple(float(f"{edge:.6g}") for edge in edges)
        return cls(title=title, unit=unit, edges=rounded, counts=tuple(counts.tolist()), axis=axis)

    @property
    def rows(self) -> dict[str, list[Any]]:
        """A table by columns, as the page's charts take it; empty bars left out."""
        bars = [(a, b, n) for a, b, n in zip(self.edges, self.edges[1:], self.counts, strict=False) if n]
        return {"from": [a for a, _, _ in bars], "to": [b for _, b, _ in bars], "count": [n for _, _, n in bars]}

    def chart(self, table: str) -> dict[str, Any]:
        """A Vega-Lite specification over the table of that name."""
        scale = alt.Scale(type=self.axis, nice=False, zero=False) if self.axis == "log" else alt.Scale(zero=False)
        whole = self.edges[0] % 1 == 0.5 and self.edges[-1] - self.edges[0] == len(self.counts)
        form = "~s" if self.edges[-1] >= 10 else "~g"
        step = 1 if whole else alt.Undefined
        axis = alt.Axis(title=None, format=form, tickCount=6, tickMinStep=step, grid=False)
        tips = [alt.Tooltip(f"{column}:Q", format=",.4~g") for column in ("from", "to", "count")]
        bars = alt.Chart().mark_bar(binSpacing=1).encode(
            x=alt.X("from:Q", bin=alt.BinParams(binned=True), scale=scale, axis=axis),
            x2="to",
            y=alt.Y("count:Q", axis=alt.Axis(title=None, format=",d", tickCount=3, tickMinStep=1)),
            tooltip=tips,
        )  # fmt: skip
        return _layered(table, bars, 130, self.title)


@spec
class Points:
    """Pairs of numbers as a cloud, on logarithmic axes."""

    title: str
    unit: str
    across: str
    up: str
    pairs: tuple[tuple[float, float], ...]

    @property
    def rows(self) -> dict[str, list[Any]]:
        """A table by columns."""
        return {self.across: [x for x, _ in self.pairs], self.up: [y for _, y in self.pairs]}

    def chart(self, table: str) -> dict[str, Any]:
        """A Vega-Lite specification over the table of that name."""
        scale = alt.Scale(type="log", zero=False, nice=False, padding=8)

        def axis(title: str) -> alt.Axis:
            return alt.Axis(title=title, format="~s", tickCount=4, grid=False)

        tips = [alt.Tooltip(f"{column}:Q", format=",d") for column in (self.across, self.up)]
        points = alt.Chart().mark_circle(size=18, opacity=0.35).encode(
            x=alt.X(f"{self.across}:Q", scale=scale, axis=axis(self.across)),
            y=alt.Y(f"{self.up}:Q", scale=scale, axis=axis(self.up)),
            tooltip=tips,
        )  # fmt: skip
        return _layered(table, points, 130, self.title)


@spec
class Line:
    """A curve of `Curves`: its name, and its points."""

    name: str
    points: tuple[tuple[float, float], ...]


@spec
class Curves:
    """Curves over the same axis, told apart by colour."""

    title: str
    unit: str
    across: str
    lines: tuple[Line, ...]

    @property
    def rows(self) -> dict[str, list[Any]]:
        """A table by columns."""
        points = [(line.name, x, y) for line in self.lines for x, y in line.points]
        return {
            "name": [n for n, _, _ in points],
            self.across: [x for _, x, _ in points],
            "value": [y for _, _, y in points],
        }

    def chart(self, table: str) -> dict[str, Any]:
        """A Vega-Lite specification over the table of that name."""
        axis = alt.Axis(title=self.across, format="~s", tickCount=5, tickMinStep=1, grid=False)
        tips = [
            alt.Tooltip("name:N"),
            alt.Tooltip(f"{self.across}:Q", format=",d"),
            alt.Tooltip("value:Q", title=self.title, format=",.4~g"),
        ]
        names = [line.name for line in self.lines]
        colour = alt.Color("name:N", scale=alt.Scale(domain=names), legend=alt.Legend(title=None, orient="bottom"))
        line = alt.Chart().mark_line(strokeWidth=1.75, point=alt.OverlayMarkDef(opacity=0, size=60)).encode(
            x=alt.X(f"{self.across}:Q", scale=alt.Scale(zero=False, nice=False), axis=axis),
            y=alt.Y("value:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title=None, tickCount=4)),
            color=colour,
            tooltip=tips,
        )  # fmt: skip
        return _layered(table, line, 220, self.title)


def _layered(table: str, chart: alt.Chart, height: int, description: str) -> dict[str, Any]:
    """A chart over one table of the page, as wide as its place on it."""
    whole = alt.LayerChart(
        data=alt.NamedData(table), layer=[chart], width="container", height=height, description=description
    )
    return whole.to_dict(validate=False)


@spec
class Table:
    """Cells in words, the first of each row its name; `note` stands below."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    left: int = 1
    """Columns that hold words, and stand to the left."""


@spec
class Section:
    """A part of a page. `hints` are what its reader should do."""

    title: str
    facts: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Histogram | Points | Curves, ...] = ()


@spec
class StatsPage:
    """A page; `numbers` are (what, how many, small print)."""

    title: str
    facts: tuple[str, ...]
    numbers: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]

    def write(self, out: Path) -> Path:
        """Write the page to `out`, and return `out`."""
        figures = {f"s{i}f{j}": fig for i, section in enumerate(self.sections) for j, fig in enumerate(section.figures)}
        text = render_page(
            "stats.html.j2",
            page=self,
            tables={name: figure.rows for name, figure in figures.items()},
            charts={name: figure.chart(name) for name, figure in figures.items()},
            scripts=chart_scripts() if figures else "",
        )
        Place(out).write(text.encode())
        return out
