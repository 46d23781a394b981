"""The Pareto fronts of a sweep as inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from ospq_export.sweep.front import front_of
from ospq_export.sweep.outcome import Outcome
from ospq_export.validate.report.drawing import INK, SERIES, STYLE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ospq_export.sweep.table import Row


@dataclass(frozen=True)
class _Chart:
    """Runs as points, less of `x` being better.

    Attributes:
        said: what it shows.
        x: of an outcome.
        y: of an outcome.
        x_label: with its unit.
        y_label: with its unit.
        best: 1 where less of `y` is better, -1 where more is.
        by_model: whether every network has a front of its own.
    """

    said: str
    x: Callable[[Outcome], float]
    y: Callable[[Outcome], float]
    x_label: str
    y_label: str
    best: int
    by_model: bool

    def places(self, outcomes: Sequence[Outcome]) -> tuple[list[float], list[float]]:
        """Coordinates, as matplotlib takes them."""
        return [self.x(o) for o in outcomes], [self.y(o) for o in outcomes]

    def front(self, rows: Sequence[Row]) -> list[Row]:
        """Rows that no other beats, from left to right."""
        places = front_of([(self.x(row.outcome), self.best * self.y(row.outcome)) for row in rows])
        return sorted((rows[place] for place in places), key=lambda row: self.x(row.outcome))


def charts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(what it shows, SVG): bits against points lost, and, where there are scores, size against the score."""
    rows = [row for row in rows if row.outcome.lost is not None]
    if not rows:
        return []
    wanted = [_BITS]
    if all(row.outcome.score is not None for row in rows):
        wanted.append(_SIZE)
    return [(chart.said, _drawn(chart, rows)) for chart in wanted]


_BITS = _Chart(
    "What fewer bits cost each network. On a line, no run of that network has fewer bits and loses less. "
    "Crosses: nearest rounding.",
    lambda o: o.bits,
    lambda o: o.lost or 0.0,
    "bits per weight + bits per activation",
    "points lost",
    best=1,
    by_model=True,
)
_SIZE = _Chart(
    "The most accurate network for a size. On the line, no run of any network is smaller and more accurate. "
    "Size: of all weights, were every code stored in its own bits; files store codes below 8 bits as int8.",
    lambda o: o.weight_bytes / 1e6,
    lambda o: o.score or 0.0,
    "weights, MB",
    "score of the deployed network, percent",
    best=-1,
    by_model=False,
)


def _drawn(chart: _Chart, rows: Sequence[Row]) -> str:
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.cell.model, []).append(row)
    with mpl.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for place, (model, mine) in enumerate(by_model.items()):
            colour = SERIES[place % len(SERIES)]
            axes.plot(*chart.places([row.outcome for row in mine]), "o", color=colour, label=model, ms=5)
            near = [row.nearest for row in mine if row.nearest and row.nearest.lost is not None]
            axes.plot(*chart.places(near), "x", color=colour, ms=5, alpha=0.6)
            if chart.by_model:
                axes.plot(*chart.places([row.outcome for row in chart.front(mine)]), "-", color=colour, lw=1)
        if not chart.by_model:
            axes.plot(*chart.places([row.outcome for row in chart.front(rows)]), "-", color=INK, lw=1)
        _name(axes, chart, rows if chart.by_model else chart.front(rows))
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        figure.legend(loc="outside upper left", ncols=4)
        return drawing(figure, f"{chart.y_label} against {chart.x_label}")


def _name(axes: Axes, chart: _Chart, rows: Sequence[Row]) -> None:
    """Write recipes beside points, each once: those of other networks and seeds lie near it, or have its colour."""
    for row in {row.column: row for row in reversed(rows)}.values():
        place = (chart.x(row.outcome), chart.y(row.outcome))
        axes.annotate(row.column, place, (4, 4), textcoords="offset points", fontsize=7)
