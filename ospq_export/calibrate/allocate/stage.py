"""Calibration with a budget: the formats of the operators are searched, everything else is as without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from ospq_export.calibrate.allocate.plan import check_reachable
from ospq_export.calibrate.allocate.search import Search, check_held_out
from ospq_export.calibrate.allocate.sensitivity import check_formats_of
from ospq_export.calibrate.checks import check_batch, check_module, check_output_folder, locked
from ospq_export.calibrate.stage import calibrate, captured_with_task
from ospq_export.data import Batch, DataConfig
from ospq_export.engines.rates import find_gpu
from ospq_export.engines.targets import check_formats, find_target
from ospq_export.errors import InputError
from ospq_export.formats.choice import FLOAT, Choice
from ospq_export.graph.sizes import sizes_between
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import torch_device
from ospq_export.progress import announce, stepper
from ospq_export.recipes import Recipe
from ospq_export.runs.allocation import Budget
from ospq_export.runs.files import MANIFEST, SEARCH
from ospq_export.runs.run import Run

HELD_OUT = 2000
"""Images that the drop is measured on, where there are as many beside those of the calibration."""
_QUARTER = 4


def calibrate_within(
    model: nn.Module,
    spec: ModelSpec,
    images: Batch,
    data: DataConfig,
    recipe: Recipe,
    out: Path,
    *,
    held_out: Batch | None,
    budget: Budget,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    **how: Any,
) -> Run:
    """Choose every operator's format within a budget, and write a run directory.

    Args:
        model: as `calibrate` has it, like `spec`, `images` and `data`.
        spec: what the model was made from.
        images: the calibration images.
        data: their preprocessing.
        recipe: everything but the formats, which are not taken.
        out: the run directory; new, empty, or left by an interruption of the same call.
        held_out: images that are not among the others, with labels where they are known: what the drop is measured on.
        budget: what may be lost or spent.
        device: torch device.
        seed: of every random choice.
        progress: where to show progress bars.
        **how: further arguments of `calibrate`.

    Raises:
        BudgetError: no formats keep the budget.
        InputError: as `calibrate`, or a budget that cannot be.
    """
    check_budget(budget, recipe)
    check_held_out(budget, 0 if held_out is None else len(held_out))
    check_folder_of(out)
    check_module(model)
    check_batch(recipe, len(images.images))
    target, sizes = torch_device(device), sizes_between(how.get("size_range"), data.input_size)

    def run_of(found: Recipe, folder: Path) -> Run:
        shown: dict[str, Any] = {"device": device, "seed": seed, "progress": progress}
        return calibrate(model, spec, images, data, found, folder, **shown, **how)

    with locked(out):
        captured, task = captured_with_task(
            model,
            images.images,
            data,
            task=how.get("task"),
            outputs=how.get("outputs"),
            sizes=sizes,
        )
        check_reachable(captured, budget)
        search = Search(
            out,
            budget,
            recipe,
            run_of,
            held_out,
            target,
            seed,
            lambda what, steps: stepper(progress, what, steps),
            lambda line: announce(progress, line),
        )
        return search.run(captured.to(target), images.images, task)


def check_budget(budget: Budget, recipe: Recipe) -> None:
    """What a budget cannot be, whatever the network.

    Raises:
        InputError: there is no such format, a GPU does not multiply one, the recipe sets formats itself, or several processes.
    """
    names = [name for name in budget.formats if name != FLOAT]
    check_formats_of(names)
    if budget.gpu is not None:
        find_gpu(budget.gpu)
        check_formats(find_target(budget.gpu), [f for n in names for f in Choice(n, n, n, n).formats()])
    if recipe.overrides:
        what = "the recipe has overrides, and a budget chooses the formats"
        raise InputError(what, where="`recipe`", fix="leave one of them out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "several processes cannot share a search", where="`max_drop`", fix="start one process"
        )


def check_folder_of(out: Path) -> None:
    """Refuse a folder that holds anything but an interrupted search.

    Raises:
        InputError: it does.
    """
    if (out / SEARCH).is_dir() and not (out / MANIFEST).is_file():
        return
    check_output_folder(out)


def images_for(budget: Budget | None, recipe: Recipe) -> int:
    """How many images to sample: those of the calibration, and those that are held out."""
    measured = budget is not None and budget.max_drop is not None
    return recipe.calibration_images + (HELD_OUT if measured else 0)


def split(sample: Batch, budget: Budget, recipe: Recipe) -> tuple[Batch, Batch | None, Recipe]:
    """The images to calibrate on, those that are held out, and the recipe with as many as there are.

    Where there are few, a quarter of them is held out. A sample begins with what a smaller one of the same seed would be, so that
    the recipe finds the same images again.
    """
    if budget.max_drop is None:
        return sample, None, recipe
    count = min(recipe.calibration_images, len(sample) - len(sample) // _QUARTER)
    first, rest = (
        Batch(sample.images[part], sample.labels[part], sample.ids[part])
        for part in (slice(count), slice(count, None))
    )
    return first, rest, recipe.model_copy(update={"calibration_images": count})
