"""The packaged demonstration: two small trained vision transformers, and Fashion-MNIST images for them."""

import io
import lzma
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from ospq_export.data import DataConfig, ImageSet
from ospq_export.errors import InputError
from ospq_export.models.record import ModelSpec

MEAN, STD = 0.2860, 0.3530
"""Of the 60,000 training images' pixels, scaled to [0, 1]."""

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_IMAGES = {"img_size": 28, "in_chans": 1, "num_classes": 10}
_VIT = {"patch_size": 4, "embed_dim": 64, "depth": 12, "num_heads": 4}
_SWIN = {"patch_size": 2, "window_size": 7, "embed_dim": 32, "depths": (2, 4, 2), "num_heads": (2, 4, 8)}
NETWORKS = {
    "vit": ModelSpec(name="vit_tiny_patch16_224", kwargs=_IMAGES | _VIT),
    "swin": ModelSpec(name="swin_tiny_patch4_window7_224", kwargs=_IMAGES | _SWIN),
}
"""The networks by name, without weights: what `scripts/train_demo.py` trains."""


def demo_spec(name: str) -> ModelSpec:
    """The trained network called `name`, `vit` or `swin`.

    Raises:
        InputError: There is no such network.
    """
    if name not in NETWORKS:
        raise InputError("no such demo network", where=name, fix=f"choose from {', '.join(NETWORKS)}")
    return NETWORKS[name].model_copy(update={"checkpoint": str(_asset(f"{name}.safetensors"))})


def demo_data_overrides() -> dict[str, Any]:
    """The preprocessing both networks were trained with, in place of timm's: neither resized nor cropped."""
    resizing = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    return {"mean": (MEAN,), "std": (STD,), **resizing}


def demo_images(split: Literal["calibration", "test"], config: DataConfig) -> ImageSet:
    """Fashion-MNIST images, 28 by 28 pixels, one channel.

    Args:
        split: `calibration`, 1,024 of the training images, or `test`, all 10,000 test images.
        config: The preprocessing.

    Returns:
        The images; their names tell their place in the original set, as in `train/00042`.
    """
    packed = lzma.decompress(_asset(f"fashion_{split}.npz.xz").read_bytes())
    arrays = np.load(io.BytesIO(packed), allow_pickle=False)
    origin = "train" if split == "calibration" else "test"
    ids = [f"{origin}/{index:05d}" for index in arrays["indices"]]
    return ImageSet.from_arrays(arrays["images"], arrays["labels"].astype(np.int64), ids, config, CLASS_NAMES)


def _asset(name: str) -> Any:
    return files(__package__) / "assets" / name
