"""What validation costs beside executing the file: time against a bare loop, and peak memory as the images grow.

    ospq-export demo
    python benchmarks/validation.py --run runs/demo-vit-w8a8

Writes a section of docs/speed.md. Time: `validate` with ONNX Runtime alone against a loop that only executes the same file, over
the same preprocessed tensors, by turns in one process. Memory: peak resident set over 10,000 and 50,000 images (the 10,000
repeated), decoded as they are needed; median of three fresh processes. Only ratios and differences travel to another machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lib.rows import DOCS, make_parser, said_by, table, write_between
from rich.console import Console

from ospq_export.data import Batch, ImageSet
from ospq_export.demo import demo_images
from ospq_export.runs.run import Run
from ospq_export.validate import Report, validate, write_documents
from ospq_export.validate.executions.chosen import open_executions
from ospq_export.validate.executions.table import OPTIMIZED
from ospq_export.validate.report.model import machine_name
from ospq_export.world.memory import peak_memory

_MIB = 1 << 20
_PROCESSES = 3
_TARGET = DOCS / "speed.md"


class Preprocessed:
    """An image set whose tensors lie in memory, so that decoding is in neither of the two times."""

    def __init__(self, images: ImageSet, batch_size: int, limit: int) -> None:
        self.config, self.class_to_idx, self.skipped = images.config, images.class_to_idx, []
        self.record = images.record
        self.ids = list(images.ids[:limit])
        self.held = list(images.batches(batch_size, range(limit)))

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.ids)

    def batches(self, *_: Any) -> Iterator[Batch]:
        """The held batches."""
        return iter(self.held)


class Repeated:
    """An image set several times over, decoded anew each time."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self.images, self.count = images, count
        self.config, self.class_to_idx, self.skipped = images.config, images.class_to_idx, images.skipped
        self.record = images.record
        self.ids: Sequence[str] = images.ids

    def __len__(self) -> int:
        """How many images there are, repetitions counted."""
        return self.count

    def batches(self, batch_size: int, indices: Sequence[int], workers: int = 0) -> Iterator[Batch]:
        """As `ImageSet.batches`; `indices` begin at 0 and leave nothing out."""
        size = len(self.images)
        for start in range(0, len(indices), size):
            yield from self.images.batches(batch_size, range(min(size, len(indices) - start)), workers)


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time (of all threads) of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def measure_time(run: Run, count: int, batch_size: int, repeats: int) -> list[list[Any]]:
    """Rows of the table: seconds and ratios, medians."""
    images: Any = Preprocessed(demo_images("test", run.manifest.data), batch_size, count)
    executions = open_executions(run, [OPTIMIZED], "cpu", "fp32").backends
    tensors = [batch.images.numpy() for batch in images.held]
    reports: list[Report] = []

    def bare() -> None:
        for part in tensors:
            for execution in executions:
                execution(part)

    def whole() -> None:
        reports.append(validate(run, images, backends=[OPTIMIZED], batch_size=batch_size))

    def pages() -> None:
        write_documents(run, reports[-1], demo_images("test", run.manifest.data))

    works = {"bare loop": bare, "validate": whole, "report.md and report.html": pages}
    for execution in executions:
        execution(tensors[0])
    turns = [{name: seconds_of(work) for name, work in works.items()} for _ in range(repeats)]
    return [[name, *_summary(turns, name)] for name in works]


def _summary(turns: list[dict[str, tuple[float, float]]], name: str) -> list[str]:
    """Median wall seconds, and medians of the ratios to the same turn's bare loop: wall time, processor time."""
    ratios = [[turn[name][i] / turn["bare loop"][i] for turn in turns] for i in (0, 1)]
    wall = statistics.median(turn[name][0] for turn in turns)
    return [f"{wall:.1f}", *(f"{statistics.median(r):.3f}" for r in ratios)]


def peak(run: Run, count: int, batch_size: int) -> dict[str, float]:
    """Peak resident set in MiB of this process after a validation; called in a process of its own."""
    images: Any = Repeated(demo_images("test", run.manifest.data), count)
    validate(run, images, backends=[OPTIMIZED], batch_size=batch_size)
    return {"count": count, "mib": peak_memory(torch.device("cpu")) / _MIB}


def _peak_of(folder: Path, count: int, batch_size: int) -> float:
    words = ["--run", str(folder), "--peak", str(count), "--batch-size", str(batch_size)]
    return float(said_by(__file__, words)["mib"])


def measure_memory(folder: Path, counts: Sequence[int], batch_size: int) -> list[list[Any]]:
    """Rows of the table: medians over processes of their own."""
    rows: list[list[Any]] = []
    first = 0.0
    for count in counts:
        mib = statistics.median(_peak_of(folder, count, batch_size) for _ in range(_PROCESSES))
        first = first or mib
        # Per image: float32 logits, an int64 label.
        kept = count * (10 * 4 + 8) / _MIB
        rows.append([f"{count:,}", f"{mib:.0f}", f"{mib - first:+.1f}", f"{kept:.1f}"])
    return rows


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="what `ospq-export demo` left")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--many", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(Run.open(args.run), args.peak, args.batch_size)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        # The run's own report stays as it is.
        folder = Path(shutil.copytree(args.run, Path(temporary) / "run"))
        memory = measure_memory(folder, (args.images, args.many), args.batch_size)
        times = measure_time(Run.open(folder), args.images, args.batch_size, args.repeats)
    text = section(Run.open(args.run), args, times, memory)
    write_between(_TARGET, "validation", text)
    Console().print(text)


def section(run: Run, args: argparse.Namespace, times: list[list[Any]], memory: list[list[Any]]) -> str:
    """The section of docs/speed.md."""
    header = ["", "seconds", "wall time over the bare loop", "processor time over the bare loop"]
    return (
        f"{run.manifest.model.name}, `{run.manifest.recipe.name}`, ONNX Runtime and its references, batches of "
        f"{args.batch_size}; {args.images:,} preprocessed images, medians of {args.repeats} turns in one process on "
        f"{machine_name()}.\n\n"
        f"{table(header, times)}\n"
        f"Peak resident memory, median of {_PROCESSES} processes; the logits and labels of every image are kept.\n\n"
        f"{table(['images', 'peak, MiB', 'growth, MiB', 'logits and labels, MiB'], memory)}"
    )


if __name__ == "__main__":
    main()
