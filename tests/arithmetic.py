"""The integer format with its levels spelled out, and AdaRound's formula to the letter as a reference for it."""

import torch
from torch import Tensor

from ospq_export.formats.integer import Integer
from ospq_export.formats.kernels import inverse_rectified_sigmoid, mix, random_kept, rectified_sigmoid
from ospq_export.formats.search import Grid, Levels, embedded_levels, symmetric_levels

__all__ = [
    "Grid",
    "Levels",
    "dequantize",
    "embedded_levels",
    "fake_quantize",
    "inverse_rectified_sigmoid",
    "mix",
    "per_channel",
    "quantize",
    "random_kept",
    "rectified_sigmoid",
    "soft_quantize_weight",
    "symmetric_levels",
]


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
