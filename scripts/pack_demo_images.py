"""Packs the demonstration's images: 1,024 for calibration, balanced over the classes, and the whole test set.

Images: the idx files of Debian's package `dataset-fashion-mnist` (MIT licence), which are in its folder
/usr/share/datasets/fashion-mnist. The files written are the same bytes on every run.
"""

from __future__ import annotations

import argparse
import gzip
import io
import lzma
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIDE = 28


def read_split(folder: Path, kind: Literal["train", "t10k"]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, 28, 28) and labels (N,) of the training set or the test set, both uint8."""
    images = np.frombuffer(_read(folder / f"{kind}-images-idx3-ubyte.gz"), np.uint8, offset=16)
    labels = np.frombuffer(_read(folder / f"{kind}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    return images.reshape(-1, SIDE, SIDE), labels


def _read(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read()


ASSETS = Path(__file__).parents[1] / "ospq_export" / "demo" / "assets"
CALIBRATION_IMAGES = 1024
SEED = 0


def balanced_choice(labels: NDArray[np.uint8], count: int, seed: int) -> NDArray[np.int32]:
    """Indices (count,) of images whose classes differ in number by one at most, in random order."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(labels))
    shares = [count // len(classes) + (place < count % len(classes)) for place in range(len(classes))]
    chosen = [
        rng.choice(np.flatnonzero(labels == name), share, replace=False)
        for name, share in zip(classes, shares, strict=True)
    ]
    return rng.permutation(np.concatenate(chosen)).astype(np.int32)


def pack(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8], indices: NDArray[np.int32]
) -> None:
    """Writes the images at `indices`, their labels and the indices: xz around npz beats npz's own deflate."""
    buffer = io.BytesIO()
    np.savez(buffer, images=images[indices], labels=labels[indices], indices=indices)
    path.write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{path}: {len(indices)} images, {path.stat().st_size:,} bytes")


def main() -> None:
    """Packs both sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the four idx files")
    parser.add_argument("--out", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    images, labels = read_split(arguments.data, "train")
    chosen = balanced_choice(labels, CALIBRATION_IMAGES, SEED)
    pack(arguments.out / "fashion_calibration.npz.xz", images, labels, chosen)
    images, labels = read_split(arguments.data, "t10k")
    pack(arguments.out / "fashion_test.npz.xz", images, labels, np.arange(len(labels), dtype=np.int32))


if __name__ == "__main__":
    main()
