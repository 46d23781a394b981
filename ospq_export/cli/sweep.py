"""`ospq-export sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ospq_export.cli import options
from ospq_export.cli.options import say


def sweep(
    plan: Annotated[Path, typer.Argument(help="TOML file: models, recipes, overrides, seeds, images.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the runs and tables; the same one goes on where it was.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a value of the plan, e.g. validation.limit=500."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: ray://HOST:10001, HOST:6379 or auto. Default: Ray on this machine."),
    ] = None,
    quiet: options.QuietOption = False,
) -> None:
    """Run every model with every recipe of a plan, on Ray; exit status 1 where a run failed."""
    from ospq_export.sweep.driver import run_sweep
    from ospq_export.sweep.plan import load_plan
    from ospq_export.sweep.table import MARKDOWN, PAGE, markdown

    chosen = load_plan(plan, overrides or [])
    table = run_sweep(chosen, out, address=address, progress=not quiet)
    for line in markdown(*table.matrix()):
        say(line)
    for outcome in table.failed:
        say(f"failed: {outcome.name}: {outcome.reason}")
    say(f"tables: {out / MARKDOWN}, page: {out / PAGE}")
    if table.failed:
        raise typer.Exit(1)
