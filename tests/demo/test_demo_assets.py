"""The packaged networks and images are what they say they are."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ospq_export.data import DataConfig, ImageSet, resolve_data_config
from ospq_export.demo import CLASS_NAMES, NETWORKS, demo_data_overrides, demo_images, demo_spec
from ospq_export.errors import InputError
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model

RAW = DataConfig(
    input_size=(1, 28, 28), mean=(0,), std=(1,), interpolation="nearest", crop_pct=1, crop_mode="center"
)
# SHA-256 of the test set's pixels and labels, in order, as the data set's authors publish them.
TEST_PIXELS = "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a"
TEST_LABELS = "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"


def config_of(name: str) -> DataConfig:
    spec = demo_spec(name)
    return resolve_data_config(create_model(spec, load_weights=False), spec, demo_data_overrides())


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_belong_to_the_network_they_are_for(name: str) -> None:
    spec = demo_spec(name)
    assert spec.checkpoint is not None
    with safe_open(spec.checkpoint, "pt") as file:
        metadata = file.metadata()
    written = ModelSpec(name=metadata["model"], kwargs=json.loads(metadata["model_kwargs"]))
    assert written == NETWORKS[name]
    config = config_of(name)
    assert (float(metadata["mean"]), float(metadata["std"])) == (config.mean[0], config.std[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_classify_about_as_well_as_their_files_say(name: str) -> None:
    spec = demo_spec(name)
    assert spec.checkpoint is not None
    with safe_open(spec.checkpoint, "pt") as file:
        claimed = float(file.metadata()["top1"])
    batch = demo_images("test", config_of(name)).sample(500, 0)
    with torch.inference_mode():
        right = (create_model(spec)(batch.images).argmax(1) == batch.labels).float().mean().item()
    # Three standard errors of a share of 500.
    assert abs(right - claimed) < 3 * (claimed * (1 - claimed) / 500) ** 0.5


def unpacked(images: ImageSet) -> tuple[np.ndarray, np.ndarray, list[str]]:
    batches = list(images.batches(1000))
    pixels = torch.cat([batch.images for batch in batches]).mul(255).round().to(torch.uint8).squeeze(1)
    labels = torch.cat([batch.labels for batch in batches]).to(torch.uint8)
    return pixels.numpy(), labels.numpy(), [name for batch in batches for name in batch.ids]


def test_test_images_are_the_whole_published_test_set() -> None:
    images = demo_images("test", RAW)
    pixels, labels, ids = unpacked(images)
    assert pixels.shape == (10_000, 28, 28)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == TEST_PIXELS
    assert hashlib.sha256(labels.tobytes()).hexdigest() == TEST_LABELS
    assert ids == [f"test/{index:05d}" for index in range(10_000)]
    assert tuple(images.class_to_idx) == CLASS_NAMES


def test_calibration_images_are_balanced_and_different() -> None:
    pixels, labels, ids = unpacked(demo_images("calibration", RAW))
    assert pixels.shape == (1024, 28, 28)
    assert len(set(ids)) == 1024
    counts = np.bincount(labels)
    assert len(counts) == 10
    assert counts.max() - counts.min() == 1
    # The mean and deviation the networks normalise with, within four standard errors over images.
    means = pixels.reshape(1024, -1).mean(1) / 255
    assert abs(means.mean() - 0.2860) < 4 * means.std() / 32


def test_preprocessing_leaves_the_pixels_where_they_are() -> None:
    config = config_of("vit")
    raw = torch.cat([batch.images for batch in demo_images("calibration", RAW).batches(256)])
    seen = torch.cat([batch.images for batch in demo_images("calibration", config).batches(256)])
    torch.testing.assert_close(seen, (raw - 0.2860) / 0.3530)


def test_unknown_demo_network() -> None:
    with pytest.raises(InputError, match="choose from vit, swin"):
        demo_spec("resnet")
