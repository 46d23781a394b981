"""Pictures with a class index in each pixel, brought to the geometry of the images that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ospq_export.data.config import DataConfig

IGNORED = 255
"""The class index, in the picture, of a pixel that does not count; it becomes -1."""
_MODES = ("1", "L", "P", "I", "I;16")


class MaskReader:
    """Reads masks, resized and cropped as the images are, but by the nearest pixel.

    Args:
        paths: A picture per image: one channel, or a palette whose indices are the classes.
        config: The images' preprocessing.
    """

    def __init__(self, paths: Sequence[Path], config: DataConfig) -> None:
        self._paths = paths
        self._geometry = geometry(config)

    def read(self, index: int, size: tuple[int, int]) -> Tensor:
        """The classes of the image at this place, int64 (H, W); -1 where they do not count.

        Args:
            index: Which one.
            size: Width and height of the decoded image, pixels.

        Raises:
            ValueError: The mask has several channels, or another size.
            Exception: Whatever Pillow's decoders raise on a damaged file.
        """
        with Image.open(self._paths[index]) as image:
            image.load()
            if image.mode not in _MODES:
                raise ValueError(f"its mask has mode {image.mode}: one channel of class indices is needed")
            if image.size != size:
                raise ValueError(
                    f"its mask has {image.size[0]}x{image.size[1]} pixels, the image {size[0]}x{size[1]}"
                )
            # As integers of one mode, that a palette or a scale does not get in the way.
            classes = Image.fromarray(np.asarray(image).astype(np.int32))
        pixels = np.asarray(self._geometry(classes)).astype(np.int64)
        return torch.from_numpy(np.where(pixels == IGNORED, -1, pixels))


def geometry(config: DataConfig) -> Callable[[Image.Image], Image.Image]:
    """Resizing and cropping of timm's transform by the nearest pixel, without what follows; what is padded is ignored."""
    from timm.data.transforms import CenterCropOrPad
    from torchvision.transforms import Compose

    nearest = config.model_copy(update={"interpolation": "nearest"}).transform()
    # The last two turn the picture into a normalised tensor.
    steps = nearest.transforms[:-2]  # type: ignore[attr-defined]
    for step in steps:
        if isinstance(step, CenterCropOrPad):
            step.fill = IGNORED
    return Compose(steps)
