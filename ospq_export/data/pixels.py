"""From an image file to 8-bit pixels, and what has to be said about the way there."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

_NOT_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"})
logger = logging.getLogger(__name__)
ORIENTATION_IGNORED = "have an EXIF orientation, which is ignored as timm does; `exif` applies it"
ORIENTATION_APPLIED = "have an EXIF orientation, which was applied"
ALPHA = "have transparent pixels, whose hidden colours are used, as timm does"
FRAMES = "have several frames, of which the first is used"
HIGH_BYTE = "have 16 bits per channel, taken as 0 (black) to 65535 (white)"
NARROW = (
    "of 16 bits hold no value above 4095: if 12 bits are all they have they are too dark, scale them first"
)
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
_WHITE = 255
_CANDIDATES = {"F": (1, _WHITE, 65535), "I": (_WHITE, 65535)}
_TWELVE_BITS = 4095


@cache
def picture_extensions() -> frozenset[str]:
    """File name endings of pictures, in lower case with the dot."""
    return frozenset(
        extension
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NOT_PICTURES
    )


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of these formats, in the order in which it tries them; a file's name does not bind its content."""
    endings = picture_extensions()
    known = {name for ending, name in Image.registered_extensions().items() if ending in endings}
    return tuple(name for name in Image.ID if name in known)


def container_range(top: int) -> str:
    """Of pixels that may be as large as their container allows."""
    return f"have more than 8 bits per pixel, taken as 0 (black) to {top} (white)"


def assumed_range(kind: str, top: int) -> str:
    """Of pixels whose range nothing tells."""
    return f"have {kind} pixels, whose range the file does not tell: 0 (black) to {top} (white) was assumed"


class Notes:
    """Which images each note holds for, however often they are read."""

    def __init__(self) -> None:
        self._places: dict[str, set[int]] = {}
        self._told: dict[str, int] = {}

    def add(self, place: int, notes: Iterable[str]) -> None:
        """Notes what was said of the image at `place`."""
        for note in notes:
            self._places.setdefault(note, set()).add(place)

    def counts(self) -> dict[str, int]:
        """Number of images by note."""
        found = {note: len(places) for note, places in self._places.items()}
        # Dark pictures are common; a whole set that stays below is not.
        if found.get(NARROW) != found.get(container_range(65535)):
            found.pop(NARROW, None)
        return found

    def log(self, name: str) -> None:
        """Warns of every note that holds for more images than at the last call."""
        for note, count in self.counts().items():
            if count > self._told.get(note, 0):
                logger.warning("%s: %d images %s", name, count, note)
                self._told[note] = count


def read_picture(
    file: Path | BinaryIO, mode: str, *, exif: bool = False
) -> tuple[Image.Image, tuple[str, ...]]:
    """Decodes a file's first frame.

    Pixels of more than 8 bits are scaled, not clipped: Pillow's own `convert` saturates them at 255.

    Args:
        file: Its path, or the file itself, open and seekable.
        mode: PIL mode `L` or `RGB`.
        exif: Whether the EXIF orientation is applied; timm ignores it.

    Returns:
        The picture in `mode`, and notes on it.

    Raises:
        ValueError: Its pixels have a range that cannot be known.
        Exception: Whatever Pillow's decoders raise on a damaged file.
    """
    # By its path, Pillow maps an uncompressed file into memory, and then misreads a TIFF that is stored on its side.
    opened = file.open("rb") if isinstance(file, Path) else nullcontext(file)
    with opened as content, Image.open(content, formats=picture_formats()) as image:
        notes = [HIGH_BYTE] if ";16" in str(image.tile) and not _is_deep(image) else []
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append(FRAMES)
        image.load()
        if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
            notes.append(ORIENTATION_APPLIED if exif else ORIENTATION_IGNORED)
        picture, more = _eight_bits(image) if _is_deep(image) else (image, [])
        if exif:
            # Of the original: the scaled picture carries no EXIF.
            picture = _oriented(picture, image)
        if _is_transparent(image):
            notes.append(ALPHA)
        return _convert(picture, mode), (*notes, *more)


def _is_deep(image: Image.Image) -> bool:
    return image.mode in _CANDIDATES or image.mode.startswith("I;16")


def _oriented(picture: Image.Image, original: Image.Image) -> Image.Image:
    if picture is not original:
        picture.getexif()[_ORIENTATION] = original.getexif().get(_ORIENTATION, 1)
    return ImageOps.exif_transpose(picture)


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return isinstance(lowest, int | float) and lowest < _WHITE


def _convert(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError:
        # LAB and premultiplied alpha have no direct way to every mode.
        between = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGB")
        return image.convert(between).convert(mode)


def _eight_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    values = np.asarray(image).astype(np.float64)
    top, notes = _known_top(image, values)
    if top is None:
        top = _assumed_top(image.mode, values)
        notes = [assumed_range(image.mode, top)]
    scaled = np.rint(values * _WHITE / top).clip(0, _WHITE).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = _WHITE - scaled
    return Image.fromarray(scaled), notes


def _known_top(image: Image.Image, values: NDArray[np.float64]) -> tuple[int | None, list[str]]:
    """White, where the container says it, and the notes that go with it."""
    bits = _tag(image, _BITS_PER_SAMPLE)
    if image.mode == "I" and image.format == "PPM":
        # Pillow scales PGM's own maximum to 65535.
        return 65535, []
    if image.mode == "I" and (bits, _tag(image, _SAMPLE_FORMAT)) == (16, _SIGNED) and values.min() >= 0:
        return 32767, [assumed_range("signed 16-bit", 32767)]
    if image.mode.startswith("I;16"):
        top = 2**bits - 1 if bits else 65535
        narrow = [NARROW] if top > _TWELVE_BITS >= values.max() else []
        return top, [container_range(top), *narrow]
    return None, []


def _assumed_top(mode: str, values: NDArray[np.float64]) -> int:
    """The smallest usual range that holds the values.

    Raises:
        ValueError: None does.
    """
    lowest, highest = float(values.min()), float(values.max())
    if lowest >= 0:
        for top in _CANDIDATES[mode]:
            if highest <= top:
                return top
    raise ValueError(
        f"its pixels (mode {mode}) go from {lowest:g} to {highest:g}: what is black and white cannot be known, "
        "convert it to 8 bits"
    )


def _tag(image: Image.Image, number: int) -> int | None:
    """A TIFF tag's first value; None where the image is no TIFF or lacks it."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value
