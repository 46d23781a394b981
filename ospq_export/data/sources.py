"""Where images come from: an ImageNet-style folder, or arrays in memory."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from ospq_export.errors import InputError

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

    def decode(self, index: int, mode: str) -> Image.Image:
        """Image `index`, all pixels read, as PIL mode `mode`; raises anything where that fails."""


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

    def decode(self, index: int, mode: str) -> Image.Image:
        """Image `index` in PIL mode `mode`."""
        return Image.fromarray(self.images[index]).convert(mode)


@dataclass(frozen=True)
class FolderSource:
    """Image files, found and ordered as timm finds and orders them.

    Attributes:
        paths: The files.
        labels: int64, (N,); NO_LABEL everywhere where the files lie in no class folder.
        ids: The paths relative to the folder, with forward slashes.
    """

    paths: Sequence[Path]
    labels: NDArray[np.int64]
    ids: Sequence[str]

    def decode(self, index: int, mode: str) -> Image.Image:
        """Image `index` in PIL mode `mode`."""
        with Image.open(self.paths[index]) as image:
            return image.convert(mode)


def scan_folder(root: Path, class_to_idx: Mapping[str, int] | None) -> tuple[FolderSource, dict[str, int]]:
    """Finds the images under `root`, in class folders or all of them without a class.

    Args:
        root: The folder; a file's class is the name of the folder it lies in.
        class_to_idx: The classes to use; None numbers the folders in timm's order.

    Returns:
        The images in order, and the classes by name; no class at all for a folder without class folders.

    Raises:
        InputError: No such folder, one that cannot be read, no image in it, images both in and beside class
            folders, or a class that is not in `class_to_idx`.
    """
    _check_readable(root)
    found, names = find_images_and_targets(str(root))
    if not found:
        extensions = ", ".join(get_img_extensions())
        raise InputError("no images in this folder", where=root, mend=f"give one with {extensions} files")
    name_of = {index: name for name, index in names.items()}
    # timm's natural order leaves '1' and '01' or 'A' and 'a' in any order; the name itself decides here.
    found = sorted(found, key=lambda item: (natural_key(item[0]), item[0]))
    labels, classes = _label(root, [name_of[index] for _, index in found], class_to_idx)
    ids = [os.fsencode(os.path.relpath(path, root)).decode("utf-8", "replace") for path, _ in found]
    ids = [name.replace(os.sep, "/") for name in ids]
    return FolderSource([Path(path) for path, _ in found], labels, ids), classes


def _check_readable(root: Path) -> None:
    def refuse(error: OSError) -> None:
        raise InputError(
            f"cannot read this folder: {error.strerror}", where=error.filename, mend="give a folder of images"
        )

    # os.walk passes over what it may not read, and with it timm: classes would vanish without a word.
    for folder, subfolders, _ in os.walk(root, followlinks=True, onerror=refuse):
        if Path(folder) != root:
            subfolders.clear()


def _label(
    root: Path, names: list[str], class_to_idx: Mapping[str, int] | None
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Class indices of images whose folders are called `names` ('' directly in the root)."""
    folders = sorted(set(names), key=lambda name: (natural_key(name), name))
    if folders == [""]:
        return np.full(len(names), NO_LABEL, np.int64), {}
    if "" in folders:
        raise InputError(
            "images lie both in class folders and beside them", where=root, mend="move those beside away"
        )
    classes = dict(class_to_idx) if class_to_idx else {name: index for index, name in enumerate(folders)}
    strangers = [name for name in folders if name not in classes]
    if strangers:
        raise InputError(
            f"{len(strangers)} class folders are not among the run's {len(classes)} classes",
            where=f"{root}: {', '.join(strangers[:3])}",
            mend="give a folder with the classes of the calibration",
        )
    return np.array([classes[name] for name in names], np.int64), classes
