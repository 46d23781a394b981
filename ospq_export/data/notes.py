"""What has to be said about images that were read: each kind once, with the number of images it holds for."""

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

ORIENTATION_IGNORED = "have an EXIF orientation, which is ignored as timm does; `exif` applies it"
ORIENTATION_APPLIED = "have an EXIF orientation, which was applied"
ALPHA = "have transparent pixels, whose hidden colours are used, as timm does"
FRAMES = "have several frames, of which the first is used"
HIGH_BYTE = "have 16 bits per channel, taken as 0 (black) to 65535 (white)"
NARROW = (
    "of 16 bits hold no value above 4095: if 12 bits are all they have they are too dark, scale them first"
)


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
