"""`ospq-export calibrate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ospq_export.cli.options import (
    CheckpointOption,
    CropPctOption,
    DataOption,
    DeviceOption,
    InputSizeOption,
    InterpolationOption,
    MeanOption,
    ModelArgument,
    ModelKwargsOption,
    QuietOption,
    RandomWeightsOption,
    RecipeOption,
    SeedOption,
    SetOption,
    StdOption,
    WorkersOption,
    data_settings,
    model_spec,
    read_recipe,
    say,
)

if TYPE_CHECKING:
    from ospq_export.data import Batch, DataConfig, ImageSet
    from ospq_export.models import ModelSpec
    from ospq_export.recipes import Recipe


def calibrate(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Run directory to write; must be new, empty or interrupted.")],
    recipe: RecipeOption = "w8a8",
    overrides: SetOption = None,
    model_kwargs: ModelKwargsOption = "",
    checkpoint: CheckpointOption = None,
    random_weights: RandomWeightsOption = False,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    crop_pct: CropPctOption = None,
    interpolation: InterpolationOption = None,
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
    chosen = read_recipe(recipe, overrides)
    spec = model_spec(model, model_kwargs, checkpoint, random_weights)
    given = data_settings(input_size, mean, std, crop_pct, interpolation)

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
    say(
        f"calibrated {spec.name} with {recipe.name} on {len(sample.images)} images "
        f"({len(image_set.skipped)} unreadable): {len(run.manifest.slices)} slices, in {run.path}"
    )


def _create_model(spec: ModelSpec, seed: int) -> Any:
    import torch

    from ospq_export.models import create_model

    torch.manual_seed(seed)
    return create_model(spec)
