"""Reads the idx files of Fashion-MNIST, as Debian's package `dataset-fashion-mnist` installs them."""

import gzip
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
