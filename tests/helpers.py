"""What several test modules share besides fixtures; importable from a spawned process as well."""

import importlib.util
import json

import pytest
import torch
from conftest import computed
from torch import Tensor

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.checkpoints import no_events
from ospq_export.data import Batch, resolve_data_config
from ospq_export.engines.build import BuildSettings
from ospq_export.engines.products import Product
from ospq_export.formats.integer import Integer
from ospq_export.formats.kernels import inverse_rectified_sigmoid, mix, random_kept, rectified_sigmoid
from ospq_export.formats.search import Grid, Levels, embedded_levels, symmetric_levels
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import MANIFEST

__all__ = [
    "RTX",
    "SETTINGS",
    "SPEC",
    "Grid",
    "Levels",
    "dequantize",
    "embedded_levels",
    "fake_quantize",
    "finished",
    "inverse_rectified_sigmoid",
    "mix",
    "per_channel",
    "quantize",
    "random_kept",
    "rectified_sigmoid",
    "soft_quantize_weight",
    "symmetric_levels",
    "tiny",
]
RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed",
)
SETTINGS = BuildSettings(Product.TENSORRT_RTX, compute_capabilities=("SM89",))
SPEC = ModelSpec(
    name="vit_tiny_patch16_224",
    kwargs={
        "img_size": 32,
        "patch_size": 8,
        "in_chans": 1,
        "depth": 2,
        "num_classes": 5,
        "embed_dim": 32,
        "num_heads": 2,
    },
)
SHORT = ["calibration_images=16", "observation_images=16", "reconstruction.batch_size=8"]


def tiny(out, *overrides, recipe="w4a4", seed=0, weights=0, images=0, device="cpu", events=no_events):
    """Calibrate a network that takes a second or two."""
    torch.manual_seed(weights)
    model = create_model(SPEC)
    config = resolve_data_config(model, SPEC, {})
    data = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(images))
    batch = Batch(data, torch.zeros(16, dtype=torch.int64), [str(i) for i in range(16)])
    chosen = load_recipe(recipe, [*SHORT, "reconstruction.iterations=6", *overrides])
    return calibrate(model, SPEC, batch, config, chosen, out, seed=seed, device=device, events=events)


def finished(out):
    """What two runs that are the same have in common: every byte but times and memory."""
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["status"] == "calibrated"
    manifest["slices"] = computed(manifest["slices"])
    assert sorted(p.name for p in out.iterdir()) == sorted([MANIFEST, *manifest["files"]])
    return manifest, {name: (out / name).read_bytes() for name in manifest["files"]}


# The integer format with its levels spelled out, and AdaRound's formula to the letter as a reference for it.


def quantize(x: Tensor, scale: Tensor, levels: Levels, offset: Tensor | None = None) -> Tensor:
    return Integer(8, levels).nearest(x, scale, offset)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    return Integer(8, symmetric_levels(8)).dequantize(codes, scale, offset)


def fake_quantize(
    x: Tensor, scale: Tensor, levels: Levels, offset: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    return Integer(8, levels).fake_quantize(x, scale, offset, kept)


def per_channel(scale: Tensor, ndim: int) -> Tensor:
    return scale.reshape(-1, *[1] * (ndim - 1))


def soft_quantize_weight(weight_floor: Tensor, v: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """W^ = s * clip(floor(W/s) + h(V), lo, hi) (AdaRound, eq. 22)."""
    return scale * torch.clamp(weight_floor + rectified_sigmoid(v), levels.lo, levels.hi)
