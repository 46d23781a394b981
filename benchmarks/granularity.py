"""Does the reconstruction granularity matter, and does `auto` find it? Fake-quantized Top-1 of every slicing beside its peers.

    python benchmarks/granularity.py demo                    # both packaged networks and their outlier-injected twins
    python benchmarks/granularity.py own --name dinov2-vits --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/granularity.py table                   # its pages from the rows at hand

A row per series, network, bits, method and seed in benchmarks/rows/granularity.jsonl; finished rows are not measured again, and
interrupted calibrations resume. Several rows at a time: --processes 2; on a GPU: --device cuda. Rows of another recipe (--set)
are another --series, which has a part of the page of its own. All methods share one code:

    rtn       nearest rounding with the ranges that all start from
    adaround  every operator alone, no drop        brecq  block, Fisher-weighted, no drop        qdrop  block, drop 0.5
    layer .. model   the granularity, with the recipe's own loss and drop 0.5
    auto      the granularity chosen by trials, whose cost comes on top (0.3 of the reconstruction)
    auto-plain   the same without equalization: what choice and loss are worth beside qdrop
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lib.rows import DOCS, GRANULARITY, TABLES_OF_NOTES, write_between
from lib.rows import table as markdown
from lib.top1 import Cell, arguments, measure_all, table_of

DOCUMENT = TABLES_OF_NOTES / "granularity.md"
SLICES = DOCS / "slices.md"
MAIN = "main"
PLAIN = ["equalization=none"]
# The peers do without what is ours: no equalization, and the loss that their papers have.
PEER = [*PLAIN, "reconstruction.loss=normalized"]
AUTO = ["slicing=auto"]
OWN = ("layer", "atom", "block", "blocks:2", "blocks:4", "stage", "model")
METHODS: dict[str, list[str]] = {
    "rtn": ["slicing=block", "reconstruction.iterations=0", "reconstruction.refinement_images=0", *PEER],
    "adaround": ["slicing=layer", "reconstruction.drop_probability=0.0", *PEER],
    "brecq": [
        *("slicing=block", "reconstruction.drop_probability=0.0"),
        *("reconstruction.loss=fisher", "reconstruction.loss.temperature=1.0"),
        *PLAIN,
    ],
    "qdrop": ["slicing=block", *PEER],
    **{name: [f"slicing={name}"] for name in OWN},
    "auto": AUTO,
    "auto-plain": [*AUTO, *PLAIN],
}


def document() -> str:
    """notes/tables/granularity.md: the table and what is to be said of it."""
    lines = [
        "# Granularity",
        "",
        "Fake-quantized Top-1 in percent, mean and (where there are several seeds) largest minus smallest. Written by",
        "`benchmarks/granularity.py`, whose docstring says what the columns are; raw rows in",
        "`benchmarks/rows/granularity.jsonl`. An empty cell is not measured yet.",
        "",
        *_series(MAIN, list(METHODS)),
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
        *_series("steps-200", [*METHODS]),
        "",
        "## With Fisher weights of the logits themselves",
        "",
        "DINOv2 as in the table above, but for `reconstruction.loss.temperature=1`; above it is 4.",
        "",
        *_series("fisher-t1", [*OWN, "auto"]),
        "",
        "## Without dropping",
        "",
        "DINOv2 as in the table above, but for `reconstruction.drop_probability=0`; above it is 0.5.",
        "",
        *_series("no-drop", [*OWN]),
        "",
        "## With the plain loss",
        "",
        "200 steps, `reconstruction.loss=normalized`, and trials judged by the KL divergence on 128 images as they were then.",
        "",
        *_series("normalized", [*OWN, "auto", "auto-plain"]),
        "",
    ]
    return "\n".join(lines) + "\n" + GRANULARITY.notes()


def short() -> str:
    """The table of docs/slices.md: the packaged networks at three bits, DINOv2, and the granularities between the extremes."""
    rows = [*GRANULARITY.rows(series=MAIN), *GRANULARITY.rows(series="steps-200", network="dinov2-vits")]
    rows = [row for row in rows if not row["network"].endswith("-twin")]
    return "\n".join(table_of(rows, ["layer", "atom", "block", "blocks:2", "blocks:4", "model", "auto"]))


def choices() -> list[str]:
    """What `auto` chose, and how its trials ranked the candidates."""
    rows = [row for row in GRANULARITY.rows(series=MAIN) if row["method"] in ("auto", "auto-plain")]
    if not rows:
        return []
    rows.sort(key=lambda row: Cell(*(row[field] for field in Cell._fields)).name)
    cells = []
    for row in rows:
        found = row["slicing"]
        tried = sorted(found["candidates"], key=lambda c: (-len(c["divergence"]), c["divergence"][-1:]))
        scores = ", ".join(f"{c['name']} " + " / ".join(f"{d:.4f}" for d in c["divergence"]) for c in tried)
        facts = [row["network"], row["bits"].upper(), row["method"], row["seed"]]
        cells.append([*facts, found["choice"], row["slices"], scores])
    header = ["network", "bits", "method", "seed", "choice", "slices", "trials (total variation, T = 2)"]
    return ["## What `auto` chose", "", markdown(header, cells)]


def _series(name: str, methods: Sequence[str]) -> list[str]:
    return table_of(GRANULARITY.rows(series=name), methods)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, list(METHODS), "runs/granularity")
    parser.add_argument("--series", default=MAIN, help="which part of the page the rows belong to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.series != MAIN:
        # The same network, bits, method and seed are another run there.
        args.runs = f"{args.runs}/{args.series}"
    if args.what != "table":
        measure_all(args, METHODS, GRANULARITY, series=args.series)
    if GRANULARITY.rows(series=MAIN):
        DOCUMENT.write_text(document())
        write_between(SLICES, "granularity", short())


if __name__ == "__main__":
    main()
