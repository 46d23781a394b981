"""What runs in the processes that decode: from a place in a source to a tensor, or to the reason why there is none."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ospq_export.data.config import DataConfig
from ospq_export.data.sources import Source


@dataclass(frozen=True)
class Decoded:
    """One image.

    Attributes:
        index: Its place in the source.
        pixels: (C, H, W) float32, or the reason why there are none.
        notes: What has to be said about it.
    """

    index: int
    pixels: Tensor | str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What a worker hands over: the images it could read as one tensor, for each costs a file descriptor.

    Attributes:
        indices: Places of the readable images in the source.
        images: float32, (len(indices), C, H, W).
        notes: What has to be said about each of them.
        unreadable: Places of the others, and why they could not be read.
    """

    indices: list[int]
    images: Tensor
    notes: list[tuple[str, ...]]
    unreadable: list[tuple[int, str]]


class Decoder(Dataset[Decoded]):
    """Decoding and the transform, and never an exception for a bad file."""

    def __init__(self, source: Source, config: DataConfig) -> None:
        self._source = source
        self._config = config
        self._transform = config.transform()

    def __getitem__(self, index: int) -> Decoded:
        try:
            image, notes = self._source.decode(index, self._config.image_mode, self._config.exif)
        except Exception as error:
            # PIL's decoders raise all sorts of things on damaged files, SyntaxError and struct.error too.
            return Decoded(index, f"{type(error).__name__}: {error}")
        return Decoded(index, self._transform(image), notes)


def gather(decoded: list[Decoded]) -> Chunk:
    """Puts a batch of decoded images together."""
    readable = [(d.index, d.pixels, d.notes) for d in decoded if isinstance(d.pixels, Tensor)]
    return Chunk(
        [index for index, _, _ in readable],
        torch.stack([pixels for _, pixels, _ in readable]) if readable else torch.empty(0),
        [notes for _, _, notes in readable],
        [(d.index, d.pixels) for d in decoded if isinstance(d.pixels, str)],
    )
