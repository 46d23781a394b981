"""Progress bars with an ETA, on stderr, for every stage."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def stage_progress(*, disable: bool = False) -> Progress:
    """A rich progress display; use it as a context manager."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=disable,
    )


def stepper(progress: Progress | None, description: str, total: int | None) -> Callable[[], None]:
    """Add a task and return what advances it by one; `total` None has no end. Does nothing without a display."""
    if progress is None:
        return lambda: None
    task = progress.add_task(description, total=total)
    return lambda: progress.advance(task)
