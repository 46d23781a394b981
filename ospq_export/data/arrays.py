"""Arrays in files: .npy, mapped into memory, and .npz with labels and names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ospq_export.data.found import Found, Labels, Named, natural_places, numbered, read_labels, refuse_twice
from ospq_export.data.sources import ArraySource, check_images
from ospq_export.errors import InputError, reason_of

ENDINGS = (".npy", ".npz")
_FORM = "write uint8 (N, H, W) or (N, H, W, 3)"
_ENTRIES = {"images", "labels", "ids"}


@dataclass(frozen=True)
class MappedSource:
    """Images in a .npy file, of which every process maps what it reads.

    Attributes:
        path: The file: uint8, (N, H, W) or (N, H, W, 3).
        labels: int64, (N,).
        ids: N names.
    """

    path: Path
    labels: Labels
    ids: list[str]

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index` in PIL mode `mode`; arrays have no EXIF."""
        pixels = np.ascontiguousarray(np.load(self.path, mmap_mode="r")[index])
        return Image.fromarray(pixels).convert(mode), ()


def open_arrays(path: Path) -> Found:
    """The images of a .npy file, or of a .npz file with `images` and, where it has them, `labels` and `ids`.

    Images with names are put into natural order; without, they keep theirs.

    Raises:
        InputError: The file cannot be read, an array has another type or shape, there is no image, or see `read_labels`.
    """
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None)
        arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else _entries(loaded, path)
    except Exception as error:
        # A damaged archive raises whatever its damage leads to, zlib.error and NotImplementedError among them.
        raise InputError(
            f"cannot read arrays: {reason_of(error)}", where=path, fix="write it with numpy, without objects"
        ) from error
    images = arrays.get("images")
    if images is None:
        raise InputError(f"no array `images`, only {', '.join(arrays) or 'nothing'}", where=path, fix=_FORM)
    try:
        check_images(images)
    except ValueError as error:
        raise InputError(str(error), where=path, fix=_FORM) from error
    if not images.size:
        raise InputError("no images in this file", where=path, fix=_FORM)
    return _mapped(path, len(images)) if isinstance(images, np.memmap) else _with_names(path, arrays)


def _entries(archive: Any, path: Path) -> dict[str, Any]:
    with archive:
        return {name: archive[name] for name in archive.files if name in _ENTRIES}


def _mapped(path: Path, count: int) -> Found:
    ids = _numbers(count)
    return Found(path, ids, lambda labels: MappedSource(path, labels, ids))


def _with_names(path: Path, arrays: dict[str, Any]) -> Found:
    images, count = arrays["images"], len(arrays["images"])
    for name in arrays.keys() - {"images"}:
        if arrays[name].shape != (count,):
            raise InputError(
                f"{count} images and `{name}` of shape {arrays[name].shape}",
                where=path,
                fix=f"write shape ({count},)",
            )
    ids, order = _numbers(count), list(range(count))
    if "ids" in arrays:
        names = [str(name) for name in arrays["ids"].tolist()]
        refuse_twice(names, path)
        order = natural_places(names)
        ids = [names[place] for place in order]
    ordered = images if order == list(range(count)) else images[order]
    labels = _labels(arrays["labels"][order], path) if "labels" in arrays else Named()
    return Found(path, ids, lambda numbers: ArraySource(ordered, numbers, ids), labels)


def _labels(labels: Any, path: Path) -> Named:
    if labels.dtype.kind in "iu":
        return numbered(labels.astype(np.int64), path)
    return read_labels(labels.tolist(), path)


def _numbers(count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"{place:0{width}d}" for place in range(count)]
