"""How much slower the demo's calibration is beside a busy process: the ratio of busy to idle, both in one run.

    python benchmarks/contention.py                                    # the demo's calibration, two pairs
    python benchmarks/contention.py --recipe w4a4 --set slicing=block reconstruction.iterations=50 --rounds 3
    python benchmarks/contention.py --stage validate --limit 2000
    python benchmarks/contention.py --code before=../older-checkout    # a second version of the package, in turn with this one

Each measurement is a process of its own, as the command line starts it: threads are chosen, and wait, as there. Idle and busy
alternate; a busy one has a process beside it that computes without a pause and is tied to no core. The machine has to be free of
other work: two shared cores show nothing. Rows in benchmarks/rows/contention.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.rows import make_parser

HERE = Path(__file__).resolve()


def measured(args: argparse.Namespace) -> None:
    """One stage on the packaged network, in this process, which has not imported torch yet."""
    try:
        from ospq_export.world.threads import use_threads, wait_passively

        wait_passively()
        use_threads(args.threads)
    except ImportError:
        # A version of the package from before: it takes what torch takes.
        pass
    from ospq_export.cli.calibrate import run_calibrate
    from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
    from ospq_export.recipes import load_recipe

    if args.stage == "validate":
        _validate(args.run, args.limit)
        return
    run_calibrate(
        demo_spec("vit"),
        demo_data_overrides(),
        lambda: lambda config, _: demo_images("calibration", config),
        load_recipe(args.recipe, args.overrides),
        args.run,
        device="cpu",
        seed=0,
        workers=0,
        quiet=True,
    )


def _validate(folder: Path, limit: int) -> None:
    from ospq_export.demo import demo_images
    from ospq_export.runs.run import Run
    from ospq_export.validate import validate

    run = Run.open(folder)
    validate(run, demo_images("test", run.manifest.data), limit=limit)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes at full load, for as long as this lasts."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(args: argparse.Namespace, code: str, run: Path, *, busy: bool) -> float:
    """Wall time of one process that does the stage, start-up included."""
    command = [sys.executable, str(HERE), "--one", "--stage", args.stage, "--recipe", args.recipe]
    command += ["--run", str(run), "--limit", str(args.limit)]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += ["--set", *args.overrides] if args.overrides else []
    with busy_processes(args.processes if busy else 0):
        started = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": code}, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def rows_of(args: argparse.Namespace, codes: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each version of the package, measured in turn."""
    times: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in codes}
    for _ in range(args.rounds):
        for kind in ("idle", "busy"):
            for name, code in codes.items():
                with tempfile.TemporaryDirectory() as folder:
                    run = args.run or Path(folder) / "run"
                    times[name][kind].append(seconds(args, code, run, busy=kind == "busy"))
                print(f"{name}, {kind}: {times[name][kind][-1]:.1f} s", flush=True)
    return [_row(args, name, Path(codes[name]), found) for name, found in times.items()]


def _row(
    args: argparse.Namespace, code: str, checkout: Path, found: dict[str, list[float]]
) -> dict[str, Any]:
    from lib.rows import origin

    ratios = [busy / idle for idle, busy in zip(found["idle"], found["busy"], strict=True)]
    return {
        "stage": args.stage,
        "code": code,
        "recipe": args.recipe,
        "overrides": args.overrides,
        "threads": args.threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or "chosen",
        "busy_processes": args.processes,
        "idle_seconds": [round(s, 1) for s in found["idle"]],
        "busy_seconds": [round(s, 1) for s in found["busy"]],
        "ratio": round(statistics.median(ratios), 2),
        **origin(checkout=checkout),
    }


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--stage", choices=("calibrate", "validate"), default="calibrate")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, help="instead of what the command line would choose")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="at full load beside it, when busy")
    parser.add_argument("--limit", type=int, default=2000, help="images to validate on")
    parser.add_argument("--run", type=Path, help="an exported run of the packaged ViT, to validate")
    parser.add_argument(
        "--code", nargs="*", default=[], metavar="NAME=FOLDER", help="more versions to compare"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measured(args)
        return
    if args.stage == "validate" and args.run is None:
        parser.error("--stage validate needs --run")
    codes = {"present": str(HERE.parents[1]), **dict(entry.split("=", 1) for entry in args.code)}
    # Not before: an older version of the package, measured in a process of its own, has not what this imports.
    from lib.rows import CONTENTION

    for row in rows_of(args, codes):
        CONTENTION.put(row)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
