"""Peak memory of a calibration against its budget for cached activations.

    python benchmarks/memory.py                                     # a DeiT-S of two blocks, 128 images, three budgets
    python benchmarks/memory.py --model vit_base_patch16_224 --model-kwargs '' --images 1024 --budgets 1GB 4GB 8GB

Each budget has a process of its own, which calibrates a network with random weights on random images for a few steps per slice
and looks at its resident memory fifty times a second. What is reported is the growth since just before the first slice, when the
network, the images and the libraries are there already. Mapped pages count while the process looks at them.
Rows in benchmarks/rows/memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from lib.networks import random_batch, random_network
from lib.rows import MEMORY, make_parser, origin, said_by
from lib.rows import table as markdown

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.reconstruct.store import parse_bytes
from ospq_export.recipes import load_recipe
from ospq_export.world.memory import process_bytes


class Watch:
    """Highest resident memory while it runs."""

    def __init__(self) -> None:
        self.peak, self.running = 0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, process_bytes("VmRSS"))
            time.sleep(0.02)


def measure(args: argparse.Namespace, budget: int) -> dict[str, Any]:
    """One row, in this process."""
    spec, model, config = random_network(args.model, args.model_kwargs)
    batch = random_batch(args.images, config.input_size)
    overrides = [f"calibration_images={args.images}", "observation_images=8", "equalization=none"]
    overrides += [f"reconstruction.{o}" for o in (f"iterations={args.iterations}", "refinement_images=0")]
    recipe = load_recipe("w4a4", overrides)
    watch, facts = Watch(), {}

    def listen(event: str, found: dict[str, Any]) -> None:
        facts[event] = found
        if event == "cost":
            facts["before"] = process_bytes("VmRSS")
            watch.thread.start()

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        calibrate(
            model, spec, batch, config, recipe, Path(folder) / "run", memory_budget=budget, events=listen
        )
    watch.running = False
    used = facts["done"]["activation_bytes"]
    return {
        "model": f"{args.model} {args.model_kwargs}".strip(),
        "images": args.images,
        "budget": budget,
        "foreseen": facts["cost"]["activation_bytes"],
        "host": used["host"],
        "disk": used["disk"],
        "image_bytes": batch.images.numel() * 4,
        "growth": watch.peak - facts["before"],
        "peak": watch.peak,
        **origin(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in MB."""
    header = ["model", "images", "budget", "foreseen", "held in memory", "on disk"]
    columns = ("budget", "foreseen", "host", "disk", "growth", "peak")
    cells = [[r["model"], r["images"], *(f"{r[c] / 1e6:.0f}" for c in columns)] for r in rows]
    return markdown([*header, "growth of resident memory", "peak"], cells)


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--model-kwargs", default="depth=2")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--budgets", nargs="*", default=["100MB", "150MB", "1GB"])
    parser.add_argument("--folder", help="where the files go; the system's temporary folder by default")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args, args.one)))
        return
    for budget in args.budgets:
        MEMORY.put(said_by(__file__, [*sys.argv[1:], "--one", str(parse_bytes(budget))]))
    print(table(MEMORY.rows()))


if __name__ == "__main__":
    main()
