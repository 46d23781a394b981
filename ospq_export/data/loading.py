"""What all sets of images have in common: decoding, batches, and the record of what was met on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ospq_export.data.config import DataConfig, ImagesRecord
from ospq_export.data.pixels import Notes
from ospq_export.data.sources import Decoded, Decoder, Source, gather
from ospq_export.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Images as the network takes them.

    Attributes:
        images: float32, (B, C, H, W), normalised.
        labels: int64, (B,); -1 where the class is not known. Of images with masks (B, H, W); -1 in pixels that do not count.
        ids: B names.
    """

    images: Tensor
    labels: Tensor
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        id: Its name.
        pixels: float32, (C, H, W).
        label: int64, () or, of an image with a mask, (H, W).
    """

    id: str
    pixels: Tensor
    label: Tensor


class Images:
    """Images with one network's preprocessing.

    Attributes:
        config: The preprocessing.
        class_to_idx: Class names and their indices; empty where nothing tells the images' classes.
        skipped: Names of the images met so far that could not be read, each once, in the order met.
    """

    def __init__(
        self,
        config: DataConfig,
        class_to_idx: Mapping[str, int],
        name: str,
        origin: ImagesRecord | None = None,
    ) -> None:
        self.config = config
        self.class_to_idx = dict(class_to_idx)
        self.skipped: list[str] = []
        self._name = name
        self._origin = origin or ImagesRecord()
        self._notes = Notes()

    @property
    def record(self) -> ImagesRecord:
        """Where the images came from, with what was noted on those read so far."""
        return self._origin.model_copy(update={"notes": self._notes.counts()})

    def _batched(self, items: Iterator[Item], batch_size: int, nothing: InputError | None) -> Iterator[Batch]:
        """Batches of what can be read; `nothing` is raised where there is not one image."""
        try:
            while held := list(islice(items, batch_size)):
                nothing = None
                pixels = torch.stack([item.pixels for item in held])
                yield Batch(pixels, torch.stack([item.label for item in held]), [item.id for item in held])
        finally:
            # Also where the caller has enough before the end.
            self._notes.log(self._name)
        if nothing is not None:
            raise nothing

    def _decoded(
        self, source: Source, order: Sequence[int], batch_size: int, workers: int, first: int = 0
    ) -> Iterator[Item]:
        """The images at these places that can be read; `first` is where the source begins in the whole set."""
        loader: DataLoader[Decoded] = DataLoader(
            Decoder(source, self.config),
            batch_size=batch_size,
            sampler=order,
            num_workers=workers,
            collate_fn=gather,
            # A generator of its own, else every pass would draw a number from torch's global one.
            generator=torch.Generator(),
        )
        for chunk in loader:
            for index, reason in chunk.unreadable:
                self._skip(source.ids[index], reason)
            for index, notes in zip(chunk.indices, chunk.notes, strict=True):
                self._notes.add(first + index, notes)
            masks = repeat(None) if chunk.masks is None else chunk.masks
            for index, pixels, mask in zip(chunk.indices, chunk.images, masks, strict=False):
                yield Item(
                    source.ids[index],
                    pixels,
                    torch.tensor(int(source.labels[index])) if mask is None else mask,
                )

    def _skip(self, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.skipped.append(name)
            logger.warning("skipped, it cannot be read: %s (%s)", name, reason)
