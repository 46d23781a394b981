"""Integers of 2 to 8 bits in int8, the number semantics that calibration, export and validation share.

All arithmetic is float32, rounds half to even and divides by the scale (ONNX QuantizeLinear divides; multiplying by the inverse
gives other codes at rounding edges). Zero points do not exist: asymmetry is expressed by the integer limits (`embedded`) or by a
float offset that is subtracted first (`shifted`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospq_export.formats.base import PER_TENSOR, Format, Granularity, Range, Sample, Scales
from ospq_export.formats.search import (
    Grid,
    Levels,
    search_activation_range,
    search_weight_scale,
    symmetric_levels,
)

_BITS = {f"int{bits}": bits for bits in range(2, 9)}
NAMES = tuple(_BITS)


@dataclass(frozen=True)
class Integer(Format):
    """Codes `lo` .. `hi`; of a weight symmetric per output channel, of an activation per tensor on one of three grids."""

    family = "integer"
    storage = torch.int8
    engine_type = "Int8"
    # Scales along an axis.
    opset = 13

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

    def search_scale(self, weight: Tensor) -> Scales:
        """See `search.search_weight_scale`."""
        return Scales(search_weight_scale(weight, self.levels))

    def search_range(self, sample: Sample, *, may_shift: bool) -> Range:
        """See `search.search_activation_range`."""
        found = search_activation_range(sample, self.bits, may_shift=may_shift)
        format_ = Integer(self.bits, found.levels, self.granularity, found.grid)
        return Range(format_, found.scale, found.offset, found.mse)

    def holds(self, codes: Tensor) -> bool:
        """Whether all codes lie in [lo, hi]."""
        return bool(codes.min() >= self.levels.lo) and bool(codes.max() <= self.levels.hi)

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
        if record["axis"] != self.granularity.axis:
            raise ValueError(f"{self.name} along axis {record['axis']}")
        levels, grid = Levels(int(record["lo"]), int(record["hi"])), Grid(record["grid"])
        if record["bits"] != self.bits or levels.hi - levels.lo >= 2**self.bits:
            raise ValueError(f"{self.name} with {record['bits']} bits, from {levels.lo} to {levels.hi}")
        return Integer(self.bits, levels, self.granularity, grid)


def find(name: str, *, weight: bool) -> Integer | None:
    """The format called `name`, such as "int4": per output channel for weights, per tensor for activations; or None."""
    bits = _BITS.get(name)
    if bits is None:
        return None
    return Integer(bits, symmetric_levels(bits), Granularity(0) if weight else PER_TENSOR)
