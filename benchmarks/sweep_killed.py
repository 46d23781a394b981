"""A sweep that is killed twice ends with the table of an undisturbed one: 24 small runs of the packaged networks on a local Ray.

    python benchmarks/sweep_killed.py
    python benchmarks/sweep_killed.py --out runs/sweep-killed --kills 2

The driver's whole process group is killed without warning (SIGKILL) when a third of the runs are finished, and again at two
thirds, each time while a calibration is between two of its checkpoints. Times are left out of the comparison. Prints what was
seen and ends with status 1 where the tables differ.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from lib.rows import ROOT, make_parser

from ospq_export.runs.files import CHECKPOINTS
from ospq_export.sweep.outcome import LOGS, RESULTS, RUNS
from ospq_export.sweep.table import CSV, MARKDOWN

# Two networks, two recipes and nearest rounding beside each, three seeds.
PLAN = """
name = "Killed"
recipes = ["w8a8", "w4a4"]
seeds = [0, 1, 2]

[models.vit]
demo = "vit"

[models.swin]
demo = "swin"

[overrides]
short = [
    "calibration_images=16", "observation_images=16", "slicing=block", "equalization=none",
    "reconstruction.iterations=4", "reconstruction.batch_size=8", "reconstruction.refinement_images=0",
    "reconstruction.loss=normalized",
]

[validation]
backends = ["onnxruntime"]
limit = 100
floor_images = 0
code_images = 0
pages = false
"""
RUNS_IN_ALL = 24
_T = TypeVar("_T")


def start(folder: Path, *words: str | Path, path: Sequence[Path] = ()) -> subprocess.Popen[str]:
    """A driver in a process group of its own, which writes to pipes; `path` is where modules are found besides."""
    found = [*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "ospq_export.cli", "sweep", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], condition: Callable[[], _T], patience: float = 7200) -> _T:
    """What the condition gives as soon as it gives something, while the process runs.

    Raises:
        RuntimeError: the process ended before that, or nothing came in `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if process.poll() is not None:
            raise RuntimeError(f"the sweep was over before that: {process.communicate()}")
        time.sleep(0.01)
    kill(process)
    raise RuntimeError("that did not come")


def kill(process: subprocess.Popen[str]) -> None:
    """End the process group without warning."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finished(out: Path) -> set[str]:
    """Names of the finished runs."""
    return {path.stem for path in (out / RESULTS).glob("*.json")}


def amid_calibration(out: Path, least: int) -> str | None:
    """An unfinished run that has a checkpoint, once so many others are finished."""
    done = finished(out)
    begun = {path.parents[1].name for path in (out / RUNS).glob(f"*/{CHECKPOINTS}/*.safetensors")} - done
    return next(iter(sorted(begun)), None) if len(done) >= least else None


def attempts(out: Path, name: str) -> list[int]:
    """Processes that computed a run, in the order of their beginnings."""
    path = out / LOGS / f"{name}.log"
    return [int(pid) for pid in re.findall(r"process (\d+) on", path.read_text())] if path.is_file() else []


def tables(out: Path) -> tuple[list[dict[str, str]], str]:
    """What two sweeps of one plan have in common: everything but times."""
    with (out / CSV).open(newline="") as file:
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]
    return lines, (out / MARKDOWN).read_text()


def run(folder: Path, out: Path) -> None:
    """Let a sweep end.

    Raises:
        RuntimeError: it did not end well.
    """
    process = start(folder, folder / "plan.toml", "--out", out)
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(said)


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep-killed"), help="a new folder")
    parser.add_argument("--kills", type=int, default=2)
    args = parser.parse_args()
    folder = args.out.absolute()
    folder.mkdir(parents=True)
    (folder / "plan.toml").write_text(PLAN)
    killed, whole = folder / "killed", folder / "whole"
    for number in range(1, args.kills + 1):
        process = start(folder, folder / "plan.toml", "--out", killed)
        least = number * RUNS_IN_ALL // (args.kills + 1)
        name = wait_for(process, lambda least=least: amid_calibration(killed, least))
        kill(process)
        print(f"killed with {len(finished(killed))} runs finished, {name} in the middle", flush=True)
    run(folder, killed)
    tried = {name: len(attempts(killed, name)) for name in finished(killed)}
    repeated = sorted(name for name, count in tried.items() if count > 1)
    print(f"{len(tried)} runs finished; begun more than once: {', '.join(repeated)}", flush=True)
    run(folder, whole)
    same = tables(killed) == tables(whole) and len(tried) == RUNS_IN_ALL
    print(
        f"the tables of the killed and of the undisturbed sweep are {'the same' if same else 'NOT the same'}"
    )
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
