"""Command line: `ospq-export calibrate | export | validate | demo`.

Heavy imports happen inside the commands, so that --help answers at once. Exit status: 0 done (validate: parity holds), 1 validate
found no parity, 2 the input was bad, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ospq_export.errors import InputError

if TYPE_CHECKING:
    from ospq_export.data import Batch, DataConfig, ImageSet
    from ospq_export.models import ModelSpec
    from ospq_export.recipes import Recipe
    from ospq_export.validate.report import Report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize a timm vision transformer after training, export it as QDQ ONNX, and prove that the file predicts the same.",
)


class DemoModel(StrEnum):
    """The packaged networks."""

    VIT = "vit"
    SWIN = "swin"


DataOption = Annotated[Path, typer.Option(help="ImageNet-style folder: one sub-folder per class.")]
DeviceOption = Annotated[str, typer.Option(help="torch device: cpu, cuda, cuda:1, ...")]
SeedOption = Annotated[int, typer.Option(help="Seed of every random choice.")]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Processes that decode images; 0 decodes in this one.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
RunArgument = Annotated[Path, typer.Argument(help="Run directory that `calibrate` wrote.")]
RecipeOption = Annotated[
    str, typer.Option(help="Packaged recipe (w8a8, w6a6, w4a8, w4a4, paper-w4a4) or a TOML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe value, e.g. reconstruction.iterations=2000."
    ),
]


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="timm model name, e.g. deit_tiny_patch16_224.")],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Run directory to write; must be new, empty or interrupted.")],
    recipe: RecipeOption = "w8a8",
    overrides: SetOption = None,
    model_kwargs: Annotated[
        str, typer.Option(help="Model arguments as one string, 'img_size=112 num_classes=10'.")
    ] = "",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights: safetensors, or a torch file. Default: timm's pretrained ones."),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option(help="Use seeded random weights, to try the tools out.")
    ] = False,
    input_size: Annotated[str | None, typer.Option(help="Channels, height, width: '3,224,224'.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean per channel: '0.485,0.456,0.406'.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation per channel.")] = None,
    crop_pct: Annotated[
        float | None, typer.Option(help="Share of the resized image that the crop keeps.")
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="Resampling: bicubic, bilinear, nearest, ...")
    ] = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    workers: WorkersOption = 2,
    quiet: QuietOption = False,
) -> None:
    """Quantize a timm model on calibration images and write a run directory."""
    from ospq_export.models import ModelSpec, parse_model_kwargs

    chosen = _recipe(recipe, overrides)
    spec = ModelSpec(
        name=model,
        kwargs=parse_model_kwargs(model_kwargs),
        checkpoint=None if checkpoint is None else str(checkpoint),
        pretrained=checkpoint is None and not random_weights,
    )
    shape = _numbers(input_size, "--input-size", int)
    settings = {
        "input_size": shape,
        "mean": _numbers(mean, "--mean", float),
        "std": _numbers(std, "--std", float),
        "crop_pct": crop_pct,
        "interpolation": interpolation,
    }
    given = {key: value for key, value in settings.items() if value is not None}

    def images(config: DataConfig) -> ImageSet:
        from ospq_export.data import ImageSet

        return ImageSet.from_folder(data, config)

    _calibrate(spec, given, images, chosen, out, device=device, seed=seed, workers=workers, quiet=quiet)


def _numbers(text: str | None, option: str, kind: type) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise InputError(
            f"{text!r} is not a list of numbers", where=option, mend="write it like 0.5,0.5,0.5"
        ) from error


def _recipe(name: str, overrides: list[str] | None) -> Recipe:
    from ospq_export.recipes import load_recipe

    return load_recipe(name, overrides or [])


def _calibrate(
    spec: ModelSpec,
    settings: dict[str, Any],
    images: Any,
    recipe: Recipe,
    out: Path,
    *,
    device: str,
    seed: int,
    workers: int,
    quiet: bool,
) -> None:
    from ospq_export.calibrate.stage import calibrate, check_output_folder
    from ospq_export.progress import stage_progress

    check_output_folder(out)
    network = _create_model(spec, seed)
    from ospq_export.data import resolve_data_config

    config = resolve_data_config(network, spec, settings)
    image_set: ImageSet = images(config)
    sample: Batch = image_set.sample(recipe.calibration_images, seed, workers)
    with stage_progress(disable=quiet) as progress:
        run = calibrate(
            network,
            spec,
            sample,
            config,
            recipe,
            out,
            class_to_idx=image_set.class_to_idx,
            skipped=image_set.skipped,
            device=device,
            seed=seed,
            progress=progress,
        )
    _console().print(
        f"calibrated {spec.name} with {recipe.name} on {len(sample.images)} images "
        f"({len(image_set.skipped)} unreadable): {len(run.manifest.slices)} slices, in {run.path}"
    )


def _create_model(spec: ModelSpec, seed: int) -> Any:
    import torch

    from ospq_export.models import create_model

    torch.manual_seed(seed)
    return create_model(spec)


@app.command()
def export(
    run: RunArgument,
    batch_size: Annotated[
        int | None, typer.Option(help="Fixed batch size of the file; default: dynamic.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write model.onnx (QDQ), model_fp32.onnx (baseline) and scales.json into a run directory."""
    _export(run, batch_size, quiet)


def _export(run: Path, batch_size: int | None, quiet: bool) -> None:
    from ospq_export.export import export
    from ospq_export.progress import stage_progress

    with stage_progress(disable=quiet) as progress:
        done = export(run, batch_size=batch_size, progress=progress)
    _console().print(
        f"exported {', '.join(n for n in done.manifest.files if n.endswith(('.onnx', '.json')))} to {run}"
    )


@app.command()
def validate(
    run: RunArgument,
    data: DataOption,
    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", help="Execution to run; repeat for several. Default: all but onnxruntime-fp32."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 100,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N images only.")] = None,
    max_top1_difference: Annotated[float, typer.Option(min=0, help="Parity: points of Top-1.")] = 0.1,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Parity: percent of equal predictions. Default 99.5, 99 at 4 bits."
        ),
    ] = None,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 2,
    quiet: QuietOption = False,
) -> None:
    """Compare the deployed files' predictions with the fake-quantized network's; exit 1 without parity."""
    from ospq_export.data import ImageSet
    from ospq_export.run import Run

    opened = Run.open(run)
    images = ImageSet.from_folder(data, opened.manifest.data, opened.manifest.class_to_idx or None)
    report = _validate(
        opened,
        images,
        max_top1_difference,
        min_agreement,
        quiet,
        backends=backends or None,
        batch_size=batch_size,
        limit=limit,
        device=device,
        workers=workers,
    )
    raise typer.Exit(0 if report.verdict else 1)


def _validate(
    run: Any,
    images: ImageSet,
    max_top1_difference: float,
    min_agreement: float | None,
    quiet: bool,
    **options: Any,
) -> Report:
    from ospq_export.progress import stage_progress
    from ospq_export.validate import default_thresholds, render, validate

    thresholds = default_thresholds(run.manifest.recipe.activation_bits, run.manifest.recipe.weight_bits)
    changes = {"max_top1_difference": max_top1_difference, "min_agreement": min_agreement}
    thresholds = thresholds.model_copy(update={k: v for k, v in changes.items() if v is not None})
    given = {key: value for key, value in options.items() if value is not None}
    with stage_progress(disable=quiet) as progress:
        report = validate(run, images, thresholds=thresholds, progress=progress, **given)
    _console().print(render(report))
    _console().print(f"report: {run.path / 'report.json'}")
    return report


@app.command()
def demo(
    model: Annotated[DemoModel, typer.Option(help="Packaged network.")] = DemoModel.VIT,
    recipe: RecipeOption = "w8a8",
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default: runs/demo-MODEL-RECIPE.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Validate on the first N of the 10,000 test images.")
    ] = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Take a packaged network (Fashion-MNIST) through all three stages, on the CPU."""
    from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
    from ospq_export.run import Run

    chosen = _recipe(recipe, overrides)
    spec = demo_spec(model.value)
    folder = out or Path("runs") / f"demo-{model.value}-{chosen.name}"
    if not _is_finished(folder, chosen, seed):
        _calibrate(
            spec,
            demo_data_overrides(),
            lambda config: demo_images("calibration", config),
            chosen,
            folder,
            device=device,
            seed=seed,
            workers=0,
            quiet=quiet,
        )
    else:
        _console().print(f"using the finished calibration in {folder} (delete the folder to calibrate anew)")
    _export(folder, None, quiet)
    run = Run.open(folder)
    images = demo_images("test", run.manifest.data)
    report = _validate(run, images, 0.1, None, quiet, limit=limit, device=device)
    raise typer.Exit(0 if report.verdict else 1)


def _is_finished(folder: Path, recipe: Recipe, seed: int) -> bool:
    from ospq_export import artifact

    if not (folder / artifact.MANIFEST).is_file():
        return False
    manifest = artifact.read_manifest(folder)
    if manifest.status != "calibrated":
        return False
    if manifest.recipe != recipe or manifest.calibration.seed != seed:
        raise InputError(
            "the folder holds a run with other settings",
            where=folder,
            mend="choose another --out, or delete it",
        )
    return True


def _console() -> Any:
    from rich.console import Console

    return Console()


def main() -> None:
    """Entry point: runs the command line and turns bad input into one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        app(standalone_mode=True)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
