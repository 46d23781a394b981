"""How far a few images can tell granularities apart, by several measures of the quantized network's output.

    python benchmarks/judges.py runs/granularity/demo-swin-w3a3-*

Takes finished runs of one packaged network that differ in their slicing. For every measure (total variation is that of the class
probabilities, logits divided by T): its spread over the images relative to its mean, and the rank correlation (Spearman) between
the runs' values on a few images, drawn at random, and on all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lib.rows import make_parser, table
from lib.trials import measures
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from ospq_export.demo import demo_images
from ospq_export.runs.run import Run

_DRAWS = 300


def logits(module: nn.Module, batches: list[Tensor]) -> Tensor:
    """(N, K)."""
    with torch.inference_mode():
        return torch.cat([module(images) for images in batches])


def agreement(values: NDArray[np.float32], size: int) -> float:
    """Mean rank correlation of the runs' means over `size` images with those over all; values (runs, N)."""
    random = np.random.default_rng(0)
    draws = [random.choice(values.shape[1], size, replace=False) for _ in range(_DRAWS)]
    truth = values.mean(1)
    return float(np.mean([spearmanr(values[:, chosen].mean(1), truth)[0] for chosen in draws]))


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--sizes", nargs="*", type=int, default=[128, 256, 512])
    args = parser.parse_args()
    runs = [Run.open(path) for path in args.runs]
    images = demo_images("test", runs[0].manifest.data)
    batches = [batch.images for batch in images.batches(200, range(args.images))]
    target = logits(runs[0].float_network(), batches)
    found = [measures(logits(run.fake_quant_network(), batches), target) for run in runs]
    rows = []
    for name in found[0]:
        values = np.stack([f[name].numpy() for f in found])
        spread = float(np.mean(values.std(1) / values.mean(1)))
        rows.append([name, f"{spread:.2f}", *(f"{agreement(values, size):.2f}" for size in args.sizes)])
    print(table(["measure", "spread over mean", *(f"{size} images" for size in args.sizes)], rows))


if __name__ == "__main__":
    main()
