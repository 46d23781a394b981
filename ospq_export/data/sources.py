"""Where images come from: files, or arrays in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ospq_export.data.pixels import read_picture

NO_LABEL = -1
"""The label of an image whose class is not known: torch's targets leave negative numbers free."""


class Source(Protocol):
    """An ordered set of labelled images, each decoded when it is asked for."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class indices, (N,)."""

    @property
    def ids(self) -> Sequence[str]:
        """N names."""

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index`, all pixels read, as PIL mode `mode`, and notes on it; raises anything where that fails."""


@dataclass(frozen=True)
class ArraySource:
    """Images that lie in memory.

    Attributes:
        images: uint8, (N, H, W) or (N, H, W, 3).
        labels: int64, (N,).
        ids: N names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: Sequence[str]

    def __post_init__(self) -> None:
        """Raises ValueError where the three do not belong together."""
        if self.images.dtype != np.uint8 or self.images.shape[3:] not in ((), (3,)) or self.images.ndim < 3:
            raise ValueError(f"images are uint8 (N, H, W[, 3]), not {self.images.dtype} {self.images.shape}")
        if not len(self.images) == len(self.labels) == len(self.ids):
            raise ValueError("images, labels and ids differ in number")

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index` in PIL mode `mode`; arrays have no EXIF."""
        return Image.fromarray(self.images[index]).convert(mode), ()


@dataclass(frozen=True)
class FolderSource:
    """Image files.

    Attributes:
        paths: The files.
        labels: int64, (N,); NO_LABEL where the class is not known.
        ids: The paths relative to the folder, with forward slashes.
    """

    paths: Sequence[Path]
    labels: NDArray[np.int64]
    ids: Sequence[str]

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index` in PIL mode `mode`, and notes on it; see `read_picture`."""
        return read_picture(self.paths[index], mode, exif=exif)
