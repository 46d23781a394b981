"""Small floating-point numbers: E4M3 (OCP 8-bit floating point specification, "FN": no infinities) and E2M1 (OCP microscaling).

Rounding is to nearest, ties to the even mantissa, and saturates, as ONNX's QuantizeLinear does. It is computed in the values'
own type, where every level, every step and every division by a power of two is exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ospq_export.formats.base import Neighbours

# An integer type of the same size, and the bits of the exponent: what they leave of a number is the power of two below it.
_FIELDS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float16: (torch.int16, 0x7C00),
}


@dataclass(frozen=True)
class Minifloat:
    """A floating-point type whose levels are the format's levels.

    Attributes:
        mantissa: bits.
        exponent: of the smallest normal number; below it the levels are evenly spaced.
        largest: magnitude.
    """

    mantissa: int
    exponent: int
    largest: float

    @property
    def lo(self) -> float:
        """The smallest level."""
        return -self.largest

    @property
    def hi(self) -> float:
        """The largest level."""
        return self.largest

    @property
    def edge(self) -> float:
        """How far beyond the last level a value still lies within its rounding: half a step."""
        return 2.0 ** (math.frexp(self.largest)[1] - 1 - self.mantissa) / 2

    @property
    def smallest(self) -> float:
        """The smallest positive level."""
        return 2.0 ** (self.exponent - self.mantissa)

    def steps(self, x: Tensor) -> Tensor:
        """Distance between the levels around each value, towards larger magnitudes; new, of x's dtype."""
        integer, exponent = _FIELDS[x.dtype]
        power = (x.view(integer) & exponent).view(x.dtype)
        return power.clamp_(min=2.0**self.exponent).mul_(2.0**-self.mantissa)

    def round_(self, x: Tensor) -> Tensor:
        """Round values to levels, in place; NaN stays NaN."""
        # Clipped first: an infinity has no step.
        steps = self.steps(x.clamp_(self.lo, self.hi))
        return x.div_(steps).round_().mul_(steps)

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest levels; float32, new."""
        return self.round_(x.float().clone(memory_format=torch.contiguous_format))

    def neighbours(self, x: Tensor) -> Neighbours:
        """The level at or below each value and the next one above it; both the end's where x lies outside."""
        # No farther beyond the end than the next step.
        x = x.clamp(2 * self.lo, 2 * self.hi).contiguous()
        steps = self.steps(x)
        lower = torch.floor(x / steps) * steps
        # Above a negative power of two the levels lie closer than below it.
        inner = self.steps(torch.nextafter(lower, torch.zeros_like(lower)))
        upper = lower + torch.where(lower < 0, inner, steps)
        position = (x - lower) / (upper - lower)
        return Neighbours(lower.clamp(self.lo, self.hi), upper.clamp(self.lo, self.hi), position)

    def ranks(self, x: Tensor) -> Tensor:
        """Place of values on a line where the levels are the integers and zero is 0; between levels it is linear.

        Half integers are where rounding changes over.
        """
        magnitude = x.abs().clamp(max=self.largest).contiguous()
        steps = self.steps(magnitude)
        power = steps * 2.0**self.mantissa
        octave = torch.log2(power).round() - self.exponent
        within = magnitude / steps
        normal = magnitude >= 2.0**self.exponent
        ranks = torch.where(normal, within + octave * 2.0**self.mantissa, within)
        return torch.copysign(ranks, x)

    @functools.cached_property
    def top(self) -> int:
        """Rank of the largest level."""
        return int(self.ranks(torch.tensor(self.largest)))

    @functools.cached_property
    def all(self) -> Sequence[float]:
        """Every level once, ascending."""
        positive = [self.smallest]
        while positive[-1] < self.largest:
            positive.append(positive[-1] + float(self.steps(torch.tensor(positive[-1]))))
        return (*(-level for level in reversed(positive)), 0.0, *positive)


E4M3 = Minifloat(mantissa=3, exponent=-6, largest=448.0)
E2M1 = Minifloat(mantissa=1, exponent=0, largest=6.0)
