"""`ospq-export export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ospq_export.cli.options import QuietOption, RunArgument, console


def export(
    run: RunArgument,
    batch_size: Annotated[
        int | None, typer.Option(help="Fixed batch size of the file; default: dynamic.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write model.onnx (QDQ), model_fp32.onnx (baseline) and scales.json into a run directory."""
    run_export(run, batch_size, quiet)


def run_export(run: Path, batch_size: int | None, quiet: bool) -> None:
    """Export with a progress bar and a line at the end."""
    from ospq_export.export import export
    from ospq_export.progress import stage_progress

    with stage_progress(disable=quiet) as progress:
        done = export(run, batch_size=batch_size, progress=progress)
    console().print(
        f"exported {', '.join(n for n in done.manifest.files if n.endswith(('.onnx', '.json')))} to {run}"
    )
