"""`ospq-export inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ospq_export.cli import options
from ospq_export.cli.options import console, data_settings, model_spec, say_json
from ospq_export.errors import InputError
from ospq_export.world.threads import use_threads

if TYPE_CHECKING:
    from ospq_export.runs.manifest import OutlierRecord


def inspect(
    model: options.ModelArgument,
    data: options.DataOption,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the profile: a .json file, or a .png plot across depth."),
    ] = None,
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
    class_from: options.ClassFromOption = None,
    images: Annotated[int, typer.Option(min=1, help="How many images to look at.")] = 64,
    device: options.DeviceOption = "cpu",
    seed: options.SeedOption = 0,
    workers: options.WorkersOption = 2,
    threads: options.ThreadsOption = None,
    quiet: options.QuietOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show where a float network's outliers are: at every cut point and in front of every quantizer."""
    if out is not None and out.suffix not in (".json", ".png"):
        raise InputError("the profile is written as JSON or PNG", where=out, fix="end --out in .json or .png")
    use_threads(threads)
    from ospq_export.calibrate.observe import outlier_profile
    from ospq_export.cli.loading import load
    from ospq_export.progress import stage_progress, stepper
    from ospq_export.runs.files import write_json

    settings = data_settings(input_size, mean, std, crop_pct, interpolation, exif)
    spec = model_spec(model, model_kwargs, checkpoint, random_weights, checkpoint_key)
    loaded = load(
        spec, data, settings, images, device=device, seed=seed, workers=workers, class_from=class_from
    )
    with stage_progress(disable=quiet) as progress:
        advance = stepper(progress, "profile", -(-len(loaded.images) // 32))
        records = outlier_profile(loaded.captured, loaded.images, advance=advance)
    values = [record.model_dump(mode="json") for record in records]
    if as_json:
        say_json(values)
    else:
        _print(records)
    if out is not None and out.suffix == ".json":
        write_json(out, values)
    elif out is not None:
        _plot(records, out, model)


def _print(records: list[OutlierRecord]) -> None:
    from rich.table import Table

    table = Table("tensor", "kind", "max / std", "kurtosis", "largest 0.1 %", "worst channels")
    for r in records:
        shares = (f"{100 * r.largest_share:.1f} %", f"{100 * r.channel_share:.1f} %")
        table.add_row(r.name, r.kind, f"{r.max_over_std:.1f}", f"{r.kurtosis:.1f}", *shares)
    console().print(table)


def _plot(records: list[OutlierRecord], out: Path, title: str) -> None:
    """Max over standard deviation, and the shares of the squared norm, across depth."""
    from matplotlib.figure import Figure

    from ospq_export.runs.files import replacing

    figure = Figure(figsize=(12, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for kind, marker in (("cut", "o"), ("quantizer", "x")):
        chosen = [(i, r) for i, r in enumerate(records) if r.kind == kind]
        at = [i for i, _ in chosen]
        upper.semilogy(at, [r.max_over_std for _, r in chosen], marker, label=kind)
        lower.plot(at, [100 * r.largest_share for _, r in chosen], marker, label=f"{kind}: largest 0.1 %")
        lower.plot(at, [100 * r.channel_share for _, r in chosen], marker, label=f"{kind}: worst channels")
    upper.set(title=title, ylabel="max / std")
    lower.set(xlabel="tensor, in graph order", ylabel="% of the squared norm")
    upper.legend()
    lower.legend()
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
