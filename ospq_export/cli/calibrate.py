"""`ospq-export calibrate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ospq_export.cli.options import (
    DataOption,
    DeviceOption,
    QuietOption,
    RecipeOption,
    SeedOption,
    SetOption,
    WorkersOption,
    console,
    read_recipe,
)
from ospq_export.errors import InputError

if TYPE_CHECKING:
    from ospq_export.data import Batch, DataConfig, ImageSet
    from ospq_export.models import ModelSpec
    from ospq_export.recipes import Recipe


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
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help="Host memory for cached activations, e.g. 8GB; the rest goes to disk. Default: half of what is free."
        ),
    ] = None,
    log_json: Annotated[
        str | None, typer.Option(help="File that a JSON line per event is appended to; - is standard error.")
    ] = None,
) -> None:
    """Quantize a timm model on calibration images and write a run directory."""
    from ospq_export.models import ModelSpec, parse_model_kwargs

    chosen = read_recipe(recipe, overrides)
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

    run_calibrate(
        spec,
        given,
        images,
        chosen,
        out,
        device=device,
        seed=seed,
        workers=workers,
        quiet=quiet,
        memory_budget=memory_budget,
        log_json=log_json,
    )


def _numbers(text: str | None, option: str, kind: type) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise InputError(
            f"{text!r} is not a list of numbers", where=option, mend="write it like 0.5,0.5,0.5"
        ) from error


def run_calibrate(
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
    memory_budget: str | None = None,
    log_json: str | None = None,
) -> None:
    """Build the model, read the images and calibrate, with progress bars and a line at the end."""
    from ospq_export.calibrate.events import json_lines, no_events
    from ospq_export.calibrate.stage import calibrate, check_output_folder
    from ospq_export.calibrate.store import parse_bytes
    from ospq_export.progress import stage_progress

    check_output_folder(out)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    events = no_events if log_json is None else json_lines(log_json)
    network = _create_model(spec, seed)
    from ospq_export.data import resolve_data_config

    config = resolve_data_config(network, spec, settings)
    image_set: ImageSet = images(config)
    sample: Batch = image_set.sample(recipe.calibration_images, seed, workers)
    first = os.environ.get("RANK", "0") == "0"
    with stage_progress(disable=quiet or not first) as progress:
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
            memory_budget=budget,
            events=events,
        )
    if not first:
        return
    console().print(
        f"calibrated {spec.name} with {recipe.name} on {len(sample.images)} images "
        f"({len(image_set.skipped)} unreadable): {len(run.manifest.slices)} slices, in {run.path}"
    )


def _create_model(spec: ModelSpec, seed: int) -> Any:
    import torch

    from ospq_export.models import create_model

    torch.manual_seed(seed)
    return create_model(spec)
