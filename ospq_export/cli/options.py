"""Options and helpers that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ospq_export.recipes import Recipe

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


def read_recipe(name: str, overrides: list[str] | None) -> Recipe:
    """A recipe with overrides; see `load_recipe`."""
    from ospq_export.recipes import load_recipe

    return load_recipe(name, overrides or [])


def console() -> Console:
    """Where results go: standard output."""
    from rich.console import Console

    return Console()
