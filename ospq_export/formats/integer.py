"""Integers of 2 to 8 bits in int8, the number semantics that calibration, export and validation share.

All arithmetic is float32, rounds half to even and divides by the scale (ONNX QuantizeLinear divides; multiplying by the inverse
gives other codes at rounding edges). Zero points do not exist: asymmetry is expressed by the integer limits (`embedded`) or by a
float offset that is subtracted first (`shifted`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospq_export.formats.base import PER_TENSOR, Format, Granularity, Neighbours, Range, Sample
from ospq_export.formats.kernels import FakeQuantize
from ospq_export.formats.search import (
    INT8_MAX,
    INT8_MIN,
    Grid,
    Levels,
    search_activation_range,
    search_weight_scale,
    symmetric_levels,
)

_NAME = re.compile(r"int([2-8])")


@dataclass(frozen=True)
class Integer(Format):
    """Codes `lo` .. `hi`; of a weight symmetric per output channel, of an activation per tensor on one of three grids."""

    family = "integer"
    storage = torch.int8
    engine_type = "Int8"
    # From 21 on, ONNX Runtime's QDQ propagation inserts QuantizeLinear nodes with both a zero_point and an output_dtype, which
    # its own type inference then refuses; at 20 the attribute does not exist. Nothing here needs 21.
    opset = 20

    bits: int
    levels: Levels
    granularity: Granularity = PER_TENSOR
    grid: Grid = Grid.SYMMETRIC

    @property
    def name(self) -> str:
        """As recipes call it."""
        return f"int{self.bits}"

    @property
    def has_offset(self) -> bool:
        """Whether the grid is `shifted`."""
        return self.grid is Grid.SHIFTED

    def search_scale(self, weight: Tensor) -> Tensor:
        """See `search.search_weight_scale`."""
        return search_weight_scale(weight, self.levels)

    def search_range(self, sample: Sample, *, may_shift: bool) -> Range:
        """See `search.search_activation_range`."""
        found = search_activation_range(sample, self.bits, may_shift=may_shift)
        format_ = Integer(self.bits, found.levels, self.granularity, found.grid)
        return Range(format_, found.scale, found.offset, found.mse)

    def unrounded(self, x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """clip((x - offset) / scale, lo, hi)."""
        shifted = x if offset is None else x - offset
        return torch.clamp(shifted / scale, self.levels.lo, self.levels.hi)

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """clip(round((x - offset) / scale), lo, hi)."""
        shifted = x if offset is None else x - offset
        return torch.clamp(torch.round(shifted / scale), self.levels.lo, self.levels.hi)

    def neighbours(self, x: Tensor, scale: Tensor) -> Neighbours:
        """floor(x/s) and the next integer, both taken into the levels."""
        scaled = x / scale
        floor, (lo, hi) = torch.floor(scaled), (self.levels.lo, self.levels.hi)
        return Neighbours(floor.clamp(lo, hi), (floor + 1.0).clamp(lo, hi), scaled - floor)

    def fake_quantize(self, x: Tensor, scale: Tensor, offset: Tensor | None, kept: Tensor | None) -> Tensor:
        """The real values of the nearest levels, differentiable; elements may be left float.

        Gradients: straight-through in x inside the range and zero outside; in scale as in LSQ (Esser et al. 2020, eq. 3),
        without its gradient scaling factor; in offset 1 where x is clipped, 0 elsewhere.
        """
        out: Tensor = FakeQuantize.apply(x, scale, offset, kept, self.levels.lo, self.levels.hi)
        return out

    def holds(self, codes: Tensor) -> bool:
        """Whether all codes lie in [lo, hi]."""
        return bool(codes.min() >= self.levels.lo) and bool(codes.max() <= self.levels.hi)

    def steps_apart(self, unrounded: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Differences of integers."""
        return (torch.round(unrounded) - codes).abs(), (unrounded - codes).abs() - 0.5

    def histogram(self, codes: Tensor) -> list[int]:
        """How often each of -128 .. 127 occurs."""
        counts: list[int] = torch.bincount(
            codes.long().flatten() - INT8_MIN, minlength=INT8_MAX - INT8_MIN + 1
        ).tolist()
        return counts

    def record(self) -> dict[str, Any]:
        """Name, grid, levels, and the axis of the scales."""
        return {
            "format": self.name,
            "bits": self.bits,
            "grid": self.grid.value,
            "lo": self.levels.lo,
            "hi": self.levels.hi,
            "axis": self.granularity.axis,
        }

    def read(self, record: dict[str, Any]) -> Integer:
        """The format of a record."""
        levels, grid = Levels(int(record["lo"]), int(record["hi"])), Grid(record["grid"])
        return Integer(self.bits, levels, Granularity(record["axis"]), grid)


def find(name: str, *, weight: bool) -> Integer | None:
    """The format called `name`, such as "int4": per output channel for weights, per tensor for activations; or None."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    bits = int(match[1])
    return Integer(bits, symmetric_levels(bits), Granularity(0) if weight else PER_TENSOR)
