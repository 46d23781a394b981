"""The application: its commands and its entry point."""

from __future__ import annotations

import logging
import sys

import typer

from ospq_export.cli.calibrate import calibrate
from ospq_export.cli.demo import demo
from ospq_export.cli.export import export
from ospq_export.cli.inspect import inspect
from ospq_export.cli.lint import doctor, lint
from ospq_export.cli.options import with_options
from ospq_export.cli.validate import validate
from ospq_export.errors import InputError
from ospq_export.world.threads import wait_passively

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize a vision network after training, export it as QDQ ONNX, and prove that the file predicts the same.",
)
for command in (calibrate, export, validate, inspect, lint, doctor, demo):
    app.command()(command)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_options(super().format(record))


def main() -> None:
    """Entry point: runs the command line and turns bad input into one line on stderr and exit status 2."""
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
