"""Batches of preprocessed images, streamed in a fixed order; one that cannot be read is named, not fatal."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from ospq_export.data.classes import ClassChoice, Classes, check_folders, number_classes
from ospq_export.data.config import DataConfig, ImagesRecord
from ospq_export.data.folders import Scan, scan_folder
from ospq_export.data.pixels import Notes
from ospq_export.data.sources import (
    NO_LABEL,
    ArraySource,
    Decoded,
    Decoder,
    FolderSource,
    Source,
    gather,
    stratified,
)
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


class ImageSet:
    """An ordered set of images with one network's preprocessing.

    Attributes:
        config: The preprocessing.
        class_to_idx: Class names and their indices; empty where nothing tells the images' classes.
        skipped: Names of the images met so far that could not be read, each once, in the order met.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        class_to_idx: Mapping[str, int],
        name: str,
        origin: ImagesRecord | None = None,
    ) -> None:
        self.config = config
        self.class_to_idx = dict(class_to_idx)
        self.skipped: list[str] = []
        self._source = source
        self._name = name
        self._origin = origin or ImagesRecord()
        self._notes = Notes()

    @classmethod
    def from_folder(
        cls,
        root: Path,
        config: DataConfig,
        class_to_idx: Mapping[str, int] | None = None,
        *,
        choice: ClassChoice | None = None,
        outputs: int | None = None,
    ) -> Self:
        """The images under `root`, one folder per class, or all directly in it and then without labels.

        Args:
            root: The folder.
            config: The preprocessing.
            class_to_idx: The classes' indices; None finds them, see `number_classes`.
            choice: What is said of the classes' order and folders.
            outputs: Outputs of the network; None where they are not known.

        Raises:
            InputError: The folder is missing, cannot be read, has no image or a class not in `class_to_idx`, or nothing tells
                which folder is which class.
        """
        said = choice or ClassChoice()
        scan = scan_folder(root, said.level)
        known = Classes(class_to_idx, "given by the caller") if class_to_idx else None
        return cls.from_scan(scan, config, known or number_classes(scan, said, outputs))

    @classmethod
    def from_scan(cls, scan: Scan, config: DataConfig, classes: Classes) -> Self:
        """The images that were found in a folder.

        Args:
            scan: What was found.
            config: The preprocessing.
            classes: The classes' indices; none at all leaves the images without labels.

        Raises:
            InputError: A folder is not among the classes.
        """
        indices = classes.indices if scan.names else {}
        if indices:
            check_folders(scan, classes)
        labels = np.array([indices.get(name, NO_LABEL) for name in scan.class_of], np.int64)
        ids = [os.fsencode(file).decode("utf-8", "replace") for file in scan.files]
        source = FolderSource([scan.root / file for file in scan.files], labels, ids)
        origin = ImagesRecord(
            classes_source=classes.source if indices else None,
            class_from=scan.class_from,
            passed_over=scan.passed_over,
        )
        return cls(source, config, indices, str(scan.root), origin)

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
        indices = {name: index for index, name in enumerate(class_names)}
        origin = ImagesRecord(classes_source="given with the images")
        return cls(source, config, indices, "arrays", origin)

    def __len__(self) -> int:
        """How many images there are, readable or not."""
        return len(self._source.ids)

    @property
    def ids(self) -> Sequence[str]:
        """Their names, readable or not, in order."""
        return self._source.ids

    @property
    def record(self) -> ImagesRecord:
        """Where the images came from, with what was noted on those read so far."""
        return self._origin.model_copy(update={"notes": self._notes.counts()})

    def choose(self, count: int, seed: int = 0) -> Sequence[int]:
        """Places of `count` images in their order, drawn at random with each class's share; all where there are not more."""
        if count >= len(self):
            return range(len(self))
        return stratified(self._source.labels, count, seed).tolist()

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
        readable = self._readable(order, batch_size, workers)
        found = 0
        try:
            while held := list(islice(readable, batch_size)):
                found += len(held)
                yield self._collate(held)
        finally:
            # Also where the caller has enough before the end.
            self._notes.log(self._name)
        if len(order) and not found:
            raise InputError(
                f"none of {len(order)} images can be read",
                where=self._name,
                fix=f"the first is {self._source.ids[order[0]]}",
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
            raise InputError("no images are asked for", where=count, fix="ask for one at least")
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
        loader: DataLoader[Decoded] = DataLoader(
            Decoder(self._source, self.config),
            batch_size=batch_size,
            sampler=order,
            num_workers=workers,
            collate_fn=gather,
            # A generator of its own, else every pass would draw a number from torch's global one.
            generator=torch.Generator(),
        )
        for chunk in loader:
            for index, reason in chunk.unreadable:
                self._skip(index, reason)
            for index, notes in zip(chunk.indices, chunk.notes, strict=True):
                self._notes.add(index, notes)
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
