"""`ospq-export lint` and `ospq-export doctor`: what a file and what this machine will do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ospq_export.cli.options import console, with_options
from ospq_export.errors import InputError

if TYPE_CHECKING:
    from ospq_export.onnx.lint import Finding


def lint(
    files: Annotated[list[Path], typer.Argument(help="QDQ ONNX files, any number of them.")],
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="What an engine will be built for: SM89. Repeatable.")
    ] = None,
) -> None:
    """Say what in ONNX files TensorRT refuses, reinterprets or runs in float.

    Exit status 2 if one is no ONNX file (the others are still linted), 1 if one has errors, 0 on warnings or nothing.
    """
    from rich.markup import escape

    from ospq_export.onnx.lint import Severity
    from ospq_export.onnx.lint import lint as run_lint

    status = 0
    for file in files:
        try:
            findings = run_lint(file, compute_capability or ())
        except InputError as error:
            if len(files) == 1:
                raise
            console().print(escape(with_options(str(error))), soft_wrap=True)
            status = 2
            continue
        errors = sum(finding.severity is Severity.ERROR for finding in findings)
        if findings:
            console().print(_table(findings))
        warnings = len(findings) - errors
        console().print(f"{escape(str(file))}: {errors} errors, {warnings} warnings", soft_wrap=True)
        status = max(status, 1 if errors else 0)
    raise typer.Exit(status)


def _table(findings: list[Finding]) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "rule", "node", "what", "fix")
    for finding in findings:
        table.add_row(
            finding.severity.value, finding.rule, escape(finding.node), escape(finding.what), finding.fix
        )
    return table


def doctor() -> None:
    """Try every backend and engine builder on this machine, and say what to install for the rest."""
    from rich.markup import escape
    from rich.table import Table

    from ospq_export.engines.doctor import examine

    table = Table("", "what", "seen", "fix")
    for result in examine():
        table.add_row(
            "works" if result.works else "no", result.name, escape(result.detail), escape(result.fix)
        )
    console().print(table)
