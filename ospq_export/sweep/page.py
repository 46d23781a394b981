"""sweep.html: one file that needs nothing else, with the fronts drawn and a table that sorts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ospq_export.recipes.keys import as_toml
from ospq_export.runs.files import REPORT, REPORT_HTML
from ospq_export.sweep.charts import charts
from ospq_export.sweep.outcome import RUNS

if TYPE_CHECKING:
    from ospq_export.sweep.table import Table


def page(table: Table, lines: Sequence[dict[str, Any]], caption: str, text: Callable[[Any, str], str]) -> str:
    """The page.

    Args:
        table: of the sweep.
        lines: its long table, as `Table.line` has it.
        caption: of the table of models by recipes.
        text: a value of a column as people read it.
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
    # Why a run failed stands below.
    shown = [
        name for name in lines[0] if name != "reason" and any(line[name] not in (None, "") for line in lines)
    ]
    return environment.get_template("sweep.html.jinja").render(
        title=table.plan.name or "Sweep",
        counts={status: counted.count(status) for status in ("done", "failed", "waiting")},
        caption=caption,
        heading=heading,
        matrix=matrix,
        columns=shown,
        numeric={name for name in shown if any(isinstance(line[name], int | float) for line in lines)},
        lines=lines,
        text=text,
        links={
            row.cell.name: f"{RUNS}/{row.cell.name}/{report}"
            for row in table.rows
            if row.outcome.status == "done"
        },
        charts=charts(table.rows),
        failed=table.failed,
        plan=as_toml(table.plan),
    )
