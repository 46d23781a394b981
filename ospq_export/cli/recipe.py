"""`ospq-export recipe`: what the recipes are, what one says, and what its keys mean."""

from __future__ import annotations

from typing import Annotated

import typer

from ospq_export.cli import options
from ospq_export.cli.options import console, say_json

recipe = typer.Typer(no_args_is_help=True, help="List recipes, show one in full, and explain its keys.")
_Name = Annotated[str, typer.Argument(help="A packaged recipe, or the path of a TOML file.")]


@recipe.command("list")
def list_recipes(as_json: options.JsonOption = False) -> None:
    """The packaged recipes."""
    from rich.table import Table

    from ospq_export.recipes import load_recipe, packaged_recipes

    found = [load_recipe(name) for name in packaged_recipes()]
    if as_json:
        say_json([{"name": r.name, "formats": r.summary(), "description": r.description} for r in found])
        return
    table = Table("recipe", "formats", "what it is", box=None, padding=(0, 2, 0, 0))
    for one in found:
        table.add_row(one.name, one.summary(), one.description)
    console().print(table)


@recipe.command()
def show(name: _Name, overrides: options.SetOption = None, as_json: options.JsonOption = False) -> None:
    """A recipe with every value, defaults and overrides included, as TOML that can be edited and used."""
    from ospq_export.recipes import load_recipe
    from ospq_export.recipes.keys import as_toml

    chosen = load_recipe(name, overrides or [])
    if as_json:
        say_json(chosen.model_dump(mode="json"))
        return
    typer.echo(as_toml(chosen), nl=False)


@recipe.command()
def explain(
    key: Annotated[str, typer.Argument(help="A key, or the beginning of some. Default: all.")] = "",
    as_json: options.JsonOption = False,
) -> None:
    """What the keys of a recipe take and do."""
    import dataclasses

    from rich.markup import escape
    from rich.table import Table

    from ospq_export.errors import InputError
    from ospq_export.recipes import Recipe
    from ospq_export.recipes.keys import keys_of, nearest

    known = keys_of(Recipe)
    found = [k for k in known if k.name.startswith(key)]
    if not found:
        raise InputError(f"unknown recipe key {key!r}", fix=nearest(key, [k.name for k in known]))
    if as_json:
        say_json([dataclasses.asdict(k) for k in found])
        return
    table = Table("key", "takes", "default", "what it does", box=None, padding=(0, 2, 0, 0))
    for k in found:
        table.add_row(k.name, escape(k.takes), escape(k.default), escape(k.description))
    console().print(table)
