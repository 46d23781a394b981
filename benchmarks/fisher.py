"""How much of the Fisher weights is chance: two halves of the calibration images, at several temperatures of the logits.

    python benchmarks/fisher.py RUN
    python benchmarks/fisher.py RUN --data calib                   # not a packaged network: its calibration images

RUN is a finished run, whose float network (equalized, where its recipe says so), slices and images are taken. At every
fourth cut: correlation of the weights that one half of the images gives with those of the other, over all elements; and the
share of the elements that would hold as much if they were equal (participation ratio), which says how concentrated they are.
"""

from __future__ import annotations

import torch
from lib.classifiers import image_set
from lib.rows import add_run, make_parser, table
from torch import Tensor

from ospq_export.calibrate.objectives.fisher import fisher_weights
from ospq_export.formats.choice import integers
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.runs.run import Run
from ospq_export.validate.report.model import machine_name

_EVERY = 4


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over all elements."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def participation(weights: Tensor) -> float:
    """(sum w)^2 / (n sum w^2), in (0, 1]."""
    return float(weights.sum().square() / (weights.numel() * weights.square().sum()))


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    add_run(parser)
    parser.add_argument("--images", type=int, default=256, help="both halves together")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 2.0, 4.0, 8.0])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run.open(args.run)
    recipe = run.manifest.recipe
    images = image_set(args.data, "calibration", run.manifest.data).sample(args.images, seed=0).images
    halves = images.chunk(2)
    network = insert_quantizers(
        run.captured(), integers(recipe.weight_bits, recipe.activation_bits, recipe.first_last_bits)
    )
    ends = [s.end for s in run.manifest.slices][1::_EVERY]
    rows = []
    for temperature in args.temperatures:
        one, other = (
            fisher_weights(network, ends, half, torch.device("cpu"), seed, temperature)
            for seed, half in enumerate(halves)
        )
        cells = [f"{correlation(one[e], other[e]):.2f} ({participation(one[e]):.3f})" for e in ends]
        rows.append([f"T = {temperature:g}", *cells])
    print(table([f"{len(halves[0])} images each", *ends], rows))
    print(f"\nMachine: {machine_name()}.")


if __name__ == "__main__":
    main()
