"""`ospq-export lint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ospq_export.cli.options import console


def lint(file: Annotated[Path, typer.Argument(help="Any QDQ ONNX file.")]) -> None:
    """Say what in an ONNX file TensorRT refuses, reinterprets or runs in float; exit 1 on errors, 0 on warnings or nothing."""
    from rich.markup import escape
    from rich.table import Table

    from ospq_export.export.lint import Severity
    from ospq_export.export.lint import lint as run_lint

    findings = run_lint(file)
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    if findings:
        table = Table("", "rule", "node", "what", "mend")
        for finding in findings:
            table.add_row(
                finding.severity.value, finding.rule, escape(finding.node), escape(finding.what), finding.mend
            )
        console().print(table)
    console().print(f"{escape(str(file))}: {errors} errors, {len(findings) - errors} warnings")
    raise typer.Exit(1 if errors else 0)
