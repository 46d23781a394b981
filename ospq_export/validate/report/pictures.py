"""Pictures of images in the page: small, and as the network saw them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from ospq_export.data import DataConfig, ImageSet, StreamSet
    from ospq_export.data.tensors import TensorSet

_SIDE = 112


def thumbnails(images: ImageSet | StreamSet | TensorSet, ids: Sequence[str]) -> dict[str, str]:
    """PNG data URLs by id, preprocessed and then de-normalised: what the network saw, not the file.

    Args:
        images: the set they come from.
        ids: which ones; those that the set does not have are left out.
    """
    wanted = set(ids)
    indices = [i for i, name in enumerate(images.ids) if name in wanted]
    batches = images.batches(1, indices) if indices else ()
    return {batch.ids[0]: data_url(batch.images[0], images.config) for batch in batches}


def data_url(image: Tensor, config: DataConfig) -> str:
    """One normalised image, float32 (C, H, W), as a PNG of at most 112 px."""
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    mean, std = torch.tensor(config.mean)[:, None, None], torch.tensor(config.std)[:, None, None]
    if not config.known:
        mean, std = image.amin((1, 2), keepdim=True), (image.amax() - image.amin()).clamp_min(1e-6)
    pixels = ((image.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    if max(picture.size) > _SIDE:
        picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
