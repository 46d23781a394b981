"""The tables, and their rows: a JSON object a line in benchmarks/rows/NAME.jsonl."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from ospq_export.runs.files import json_line, replacing
from ospq_export.world.processor import machine_name

# Changes elsewhere leave a measurement as it is; benchmarks/rows changes with every row.
_CODE = ("ospq_export", "benchmarks/*.py", "benchmarks/lib")
# Distributions whose versions a run directory does not name, and whose name is not the same everywhere.
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt_rtx_cu13")


ROOT = Path(__file__).resolve().parents[2]


def origin(device: str = "cpu", checkout: Path = ROOT) -> dict[str, Any]:
    """The last fields of every row.

    Args:
        device: torch's name of what was measured.
        checkout: of the code that was measured.

    Returns:
        `versions`, `machine` and, in a checkout, `commit`, with a "+" where the code has changes that are not committed.
    """
    from ospq_export.runs.manifest import installed_versions

    versions = installed_versions()
    for name in _RUNTIMES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit = _commit(checkout)
    return {"versions": versions, "machine": _machine(device), **({"commit": commit} if commit else {})}


def _machine(device: str) -> str:
    if not device.startswith("cuda"):
        return machine_name()
    import torch

    return torch.cuda.get_device_name(device)


def _commit(checkout: Path) -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit}+" if git("status", "--porcelain", "--", *_CODE) else commit
    except (OSError, subprocess.CalledProcessError):
        return ""


BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"
# Long tables, with what was tried beside what is used; the documents have the short ones.
TABLES_OF_NOTES = ROOT / "notes" / "tables"

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Measurements of one kind.

    Attributes:
        name: of the file, without its suffix.
        key: the fields that say which measurement a row is; no two rows have the same.
        folder: where the file lies.
    """

    name: str
    key: tuple[str, ...]
    folder: Path = BENCHMARKS / "rows"

    @property
    def path(self) -> Path:
        """The file, which need not exist yet."""
        return self.folder / f"{self.name}.jsonl"

    def rows(self, **fields: Any) -> list[Row]:
        """Rows with these fields, in the order of their keys."""
        if not self.path.is_file():
            return []
        found = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [row for row in found if all(row[name] == value for name, value in fields.items())]

    def find(self, **key: Any) -> Row | None:
        """The row with this key; None where it is not measured yet."""
        assert set(key) == set(self.key), f"the key of {self.name} is {self.key}"
        return next(iter(self.rows(**key)), None)

    def put(self, *rows: Row) -> None:
        """Add rows; each takes the place of the one with its key. Other processes may do so at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{self.name}.lock"):
            kept = {self._rank(row): row for row in (*self.rows(), *rows)}
            with replacing(self.path) as temporary:
                lines = [json_line(kept[rank]) for rank in sorted(kept)]
                temporary.write_text("".join(lines), encoding="utf-8")

    def notes(self) -> str:
        """What its page says below the table, from NAME.md beside the rows; "" where there is nothing."""
        path = self.folder / f"{self.name}.md"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _rank(self, row: Row) -> tuple[tuple[str, str | int], ...]:
        """Its key as something that sorts and hashes, whatever the types; numbers by their size."""
        values = [row[name] for name in self.key]
        return tuple(("", v) if isinstance(v, int) else ("text", json.dumps(v)) for v in values)


# The series is the part of the page that a row belongs to: "main" or, from other recipes, one of those below it.
GRANULARITY = Table("granularity", ("series", "network", "bits", "method", "seed"))
SETTINGS = Table("settings", ("network", "bits", "method", "seed"))
RESULTS = Table("results", ("network", "bits"))
SENSITIVITY = Table("sensitivity", ("network", "format"))
# The widths are those of the recipe with one format that the row is beside, "" for budgets of points; the settings are overrides.
BUDGETS = Table("budgets", ("network", "widths", "method", "seed", "settings"))
MODELS = Table("models", ("label",))
PEERS = Table("peers", ("network",))
TOOLS = Table("tools", ("run", "tool"))
# The device as torch calls it: a second processor's row takes the place of the first one's.
RECONSTRUCTION = Table("reconstruction", ("slice", "device", "threads", "precision"))
FORMAT_SPEED = Table("format_speed", ("slice", "formats", "device"))
PAPER = Table("paper", ("device",))
MEMORY = Table("memory", ("model", "images", "budget"))
LARGE = Table("large", ("width",))
ARCHIVES = Table("archives", ("task", "images"))
CONTENTION = Table("contention", ("stage", "code", "recipe", "overrides", "threads", "machine"))
NETWORKS = Table("networks", ("network", "recipe"))
TASKS = Table("tasks", ("task", "recipe"))
LINT = Table("lint", ("target", "seeds"))
MODELOPT = Table("modelopt", ("network", "format", "setting"))

TABLES = (
    *(GRANULARITY, SETTINGS, RESULTS, SENSITIVITY, BUDGETS, MODELS, PEERS, TOOLS),
    *(RECONSTRUCTION, FORMAT_SPEED, PAPER, MEMORY, LARGE, ARCHIVES, CONTENTION, LINT, MODELOPT),
    *(NETWORKS, TASKS),
)


def percent(part: int, whole: int) -> str:
    """Such as "31 of 32", or "-" where there is nothing to count."""
    return f"{part} of {whole}" if whole else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, with the line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def write_between(document: Path, name: str, text: str) -> None:
    """Put a measured table where a page that is written by hand has the marks of this name."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    assert found and ended, f"{document} has no marks of {name}"
    document.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the script's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_study(studies: Mapping[str, Callable[[], None]]) -> None:
    """Run the study that the first argument names; it reads the arguments behind its name."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in studies:
        raise SystemExit(f"which study? {', '.join(studies)}")
    del sys.argv[1]
    studies[name]()


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
