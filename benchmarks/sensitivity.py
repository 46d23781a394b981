"""Does the estimate of `sensitivity` rank operands as measuring each of them does? The table of docs/sensitivity.md.

    python benchmarks/sensitivity.py demo                   # both packaged networks
    python benchmarks/sensitivity.py own --name dinov2-vits --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/sensitivity.py table                  # the page from the rows at hand

Every operand is measured in every format, on the images that the estimate is made of. Times are of one process, without the
observation, which both need. Finished rows are kept in benchmarks/rows/sensitivity.jsonl.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from lib.classifiers import Network, add_networks, chosen_networks
from lib.rows import DOCS, SENSITIVITY, make_parser, origin, table, write_between
from rich.console import Console
from scipy.stats import spearmanr

from ospq_export.calibrate.allocate.effects import Operand
from ospq_export.calibrate.allocate.estimate import Estimator
from ospq_export.calibrate.allocate.sensitivity import (
    divergence_of,
    observed_networks,
    operands_of,
    outputs_of,
)
from ospq_export.graph.capture import capture
from ospq_export.tasks.classify import CLASSIFY

FORMATS = ("int8", "int4", "fp8", "nvfp4")
_BATCH = 8


def measure(network: Network, count: int) -> list[dict[str, Any]]:
    """A row for each format, and one for all of them."""
    images = network.calibration.sample(count, seed=0).images
    captured = capture(network.model, network.config.input_size)
    networks = observed_networks(captured, images, FORMATS)
    operands = operands_of(networks, captured)
    started = time.process_time()
    estimator, sums = Estimator(networks, CLASSIFY), [0.0] * len(operands)
    for place, batch in enumerate(images.split(_BATCH)):
        found = estimator.batch(batch, place)
        sums = [s + found[o.name, o.wanted] for s, o in zip(sums, operands, strict=True)]
    estimating = time.process_time() - started
    started = time.process_time()
    reference = outputs_of(networks[FORMATS[0]], images)
    measured = [divergence_of(networks[o.wanted], [o.name], images, CLASSIFY, reference) for o in operands]
    measuring = time.process_time() - started
    rows = []
    for label, chosen in [("all", list(FORMATS)), *((name, [name]) for name in FORMATS)]:
        places = [i for i, o in enumerate(operands) if o.wanted in chosen]
        rank = spearmanr([sums[i] for i in places], [measured[i] for i in places]).statistic
        row = {"network": network.name, "format": label, "operands": len(places), "images": count}
        row |= {"spearman": float(rank), "largest": _largest(operands, places, measured)}
        rows.append(row | {"cost": estimating / measuring, **origin()})
        Console().print(rows[-1])
    return rows


def _largest(operands: list[Operand], places: list[int], measured: list[float]) -> str:
    return operands[max(places, key=lambda i: measured[i])].name


def write_page() -> None:
    """The table."""
    cells = []
    for r in SENSITIVITY.rows():
        figures = [f"{r['spearman']:.2f}", f"{100 * r['cost']:.1f} %"]
        cells.append([r["network"], r["format"], r["operands"], r["images"], *figures, f"`{r['largest']}`"])
    header = [
        "network",
        "format",
        "operands",
        "images",
        "rank correlation",
        "time of measuring all",
        "costs most",
    ]
    write_between(DOCS / "sensitivity.md", "sensitivity", table(header, cells))


def main() -> None:
    """Command line."""
    parser: argparse.ArgumentParser = make_parser(__doc__)
    add_networks(parser)
    parser.add_argument("--images", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for network in chosen_networks(args):
        if SENSITIVITY.find(network=network.name, format="all") is None:
            SENSITIVITY.put(*measure(network, args.images))
    write_page()


if __name__ == "__main__":
    main()
