"""Progress with an ETA, on standard error, for every stage: bars on a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Seconds: a line for every tenth of the work, but not sooner than the first after another one, and no later than the second.
_SHORTEST, _LONGEST = 5.0, 60.0
# What takes less gets no line: an engine is built in dozens of short phases.
_BRIEF = 1.0


def stage_progress(*, disable: bool = False) -> Progress:
    """A progress display; use it as a context manager. Disabled, it shows nothing."""
    console = Console(stderr=True)
    # Not the console's opinion: variables such as FORCE_COLOR make it take a log file for a terminal.
    if disable or (sys.stderr.isatty() and not console.is_dumb_terminal):
        return Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=disable,
        )
    return PlainProgress()


def stepper(progress: Progress | None, description: str, total: int | None) -> Callable[[], None]:
    """Add a task and return what advances it by one; `total` None has no end. Does nothing without a display."""
    if progress is None:
        return lambda: None
    task = progress.add_task(description, total=total)
    return lambda: progress.advance(task)


def announce(progress: Progress | None, line: str) -> None:
    """A line between the bars; nothing without a display."""
    if progress is not None and (not progress.disable or isinstance(progress, PlainProgress)):
        progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Shown:
    """When and where a task last had a line."""

    time: float
    tenth: int = 0
    ended: bool = False


class PlainProgress(Progress):
    """Lines such as "observe: 30 % (46 of 152), 0:12 elapsed, ETA 0:28", without control codes, for logs and pipes.

    Tasks that are added as `nested` in another one have no lines.
    """

    def __init__(self) -> None:
        # Rich itself shows nothing: it only counts and estimates.
        plain = Console(stderr=True, force_terminal=False, color_system=None)
        super().__init__(console=plain, disable=True, auto_refresh=False)
        self._shown: dict[TaskID, _Shown] = {}

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task, and print a line where one is due."""
        super().advance(task_id, advance)
        self._report(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task, and print a line where one is due."""
        super().update(task_id, **changes)
        self._report(task_id)

    def _report(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], self.get_time()
        started = now if task.start_time is None else task.start_time
        shown = self._shown.setdefault(task_id, _Shown(started))
        tenth, waited = int(task.percentage // 10), now - shown.time
        due = waited >= _LONGEST or (tenth > shown.tenth and waited >= _SHORTEST)
        ends = task.finished and (waited >= _BRIEF or shown.tenth > 0)
        if shown.ended or task.fields.get("nested") or not (due or ends):
            return
        shown.time, shown.tenth, shown.ended = now, tenth, task.finished
        announce(self, _line(task))


def _line(task: Task) -> str:
    elapsed = f"{_clock(task.elapsed or 0)} elapsed"
    if task.total is None:
        return f"{task.description}: {task.completed:.0f} done, {elapsed}"
    count = f"{task.percentage:.0f} % ({task.completed:.0f} of {task.total:.0f})"
    if task.finished or not task.completed:
        return f"{task.description}: {count}, {elapsed}"
    left = (task.elapsed or 0) * (task.total - task.completed) / task.completed
    return f"{task.description}: {count}, {elapsed}, ETA {_clock(left)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
