"""Peak memory of a validation on tar shards, against the number of images.

    python benchmarks/archives.py                       # 10,000 and 60,000 images, three tasks: about an hour on one processor
    python benchmarks/archives.py --counts 500 2000     # a look
    python benchmarks/archives.py --table

A small network is calibrated for each task; images and labels are random. Every validation is a process of its own, in which ONNX
Runtime is the only deployed execution. What a validation keeps of the outputs grows with the images; the images themselves,
embeddings and maps must not be kept.
Rows in benchmarks/rows/archives.jsonl.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lib.rows import ARCHIVES, Row, make_parser, origin, said_by
from lib.rows import table as markdown
from PIL import Image
from torch import Tensor, nn

from ospq_export import DataConfig, Run, Session
from ospq_export.world.memory import peak_memory

SIDE, CLASSES, PER_SHARD = 48, 10, 2000
TASKS = ("classify", "embed", "dense")
SHORT = ["slicing=model", "calibration_images=64", "observation_images=64", "reconstruction.iterations=0"]
SHARED = {
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
_MB = 1e6


class Net(nn.Module):
    """A vision transformer of one block; what it returns is the task's."""

    def __init__(self, task: str) -> None:
        super().__init__()
        classes = 0 if task == "embed" else CLASSES
        shape = {"img_size": SIDE, "patch_size": 8, "depth": 1, "embed_dim": 192, "num_heads": 3}
        self.task, self.network = (
            task,
            timm.create_model("vit_tiny_patch16_224", num_classes=classes, **shape),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10), features (B, 192), or logits (B, 10, 6, 6) of every patch."""
        network: Any = self.network
        if self.task != "dense":
            found: Tensor = network(x)
            return found
        logits: Tensor = network.head(network.forward_features(x)[:, 1:])
        return logits.transpose(1, 2).unflatten(2, (SIDE // 8, SIDE // 8))


def write_shards(folder: Path, count: int) -> None:
    """Random JPEG images of ten classes in shards of 2,000."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for start in range(0, count, PER_SHARD):
        with tarfile.open(folder / f"shard-{start // PER_SHARD:04d}.tar", "w") as archive:
            for i in range(start, min(start + PER_SHARD, count)):
                picture = io.BytesIO()
                coarse = generator.integers(0, 256, (6, 6, 3), np.uint8)
                Image.fromarray(coarse).resize((64, 64)).save(picture, "JPEG")
                for name, content in (
                    (f"{i:06d}.jpg", picture.getvalue()),
                    (f"{i:06d}.cls", f"{i % CLASSES}".encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def make_run(task: str, folder: Path) -> None:
    """A calibrated and exported run."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, SIDE, SIDE)
    config = DataConfig(input_size=(3, SIDE, SIDE), **SHARED)
    run = Run.calibrate(
        Net(task).eval(), images, "w8a8", folder, overrides=SHORT, task=task, preprocessing=config
    )
    run.export()


def validated(run: Path, data: Path) -> dict[str, Any]:
    """A validation in this process, and the most memory that it took."""
    report = Run.open(run).validate(data, backends=["onnxruntime"], session=Session(progress=True))
    return {"images": report.images, "peak": peak_memory(torch.device("cpu"))}


def table(rows: list[Row]) -> str:
    """Markdown, in MB."""
    lines = [[r["task"], f"{r['images']:,}", f"{r['peak'] / _MB:.0f}"] for r in rows]
    return markdown(["task", "images", "peak of the process, MB"], lines)


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=[10_000, 60_000])
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--folder", help="where the files go; the system's temporary folder by default")
    parser.add_argument("--table", action="store_true", help="print the rows that are there")
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(validated(*args.one)))
        return
    if not args.table:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            for task in args.tasks:
                make_run(task, folder / task)
            for count in args.counts:
                write_shards(folder / str(count), count)
                for task in args.tasks:
                    found = said_by(__file__, ["--one", str(folder / task), str(folder / str(count))])
                    ARCHIVES.put({"task": task, **found, **origin()})
                    print(task, found, file=sys.stderr, flush=True)
    print(table(ARCHIVES.rows()))


if __name__ == "__main__":
    main()
