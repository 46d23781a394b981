"""The reconstruction engine against a plain eager loop: iterations per second, and their share of what the machine could do.

    python benchmarks/reconstruction.py                        # the three slices on the CPU
    python benchmarks/reconstruction.py --device cuda --batch-size 64 --iterations 2000
    python benchmarks/reconstruction.py --formats fp8 nvfp4    # the engine in these formats against itself at W4A4
    python benchmarks/reconstruction.py --table                # prints the tables of docs/speed.md

Both loops run in one process on the same slice, images, ranges and settings, a few steps of one and a few steps of the other in
turn, so that what else the machine does slows both alike. Afterwards both slices are hardened and must reach the same loss.
The plain loop is benchmarks/lib/floor.py, the floor is benchmarks/lib/floor.py; rows in benchmarks/rows/reconstruction.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lib.floor import Clock, Machine, PlainLoop, synchronize, unrecorded, work_of
from lib.rows import FORMAT_SPEED, RECONSTRUCTION, make_parser, origin
from lib.rows import table as markdown

from ospq_export.calibrate.objectives import objective_class
from ospq_export.calibrate.objectives.base import Objective
from ospq_export.calibrate.observe import observe
from ospq_export.calibrate.reconstruct.activations import SliceData, forward
from ospq_export.calibrate.reconstruct.learner import Learner
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, weight_quantizers
from ospq_export.demo import demo_spec
from ospq_export.formats.choice import Choice, integers
from ospq_export.graph.capture import capture
from ospq_export.graph.granularity import block_slicing
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.graph.slicing import extract
from ospq_export.models.timm import ModelSpec, create_model
from ospq_export.recipes import Reconstruction, load_recipe

_TOLERANCE = 0.05
_ROUNDS = 20
_W4A4 = integers(4, 4)


@dataclass(frozen=True)
class Case:
    """A slice: the network, its input, and which of its blocks."""

    title: str
    spec: ModelSpec
    input_size: tuple[int, int, int]
    block: int
    iterations: int


CASES = {
    "demo-vit": Case("demo ViT block, 50 x 64", demo_spec("vit"), (1, 28, 28), 5, 500),
    "deit-small": Case(
        "DeiT-S block at 224 px, 197 x 384",
        ModelSpec(name="deit_small_patch16_224", kwargs={"depth": 2}),
        (3, 224, 224),
        1,
        60,
    ),
    "swin-tiny": Case(
        "Swin-T stage-1 block at 224 px, 3,136 x 96",
        ModelSpec(name="swin_tiny_patch4_window7_224", kwargs={"depths": (2, 1)}),
        (3, 224, 224),
        1,
        40,
    ),
}


def clock_of(args: argparse.Namespace) -> Clock:
    """Wall time, or the processor time of this process."""
    return time.process_time if args.cpu_time else time.perf_counter


def prepare(
    case: Case, images: int, device: torch.device, formats: Choice = _W4A4
) -> tuple[torch.fx.GraphModule, SliceData]:
    """The slice with searched ranges and nearest codes, and its data."""
    torch.manual_seed(0)
    captured = capture(create_model(case.spec), case.input_size).to(device)
    network = insert_quantizers(captured, formats)
    network.module.to(device)
    x = torch.randn(images, *case.input_size, generator=torch.Generator().manual_seed(1))
    observe(network, x[:8], batch_size=8, seed=0, values_per_tensor=1 << 14)
    slices = block_slicing(captured.graph)
    tensors: tuple[torch.Tensor, ...] = (x.to(device),)
    original = tensors
    for bounds in slices[: case.block]:
        piece = extract(network.module, bounds)
        original = forward(piece, original, Mode.FLOAT, device, images)
        tensors = forward(piece, tensors, Mode.QUANTIZE, device, images)
    piece = extract(network.module, slices[case.block])
    target = forward(piece, original, Mode.FLOAT, device, images)[0]
    return piece, SliceData(original, tensors, target, images)


def timed(step: Callable[[int], object], start: int, stop: int, device: torch.device, clock: Clock) -> float:
    """Seconds per step."""
    synchronize(device)
    began = clock()
    for index in range(start, stop):
        step(index)
    synchronize(device)
    return (clock() - began) / (stop - start)


def race(
    plain: Callable[[int], object],
    ours: Callable[[int], object],
    iterations: int,
    device: torch.device,
    clock: Clock,
) -> tuple[list[float], list[float]]:
    """Seconds per step of both, round by round; the first round warms up and is left out."""
    edges = [iterations * k // _ROUNDS for k in range(_ROUNDS + 1)]
    times: tuple[list[float], list[float]] = ([], [])
    for start, stop in itertools.pairwise(edges):
        times[0].append(timed(plain, start, stop, device, clock))
        times[1].append(timed(ours, start, stop, device, clock))
    return times[0][1:], times[1][1:]


def measure(name: str, args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """One row."""
    case, device = CASES[name], torch.device(args.device)
    iterations = args.iterations or case.iterations
    piece, data = prepare(case, 2 * args.batch_size, device)
    changed = {"iterations": iterations, "batch_size": args.batch_size, "precision": args.precision}
    overrides = [f"reconstruction.{key}={value}" for key, value in changed.items()]
    settings = load_recipe("w4a4", overrides).reconstruction
    judge = Reconstructor(settings, device)
    objective: Objective = objective_class(settings)(settings, weight_quantizers(piece))
    initial = judge.error(piece, data, objective)[1]
    objective.normalise_by(initial)
    torch.manual_seed(0)
    plain = PlainLoop(piece, data, settings, objective.normaliser, device)
    learner = Learner(piece, data, objective, settings, device)
    plain_seconds, seconds = race(plain.step, learner.step, iterations, device, clock_of(args))
    work = _work(piece, data.select(slice(0, settings.batch_size)).to(device), learner, settings)
    learner.settle()
    losses = plain.hardened_loss(), judge.error(piece, data, objective)[1] / objective.normaliser
    floor = work.seconds(machine)
    ours = statistics.median(seconds)
    return {
        "slice": name,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "precision": args.precision,
        "title": case.title,
        "clock": "processor" if args.cpu_time else "wall",
        "batch_size": args.batch_size,
        "iterations": iterations,
        "plain_per_second": 1.0 / statistics.median(plain_seconds),
        "per_second": 1.0 / ours,
        "ratio": statistics.median(p / o for p, o in zip(plain_seconds, seconds, strict=True)),
        "flops": work.flops,
        "bytes": work.bytes,
        "peak_flops": machine.flops,
        "peak_bandwidth": machine.bandwidth,
        "floor_seconds": floor,
        "share_of_floor": floor / ours,
        "plain_loss": losses[0],
        "loss": losses[1],
        "same_loss": abs(losses[0] - losses[1]) <= _TOLERANCE * max(losses),
        **origin(args.device),
    }


def compare_formats(name: str, recipe: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the engine's steps at W4A4 and in a recipe's formats, on the same slice and with the same settings."""
    case, device = CASES[name], torch.device(args.device)
    iterations = args.iterations or case.iterations
    settings = load_recipe(
        "w4a4", [f"reconstruction.iterations={iterations}", f"reconstruction.batch_size={args.batch_size}"]
    ).reconstruction
    learners = []
    for formats in (_W4A4, load_recipe(recipe).formats()):
        piece, data = prepare(case, 2 * args.batch_size, device, formats)
        objective: Objective = objective_class(settings)(settings, weight_quantizers(piece))
        objective.normalise_by(Reconstructor(settings, device).error(piece, data, objective)[1])
        torch.manual_seed(0)
        learners.append(Learner(piece, data, objective, settings, device))
    integer, other = race(learners[0].step, learners[1].step, iterations, device, clock_of(args))
    return {
        "slice": name,
        "formats": recipe,
        "device": device.type,
        "title": case.title,
        "threads": torch.get_num_threads(),
        "clock": "processor" if args.cpu_time else "wall",
        "batch_size": args.batch_size,
        "iterations": iterations,
        "integer_per_second": 1.0 / statistics.median(integer),
        "per_second": 1.0 / statistics.median(other),
        "ratio": statistics.median(i / o for i, o in zip(integer, other, strict=True)),
        **origin(args.device),
    }


def formats_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    header = ["slice", "machine", "batch", "formats", "W4A4 it/s", "it/s", "ratio"]
    cells = [
        [
            r["title"],
            f"{r['machine']}, {r['threads']} threads, {r['clock']} time",
            r["batch_size"],
            r["formats"],
            f"{r['integer_per_second']:.2f}",
            f"{r['per_second']:.2f}",
            f"{r['ratio']:.2f}",
        ]
        for r in rows
    ]
    return markdown(header, cells)


def _work(piece: torch.fx.GraphModule, batch: SliceData, learner: Learner, settings: Reconstruction) -> Any:
    weights = sum(w.codes.numel() for w in weight_quantizers(piece))
    inputs = (batch.quantized_input[0], batch.images)
    learner.learn = unrecorded(learner.learn)
    # One step more than the race had: its rate is that of the end of the schedule, next to nothing.
    return work_of(piece, inputs, lambda: learner.step(settings.iterations), weights)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    header = [
        "slice",
        "machine",
        "products",
        "batch",
        "plain it/s",
        "engine it/s",
        "ratio",
        "floor ms",
        "share of floor",
    ]
    cells = [
        [
            r["title"],
            f"{r['machine']}, {r['threads']} threads, {r['clock']} time",
            r["precision"],
            r["batch_size"],
            f"{r['plain_per_second']:.2f}",
            f"{r['per_second']:.2f}",
            f"{r['ratio']:.2f}",
            f"{1e3 * r['floor_seconds']:.1f}",
            f"{r['share_of_floor']:.0%}",
            f"{r['plain_loss']:.4f}",
            f"{r['loss']:.4f}",
        ]
        for r in rows
    ]
    return markdown([*header, "plain loss", "engine loss"], cells)


def main() -> None:
    """Command line; exit status 1 where the two loops reach different losses."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--formats", nargs="*", default=[], help="recipes whose formats to compare with W4A4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--precision",
        choices=("float32", "tf32", "bf16"),
        default="float32",
        help="the engine's products; the plain loop's stay float32",
    )
    parser.add_argument("--iterations", type=int, default=0, help="0: few enough for a CPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, for a busy machine; with one thread only",
    )
    parser.add_argument("--table", action="store_true", help="only print the rows at hand")
    args = parser.parse_args()
    if args.cpu_time and (args.threads > 1 or args.device != "cpu"):
        parser.error("--cpu-time needs --threads 1 and the CPU")
    torch.set_num_threads(args.threads)
    for name in args.only if args.formats else ():
        for recipe in args.formats:
            row = compare_formats(name, recipe, args)
            FORMAT_SPEED.put(row)
            print(formats_table([row]), flush=True)
    if not args.table and not args.formats:
        machine = Machine.measured(torch.device(args.device), clock_of(args))
        print(f"peak {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s", flush=True)
        for name in args.only:
            row = measure(name, args, machine)
            RECONSTRUCTION.put(row)
            print(table([row]), flush=True)
    rows = RECONSTRUCTION.rows()
    print(table(rows))
    print(formats_table(FORMAT_SPEED.rows()))
    if not all(row["same_loss"] for row in rows):
        raise SystemExit("the two loops reach different losses")


if __name__ == "__main__":
    main()
