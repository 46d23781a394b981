"""What a worker of Ray is sent: imports nothing heavy, so that the number of threads is set before torch is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from ospq_export.world.threads import wait_passively


def compute(
    cell: str, out: str, here: str, cpus: int, device: str, workers: int, memory_budget: str | None
) -> str:
    """Run one cell in this process; see `work.run_cell`.

    Args:
        cell: a `Cell` as JSON.
        out: folder of the sweep.
        here: folder that the sweep was started in, where modules and data sets of the user may lie.
        cpus: threads that compute.
        device: torch device.
        workers: processes that decode images.
        memory_budget: of the calibration's activations.

    Returns:
        An `Outcome` as JSON.
    """
    os.environ["OMP_NUM_THREADS"] = str(cpus)
    wait_passively()
    if Path(here).is_dir():
        os.chdir(here)
    from ospq_export.api import Session
    from ospq_export.sweep.cells import Cell
    from ospq_export.sweep.work import run_cell

    chosen = Cell.model_validate_json(cell)
    session = Session(device=device, seed=chosen.seed, workers=workers, memory_budget=memory_budget)
    return run_cell(chosen, Path(out), session, cpus).model_dump_json()
