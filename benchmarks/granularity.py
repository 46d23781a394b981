"""Does the reconstruction granularity matter, and does `auto` find it? Fake-quantized Top-1 of every slicing beside its peers.

    python benchmarks/granularity.py demo                    # both packaged networks and their outlier-injected twins
    python benchmarks/granularity.py own --name dinov2-vits --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/granularity.py table                   # docs/granularity.md from the rows at hand

A row per network, bits, method and seed in benchmarks/granularity/*.json; finished rows are not measured again, and interrupted
calibrations resume. Several rows at a time: --processes 2; on a GPU: --device cuda. All methods share one code and one recipe:

    rtn       nearest rounding with the ranges that all start from
    adaround  every operator alone, no drop        brecq  block, Fisher-weighted, no drop        qdrop  block, drop 0.5
    layer .. model   the granularity, with the recipe's own loss and drop 0.5
    auto      the granularity chosen by trials, whose cost comes on top (0.3 of the reconstruction)
    auto-plain   the same without equalization: what choice and loss are worth beside qdrop
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from networks import device_name
from networks import table as markdown
from results import HERE, Network, correct, demo_network, finished_run, own_network

from ospq_export.calibrate import calibrate
from ospq_export.graph.outliers import twin_state_dict
from ospq_export.models.timm import create_model
from ospq_export.progress import stage_progress
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import write_json
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import write_tensors

ROWS = HERE / "granularity"
DOCUMENT = HERE.parent / "docs" / "granularity.md"
BITS = {"w3a3": (3, 3), "w4a4": (4, 4), "w4a8": (4, 8), "w6a6": (6, 6), "w8a8": (8, 8)}
PLAIN = ["equalization=none"]
# The peers do without what is ours: no equalization, and the loss that their papers have.
PEER = [*PLAIN, "reconstruction.loss=normalized"]
AUTO = ["slicing=auto"]
TWIN = "-twin"
OWN = ("layer", "atom", "block", "blocks:2", "blocks:4", "stage", "model")
METHODS: dict[str, list[str]] = {
    "rtn": ["slicing=block", "reconstruction.iterations=0", "reconstruction.refinement_images=0", *PEER],
    "adaround": ["slicing=layer", "reconstruction.drop_probability=0.0", *PEER],
    "brecq": [
        *("slicing=block", "reconstruction.drop_probability=0.0"),
        *("reconstruction.loss=fisher", "reconstruction.fisher_temperature=1.0"),
        *PLAIN,
    ],
    "qdrop": ["slicing=block", *PEER],
    **{name: [f"slicing={name}"] for name in OWN},
    "auto": AUTO,
    "auto-plain": [*AUTO, *PLAIN],
}


def twin(network: Network, folder: Path) -> Network:
    """The network with injected outlier channels: the same float function from another checkpoint."""
    path = folder / f"{network.name}{TWIN}.safetensors"
    if not path.is_file():
        state = twin_state_dict(network.model, network.config.input_size)
        write_tensors(path, state)
    spec = network.spec.model_copy(update={"checkpoint": str(path)})
    return replace(network, name=f"{network.name}{TWIN}", spec=spec, model=create_model(spec))


def top1(run: Run, network: Network, device: str) -> float:
    """Top-1 (percent) of the fake-quantized network on all validation images."""
    module = run.fake_quant_network().to(device)
    return float(correct(module, network, len(network.validation)).mean() * 100)


def measure(
    network: Network, bits: str, method: str, overrides: Sequence[str], seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: the network calibrated with a method, which is so many overrides of the recipe, and its Top-1."""
    weight, activation = BITS[bits]
    widths = [f"name={bits}", f"weight_bits={weight}", f"activation_bits={activation}"]
    recipe = load_recipe("w4a4", [*widths, *args.set, *overrides])
    folder = Path(args.runs) / f"{network.name}-{bits}-{method.replace(':', '')}-{seed}"
    images = network.calibration.sample(recipe.calibration_images, seed=seed)
    run = finished_run(folder)
    if run is None:
        with stage_progress() as progress:
            run = calibrate(
                network.model,
                network.spec,
                images,
                network.config,
                recipe,
                folder,
                device=args.device,
                seed=seed,
                progress=progress,
            )
    slicing = run.manifest.slicing
    return {
        "network": network.name,
        "bits": bits,
        "method": method,
        "seed": seed,
        "top1": top1(run, network, args.device),
        "images": len(network.validation),
        "slices": len(run.manifest.slices),
        "seconds": round(sum(s.seconds for s in run.manifest.slices)),
        "recipe": recipe.model_dump(mode="json"),
        "slicing": None if slicing is None else slicing.model_dump(mode="json"),
        "machine": device_name(torch.device(args.device)),
    }


def table(rows_at: Path, methods: Sequence[str]) -> list[str]:
    """Top-1 in percent by network, bits and method, and the machine, from the rows at hand."""
    rows = [json.loads(path.read_text()) for path in sorted(rows_at.glob("*.json"))]
    groups: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["network"], row["bits"]][row["method"]].append(row["top1"])
    cells = [
        [network, bits.upper(), *(_cell(found.get(method, [])) for method in methods)]
        for (network, bits), found in sorted(groups.items())
    ]
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    steps = ", ".join(sorted({str(row["recipe"]["reconstruction"]["iterations"]) for row in rows}, key=int))
    lines = markdown(["network", "bits", *methods], cells)
    return [lines, f"Steps per slice: {steps} (0 is RTN). Machine: {machines}."]


def document() -> str:
    """docs/granularity.md: the table and what is to be said of it."""
    notes = ROWS / "notes.md"
    lines = [
        "# Granularity",
        "",
        "Fake-quantized Top-1 in percent, mean and (where there are several seeds) largest minus smallest. Written by",
        "`benchmarks/granularity.py`, whose docstring says what the columns are; raw rows in `benchmarks/granularity/`.",
        "An empty cell is not measured yet.",
        "",
        *table(ROWS, list(METHODS)),
        "",
        *choices(),
        "",
        "## With 200 steps per slice",
        "",
        "The same with `--set reconstruction.iterations=200` on a CPU; DINOv2 with 512 calibration images and batches of 16",
        "(W4A4) or 8 (W4A8, W6A6). Fisher weights: of the logits over four on DINOv2 (BRECQ: of the logits themselves,",
        "its own form), of the logits themselves elsewhere.",
        "`auto` has a larger budget here, 0.6 (DINOv2 0.65) of the reconstruction, since 0.3 of so few steps pays for no trials.",
        "",
        *table(ROWS / "steps-200", [*METHODS]),
        "",
        "## With Fisher weights of the logits themselves",
        "",
        "DINOv2 as in the table above, but for `reconstruction.fisher_temperature=1`; above it is 4.",
        "",
        *table(ROWS / "fisher-t1", [*OWN, "auto"]),
        "",
        "## Without dropping",
        "",
        "DINOv2 as in the table above, but for `reconstruction.drop_probability=0`; above it is 0.5.",
        "",
        *table(ROWS / "no-drop", [*OWN]),
        "",
        "## With the plain loss",
        "",
        "200 steps, `reconstruction.loss=normalized`, and trials judged by the KL divergence on 128 images as they were then.",
        "",
        *table(ROWS / "normalized", [*OWN, "auto", "auto-plain"]),
        "",
    ]
    return "\n".join(lines) + ("\n" + notes.read_text() if notes.is_file() else "")


def choices() -> list[str]:
    """What `auto` chose, and how its trials ranked the candidates."""
    rows = [json.loads(path.read_text()) for path in sorted(ROWS.glob("*-auto-*.json"))]
    if not rows:
        return []
    cells = []
    for row in rows:
        found = row["slicing"]
        tried = sorted(found["candidates"], key=lambda c: (-len(c["divergence"]), c["divergence"][-1:]))
        scores = ", ".join(f"{c['name']} " + " / ".join(f"{d:.4f}" for d in c["divergence"]) for c in tried)
        facts = [row["network"], row["bits"].upper(), row["method"], row["seed"]]
        cells.append([*facts, found["choice"], row["slices"], scores])
    header = ["network", "bits", "method", "seed", "choice", "slices", "trials (total variation, T = 2)"]
    return ["## What `auto` chose", "", markdown(header, cells)]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ±{max(values) - min(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def arguments(doc: str | None, methods: Sequence[str], runs: str) -> argparse.Namespace:
    """The command line, which `settings.py` has too."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for name in ("--name", "--model", "--checkpoint", "--calibration", "--validation"):
        parser.add_argument(name)
    parser.add_argument("--model-kwargs", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def main() -> None:
    """Command line."""
    args = arguments(__doc__, list(METHODS), "runs/granularity")
    if args.what != "table":
        measure_all(args, METHODS, ROWS)
    if any(ROWS.glob("*.json")):
        DOCUMENT.write_text(document())


def measure_all(args: argparse.Namespace, methods: Mapping[str, Sequence[str]], rows: Path) -> None:
    """Every row that is not at hand, seeds outermost, so that an interrupted table is a whole one of fewer seeds."""
    rest = [cell for cell in _cells(args) if not cell.path(rows).is_file()]
    shared = partial(_measure_one, args, methods, rows)
    if args.processes == 1:
        for cell in rest:
            shared(cell)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        for done in as_completed([pool.submit(shared, cell) for cell in rest]):
            done.result()


class Cell(NamedTuple):
    """One row to be measured."""

    network: str
    bits: str
    method: str
    seed: int

    def path(self, rows: Path) -> Path:
        """Where it goes."""
        return rows / f"{self.network}-{self.bits}-{self.method.replace(':', '')}-{self.seed}.json"


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


def _measure_one(
    args: argparse.Namespace, methods: Mapping[str, Sequence[str]], rows: Path, cell: Cell
) -> None:
    torch.set_num_threads(args.threads)
    if cell.network not in _networks:
        _networks[cell.network] = _network(cell.network, args)
    row = measure(_networks[cell.network], cell.bits, cell.method, methods[cell.method], cell.seed, args)
    write_json(cell.path(rows), row)
    print(*cell[:3], f"{cell.seed}: {row['top1']:.2f}", flush=True)


_networks: dict[str, Network] = {}


def _network(name: str, args: argparse.Namespace) -> Network:
    if args.what == "own":
        return own_network(args)
    plain = demo_network(name.removeprefix("demo-").removesuffix(TWIN))
    return twin(plain, Path(args.runs)) if name.endswith(TWIN) else plain


if __name__ == "__main__":
    main()
