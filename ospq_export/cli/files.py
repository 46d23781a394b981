"""`ospq-export validate --float A --deployed B`: two ONNX files that nobody calibrated here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ospq_export.cli.options import console, say, with_options

if TYPE_CHECKING:
    from ospq_export.data import ClassChoice
    from ospq_export.validate.report.model import Report


def run_files(
    float_file: Path,
    deployed_file: Path,
    data: str,
    out: Path | None,
    given: dict[str, Any],
    choice: ClassChoice,
    quiet: bool,
    as_json: bool = False,
    pictures: bool = True,
    **settings: Any,
) -> Report:
    """Compare two files with a progress bar, print the report, and write it for people.

    Args:
        float_file: what accuracy is judged against.
        deployed_file: what is judged.
        data: images, as `--data` takes them.
        out: folder of the report; None puts it beside the deployed file, under its name and ".report".
        given: what is said of the preprocessing.
        choice: what is said of the classes.
        quiet: no progress.
        as_json: whether the report is printed as JSON.
        pictures: whether the page may show images.
        settings: of `validate_files`.

    Raises:
        InputError: a file or the images cannot be used, or nothing tells how images become the files' input.
    """
    from ospq_export.data import image_set, open_source
    from ospq_export.progress import stage_progress
    from ospq_export.validate import write_documents
    from ospq_export.validate.files import preprocessing_of_files, validate_files
    from ospq_export.world.room import check_folder

    folder = out or deployed_file.with_suffix(".report")
    check_folder(folder, "--out")
    config = preprocessing_of_files([float_file, deployed_file], given)
    images = image_set(open_source(data, choice), config, choice, None, needed=False)
    with stage_progress(disable=quiet) as progress:
        report = validate_files(float_file, deployed_file, images, folder, progress=progress, **settings)
    shown = as_options(report)
    page = write_documents(folder, shown, images, pictures=pictures)
    print_report(shown, page, as_json)
    return report


def print_report(report: Report, page: Path, as_json: bool) -> None:
    """A report as people read it, with the path of its page; or as JSON."""
    from ospq_export.validate import render

    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    console().print(render(report), soft_wrap=True)
    say(f"report: {page}")


def as_options(report: Report) -> Report:
    """The report for people on the command line: report.json names settings as Python does."""
    verdict, named = report.verdict, with_options
    judged = {
        key: judgement.model_copy(
            update={"text": named(judgement.text), "advice": named(judgement.advice)},
        )
        for key, judgement in (("faithful", verdict.faithful), ("accuracy", verdict.accuracy))
    }
    changed: dict[str, Any] = {
        "verdict": verdict.model_copy(update={"text": [named(line) for line in verdict.text], **judged}),
        "image_notes": {named(note): count for note, count in report.image_notes.items()},
        "executions_skipped": {n: named(why) for n, why in report.executions_skipped.items()},
    }
    return report.model_copy(update=changed)
