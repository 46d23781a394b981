"""Where images lie, which endings they have, how one is read, and which are drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ospq_export.data.config import DataConfig
from ospq_export.data.masks import MaskReader
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


def check_images(images: NDArray[Any]) -> None:
    """Raises ValueError where these are no images in 8 bits."""
    if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or images.ndim < 3:
        raise ValueError(f"images are uint8 (N, H, W[, 3]), not {images.dtype} {images.shape}")


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
        check_images(self.images)
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
        masks: Pictures with a class in each pixel, one per image; None without.
    """

    paths: Sequence[Path]
    labels: NDArray[np.int64]
    ids: Sequence[str]
    masks: Sequence[Path] | None = None

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index` in PIL mode `mode`, and notes on it; see `read_picture`."""
        return read_picture(self.paths[index], mode, exif=exif)


@dataclass(frozen=True)
class Record:
    """An image out of a stream, still encoded.

    Attributes:
        id: Its name.
        content: The file's bytes.
        label: A class name or number; None without.
        by_name: Whether the label is a name, though it may look like a number.
    """

    id: str
    content: bytes
    label: str | int | None = None
    by_name: bool = False


@dataclass(frozen=True)
class Held:
    """Images that lie in memory, still encoded.

    Attributes:
        content: Files by their images' places, or the reason why there is none.
        labels: int64, (N,).
        ids: N names; there may be more than files.
    """

    content: Mapping[int, bytes | Exception]
    labels: NDArray[np.int64]
    ids: Sequence[str]

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index` in PIL mode `mode`, and notes on it; see `read_picture`."""
        content = self.content[index]
        if isinstance(content, Exception):
            raise content
        return read_picture(io.BytesIO(content), mode, exif=exif)


@runtime_checkable
class Gathering(Protocol):
    """A source that cannot read single images well."""

    def gather(self, indices: Sequence[int]) -> Held:
        """The images at these places."""


@dataclass(frozen=True)
class Decoded:
    """One image.

    Attributes:
        index: Its place in the source.
        pixels: (C, H, W) float32, or the reason why there are none.
        notes: What has to be said about it.
        mask: int64, (H, W), the class of each pixel; None without.
    """

    index: int
    pixels: Tensor | str
    notes: tuple[str, ...] = ()
    mask: Tensor | None = None


@dataclass(frozen=True)
class Chunk:
    """What a worker hands over: the images it could read as one tensor, for each costs a file descriptor.

    Attributes:
        indices: Places of the readable images in the source.
        images: float32, (len(indices), C, H, W).
        notes: What has to be said about each of them.
        unreadable: Places of the others, and why they could not be read.
        masks: int64, (len(indices), H, W); None without.
    """

    indices: list[int]
    images: Tensor
    notes: list[tuple[str, ...]]
    unreadable: list[tuple[int, str]]
    masks: Tensor | None = None


class Decoder(Dataset[Decoded]):
    """Decoding and the transform, and never an exception for a bad file."""

    def __init__(self, source: Source, config: DataConfig) -> None:
        self._source = source
        self._config = config
        self._transform = config.transform()
        masks = getattr(source, "masks", None)
        self._masks = None if masks is None else MaskReader(masks, config)

    def __getitem__(self, index: int) -> Decoded:
        try:
            image, notes = self._source.decode(index, self._config.image_mode, self._config.exif)
            mask = None if self._masks is None else self._masks.read(index, image.size)
        except Exception as error:
            # PIL's decoders raise all sorts of things on damaged files, SyntaxError and struct.error too.
            return Decoded(index, f"{type(error).__name__}: {error}")
        return Decoded(index, self._transform(image), notes, mask)


def gather(decoded: list[Decoded]) -> Chunk:
    """Puts a batch of decoded images together."""
    readable = [(d.index, d.pixels, d.notes) for d in decoded if isinstance(d.pixels, Tensor)]
    masks = [d.mask for d in decoded if d.mask is not None]
    return Chunk(
        [index for index, _, _ in readable],
        torch.stack([pixels for _, pixels, _ in readable]) if readable else torch.empty(0),
        [notes for _, _, notes in readable],
        [(d.index, d.pixels) for d in decoded if isinstance(d.pixels, str)],
        torch.stack(masks) if masks else None,
    )


def stratified(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Places of a random sample in which every class has its share, so that it stands for the whole set.

    Classes get their proportional part, rounded down, and those with the largest remainders one more until `count` is reached
    (Hamilton's method; equal remainders are drawn by lot).

    Args:
        labels: Classes of all images, (N,); images without a class are a class of their own.
        count: How many, at most N.
        seed: The choice depends on nothing else.

    Returns:
        The places, (count,), in ascending order.
    """
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    sizes = np.array([len(group) for group in groups])
    parts, remainders = np.divmod(sizes * count, len(labels))
    # lexsort: the last key decides first.
    largest = np.lexsort((rng.permutation(len(groups)), -remainders))
    parts[largest[: count - parts.sum()]] += 1
    chosen = [rng.choice(group, part, replace=False) for group, part in zip(groups, parts, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
