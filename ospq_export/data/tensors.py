"""Images that a caller brings along as tensors: from a list, a DataLoader, a generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from ospq_export.data.config import DataConfig, ImagesRecord
from ospq_export.data.images import ImageSet
from ospq_export.data.loading import Batch, Images, Item
from ospq_export.data.sources import NO_LABEL
from ospq_export.errors import InputError

PIXELS, LABELS = ("pixel_values", "image", "images"), ("labels", "label")


class TensorSet(Images):
    """Images as the network takes them, one after the other, in the order in which they come.

    Args:
        data: of float tensors (C, H, W) or (B, C, H, W), alone, in pairs with labels, or in dictionaries with `pixel_values` and
            `labels`. Labels are integers, tensors (B,) or masks (B, H, W).
        config: the preprocessing that the tensors have had.
        class_to_idx: the network's outputs by class name, where they are known.
    """

    ids: tuple[str, ...] = ()

    def __init__(
        self, data: Iterable[Any], config: DataConfig, class_to_idx: Mapping[str, int] | None = None
    ) -> None:
        origin = ImagesRecord(classes_source="given with the tensors")
        super().__init__(config, class_to_idx or {}, "tensors", origin)
        self._data = data

    def at_most(self, count: int) -> int:
        """How many of `count` images there can be: that is not known, so all."""
        return count

    def sample(self, count: int, seed: int, workers: int = 0) -> Batch:
        """The first images, so that the caller decides which; see `ImageSet.sample`.

        Raises:
            InputError: as `batches`.
        """
        return next(self._batched(islice(self._items(), count), count, self._nothing()))

    def drawn(self, count: int, seed: int = 0) -> ImageSet:
        """Nothing can be drawn from what goes by once.

        Raises:
            InputError: always.
        """
        raise InputError("tensors cannot be drawn from", where="`limit`", fix="pass fewer of them")

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None, workers: int = 0
    ) -> Iterator[Batch]:
        """All images; see `ImageSet.batches`.

        Raises:
            InputError: there is none, or one is not as the others are.
        """
        return self._batched(self._items(), batch_size, self._nothing())

    def _items(self) -> Iterator[Item]:
        numbers = count()
        for position, entry in enumerate(self._data):
            images, labels = _parts(entry, f"item {position}")
            images = images if images.dim() == 4 else images[None]
            self._check(images, f"item {position}")
            for pixels, label in zip(images, _labels(labels, len(images), f"item {position}"), strict=True):
                yield Item(f"{next(numbers):06d}", pixels, label)

    def _check(self, images: Tensor, where: str) -> None:
        expected = tuple(self.config.input_size)
        if tuple(images.shape[1:]) != expected or not images.is_floating_point():
            raise InputError(
                f"it holds {str(images.dtype).removeprefix('torch.')} {tuple(images.shape[1:])}, not float {expected}",
                where=f"`data`, {where}",
                fix="prepare all images alike, as the network takes them",
            )
        if not bool(torch.isfinite(images).all()):
            raise InputError("it holds NaN or infinity", where=f"`data`, {where}", fix="leave it out")

    def _nothing(self) -> InputError:
        return InputError("there is no image", where="`data`", fix="give some; a generator is used up once")


def first_size(data: Iterable[Any]) -> tuple[tuple[int, ...], Iterable[Any]]:
    """(C, H, W) of the first image, and data that still hold it.

    Raises:
        InputError: there is none.
    """
    if isinstance(data, Iterator):
        first = list(islice(data, 1))
        rest: Iterable[Any] = _Joined(first, data)
    else:
        first, rest = list(islice(iter(data), 1)), data
    if not first:
        raise InputError("there is no image", where="`data`", fix="give some")
    images, _ = _parts(first[0], "item 0")
    return tuple(images.shape[-3:]), rest


class _Joined:
    """What was taken from an iterator, and the rest of it; to be gone through once."""

    def __init__(self, first: list[Any], rest: Iterator[Any]) -> None:
        self._first, self._rest = first, rest

    def __iter__(self) -> Iterator[Any]:
        taken, self._first = self._first, []
        yield from taken
        yield from self._rest


def _parts(entry: Any, where: str) -> tuple[Tensor, Any]:
    """The images and labels of what a loader gives."""
    labels: Any = None
    if isinstance(entry, Mapping):
        images = next((entry[key] for key in PIXELS if key in entry), None)
        labels = next((entry[key] for key in LABELS if key in entry), None)
    elif isinstance(entry, tuple | list) and len(entry) == 2:
        images, labels = entry
    else:
        images = entry
    if not isinstance(images, Tensor) or images.dim() not in (3, 4):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(entry).__name__
        raise InputError(
            f"it is {found}, no images",
            where=f"`data`, {where}",
            fix="give tensors (C, H, W) or (B, C, H, W), pairs with labels, or dictionaries with pixel_values",
        )
    return images.detach().cpu().float() if images.is_floating_point() else images.cpu(), labels


def _labels(labels: Any, images: int, where: str) -> Tensor:
    """int64 (B,) or (B, H, W)."""
    if labels is None:
        return torch.full((images,), NO_LABEL)
    found = torch.as_tensor(labels).cpu()
    # One image's label, or its mask, has no dimension for the batch.
    if images == 1 and found.dim() in (0, 2):
        found = found[None]
    if len(found) != images or found.is_floating_point() or found.dim() not in (1, 3):
        raise InputError(
            f"its labels are {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)} for {images} images",
            where=f"`data`, {where}",
            fix="give class numbers (B,), or masks of class numbers (B, H, W)",
        )
    return torch.where(found == 255, NO_LABEL, found.long()) if found.dim() == 3 else found.long()
