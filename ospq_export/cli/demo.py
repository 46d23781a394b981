"""`ospq-export demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ospq_export.cli import options
from ospq_export.cli.calibrate import run_calibrate
from ospq_export.cli.export import run_export
from ospq_export.cli.options import check_recipe, say
from ospq_export.cli.validate import run_validate
from ospq_export.errors import InputError
from ospq_export.world.threads import use_threads

if TYPE_CHECKING:
    from ospq_export.recipes import Recipe


def demo(
    model: Annotated[Literal["vit", "swin"], typer.Option(help="Packaged network.")] = "vit",
    recipe: options.RecipeOption = "w8a8",
    overrides: options.SetOption = None,
    target: options.TargetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default: runs/demo-MODEL-RECIPE.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Validate on a sample of N of the 10,000 test images, with each class's share."
        ),
    ] = None,
    device: options.DeviceOption = "cpu",
    seed: options.SeedOption = 0,
    threads: options.ThreadsOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Take a packaged network (Fashion-MNIST) through all three stages, on the CPU."""
    use_threads(threads)
    from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
    from ospq_export.recipes import load_recipe
    from ospq_export.runs.run import Run

    chosen = load_recipe(recipe, overrides or [])
    check_recipe(chosen, target)
    spec = demo_spec(model)
    folder = out or Path("runs") / f"demo-{model}-{chosen.name}"
    if not _is_finished(folder, chosen, seed):
        run_calibrate(
            spec,
            demo_data_overrides(),
            lambda: lambda config, _: demo_images("calibration", config),
            chosen,
            folder,
            device=device,
            seed=seed,
            workers=0,
            quiet=quiet,
        )
    else:
        say(f"using the finished calibration in {folder} (delete the folder to calibrate anew)")
    run_export(folder, None, quiet, overwrite=True)
    run = Run.open(folder)
    images = demo_images("test", run.manifest.data)
    report = run_validate(run, images, quiet, limit=limit, device=device)
    raise typer.Exit(report.verdict.exit_status)


def _is_finished(folder: Path, recipe: Recipe, seed: int) -> bool:
    from ospq_export.runs.files import MANIFEST
    from ospq_export.runs.manifest import read_manifest

    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    if manifest.status != "calibrated":
        return False
    if manifest.recipe != recipe or manifest.calibration.seed != seed:
        raise InputError(
            "the folder holds a run with other settings",
            where=folder,
            fix="choose another --out, or delete it",
        )
    return True
