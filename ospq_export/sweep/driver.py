"""The sweep itself: what its folder lacks is computed, and the tables are written as runs end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.progress import Progress

from ospq_export.calibrate.checks import LOCK, differences
from ospq_export.calibrate.reconstruct.store import parse_bytes
from ospq_export.data import folder_of
from ospq_export.errors import InputError
from ospq_export.progress import announce, stage_progress, stepper
from ospq_export.runs.files import is_temporary, write_json
from ospq_export.sweep.cells import Cell, cells_of
from ospq_export.sweep.cluster import Cluster, cluster, load_ray
from ospq_export.sweep.outcome import CELLS, Outcome, read_cells, read_outcome
from ospq_export.sweep.plan import Plan
from ospq_export.sweep.table import Table, write_tables
from ospq_export.sweep.task import compute
from ospq_export.world.room import check_apart, check_folder


def run_sweep(plan: Plan, out: Path, *, address: str | None = None, progress: bool = False) -> Table:
    """Compute what a sweep's folder lacks, and write its tables.

    Args:
        plan: of the sweep.
        out: its folder, new, or left by an earlier sweep of the same plan or of a part of it. It, the images and the
            checkpoints are seen under the same names by all nodes.
        address: of a Ray cluster; None starts Ray on this machine.
        progress: whether a bar, and a line for each run that ends, are shown on standard error.

    Returns:
        The table; a run that failed is in it with its reason, and is tried again by the next call.

    Raises:
        InputError: Ray is not installed or does not start, the plan names what is not there, or the folder holds runs of another
            plan or is in use.
    """
    load_ray()
    cells = cells_of(plan)
    out = out.absolute()
    _check_apart(cells, out)
    with _alone(out):
        _claim(cells, out)
        known = {cell.name: read_outcome(out, cell.name) for cell in cells}
        outcomes = {name: outcome or Outcome(name=name, status="waiting") for name, outcome in known.items()}
        todo = [cell for cell in cells if known[cell.name] is None]
        if todo:
            with cluster(address, plan.resources) as found, stage_progress(disable=not progress) as bars:
                shown = _Shown(bars, len(cells), len(todo))
                for outcome in _computed(todo, plan, out, found):
                    outcomes[outcome.name] = outcome
                    shown.say(outcome)
                    write_tables(Table(plan, cells, outcomes), out)
        table = Table(plan, cells, outcomes)
        write_tables(table, out)
        return table


def _computed(cells: Sequence[Cell], plan: Plan, out: Path, found: Cluster) -> Iterator[Outcome]:
    """Outcomes as they come."""
    asked = plan.resources
    device, here = "cuda" if asked.gpus else "cpu", str(Path.cwd())
    # Without it a calibration takes half of what is free, as if it were alone.
    budget = None if asked.memory is None else str(parse_bytes(asked.memory) // 2)
    common = (str(out), here, asked.cpus, device, asked.workers, budget)
    calls: dict[str, tuple[Any, ...]] = {cell.name: (cell.model_dump_json(), *common) for cell in cells}
    for name, text, reason in found.each(compute, calls):
        done = Outcome.model_validate_json(text) if text else None
        yield done or Outcome(name=name, status="failed", reason=reason)


def _check_apart(cells: Sequence[Cell], out: Path) -> None:
    check_folder(out, "`out`")
    networks = (cell.network for cell in cells)
    for data in {data for n in networks for data in (n.calibration, n.validation) if data is not None}:
        folder = folder_of(data)
        if folder is not None:
            check_apart(out, folder)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be.

    Raises:
        InputError: another sweep holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        fix = "wait for it, or choose another `out`"
        raise InputError("another sweep is running in this folder", where=out, fix=fix) from error
    try:
        yield
    finally:
        lock.release()


def _claim(cells: Sequence[Cell], out: Path) -> None:
    """Add the plan's cells to those that the folder is known to hold.

    Raises:
        InputError: it holds one of another plan under the same name, or things that are no sweep's.
    """
    known = read_cells(out)
    others = [path for path in out.iterdir() if path.name != LOCK and not is_temporary(path)]
    if others and not known:
        raise InputError("the folder is not empty, and holds no sweep", where=out, fix="choose another `out`")
    planned = {cell.name: cell.identity() for cell in cells}
    for name, cell in planned.items():
        changed = differences(known.get(name, cell), cell)
        if changed:
            what = f"the folder holds another run {name} ({'; '.join(changed[:3])})"
            raise InputError(
                what, where=out, fix="choose another `out`, or name the changed part differently"
            )
    write_json(out / CELLS, known | planned)


@dataclass
class _Shown:
    """A bar with an estimate, and a line for each run that ends: where there is no terminal, the lines alone are seen in time."""

    progress: Progress
    total: int
    todo: int

    def __post_init__(self) -> None:
        self._started, self._ended = time.monotonic(), 0
        self._advance = stepper(self.progress, "sweep", self.todo)

    def say(self, outcome: Outcome) -> None:
        """Tell of a run that ended."""
        self._ended += 1
        self._advance()
        left = self.todo - self._ended
        remaining = left * (time.monotonic() - self._started) / self._ended
        told = f"failed: {outcome.reason}" if outcome.status == "failed" else _told(outcome)
        count = self.total - left
        estimate = f", about {_duration(remaining)} left" if left else ""
        line = f"[{count}/{self.total}] {outcome.name}: {told}{estimate}"
        announce(self.progress, line)


def _told(outcome: Outcome) -> str:
    lost = "" if outcome.lost is None else f"{outcome.measure} {outcome.lost:+.2f} lost, "
    return f"{lost}{_duration(outcome.seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
