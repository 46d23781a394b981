"""`ospq-export lint` and `ospq-export doctor`: what a file and what this machine will do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ospq_export.cli import options
from ospq_export.cli.options import console, say, say_json, with_options
from ospq_export.errors import InputError

if TYPE_CHECKING:
    from ospq_export.onnx.lint import Finding, Severity


LintVersion = Literal["rtx", "tensorrt-8.6", "tensorrt-10.3", "tensorrt-10.13", "tensorrt-11"]


def lint(
    files: Annotated[list[Path], typer.Argument(help="QDQ ONNX files, any number of them.")],
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="What an engine will be built for: SM89. Repeatable.")
    ] = None,
    version: Annotated[
        LintVersion, typer.Option("--for", help="The TensorRT that reads them; rtx is TensorRT-RTX 1.7.")
    ] = "rtx",
    as_json: options.JsonOption = False,
) -> None:
    """Say what in ONNX files TensorRT refuses, reinterprets or runs in float.

    Exit status 2 if one is no ONNX file (the others are still linted), 1 if one has errors, 0 on warnings or nothing.
    """
    from ospq_export.onnx.lint import Severity
    from ospq_export.onnx.lint import lint as run_lint

    status, results = 0, list[dict[str, Any]]()
    for file in files:
        try:
            findings = run_lint(file, compute_capability or (), version)
        except InputError as error:
            if len(files) == 1:
                raise
            refused = with_options(str(error))
            results.append({"file": str(file), "refused": refused})
            status = 2
            if not as_json:
                say(refused)
            continue
        errors = sum(finding.severity is Severity.ERROR for finding in findings)
        results.append({"file": str(file), "findings": [f.model_dump(mode="json") for f in findings]})
        status = max(status, 1 if errors else 0)
        if not as_json:
            _print(findings)
            say(f"{file}: {errors} errors, {len(findings) - errors} warnings")
    if as_json:
        say_json(results)
    raise typer.Exit(status)


def _print(findings: list[Finding]) -> None:
    """Findings by rule: what is wrong and where, then what fixes it."""
    rules: dict[tuple[Severity, str, str], list[Finding]] = {}
    for finding in findings:
        rules.setdefault((finding.severity, finding.rule, finding.fix), []).append(finding)
    for (severity, rule, fix), found in rules.items():
        say(
            f"{severity.value}: {rule}, {len(found)} times" if len(found) > 1 else f"{severity.value}: {rule}"
        )
        for finding in found:
            say(f"  {finding.node}: {finding.what}")
        say(f"  fix: {fix}")
        if found[0].source:
            say(f"  known from: {found[0].source}")


def doctor(as_json: options.JsonOption = False) -> None:
    """Try every backend and engine builder on this machine, and say what to install for the rest."""
    from ospq_export.engines.doctor import examine

    results = examine()
    if as_json:
        say_json([result.model_dump(mode="json") for result in results])
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "what", "seen", "fix")
    for result in results:
        table.add_row(
            "works" if result.works else "no", result.name, escape(result.detail), escape(result.fix)
        )
    console().print(table)
