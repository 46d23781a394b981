"""`ospq-export validate`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ospq_export.cli import options
from ospq_export.cli.budget import own_drop
from ospq_export.cli.elsewhere import run_device, server_of
from ospq_export.cli.files import as_options, print_report, run_files
from ospq_export.cli.options import batch_sizes, class_choice, data_settings, limits_of
from ospq_export.errors import InputError
from ospq_export.world.threads import use_threads

if TYPE_CHECKING:
    from ospq_export.data import ImageSet, StreamSet
    from ospq_export.validate.report.model import Report

log = logging.getLogger(__name__)


def validate(
    context: typer.Context,
    run: Annotated[Path | None, typer.Argument(help="Run directory that `calibrate` wrote.")] = None,
    data: options.GivenDataOption = None,
    float_file: Annotated[
        Path | None,
        typer.Option("--float", help="Instead of RUN: a float ONNX file, to compare --deployed with."),
    ] = None,
    deployed_file: Annotated[
        Path | None, typer.Option("--deployed", help="An ONNX file, whoever made it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --float: folder of the report. Default: beside --deployed.")
    ] = None,
    task: options.TaskOption = None,
    input_size: options.InputSizeOption = None,
    mean: options.MeanOption = None,
    std: options.StdOption = None,
    crop_pct: options.CropPctOption = None,
    interpolation: options.InterpolationOption = None,
    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", help="Execution to run; repeat for several. Default: all that this machine has."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 100,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use N images only: a seeded sample with each class's share.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Points of Top-1 that may be lost against float. Default: the run's own budget, else 1.",
        ),
    ] = None,
    confidence: Annotated[
        float,
        typer.Option(help="Of every bound, from 0.5 to below 1; 0.5 takes the bare estimates."),
    ] = 0.95,
    decision_threshold: Annotated[
        float | None,
        typer.Option(help="Networks with one logit: the second class lies above it. Default: 0."),
    ] = None,
    max_top1_difference: Annotated[
        float, typer.Option(min=0, help="Faithful: points of Top-1 between deployed and fake-quantized.")
    ] = 0.1,
    min_agreement: Annotated[
        float,
        typer.Option(
            min=0, max=100, help="Faithful: percent of predictions equal to the fake-quantized network's."
        ),
    ] = 99.5,
    significance: Annotated[
        float,
        typer.Option(help="Faithful: level of the exact tests against the noise floor, above 0 and below 1."),
    ] = 0.01,
    max_error: Annotated[
        float,
        typer.Option(min=0, help="Task tensors: percent that outputs may be off float's, on average."),
    ] = 10.0,
    floor_images: Annotated[
        int, typer.Option(min=0, help="Images the noise floor is measured on; 0 leaves it out.")
    ] = 1000,
    code_images: Annotated[
        int, typer.Option(min=0, help="Images the codes are compared on; 0 leaves it out.")
    ] = 32,
    latency: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Batch sizes to time, like 1,8,32. Default: none.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="With --backend triton: the server, http://HOST:8000.")
    ] = None,
    triton_model: Annotated[
        str | None, typer.Option(help="Its name on the server. Default: the run directory's.")
    ] = None,
    device_result: Annotated[
        Path | None,
        typer.Option(help="In place of --data: result.json, which a bundle's script wrote on a device."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Another run, to compare with on the same images.")
    ] = None,
    fp16: Annotated[
        bool,
        typer.Option(
            "--fp16",
            help="Validate model_qdq_fp16.onnx too; it and engines are compared with FP16 float parts.",
        ),
    ] = False,
    save_outputs: Annotated[
        Path | None,
        typer.Option(
            help="Also FILE.json for Polygraphy: outputs of 8 images; the images in FILE.inputs.json."
        ),
    ] = None,
    engine_debug: Annotated[
        bool,
        typer.Option("--engine-debug", help="Build each engine again, open: where does it differ inside?"),
    ] = False,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="No picture of an image in report.html; file names stay.")
    ] = False,
    provenance: Annotated[
        bool, typer.Option("--provenance", help="Record date and host in the report.")
    ] = False,
    exif: options.ExifOption = False,
    class_map: options.ClassMapOption = None,
    class_order: options.ClassOrderOption = None,
    class_from: options.ClassFromOption = None,
    device: options.DeviceOption = "cpu",
    workers: options.WorkersOption = 2,
    threads: options.ThreadsOption = None,
    quiet: options.QuietOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Is the deployment faithful, is accuracy kept? Exit status 0: both; 1: not; 3: too few images to tell; 2: bad input."""
    use_threads(threads)
    from ospq_export.runs.run import Run
    from ospq_export.validate.preflight import images_of

    thresholds = limits_of(
        max_drop=own_drop(run) if max_drop is None else max_drop,
        confidence=confidence,
        min_agreement=min_agreement,
        max_top1_difference=max_top1_difference,
        significance=significance,
        max_error=max_error,
    )
    if device_result is not None:
        others = [str(p.name) for p in context.command.params if p.name not in _OF_DEVICES]
        _without(context, others, "it says nothing of a device's result")
        limits: dict[str, Any] = {"thresholds": thresholds, "decision_threshold": decision_threshold}
        limits["provenance"] = provenance
        report = run_device(_only_run(run, {}), device_result, as_json, **limits)
        raise typer.Exit(report.verdict.exit_status)
    if data is None:
        raise InputError("there are no images to validate on", where="--data", fix="give some")
    server, timed = server_of(url, triton_model), batch_sizes(latency)
    choice = class_choice(class_map, class_order, class_from)
    stated = data_settings(input_size, mean, std, crop_pct, interpolation)
    common: dict[str, Any] = {
        "thresholds": thresholds,
        "batch_size": batch_size,
        "limit": limit,
        "decision_threshold": decision_threshold,
        "floor_images": floor_images,
        "workers": workers,
        "provenance": provenance,
        "pictures": not no_images,
    }
    if float_file is not None or deployed_file is not None:
        files = _two_files(run, float_file, deployed_file)
        _without(context, _OF_RUNS, "it is for runs, not for two files")
        report = run_files(
            *files, data, out, {**stated, "exif": exif or None}, choice, quiet, as_json, task=task, **common
        )
        raise typer.Exit(report.verdict.exit_status)
    size = stated.pop("input_size", None)
    opened = _at(Run.open(_only_run(run, {**stated, "task": task, "out": out})), size)
    images = images_of(opened, data, choice, exif=exif)
    report = run_validate(
        opened,
        images,
        quiet,
        as_json,
        **common,
        backends=backends or None,
        code_images=code_images,
        latency=timed,
        float_type="fp16" if fp16 else "fp32",
        baseline=None if baseline is None else _at(Run.open(baseline), size),
        save_outputs=save_outputs,
        engine_debug=engine_debug,
        server=server,
        device=device,
    )
    raise typer.Exit(report.verdict.exit_status)


_OF_DEVICES = (
    *("run", "device_result", "decision_threshold", "quiet", "as_json", "threads", "max_drop", "confidence"),
    *("max_top1_difference", "min_agreement", "significance", "max_error", "provenance", "no_images"),
)
_OF_RUNS = (
    *("backends", "code_images", "latency", "baseline", "fp16", "device", "save_outputs"),
    *("engine_debug",),
    *("url", "triton_model", "device_result"),
)


def _without(context: typer.Context, names: Sequence[str], what: str) -> None:
    """Refuse options that say nothing here: what would be ignored is not taken."""
    given = [p for p in context.command.params if p.name in names and _was_given(context, p.name)]
    if given:
        raise InputError(what, where=", ".join(p.opts[0] for p in given), fix="leave it out")


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _two_files(run: Path | None, float_file: Path | None, deployed_file: Path | None) -> tuple[Path, Path]:
    if float_file is None or deployed_file is None or run is not None:
        raise InputError(
            "two files are compared, or a run is validated",
            where="RUN, --float, --deployed",
            fix="give --float and --deployed, or RUN alone",
        )
    return float_file, deployed_file


def _only_run(run: Path | None, of_files: dict[str, Any]) -> Path:
    """The run; what is stated for files is the run's own."""
    if run is None:
        raise InputError("nothing is given to validate", where="RUN", fix="give a run directory")
    named = [name for name, value in of_files.items() if value is not None]
    if named:
        raise InputError(
            "the run says it itself", where=", ".join(f"`{name}`" for name in named), fix="leave it out"
        )
    return run


def _at(run: Any, size: tuple[int, ...] | None) -> Any:
    """The run at another size of its range."""
    return run if size is None else run.at(size)


def run_validate(
    run: Any,
    images: ImageSet | StreamSet,
    quiet: bool,
    as_json: bool = False,
    pictures: bool = True,
    **settings: Any,
) -> Report:
    """Validate with a progress bar, print the report, and write it for people.

    Args:
        run: exported.
        images: with the run's preprocessing.
        quiet: no progress.
        as_json: whether the report is printed as JSON.
        pictures: whether the page may show images.
        settings: of `validate`; None means the default.

    Raises:
        InputError: as `validate`.
    """
    from ospq_export.progress import stage_progress
    from ospq_export.validate import validate, write_documents
    from ospq_export.world.processes import joined

    given = {key: value for key, value in settings.items() if value is not None}
    with joined() as world, stage_progress(disable=quiet or world.rank > 0) as progress:
        report = validate(run, images, progress=progress, world=world, **given)
    if world.rank > 0:
        return report
    shown = as_options(report)
    page = write_documents(run, shown, images, pictures=pictures)
    print_report(shown, page, as_json)
    return report
