"""Batches of preprocessed images, streamed in a fixed order; one that cannot be read is named, not fatal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ospq_export.data.choice import ClassChoice, Classes
from ospq_export.data.classes import check_folders, number_classes
from ospq_export.data.config import DataConfig, ImagesRecord
from ospq_export.data.folders import Scan, scan_folder
from ospq_export.data.found import Found, found_in
from ospq_export.data.loading import Batch, Images, Item
from ospq_export.data.sources import ArraySource, Gathering, Source, stratified
from ospq_export.errors import InputError

logger = logging.getLogger(__name__)

_SAMPLE_BATCH = 64
_GATHERED = 1024


class ImageSet(Images):
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
        super().__init__(config, class_to_idx, name, origin)
        self._source = source

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
        return cls.from_found(found_in(scan), config, classes)

    @classmethod
    def from_found(cls, found: Found, config: DataConfig, classes: Classes) -> Self:
        """The images that were found in any source.

        Args:
            found: What was found.
            config: The preprocessing.
            classes: The classes' indices; none at all leaves the images without labels.

        Raises:
            InputError: A class of the images is not among the classes.
        """
        indices = classes.indices if found.labels.codes is not None else {}
        if indices and not classes.by_number:
            check_folders(found, classes)
        labels = found.numbers(indices, as_they_are=classes.by_number)
        origin = ImagesRecord(
            classes_source=classes.source if indices or classes.by_number else None,
            class_from=found.class_from,
            passed_over=dict(found.passed_over),
        )
        return cls(found.source(labels), config, indices, str(found.root), origin)

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

    def at_most(self, count: int) -> int:
        """How many of `count` images there can be."""
        return min(len(self), count)

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
        return self._stream(order, batch_size, workers, _GATHERED)

    def _stream(self, order: Sequence[int], batch_size: int, workers: int, held: int) -> Iterator[Batch]:
        """See `batches`; `held` images at a time are gathered, where the source has to."""
        nothing = None
        if len(order):
            nothing = InputError(
                f"none of {len(order)} images can be read",
                where=self._name,
                fix=f"the first is {self._source.ids[order[0]]}",
            )
        return self._batched(self._items(order, batch_size, workers, held), batch_size, nothing)

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
        return self.first(count, np.random.default_rng(seed).permutation(len(self)).tolist(), workers)

    def first(self, count: int, order: Sequence[int], workers: int = 0) -> Batch:
        """The first images in an order that can be read; see `sample`."""
        if count < 1:
            raise InputError("no images are asked for", where=count, fix="ask for one at least")
        # One allocation: joining batches at the end would hold every image twice.
        images = torch.empty(min(count, len(self)), *self.config.input_size)
        labels: list[Tensor] = []
        ids: list[str] = []
        for batch in self._stream(order, min(count, _SAMPLE_BATCH), workers, min(count, _GATHERED)):
            room = min(len(batch), count - len(ids))
            images[len(ids) : len(ids) + room] = batch.images[:room]
            labels.append(batch.labels[:room])
            ids += batch.ids[:room]
            if len(ids) == count:
                break
        if len(ids) < count:
            logger.warning("%s: %d images asked for, all %d readable ones used", self._name, count, len(ids))
        return Batch(images[: len(ids)], torch.cat(labels), ids)

    def _items(self, order: Sequence[int], batch_size: int, workers: int, held: int) -> Iterator[Item]:
        """The images in `order`, without those that cannot be read, which are noted."""
        if not isinstance(self._source, Gathering):
            yield from self._decoded(self._source, order, batch_size, workers)
            return
        for start in range(0, len(order), held):
            part = order[start : start + held]
            yield from self._decoded(self._source.gather(part), part, batch_size, workers)
