"""What there is to run on a GPU, in order of value, inside ten minutes: tests first, then the whole path, then speed.

    make bench-gpu
    python benchmarks/gpu.py --device cpu --minutes 5 --iterations 2 --limit 20    # to try the script itself

Every step is a process of its own, with a share of the time as its limit. Its output goes to runs/bench-gpu/NAME.log as it
comes, and its outcome to runs/bench-gpu/steps.jsonl as soon as it ends: what was measured is there whenever the machine goes.
Rows of the benchmarks go to benchmarks/rows/ as ever.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lib.rows import ROOT, origin

PYTHON = sys.executable
GPU_TESTS = (
    "tests/formats/test_kernels.py",
    "tests/calibrate/test_auto.py::test_a_run_records_its_slicing_and_resumes_after_the_trials[cuda]",
    "tests/engines/test_tensorrt.py",
)


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of its log.
        command: with its arguments.
        share: of the whole time that it may take at most.
        fine: exit statuses that are results; a verdict is one, whatever it says.
    """

    name: str
    command: list[str]
    share: float
    fine: tuple[int, ...] = (0,)


def steps(device: str, iterations: int, limit: int | None, out: Path) -> list[Step]:
    """All steps, the most valuable first.

    Args:
        device: torch device.
        iterations: steps per slice; 0 takes each script's own number.
        limit: validation images; None takes all.
        out: where runs go.
    """
    cli, few = [PYTHON, "-m", "ospq_export.cli"], [] if limit is None else ["--limit", str(limit)]
    learned = [f"reconstruction.iterations={iterations}"] if iterations else []
    settings = [word for value in learned for word in ("--set", value)]
    demo = ["demo", "--device", device, "--quiet", *few, *settings]
    runs = {recipe: out / f"demo-vit-{recipe}" for recipe in ("w8a8", "w4a4")}
    cuda = device.startswith("cuda")
    tests = GPU_TESTS if cuda else GPU_TESTS[:1]
    reconstruction = ["benchmarks/reconstruction.py", "--device", device]
    paper = ["benchmarks/paper.py", "--device", device, "--set", "calibration_images=64", *learned]
    return [
        Step("tests", [PYTHON, "-m", "pytest", "-q", "-m", "", *tests], 0.3),
        Step("doctor", [*cli, "doctor"], 0.1),
        *(
            Step(f"demo-{r}", [*cli, *demo, "--recipe", r, "--out", str(p)], 0.25, (0, 1, 3))
            for r, p in runs.items()
        ),
        Step("reconstruction", [PYTHON, *reconstruction, "--iterations", str(iterations)], 0.3),
        Step("paper", [PYTHON, *paper, *(() if cuda else ("--model-kwargs", "depth=1"))], 0.5),
    ]


def run(step: Step, seconds: float, folder: Path) -> dict[str, object]:
    """Run one step; its outcome, with the exit status or "out of time"."""
    started = time.monotonic()
    with (folder / f"{step.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
            status: object = done.returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    return {"step": step.name, "status": status, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    """Command line; exit status 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--iterations", type=int, default=0, help="steps per slice; 0: each script's own")
    parser.add_argument("--limit", type=int, help="validation images")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-gpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    whole, started, failed = 60 * args.minutes, time.monotonic(), False
    for step in steps(args.device, args.iterations, args.limit, args.out):
        left = whole - (time.monotonic() - started)
        outcome = (
            run(step, min(left, step.share * whole), args.out)
            if left > 1
            else {"step": step.name, "status": "no time"}
        )
        failed |= outcome["status"] not in step.fine
        line = json.dumps({**outcome, **origin(args.device)})
        with (args.out / "steps.jsonl").open("a") as rows:
            rows.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
