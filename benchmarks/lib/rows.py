"""The tables, and their rows: a JSON object a line in benchmarks/rows/NAME.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ospq_export.runs.files import json_line, replacing

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"

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
MODELS = Table("models", ("label",))
PEERS = Table("peers", ("network",))
TOOLS = Table("tools", ("run", "tool"))
# The device as torch calls it: a second processor's row takes the place of the first one's.
RECONSTRUCTION = Table("reconstruction", ("slice", "device", "threads", "precision"))
PAPER = Table("paper", ("device",))
MEMORY = Table("memory", ("model", "images", "budget"))
LARGE = Table("large", ("width",))
CONTENTION = Table("contention", ("stage", "code", "recipe", "overrides", "threads", "machine"))
LINT = Table("lint", ("target", "seeds"))

TABLES = (
    *(GRANULARITY, SETTINGS, RESULTS, MODELS, PEERS, TOOLS),
    *(RECONSTRUCTION, PAPER, MEMORY, LARGE, CONTENTION, LINT),
)
