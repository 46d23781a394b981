"""`ospq-export sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ospq_export.cli import options
from ospq_export.cli.options import console, data_settings, model_spec, say, say_json
from ospq_export.world.threads import use_threads

if TYPE_CHECKING:
    from ospq_export.calibrate.allocate.effects import Sensitivity

_SHOWN = 20


def sensitivity(
    model: options.ModelArgument,
    data: options.DataOption,
    formats: Annotated[str, typer.Option(help="Formats to try, like int8,int4 or fp8,nvfp4.")] = "int8,int4",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for sensitivity.json and .png; the same command resumes there."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many calibration images.")] = 64,
    measured: Annotated[
        int | None, typer.Option(min=0, help="How many of the largest are measured. Default: one in twenty.")
    ] = None,
    task: options.TaskOption = None,
    model_kwargs: options.ModelKwargsOption = "",
    checkpoint: options.CheckpointOption = None,
    checkpoint_key: options.CheckpointKeyOption = None,
    random_weights: options.RandomWeightsOption = False,
    input_size: options.InputSizeOption = None,
    mean: options.MeanOption = None,
    std: options.StdOption = None,
    crop_pct: options.CropPctOption = None,
    interpolation: options.InterpolationOption = None,
    exif: options.ExifOption = False,
    device: options.DeviceOption = "cpu",
    seed: options.SeedOption = 0,
    workers: options.WorkersOption = 2,
    threads: options.ThreadsOption = None,
    quiet: options.QuietOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Which operands cost the network's output how much in which format, and which operators to leave in float."""
    use_threads(threads)
    from ospq_export.calibrate.allocate.sensitivity import check_formats_of, measure_sensitivity
    from ospq_export.cli.loading import load
    from ospq_export.graph.outputs import output_shapes
    from ospq_export.progress import announce, stage_progress, stepper
    from ospq_export.tasks.choice import choose_task
    from ospq_export.world.room import check_folder

    wanted = [name for name in formats.replace(",", " ").split() if name]
    check_formats_of(wanted)
    if out is not None:
        check_folder(next(p for p in (out, *out.absolute().parents) if p.exists()), "--out")
    settings = data_settings(input_size, mean, std, crop_pct, interpolation, exif)
    spec = model_spec(model, model_kwargs, checkpoint, random_weights, checkpoint_key)
    loaded = load(spec, data, settings, images, device=device, seed=seed, workers=workers)
    headless = getattr(loaded.network, "num_classes", None) == 0
    shapes = output_shapes(loaded.captured.graph)
    chosen, _ = choose_task(task, shapes, loaded.config.input_size, headless=headless)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with stage_progress(disable=quiet) as progress:
        result = measure_sensitivity(
            loaded.captured,
            loaded.images,
            wanted,
            chosen,
            out=out,
            measured=measured,
            seed=seed,
            advances=lambda what, steps: stepper(progress, what, steps),
            say=lambda line: announce(progress, line),
        )
    if out is not None:
        _plot(result, wanted, out, model)
    if as_json:
        say_json(result.model_dump(mode="json"))
    else:
        _print(result, wanted)


def _print(result: Sensitivity, formats: list[str]) -> None:
    from rich.table import Table

    table = Table("operand", "format", f"divergence ({result.task})", "measured")
    for operand in sorted(result.operands, key=lambda o: -result.loss(o))[:_SHOWN]:
        measured = "yes" if operand.measured is not None else ""
        table.add_row(operand.name, operand.format, f"{result.loss(operand):.3g}", measured)
    console().print(table)
    for name in dict.fromkeys(formats):
        patterns = ", ".join(result.to_leave(name))
        say(f"{name}: half of the loss is that of {patterns}; leave them in float, or give them more bits")


def _plot(result: Sensitivity, formats: list[str], out: Path, title: str) -> None:
    """The loss of every operator across depth, a line for each format."""
    from matplotlib.figure import Figure

    from ospq_export.calibrate.allocate.effects import SENSITIVITY_PLOT
    from ospq_export.runs.files import replacing

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(formats):
        losses = result.by_operator(name)
        axes.semilogy([max(losses[o], 1e-12) for o in result.operators], "o-", markersize=3, label=name)
    axes.set(title=title, xlabel="operator, in graph order", ylabel=f"divergence ({result.task})")
    axes.legend()
    with replacing(out / SENSITIVITY_PLOT) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
