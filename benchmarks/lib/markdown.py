"""Cells and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def percent(part: int, whole: int) -> str:
    """Such as "31 of 32", or "-" where there is nothing to count."""
    return f"{part} of {whole}" if whole else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, with the line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
