"""Are formats per operator better than one format for all, at the same average bits? Is `max_drop` kept? docs/budgets.md.

    python benchmarks/budgets.py demo                        # both packaged networks and their outlier-injected twins
    python benchmarks/budgets.py demo --bits w4a4 --seeds 1 --only swin --set slicing=block reconstruction.iterations=50
    python benchmarks/budgets.py own --name dinov2-vits --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/budgets.py table                       # the page from the rows at hand

A method is "uniform", WbAb with ends of 8 bits; "allocated", formats int3 to int8 of the same average bits; or "drop-0.5", the
fewest bits that lose at most so many points: the drop is then measured on test images it never saw. Finished rows are
kept in benchmarks/rows/budgets.jsonl, and run directories in --runs.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lib.classifiers import Network, correct, finished_run
from lib.rows import BUDGETS, DOCS, Row, origin, table, write_between
from lib.top1 import BITS, TWIN, arguments, network_of

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.allocate.cost import average_bits
from ospq_export.calibrate.allocate.operators import operators_of
from ospq_export.calibrate.allocate.stage import calibrate_within, images_for, split
from ospq_export.errors import BudgetError
from ospq_export.progress import stage_progress
from ospq_export.recipes import Recipe, load_recipe
from ospq_export.runs.allocation import Budget, read_allocation
from ospq_export.runs.files import ALLOCATION
from ospq_export.runs.run import Run

FORMATS = ("int3", "int4", "int5", "int6", "int8")
UNIFORM, ALLOCATED, DROP = "uniform", "allocated", "drop-"
METHODS = (UNIFORM, ALLOCATED, f"{DROP}0.5", f"{DROP}1")
DEFAULT_WIDTHS = ("w3a3", "w4a4", "w5a5", "w6a6")


def uniform_bits(run: Run, recipe: Recipe) -> float:
    """Average bits of a recipe of one format but for the ends."""
    operators, choice = operators_of(run.captured()), recipe.formats()
    formats = {o.name: choice.activation for o in operators}
    return average_bits(
        operators, formats | dict.fromkeys((operators[0].name, operators[-1].name), choice.end)
    )


def run_of(
    network: Network, recipe: Recipe, budget: Budget | None, folder: Path, args: argparse.Namespace, seed: int
) -> Run:
    """The finished run in a folder; calibrated where it is not there yet."""
    found = finished_run(folder)
    if found is not None:
        return found
    images = network.calibration.sample(images_for(budget, recipe), seed=seed)
    with stage_progress() as progress:
        how: dict[str, Any] = {"seed": seed, "progress": progress, "device": args.device}
        stage: Callable[..., Run] = calibrate
        if budget is not None:
            images, how["held_out"], recipe = split(images, budget, recipe)
            stage, how["budget"] = calibrate_within, budget
        return stage(network.model, network.spec, images, network.config, recipe, folder, **how)


def measure(name: str, widths: str, method: str, seed: int, args: argparse.Namespace) -> Row:
    """One row: Top-1 of the fake-quantized network on all validation images, beside the float one's."""
    network, runs = network_of(name, args), Path(args.runs)
    weight, activation = BITS[widths or "w4a4"]
    recipe = load_recipe("w4a4", [f"weight_bits={weight}", f"activation_bits={activation}", *args.set])
    settings = " ".join(args.set)
    row: Row = {"network": name, "widths": widths, "method": method, "seed": seed, "settings": settings}
    row |= {"images": len(network.validation), "top1": None, "float_top1": None, "bits": None, "said": ""}
    runs /= hashlib.sha256(settings.encode()).hexdigest()[:8]
    folder = runs / f"{name}-{widths}-{method}-{seed}"
    try:
        if method.startswith(DROP):
            budget = Budget(formats=FORMATS, max_drop=float(method.removeprefix(DROP)))
            run = run_of(network, recipe, budget, folder, args, seed)
        else:
            run = run_of(network, recipe, None, runs / f"{name}-{widths}-{UNIFORM}-{seed}", args, seed)
            bits = uniform_bits(run, recipe)
            if method == ALLOCATED:
                run = run_of(network, recipe, Budget(formats=FORMATS, bits=bits), folder, args, seed)
    except BudgetError as error:
        return {**row, "said": str(error), **origin()}
    row["bits"] = uniform_bits(run, recipe) if method == UNIFORM else taken_bits(run)
    for key, module in (("top1", run.fake_quant_network()), ("float_top1", run.float_network())):
        hits = correct(module.to(args.device), network, len(network.validation))
        row[key] = float(hits.mean() * 100)
    return {**row, **origin()}


def taken_bits(run: Run) -> float:
    """Average bits of the allocation that a run has."""
    allocation = read_allocation(run.file(ALLOCATION))
    assert allocation.taken is not None
    return allocation.attempts[allocation.taken].bits


def write_page() -> None:
    """Both tables: allocated beside uniform over the seeds, and the budgets of points."""
    cells, drops = [], []
    groups = dict.fromkeys((r["network"], r["widths"], r["settings"]) for r in BUDGETS.rows() if r["widths"])
    for network, widths, settings in groups:
        same = {"network": network, "widths": widths, "settings": settings}
        found = {m: BUDGETS.rows(**same, method=m) for m in (UNIFORM, ALLOCATED)}
        lost = {m: [r["float_top1"] - r["top1"] for r in rows] for m, rows in found.items()}
        if all(lost.values()):
            shown = [f"{mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in lost.values()]
            bits = f"{found[UNIFORM][0]['bits']:.2f}"
            cells.append([network, bits, len(lost[ALLOCATED]), *shown, _shown(settings)])
    for row in BUDGETS.rows(widths=""):
        kept = (
            ("", "none found")
            if row["top1"] is None
            else (f"{row['bits']:.2f}", f"{row['float_top1'] - row['top1']:.2f}")
        )
        allowed = row["method"].removeprefix(DROP)
        drops.append([row["network"], row["seed"], allowed, *kept, _shown(row["settings"])])
    header = ["network", "bits on average", "seeds", "points lost, one format", "points lost, allocated"]
    header.append("settings")
    write_between(DOCS / "budgets.md", "bits", table(header, cells))
    header = ["network", "seed", "points allowed", "bits on average", "points lost on test images"]
    write_between(DOCS / "budgets.md", "drops", table([*header, "settings"], drops) if drops else "")


def _shown(settings: str) -> str:
    return ", ".join(f"`{s}`" for s in settings.split()) or "the recipe's"


def main() -> None:
    """Command line."""
    args = arguments(__doc__, METHODS, "runs/budgets").parse_args()
    torch.set_num_threads(args.threads)
    ends = ("",) if args.no_twins else ("", TWIN)
    names = [args.name] if args.what == "own" else [f"demo-{n}{end}" for n in args.only for end in ends]
    cells = [
        (name, "" if method.startswith(DROP) else widths, method, seed)
        for seed in range(args.seeds or 1)
        for name in names
        for widths in args.bits or DEFAULT_WIDTHS
        for method in args.methods
    ]
    for name, widths, method, seed in dict.fromkeys(cells) if args.what != "table" else ():
        key = {
            "network": name,
            "widths": widths,
            "method": method,
            "seed": seed,
            "settings": " ".join(args.set),
        }
        if BUDGETS.find(**key) is None:
            BUDGETS.put(measure(name, widths, method, seed, args))
    write_page()


if __name__ == "__main__":
    main()
