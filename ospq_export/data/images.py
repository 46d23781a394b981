"""Batches of preprocessed images, streamed in a fixed order; one that cannot be read is named, not fatal."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ospq_export.data.config import DataConfig
from ospq_export.data.sources import ArraySource, Source, scan_folder
from ospq_export.errors import InputError

logger = logging.getLogger(__name__)

_SAMPLE_BATCH = 64


@dataclass(frozen=True)
class Batch:
    """Images as the network takes them.

    Attributes:
        images: float32, (B, C, H, W), normalised.
        labels: int64, (B,); -1 where the class is not known.
        ids: B names.
    """

    images: Tensor
    labels: Tensor
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


_Decoded = tuple[int, Tensor | str]
"""An image's place in its source, and its pixels (C, H, W) or the reason why there are none."""


@dataclass(frozen=True)
class _Chunk:
    """What a worker hands over: the images it could read as one tensor, for each costs a file descriptor.

    Attributes:
        indices: Places of the readable images in the source.
        images: float32, (len(indices), C, H, W).
        unreadable: Places of the others, and why they could not be read.
    """

    indices: list[int]
    images: Tensor
    unreadable: list[tuple[int, str]]


class _Decoder(Dataset[_Decoded]):
    """What runs in a worker process: decoding and the transform, and never an exception for a bad file."""

    def __init__(self, source: Source, config: DataConfig) -> None:
        self._source = source
        self._mode = config.image_mode
        self._transform = config.transform()

    def __getitem__(self, index: int) -> _Decoded:
        try:
            image = self._source.decode(index, self._mode)
        except Exception as error:
            # PIL's decoders raise all sorts of things on damaged files, SyntaxError and struct.error too.
            return index, f"{type(error).__name__}: {error}"
        return index, self._transform(image)


def _gather(decoded: list[_Decoded]) -> _Chunk:
    readable = [(index, pixels) for index, pixels in decoded if isinstance(pixels, Tensor)]
    return _Chunk(
        [index for index, _ in readable],
        torch.stack([pixels for _, pixels in readable]) if readable else torch.empty(0),
        [(index, reason) for index, reason in decoded if isinstance(reason, str)],
    )


class ImageSet:
    """An ordered set of images with one network's preprocessing.

    Attributes:
        config: The preprocessing.
        class_to_idx: Class names and their indices; empty where nothing tells the images' classes.
        skipped: Names of the images met so far that could not be read, each once, in the order met.
    """

    def __init__(
        self, source: Source, config: DataConfig, class_to_idx: Mapping[str, int], name: str
    ) -> None:
        self.config = config
        self.class_to_idx = dict(class_to_idx)
        self.skipped: list[str] = []
        self._source = source
        self._name = name

    @classmethod
    def from_folder(
        cls, root: Path, config: DataConfig, class_to_idx: Mapping[str, int] | None = None
    ) -> Self:
        """The images under `root`, one folder per class, or all directly in it and then without labels.

        Args:
            root: The folder.
            config: The preprocessing.
            class_to_idx: The classes' indices; None numbers the folders in timm's order.

        Raises:
            InputError: The folder is missing, cannot be read, has no image or a class not in `class_to_idx`.
        """
        source, classes = scan_folder(root, class_to_idx)
        return cls(source, config, classes, str(root))

    @classmethod
    def from_arrays(
        cls,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        ids: Sequence[str],
        config: DataConfig,
        class_names: Sequence[str],
    ) -> Self:
        """Images in memory, through the very transform that files go through.

        Args:
            images: uint8, (N, H, W) or (N, H, W, 3).
            labels: int64, (N,), indices into `class_names`.
            ids: N names.
            config: The preprocessing.
            class_names: The classes in the order of their indices.
        """
        source = ArraySource(images, labels, ids)
        return cls(source, config, {name: index for index, name in enumerate(class_names)}, "arrays")

    def __len__(self) -> int:
        """How many images there are, readable or not."""
        return len(self._source.ids)

    @property
    def ids(self) -> Sequence[str]:
        """Their names, readable or not, in order."""
        return self._source.ids

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None, workers: int = 0
    ) -> Iterator[Batch]:
        """Streams the readable images in order.

        Args:
            batch_size: Images per batch; only the last may hold fewer.
            indices: Which images, in which order; None is all of them in theirs.
            workers: Processes that decode; 0 decodes in this one. The batches do not depend on it.

        Yields:
            The batches.

        Raises:
            InputError: Not one of the images can be read.
        """
        order = range(len(self)) if indices is None else indices
        held: list[tuple[int, Tensor]] = []
        found = 0
        for image in self._readable(order, batch_size, workers):
            found += 1
            held.append(image)
            if len(held) == batch_size:
                yield self._collate(held)
                held = []
        if held:
            yield self._collate(held)
        if len(order) and not found:
            raise InputError(
                f"none of {len(order)} images can be read",
                where=self._name,
                mend=f"the first is {self._source.ids[order[0]]}",
            )

    def sample(self, count: int, seed: int, workers: int = 0) -> Batch:
        """Chooses images at random; one that cannot be read is replaced by the next in the random order.

        Args:
            count: How many; where fewer can be read, all of those, with a warning.
            seed: The choice depends on nothing else, so the same set and seed give the same images.
            workers: Processes that decode.

        Returns:
            The images, in random order.

        Raises:
            InputError: Not one image can be read, or none is asked for.
        """
        if count < 1:
            raise InputError("no images are asked for", where=count, mend="ask for one at least")
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        # One allocation: joining batches at the end would hold every image twice.
        images = torch.empty(min(count, len(self)), *self.config.input_size)
        labels: list[Tensor] = []
        ids: list[str] = []
        for batch in self.batches(min(count, _SAMPLE_BATCH), order, workers):
            room = min(len(batch), count - len(ids))
            images[len(ids) : len(ids) + room] = batch.images[:room]
            labels.append(batch.labels[:room])
            ids += batch.ids[:room]
            if len(ids) == count:
                break
        if len(ids) < count:
            logger.warning("%s: %d images asked for, all %d readable ones used", self._name, count, len(ids))
        return Batch(images[: len(ids)], torch.cat(labels), ids)

    def _readable(self, order: Sequence[int], batch_size: int, workers: int) -> Iterator[tuple[int, Tensor]]:
        """Places and pixels of the images in `order`, without those that cannot be read, which are noted."""
        loader: DataLoader[_Decoded] = DataLoader(
            _Decoder(self._source, self.config),
            batch_size=batch_size,
            sampler=order,
            num_workers=workers,
            collate_fn=_gather,
            # A generator of its own, else every pass would draw a number from torch's global one.
            generator=torch.Generator(),
        )
        for chunk in loader:
            for index, reason in chunk.unreadable:
                self._skip(index, reason)
            yield from zip(chunk.indices, chunk.images, strict=True)

    def _collate(self, images: list[tuple[int, Tensor]]) -> Batch:
        indices = [index for index, _ in images]
        return Batch(
            torch.stack([pixels for _, pixels in images]),
            torch.from_numpy(self._source.labels[indices]),
            [self._source.ids[index] for index in indices],
        )

    def _skip(self, index: int, reason: str) -> None:
        name = self._source.ids[index]
        if name not in self.skipped:
            self.skipped.append(name)
            logger.warning("skipped, it cannot be read: %s (%s)", name, reason)
