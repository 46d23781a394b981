"""The application: its commands and its entry point."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from ospq_export.cli.calibrate import calibrate
from ospq_export.cli.demo import demo
from ospq_export.cli.export import export
from ospq_export.cli.inspect import inspect
from ospq_export.cli.lint import doctor, lint
from ospq_export.cli.options import with_options
from ospq_export.cli.recipe import recipe
from ospq_export.cli.sensitivity import sensitivity
from ospq_export.cli.sweep import sweep
from ospq_export.cli.validate import validate
from ospq_export.errors import BudgetError, InputError
from ospq_export.world.threads import wait_passively

# Plain help wraps where rich's tables cut.
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_SETTINGS,
)
for command in (calibrate, export, validate, inspect, sensitivity, lint, doctor, demo, sweep):
    # What is given as the short help is not cut.
    app.command(short_help=(command.__doc__ or "").partition("\n")[0])(command)
app.add_typer(recipe, name="recipe")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("ospq-export"))
        raise typer.Exit


@app.callback()
def _root(
    shown: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize a vision network after training, export it as QDQ ONNX, and prove that the file predicts the same."""


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_options(super().format(record))


def main() -> None:
    """Entry point: runs the command line; bad input is one line on stderr and exit status 2, a budget that cannot be kept 1."""
    # Read when torch loads OpenMP, which no command has done yet.
    wait_passively()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        app(standalone_mode=True)
    except InputError as error:
        typer.echo(f"error: {with_options(str(error))}", err=True)
        sys.exit(2)
    except BudgetError as error:
        typer.echo(f"budget not kept: {with_options(str(error))}", err=True)
        sys.exit(1)
