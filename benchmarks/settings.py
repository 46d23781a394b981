"""Which settings help: equalization, loss, bias correction, one changed at a time, slicing `block`.

    python benchmarks/settings.py demo                    # both packaged networks and their outlier-injected twins
    python benchmarks/settings.py own --name dinov2-vits --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/settings.py table                   # notes/tables/settings.md from the rows at hand

Rows in benchmarks/rows/settings.jsonl, as in granularity.py. The first column is the starting point, the others change one thing:

    base      equalization `shift`, normalised loss, mean squared error at the logits, no bias correction
    none, smooth, repq   another equalization
    channel, fisher      another loss          soft-fisher   Fisher information of the logits over 4
    kl   Kullback-Leibler divergence at the logits
    no-drop, fisher-no-drop, soft-fisher-no-drop   inputs are always the quantized ones
    bias      every operator's bias corrected  offsets   learned offsets of `shifted` grids (8-bit activations only)
    no-refinement        scales start from the searched ranges
    bf16                 products of bf16 factors while learning
"""

from __future__ import annotations

import torch
from lib.rows import SETTINGS, TABLES_OF_NOTES
from lib.top1 import arguments, measure_all, table_of

DOCUMENT = TABLES_OF_NOTES / "settings.md"
BASE = [
    "slicing=block",
    "equalization=shift",
    "reconstruction.loss=normalized",
    "reconstruction.final_loss=same",
    "reconstruction.bias_correction=false",
]
FISHER = [*BASE, "reconstruction.loss=fisher", "reconstruction.loss.temperature=1.0"]
SOFT = [*FISHER, "reconstruction.loss.temperature=4.0"]
VARIANTS: dict[str, list[str]] = {
    "base": BASE,
    **{name: [*BASE, f"equalization={name}"] for name in ("none", "smooth", "repq")},
    "channel": [*BASE, "reconstruction.loss=channel"],
    "fisher": FISHER,
    "soft-fisher": SOFT,
    "soft-fisher-no-drop": [*SOFT, "reconstruction.drop_probability=0.0"],
    "kl": [*BASE, "reconstruction.final_loss=kl"],
    "no-drop": [*BASE, "reconstruction.drop_probability=0.0"],
    "fisher-no-drop": [*FISHER, "reconstruction.drop_probability=0.0"],
    "bias": [*BASE, "reconstruction.bias_correction=true"],
    "offsets": [*BASE, "reconstruction.learn_offsets=true"],
    "no-refinement": [*BASE, "reconstruction.refinement_images=0"],
    "bf16": [*BASE, "reconstruction.precision=bf16"],
}


def document() -> str:
    """notes/tables/settings.md: the table and what is to be said of it."""
    lines = [
        "# Settings",
        "",
        "Fake-quantized Top-1 in percent, one setting changed at a time. Written by `benchmarks/settings.py`, whose docstring",
        "says what the columns are; raw rows in `benchmarks/rows/settings.jsonl`. An empty cell is not measured.",
        "",
        *table_of(SETTINGS.rows(), list(VARIANTS)),
        "",
    ]
    return "\n".join(lines) + SETTINGS.notes()


def main() -> None:
    """Command line."""
    args = arguments(__doc__, list(VARIANTS), "runs/settings").parse_args()
    torch.set_num_threads(args.threads)
    if args.what != "table":
        measure_all(args, VARIANTS, SETTINGS)
    if SETTINGS.rows():
        DOCUMENT.write_text(document())


if __name__ == "__main__":
    main()
