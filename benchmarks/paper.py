"""The paper's full recipe on DeiT-S at 224 px: wall time, and the share of it that the floor of its steps would take.

    python benchmarks/paper.py --device cuda
    python benchmarks/paper.py --device cpu --model-kwargs depth=1 --set reconstruction.iterations=3 calibration_images=64

Random weights and random images: neither changes what has to be computed. Writes a row of benchmarks/rows/paper.jsonl and
prints a table, slice by slice; the floor is that of benchmarks/lib/floor.py. An interrupted run goes on where it was when --out
is given again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lib.floor import Machine, Work, synchronize, unrecorded, work_of
from lib.networks import random_batch, random_network
from lib.rows import PAPER, make_parser, origin, table

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.objectives import objective_class
from ospq_export.calibrate.reconstruct.activations import SliceData, forward
from ospq_export.calibrate.reconstruct.learner import Learner
from ospq_export.calibrate.reconstruct.reconstructor import weight_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.graph.slicing import Slice, extract
from ospq_export.progress import stage_progress
from ospq_export.recipes import Reconstruction, load_recipe
from ospq_export.runs.run import Run


def floors(run: Run, images: torch.Tensor, device: torch.device) -> list[Work]:
    """What one step of every slice has to do; images (B, C, H, W) are one batch."""
    settings: Reconstruction = run.manifest.recipe.reconstruction
    network = run.quantized_graph()
    network.module.to(device)
    tensors: tuple[torch.Tensor, ...] = (images.to(device),)
    found = []
    for record in run.manifest.slices:
        bounds = Slice(record.name, record.start, record.end, tuple(record.received), tuple(record.carried))
        piece, count = extract(network.module, bounds), len(images)
        outputs = forward(piece, tensors, Mode.FLOAT, device, count)
        weights = weight_quantizers(piece)
        objective = objective_class(settings)(settings, weights)
        objective.normalise_by(1.0)
        learner = Learner(piece, SliceData(tensors, tensors, outputs[0], count), objective, settings, device)
        learner.learn = unrecorded(learner.learn)
        elements = sum(w.codes.numel() for w in weights)
        inputs: Any = (tensors[0], count, *tensors[1:])
        found.append(work_of(piece, inputs, lambda learner=learner: learner.step(1), elements))
        learner.settle()
        tensors = outputs
    return found


def measure(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Calibrate, and set the time of every slice beside its floor."""
    device = torch.device(args.device)
    spec, model, config = random_network(args.model, args.model_kwargs)
    recipe = load_recipe("paper-w4a4", args.set)
    batch = random_batch(recipe.calibration_images, config.input_size)
    started = time.monotonic()
    with stage_progress() as progress:
        run = calibrate(model, spec, batch, config, recipe, out, device=args.device, progress=progress)
    synchronize(device)
    wall = time.monotonic() - started
    machine = Machine.measured(device)
    steps = recipe.reconstruction.iterations
    works = floors(run, batch.images[: recipe.reconstruction.batch_size], device)
    return {
        "model": f"{args.model} {args.model_kwargs}".strip(),
        "device": args.device,
        "recipe": recipe.model_dump(mode="json"),
        "wall_seconds": wall,
        "slices": [
            {"name": s.name, "seconds": s.seconds, "floor_seconds": steps * w.seconds(machine)}
            for s, w in zip(run.manifest.slices, works, strict=True)
        ],
        **origin(args.device),
    }


def page(row: dict[str, Any]) -> str:
    """Markdown."""
    slices = row["slices"]
    cells = [
        [
            s["name"],
            f"{s['seconds']:.1f}",
            f"{s['floor_seconds']:.1f}",
            _share(s["floor_seconds"], s["seconds"]),
        ]
        for s in slices
    ]
    floor = sum(s["floor_seconds"] for s in slices)
    cells.append(
        ["whole run", f"{row['wall_seconds']:.1f}", f"{floor:.1f}", _share(floor, row["wall_seconds"])]
    )
    lines = [
        f"{row['model']}, {row['machine']}, {row['recipe']['reconstruction']['iterations']:,} steps per slice",
        "",
    ]
    return "\n".join([*lines, table(["slice", "seconds", "floor, seconds", "share"], cells)])


def _share(floor: float, seconds: float) -> str:
    return f"{floor / max(seconds, 1e-9):.0%}"


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--model-kwargs", default="")
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides")
    parser.add_argument("--out", type=Path, help="the run directory; by default one that goes afterwards")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, args.out or Path(folder) / "run")
    PAPER.put(row)
    print(page(row))


if __name__ == "__main__":
    main()
