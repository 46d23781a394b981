"""What the scripts' command lines have in common."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the script's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_network(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Options of a network that is not a packaged one; `lib.classifiers.own_network` reads them."""
    parser.add_argument("--name", help="of the network in the tables")
    parser.add_argument("--model-kwargs", default="")
    for option in ("--model", "--checkpoint", "--calibration", "--validation"):
        parser.add_argument(option, required=required)


def add_run(parser: argparse.ArgumentParser) -> None:
    """A finished run, and where its images are."""
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="calibration images; left out for a packaged network")
    parser.add_argument("--threads", type=int, default=1)


def said_by(script: str, words: Sequence[str]) -> Any:
    """The JSON in the last line that a script prints in a process of its own.

    Raises:
        subprocess.CalledProcessError: the script failed.
    """
    command = [sys.executable, script, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
