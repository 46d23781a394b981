"""`ospq-export validate` of what runs elsewhere: `--url` of a server, `--device-result` of a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospq_export.cli.files import as_options, print_report
from ospq_export.errors import InputError
from ospq_export.runs.files import REPORT_HTML

if TYPE_CHECKING:
    from ospq_export.validate.executions.triton import Server
    from ospq_export.validate.report.model import Report


def server_of(url: str | None, model: str | None) -> Server | None:
    """Where a model is served; None where no server is asked for.

    Raises:
        InputError: a model is named and no server.
    """
    from ospq_export.validate.executions.triton import Server

    if url is None and model is not None:
        raise InputError("only a served model has it", where="--triton-model", fix="give --url")
    return None if url is None else Server(url, model)


def run_device(run: Path, result: Path, as_json: bool, **limits: Any) -> Report:
    """Judge what a bundle's script found, print the report, and write it for people.

    Args:
        run: what the bundle was made of.
        result: the JSON file that the script wrote.
        as_json: whether the report is printed as JSON.
        limits: thresholds, decision_threshold and provenance.

    Raises:
        InputError: the result is not of this run.
    """
    from ospq_export.deploy import report_device
    from ospq_export.runs.run import Run

    report = report_device(Run.open(run), result, **limits)
    print_report(as_options(report), run / REPORT_HTML, as_json)
    return report
