"""`ospq-export calibrate`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ospq_export.cli import budget as budgets
from ospq_export.cli import options
from ospq_export.cli.options import (
    check_recipe,
    class_choice,
    data_settings,
    model_spec,
    say,
    size_bounds,
)
from ospq_export.errors import InputError
from ospq_export.world.room import check_apart
from ospq_export.world.threads import use_threads

if TYPE_CHECKING:
    from torch import nn

    from ospq_export.data import Batch, DataConfig, ImageSet, StreamSet
    from ospq_export.models.record import ModelSpec
    from ospq_export.recipes import Recipe
    from ospq_export.runs.allocation import Budget
    from ospq_export.runs.run import Run


def calibrate(
    model: options.ModelArgument,
    data: options.DataOption,
    out: Annotated[Path, typer.Option(help="Run directory to write; must be new, empty or interrupted.")],
    recipe: options.RecipeOption = "w8a8",
    overrides: options.SetOption = None,
    target: options.TargetOption = None,
    max_drop: budgets.BudgetDropOption = None,
    budget_bits: budgets.BudgetBitsOption = None,
    budget_latency: budgets.BudgetLatencyOption = None,
    formats: budgets.BudgetFormatsOption = None,
    confidence: budgets.BudgetConfidenceOption = None,
    model_kwargs: options.ModelKwargsOption = "",
    checkpoint: options.CheckpointOption = None,
    checkpoint_key: options.CheckpointKeyOption = None,
    random_weights: options.RandomWeightsOption = False,
    input_size: options.InputSizeOption = None,
    size_range: options.SizeRangeOption = None,
    mean: options.MeanOption = None,
    std: options.StdOption = None,
    crop_pct: options.CropPctOption = None,
    interpolation: options.InterpolationOption = None,
    exif: options.ExifOption = False,
    task: options.TaskOption = None,
    outputs: options.OutputsOption = None,
    class_map: options.ClassMapOption = None,
    class_order: options.ClassOrderOption = None,
    class_from: options.ClassFromOption = None,
    device: options.DeviceOption = "cpu",
    seed: options.SeedOption = 0,
    workers: options.WorkersOption = 2,
    threads: options.ThreadsOption = None,
    quiet: options.QuietOption = False,
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
    """Quantize a network on calibration images and write a run directory."""
    use_threads(threads)
    from ospq_export.recipes import load_recipe

    chosen = load_recipe(recipe, overrides or [])
    budget = budgets.budget_of(max_drop, budget_bits, budget_latency, formats, confidence, target)
    if budget is None:
        check_recipe(chosen, target)
    _check_apart(out, data)
    spec = model_spec(model, model_kwargs, checkpoint, random_weights, checkpoint_key)
    given = data_settings(input_size, mean, std, crop_pct, interpolation, exif)
    bounds = size_bounds(size_range)
    choice = class_choice(class_map, class_order, class_from)
    from ospq_export.data import image_set, open_source

    def images() -> Any:
        found = open_source(data, choice)
        if getattr(found, "once", False) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("several processes cannot share a pipe", where="`data`", fix="start one process")

        def prepared(config: DataConfig, outputs: int | None) -> ImageSet | StreamSet:
            return image_set(found, config, choice, outputs, needed=False)

        return prepared

    run_calibrate(
        spec,
        given,
        images,
        chosen,
        out,
        task=task,
        outputs=outputs,
        bounds=bounds,
        device=device,
        seed=seed,
        workers=workers,
        quiet=quiet,
        memory_budget=memory_budget,
        log_json=log_json,
        budget=budget,
    )


def run_calibrate(
    spec: ModelSpec,
    settings: dict[str, Any],
    images: Any,
    recipe: Recipe,
    out: Path,
    *,
    task: str | None = None,
    outputs: list[str] | None = None,
    bounds: list[tuple[int, ...]] | None = None,
    device: str,
    seed: int,
    workers: int,
    quiet: bool,
    memory_budget: str | None = None,
    log_json: str | None = None,
    budget: Budget | None = None,
) -> None:
    """Build the model, read the images and calibrate, with progress bars and a line at the end.

    `images` finds them and returns a function of the preprocessing and the network's number of outputs that gives the set.
    """
    import torch

    from ospq_export.calibrate.allocate.stage import (
        calibrate_within,
        check_budget,
        check_folder_of,
        images_for,
        split,
    )
    from ospq_export.calibrate.checkpoints import json_lines, no_events
    from ospq_export.calibrate.checks import check_output_folder
    from ospq_export.calibrate.reconstruct.store import parse_bytes
    from ospq_export.calibrate.stage import calibrate
    from ospq_export.data import resolve_data_config
    from ospq_export.models.sources import check_input, create_model
    from ospq_export.models.timm import for_size
    from ospq_export.progress import stage_progress

    if budget is None:
        check_output_folder(out)
    else:
        check_folder_of(out)
        check_budget(budget, recipe)
    memory = None if memory_budget is None else parse_bytes(memory_budget)
    events = no_events if log_json is None else json_lines(log_json)
    _check_before(spec, recipe, out, device, log_json)
    # Before the network is made: a folder that cannot be used is said at once.
    prepared = images()
    spec = for_size(spec, settings.get("input_size"))
    torch.manual_seed(seed)
    network = create_model(spec)
    config = resolve_data_config(network, spec, settings)
    classes = check_input(network, spec, config.input_size)
    found: ImageSet | StreamSet = prepared(config, classes if task in (None, "classify") else None)
    _check_images(found.at_most(recipe.calibration_images), config, recipe, memory, network, bounds)
    sample: Batch = found.sample(images_for(budget, recipe), seed, workers)
    stage: Callable[..., Run] = calibrate
    if budget is not None:
        sample, held_out, recipe = split(sample, budget, recipe)
        stage = functools.partial(calibrate_within, held_out=held_out, budget=budget)
    first = os.environ.get("RANK", "0") == "0"
    with stage_progress(disable=quiet or not first) as progress:
        run = stage(
            network,
            spec,
            sample,
            config,
            recipe,
            out,
            task=task,
            outputs=outputs,
            size_range=bounds,
            class_to_idx=found.class_to_idx,
            skipped=found.skipped,
            origin=found.record,
            device=device,
            seed=seed,
            progress=progress,
            memory_budget=memory,
            events=events,
        )
    if not first:
        return
    say(
        f"calibrated {spec.name} with {run.manifest.recipe.name} on {len(sample.images)} images "
        f"({len(found.skipped)} unreadable): {len(run.manifest.slices)} slices, in {run.path}"
    )


def _check_apart(out: Path, data: str) -> None:
    from ospq_export.data import folder_of

    folder = folder_of(data)
    if folder is not None:
        check_apart(out, folder)


def _check_before(spec: ModelSpec, recipe: Recipe, out: Path, device: str, log_json: str | None) -> None:
    """What is known before the network is built."""
    from ospq_export.calibrate.checks import check_processes
    from ospq_export.models.sources import network_bytes
    from ospq_export.models.timm import torch_device
    from ospq_export.world import room

    room.check_folder(out, "--out")
    if log_json not in (None, "-"):
        room.check_file(Path(log_json), "--log-json")
    torch_device(device)
    recipe.formats()
    check_processes(recipe)
    room.check_calibration(out, network_bytes(spec))


def _check_images(
    count: int, config: DataConfig, recipe: Recipe, budget: int | None, network: nn.Module, bounds: Any = None
) -> None:
    """What is known before images are decoded."""
    from ospq_export.calibrate.checks import check_batch
    from ospq_export.graph.capture import capture
    from ospq_export.graph.granularity import slicing_of
    from ospq_export.graph.insertion import check_overrides
    from ospq_export.graph.ranged import check_ends
    from ospq_export.graph.sizes import sizes_between
    from ospq_export.world import room

    check_batch(recipe, count)
    room.check_images(count, config.input_size, budget, recipe.reconstruction.batch_size)
    # Cut points and overrides are names in this network's graph; the named slicings fit any.
    named = not isinstance(recipe.slicing, str)
    sizes = sizes_between(bounds, config.input_size)
    if sizes is not None:
        check_ends(network, config.input_size[0], sizes)
    if named or recipe.overrides:
        graph = capture(network, config.input_size, share=True).graph
        check_overrides(graph, recipe.formats())
        if named:
            slicing_of(graph, recipe.slicing)
