"""sweep.html: one file that needs nothing else, with the fronts drawn and a table that sorts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from ospq_export.recipes.keys import as_toml
from ospq_export.runs.files import REPORT, REPORT_HTML
from ospq_export.sweep.front import front_of
from ospq_export.sweep.outcome import RUNS, Outcome

if TYPE_CHECKING:
    from ospq_export.sweep.table import Row, Table

# Each stands for a variable of the page, so that one drawing serves light and dark.
_INK, _FAINT = "#000001", "#000002"
_SERIES = tuple(f"#0000{n}" for n in range(11, 17))
_VARIABLES = {_INK: "ink", _FAINT: "line", **{colour: f"s{i}" for i, colour in enumerate(_SERIES, 1)}}
_STYLE: Any = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "sweep",
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_Value = Callable[[Outcome], float | None]


def page(table: Table, lines: Sequence[dict[str, Any]], caption: str) -> str:
    """The page.

    Args:
        table: of the sweep.
        lines: its long table, as `Table.line` has it.
        caption: of the table of models by recipes.
    """
    environment = Environment(
        loader=PackageLoader("ospq_export.sweep"),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    heading, matrix = table.matrix()
    counted = [outcome.status for outcome in table.outcomes.values()]
    report = REPORT_HTML if table.plan.validation.pages else REPORT
    shown = [name for name in lines[0] if any(line[name] not in (None, "") for line in lines)]
    return environment.get_template("sweep.html.jinja").render(
        title=table.plan.name or "Sweep",
        counts={status: counted.count(status) for status in ("done", "failed", "waiting")},
        caption=caption,
        heading=heading,
        matrix=matrix,
        columns=shown,
        numeric={name for name in shown if any(isinstance(line[name], int | float) for line in lines)},
        lines=lines,
        links={
            row.cell.name: f"{RUNS}/{row.cell.name}/{report}"
            for row in table.rows
            if row.outcome.status == "done"
        },
        charts=_charts(table),
        failed=table.failed,
        plan=as_toml(table.plan),
    )


def _charts(table: Table) -> list[tuple[str, str]]:
    """(what it shows, SVG)."""
    rows = [row for row in table.rows if row.outcome.status == "done" and row.outcome.lost is not None]
    if not rows:
        return []
    bits, lost = (lambda o: o.bits), (lambda o: o.lost)
    charts = [
        (
            "What fewer bits cost each network. Along the line, no run of that network has fewer bits and loses less. "
            "Crosses: nearest rounding.",
            _chart(rows, bits, lost, "bits per weight + bits per activation", "points lost", by_model=True),
        )
    ]
    if all(row.outcome.score is not None for row in rows):
        charts.append(
            (
                "The most accurate network for a size. Along the line, no run of any network is smaller and more accurate. "
                "Size: of all weights, were every code stored in its own bits; files store codes below 8 bits as int8.",
                _chart(
                    rows,
                    lambda o: o.weight_bytes / 1e6,
                    lambda o: o.score,
                    "weights, MB",
                    "percent",
                    by_model=False,
                ),
            )
        )
    return charts


def _chart(rows: Sequence[Row], x: _Value, y: _Value, x_label: str, y_label: str, *, by_model: bool) -> str:
    """Runs as points, a colour per network, and the fronts as lines."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        models = list(dict.fromkeys(row.cell.model for row in rows))
        colours = {model: _SERIES[i % len(_SERIES)] for i, model in enumerate(models)}
        for model in models:
            mine = [row for row in rows if row.cell.model == model]
            axes.plot(*_places([r.outcome for r in mine], x, y), "o", color=colours[model], label=model, ms=5)
            near = [row.nearest for row in mine if row.nearest and row.nearest.lost is not None]
            axes.plot(*_places(near, x, y), "x", color=colours[model], ms=5, alpha=0.6)
        better = 1 if by_model else -1
        for group in [[m] for m in models] if by_model else [models]:
            inside = [row for row in rows if row.cell.model in group]
            best = front_of([(float(x(r.outcome) or 0), better * float(y(r.outcome) or 0)) for r in inside])
            chosen = sorted((inside[place] for place in best), key=lambda r: x(r.outcome) or 0)
            colour = colours[group[0]] if by_model else _INK
            axes.plot(*_places([r.outcome for r in chosen], x, y), "-", color=colour, lw=1)
            for row in chosen:
                place = (float(x(row.outcome) or 0), float(y(row.outcome) or 0))
                axes.annotate(row.column, place, (4, 4), textcoords="offset points", fontsize=7)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside upper left", ncols=4)
        return _svg(figure, f"{y_label} against {x_label}")


def _places(
    outcomes: Sequence[Outcome], x: _Value, y: _Value
) -> tuple[list[float | None], list[float | None]]:
    return [x(o) for o in outcomes], [y(o) for o in outcomes]


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element without a background."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    # Ids repeat from drawing to drawing.
    prefix = re.sub(r"\W+", "-", name)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
