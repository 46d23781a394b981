"""Number semantics: pure functions that quantize, dequantize and fake-quantize tensors.

Everything deployable is defined here once and used by calibration, export and validation alike. All arithmetic is float32,
rounds half to even and divides by the scale (ONNX QuantizeLinear divides; multiplying by the inverse gives other codes at
rounding edges). Zero points do not exist: asymmetry is expressed by the integer limits (`embedded`) or by a float offset that
is subtracted first (`shifted`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ospq_export.formats.kernels import FakeQuantize, lerp_mask

INT8_MIN, INT8_MAX = -128, 127
# [-127, 127]: an `embedded` grid never touches -128, so that its negative is an int8 grid as well.
EMBEDDED_MIN, EMBEDDED_MAX = -127, 127

# Stretch of the rectified sigmoid (AdaRound, Nagel et al. 2020, eq. 23): zeta = 1.1, gamma = -0.1.
STRETCH, SHIFT = 1.2, -0.1


class Grid(StrEnum):
    """How the 2**bits levels of an activation lie in int8; see DESIGN section 3."""

    SYMMETRIC = "symmetric"
    EMBEDDED = "embedded"
    SHIFTED = "shifted"


@dataclass(frozen=True)
class Levels:
    """The integer levels of a quantizer: codes run from `lo` to `hi`, both included."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        if not INT8_MIN <= self.lo < self.hi <= INT8_MAX:
            raise ValueError(f"levels [{self.lo}, {self.hi}] do not lie in int8")

    @property
    def saturates_int8(self) -> bool:
        """Whether QuantizeLinear's own saturation already is the clip, so that no Clip needs to be emitted."""
        return self.lo == INT8_MIN and self.hi == INT8_MAX


def symmetric_levels(bits: int) -> Levels:
    """Levels -2**(bits-1) .. 2**(bits-1) - 1 of a `symmetric` or `shifted` grid and of weights.

    Raises:
        ValueError: bits is not in 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits: only 2 to 8 bits have an int8 container")
    return Levels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def embedded_levels(bits: int, lo: int) -> Levels:
    """Levels lo .. lo + 2**bits - 1 of an `embedded` grid.

    Raises:
        ValueError: bits is not in 2..7, or the levels leave [-127, 127].
    """
    if not 2 <= bits <= 7:
        raise ValueError(f"{bits} bits: an embedded grid holds 2 to 7 bits")
    hi = lo + 2**bits - 1
    if lo < EMBEDDED_MIN or hi > EMBEDDED_MAX:
        raise ValueError(f"embedded levels [{lo}, {hi}] leave [{EMBEDDED_MIN}, {EMBEDDED_MAX}]")
    return Levels(lo, hi)


def quantize(x: Tensor, scale: Tensor, levels: Levels, offset: Tensor | None = None) -> Tensor:
    """Integer codes of x, as float32: clip(round((x - offset) / scale), lo, hi).

    Args:
        x: float32, any shape.
        scale: float32, positive, broadcastable to x.
        levels: integer limits.
        offset: float32 scalar of a `shifted` grid, in the units of x.
    """
    shifted = x if offset is None else x - offset
    return torch.clamp(torch.round(shifted / scale), levels.lo, levels.hi)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Real values of codes: codes * scale (+ offset); float32, the shape of codes broadcast with scale."""
    real = codes * scale
    return real if offset is None else real + offset


def fake_quantize(
    x: Tensor, scale: Tensor, levels: Levels, offset: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """dequantize(quantize(x)), differentiable; elements may be left float (QDrop).

    Gradients: straight-through in x inside the range and zero outside; in scale as in LSQ (Esser et al. 2020, eq. 3), without
    its gradient scaling factor; in offset 1 where x is clipped, 0 elsewhere.

    Args:
        x: float32, any shape.
        scale: float32 scalar, positive.
        levels: integer limits.
        offset: float32 scalar of a `shifted` grid, in the units of x.
        kept: 0 and 1 of any dtype, the shape of x: 1 where the element is quantized, 0 where it stays float; None quantizes all.

    Returns:
        float32, the shape of x.
    """
    out: Tensor = FakeQuantize.apply(x, scale, offset, kept, levels.lo, levels.hi)
    return out


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) (AdaRound, eq. 23)."""
    return torch.clamp(torch.sigmoid(v) * STRETCH + SHIFT, 0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The V with h(V) = h, for h in [0, 1]."""
    return torch.logit((h - SHIFT) / STRETCH)


def soft_quantize_weight(weight_floor: Tensor, v: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """W^ = s * clip(floor(W/s) + h(V), lo, hi) (AdaRound, eq. 22).

    Args:
        weight_floor: floor(W/s), float32, the weight's shape.
        v: rounding parameter V, the weight's shape.
        scale: float32, broadcastable to the weight (per output channel).
        levels: integer limits.
    """
    return scale * torch.clamp(weight_floor + rectified_sigmoid(v), levels.lo, levels.hi)


def per_channel(scale: Tensor, ndim: int) -> Tensor:
    """View a scale of shape (channels,) so that it broadcasts along axis 0 of a weight with `ndim` dimensions."""
    return scale.reshape(-1, *[1] * (ndim - 1))


def random_kept(like: Tensor, drop_probability: float) -> Tensor | None:
    """A mask that leaves each element float with the given probability (QDrop, Wei et al. 2022, eq. 5).

    Random bytes decide, so the probability is rounded to a multiple of 1/256; the global generator gives them.

    Returns:
        uint8 of 0 (float) and 1 (quantized), the shape of `like`; None where nothing is dropped.
    """
    threshold = round(drop_probability * 256)
    if threshold <= 0:
        return None
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device)
    random_bytes = words.random_(-(2**63), None).view(torch.uint8)[: like.numel()]
    if threshold >= 256:
        return torch.zeros_like(like, dtype=torch.uint8)
    return torch.ge(random_bytes, threshold, out=random_bytes).view(like.shape)


def mix(quantized: Tensor, original: Tensor, drop_probability: float) -> Tensor:
    """Quantized activations with a random share of elements replaced by the float network's (QDrop's input)."""
    kept = random_kept(original, drop_probability)
    return quantized if kept is None else lerp_mask(original, quantized, kept)
