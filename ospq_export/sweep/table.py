"""The tables of a sweep: sweep.csv, sweep.md, sweep.json, and the page."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ospq_export.runs.files import write_json
from ospq_export.sweep.cells import Cell
from ospq_export.sweep.front import front_of
from ospq_export.sweep.outcome import Outcome, write_text
from ospq_export.sweep.page import page
from ospq_export.sweep.plan import Plan

CSV, MARKDOWN, JSON, PAGE = "sweep.csv", "sweep.md", "sweep.json", "sweep.html"
_WORDS = {True: "yes", False: "no", None: "open"}


@dataclass(frozen=True)
class Row:
    """A run, and the one that rounds its formats to nearest; `front`: no run of its network has fewer bits and loses less."""

    cell: Cell
    outcome: Outcome
    nearest: Outcome | None
    front: bool

    @property
    def column(self) -> str:
        """Where it stands in the table of models by recipes."""
        return ", ".join(filter(None, (self.cell.recipe, self.cell.overrides)))


@dataclass(frozen=True)
class Table:
    """All runs of a sweep."""

    plan: Plan
    cells: Sequence[Cell]
    outcomes: dict[str, Outcome]

    @cached_property
    def rows(self) -> list[Row]:
        """Every run but those that round to nearest, in the plan's order of models, recipes, overrides and seeds."""
        cells = [cell for cell in self.cells if not cell.nearest]
        order = {name: place for place, name in enumerate(self.plan.models)}
        best = {
            name for model in self.plan.models for name in self._front([c for c in cells if c.model == model])
        }
        rows = [Row(c, self.outcomes[c.name], self.outcomes.get(c.beside), c.name in best) for c in cells]
        place = {column: i for i, column in enumerate(dict.fromkeys(row.column for row in rows))}
        return sorted(rows, key=lambda r: (order[r.cell.model], place[r.column], r.cell.seed))

    def _front(self, cells: Sequence[Cell]) -> list[str]:
        found = [outcome for cell in cells if (outcome := self.outcomes[cell.name]).lost is not None]
        return [found[place].name for place in front_of([(o.bits, float(o.lost or 0)) for o in found])]

    @property
    def failed(self) -> list[Outcome]:
        """Runs that failed, those that round to nearest among them."""
        return [outcome for outcome in self.outcomes.values() if outcome.status == "failed"]

    @cached_property
    def executions(self) -> list[str]:
        """Names of all deployed executions."""
        return list(dict.fromkeys(name for row in self.rows for name in row.outcome.scores))

    def line(self, row: Row) -> dict[str, Any]:
        """A row as it stands in the long table and in the CSV, by column; None where there is nothing to say."""
        cell, outcome, near = row.cell, row.outcome, row.nearest
        done = outcome.status == "done"
        return {
            "run": cell.name,
            "model": cell.model,
            "recipe": cell.recipe,
            "overrides": cell.overrides,
            "seed": cell.seed,
            "formats": outcome.formats or cell.settings.summary(),
            "measure": outcome.measure,
            "images": outcome.images if done else None,
            "float": outcome.float_score,
            **{name: outcome.scores.get(name) for name in self.executions},
            "lost": outcome.lost,
            "nearest lost": None if near is None else near.lost,
            "faithful": _WORDS[outcome.faithful] if done else None,
            "accuracy kept": _WORDS[outcome.kept] if done else None,
            "bits": outcome.bits if done else None,
            "file MB": outcome.file_bytes / 1e6 if done else None,
            "weights MB": outcome.weight_bytes / 1e6 if done else None,
            "front": "yes" if row.front else None,
            "seconds": outcome.seconds if done else None,
            "status": outcome.status,
            "reason": outcome.reason,
        }

    def matrix(self) -> tuple[list[str], list[list[str]]]:
        """Models by recipes: heading and rows, each cell a mean over the seeds."""
        columns = list(dict.fromkeys(row.column for row in self.rows))
        lines = []
        for model in self.plan.models:
            rows = [row for row in self.rows if row.cell.model == model]
            floats = [r.outcome.float_score for r in rows if r.outcome.float_score is not None]
            cells = [_summary([r for r in rows if r.column == column]) for column in columns]
            lines.append([model, f"{floats[0]:.2f}" if floats else "", *cells])
        return ["model", "float", *columns], lines


def _summary(rows: Sequence[Row]) -> str:
    """Points lost, mean over the seeds, and what nearest rounding loses."""
    done = [row for row in rows if row.outcome.status == "done"]
    if not done:
        return "failed" if any(row.outcome.status == "failed" for row in rows) else ""
    said = _mean(done, lambda row: row.outcome.score, spread=True)
    lost = _mean(done, lambda row: row.outcome.lost, spread=not said)
    near = _mean(done, lambda row: None if row.nearest is None else row.nearest.lost)
    parts = [f"lost {lost}" if lost else "", f"nearest {near}" if near else ""]
    told = ", ".join(filter(None, parts))
    return f"{said} ({told})" if said else told


def _mean(rows: Sequence[Row], of: Callable[[Row], float | None], *, spread: bool = False) -> str:
    """The mean, and, if asked for, half of the spread where there are several seeds."""
    values = [value for row in rows if (value := of(row)) is not None]
    if not values:
        return ""
    half = f" ±{(max(values) - min(values)) / 2:.2f}" if spread and len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{half}"


def write_tables(table: Table, out: Path) -> None:
    """Write all four files into the sweep's folder."""
    lines = [table.line(row) for row in table.rows]
    write_text(out / CSV, _csv(lines))
    write_text(out / MARKDOWN, _markdown(table, lines))
    write_json(out / JSON, document(table))
    write_text(out / PAGE, page(table, lines, caption(table), text))


def document(table: Table) -> dict[str, Any]:
    """sweep.json: every run with its outcome, those that round to nearest too."""
    best = {row.cell.name for row in table.rows if row.front}
    described = {"model", "recipe", "overrides", "seed", "nearest", "beside"}
    return {
        "schema_version": 1,
        "name": table.plan.name,
        "runs": [
            {
                **cell.model_dump(mode="json", include=described),
                "front": cell.name in best,
                **table.outcomes[cell.name].model_dump(mode="json"),
            }
            for cell in table.cells
        ],
    }


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    """With full precision; empty where there is nothing to say."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _markdown(table: Table, lines: Sequence[dict[str, Any]]) -> str:
    """Without times: two sweeps of one plan give the same text."""
    left_out = {"seconds", "reason", "measure", "status"}
    columns = [name for name in lines[0] if name not in left_out and any(line[name] for line in lines)]
    rows = [[text(line[name], name) for name in columns] for line in lines]
    parts = [f"# {table.plan.name or 'Sweep'}", "", caption(table), "", *markdown(*table.matrix())]
    parts += ["", "## Every run", "", *markdown(columns, rows)]
    if table.failed:
        parts += [
            "",
            "## Failed",
            "",
            *markdown(["run", "reason"], [[o.name, o.reason] for o in table.failed]),
        ]
    return "\n".join(parts) + "\n"


def caption(table: Table) -> str:
    """What the first table says."""
    measures = (
        ", ".join(dict.fromkeys(r.outcome.measure for r in table.rows if r.outcome.measure)) or "accuracy"
    )
    seeds = len(table.plan.seeds)
    several = f" Mean over {seeds} seeds, ± half of the spread." if seeds > 1 else ""
    beside = "; nearest: the same formats without learning" if table.plan.nearest else ""
    return f"{measures} in percent of the deployed network, the worst execution. Lost: points below float{beside}.{several}"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [heading, ["-" * 3] * len(heading), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def text(value: Any, column: str = "") -> str:
    """A value as people read it; sizes with three digits, whatever they are."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if column.endswith("MB") else f"{value:.2f}"
