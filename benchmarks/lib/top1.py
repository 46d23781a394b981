"""Fake-quantized Top-1 of many recipes over networks, bits and seeds: what `granularity.py` and `settings.py` measure."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lib.classifiers import Network, correct, demo_network, finished_run, own_network
from lib.rows import Row, Table, add_network, make_parser, origin
from lib.rows import table as markdown
from lib.twins import twin_state_dict
from ospq_export.calibrate import calibrate
from ospq_export.models.timm import create_model
from ospq_export.progress import stage_progress
from ospq_export.recipes import load_recipe
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import write_tensors

BITS = {"w3a3": (3, 3), "w4a4": (4, 4), "w4a8": (4, 8), "w5a5": (5, 5), "w6a6": (6, 6), "w8a8": (8, 8)}
TWIN = "-twin"

Methods = Mapping[str, Sequence[str]]
"""Overrides of the recipe by the method's name."""


class Cell(NamedTuple):
    """One row to be measured."""

    network: str
    bits: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.network}-{self.bits}-{self.method.replace(':', '')}-{self.seed}"


def arguments(doc: str | None, methods: Sequence[str], runs: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(doc)
    parser.add_argument("what", choices=("demo", "own", "table"))
    parser.add_argument("--only", nargs="*", default=["vit", "swin"], help="packaged networks")
    parser.add_argument("--bits", nargs="*", choices=list(BITS))
    parser.add_argument("--methods", nargs="*", choices=list(methods), default=list(methods))
    parser.add_argument("--seeds", type=int, help="at all bits asked for; default: 3 at the lowest, else 1")
    parser.add_argument("--no-twins", action="store_true", help="leave the outlier-injected twins out")
    parser.add_argument("--processes", type=int, default=1, help="rows measured at a time")
    parser.add_argument("--device", default="cpu", help="torch device that calibrates and classifies")
    parser.add_argument("--runs", default=runs, help="where the run directories go")
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides for all methods")
    parser.add_argument("--threads", type=int, default=1)
    add_network(parser)
    return parser


def measure_all(args: argparse.Namespace, methods: Methods, table: Table, **shared: str) -> None:
    """Every row that the table lacks, seeds outermost, so that an interrupted table is a whole one of fewer seeds.

    Args:
        args: of a parser that `arguments` made.
        methods: all there are.
        table: where the rows go; its key has `shared` and the fields of `Cell`.
        shared: further fields of every row.
    """
    known = {tuple(row[field] for field in Cell._fields) for row in table.rows(**shared)}
    rest = [cell for cell in _cells(args) if cell not in known]
    one = partial(_measure_one, args, methods, table, shared)
    if args.processes == 1:
        for cell in rest:
            one(cell)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        for done in as_completed([pool.submit(one, cell) for cell in rest]):
            done.result()


def table_of(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """Lines of a page: Top-1 in percent by network, bits and method; the steps and the machines."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["network"], row["bits"]][row["method"]].append(row["top1"])
    cells = [
        [network, bits.upper(), *(_text(found.get(method, [])) for method in methods)]
        for (network, bits), found in sorted(groups.items())
    ]
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    steps = ", ".join(sorted({str(row["recipe"]["reconstruction"]["iterations"]) for row in rows}, key=int))
    lines = markdown(["network", "bits", *methods], cells)
    return [lines, f"Steps per slice: {steps} (0 is RTN). Machine: {machines}."]


def _text(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ±{max(values) - min(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _cells(args: argparse.Namespace) -> list[Cell]:
    if args.what == "demo":
        ends = ("",) if args.no_twins else ("", TWIN)
        names, default = [f"demo-{name}{end}" for name in args.only for end in ends], ["w3a3", "w4a4"]
    else:
        names, default = [args.name], ["w4a4", "w4a8", "w6a6"]
    seeds = {bits: args.seeds or (3 if bits == default[0] else 1) for bits in args.bits or default}
    return [
        Cell(name, bits, method, seed)
        for seed in range(max(seeds.values()))
        for bits in seeds
        for name in names
        for method in args.methods
        if seed < seeds[bits]
    ]


def _measure_one(args: argparse.Namespace, methods: Methods, table: Table, shared: Row, cell: Cell) -> None:
    torch.set_num_threads(args.threads)
    if cell.network not in _networks:
        _networks[cell.network] = network_of(cell.network, args)
    row = _measure(cell, _networks[cell.network], methods[cell.method], args)
    table.put({**shared, **row})
    print(*cell[:3], f"{cell.seed}: {row['top1']:.2f}", flush=True)


def _measure(cell: Cell, network: Network, overrides: Sequence[str], args: argparse.Namespace) -> Row:
    """The network calibrated with a method, which is so many overrides of the recipe, and its Top-1."""
    weight, activation = BITS[cell.bits]
    widths = [f"name={cell.bits}", f"weight_bits={weight}", f"activation_bits={activation}"]
    recipe = load_recipe("w4a4", [*widths, *args.set, *overrides])
    folder = Path(args.runs) / cell.name
    run = finished_run(folder)
    if run is None:
        images = network.calibration.sample(recipe.calibration_images, seed=cell.seed)
        with stage_progress() as progress:
            run = calibrate(
                network.model,
                network.spec,
                images,
                network.config,
                recipe,
                folder,
                device=args.device,
                seed=cell.seed,
                progress=progress,
            )
    slicing = run.manifest.slicing
    return {
        **cell._asdict(),
        "top1": _top1(run, network, args.device),
        "images": len(network.validation),
        "slices": len(run.manifest.slices),
        "seconds": round(sum(s.seconds for s in run.manifest.slices)),
        "recipe": recipe.model_dump(mode="json"),
        "slicing": None if slicing is None else slicing.model_dump(mode="json"),
        **origin(args.device),
    }


def _top1(run: Run, network: Network, device: str) -> float:
    """Top-1 (percent) of the fake-quantized network on all validation images."""
    module = run.fake_quant_network().to(device)
    return float(correct(module, network, len(network.validation)).mean() * 100)


_networks: dict[str, Network] = {}


def network_of(name: str, args: argparse.Namespace) -> Network:
    """The network of a row's name: a packaged one, its twin, or the one that the command line names."""
    if args.what == "own":
        return own_network(args)
    plain = demo_network(name.removeprefix("demo-").removesuffix(TWIN))
    return _twin(plain, Path(args.runs)) if name.endswith(TWIN) else plain


def _twin(network: Network, folder: Path) -> Network:
    """The network with injected outlier channels: the same float function from another checkpoint."""
    path = folder / f"{network.name}{TWIN}.safetensors"
    if not path.is_file():
        state = twin_state_dict(network.model, network.config.input_size)
        write_tensors(path, state)
    spec = network.spec.model_copy(update={"checkpoint": str(path)})
    return replace(network, name=f"{network.name}{TWIN}", spec=spec, model=create_model(spec))
