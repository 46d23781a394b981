"""What a number format is: one value that is asked wherever something quantizes, stores, exports or compares codes.

A format is a grid of *levels*, which a scale turns into real values. Its codes are what is stored of the levels. To add a
format is to write a module here and one in `export/lower/`; nothing else knows what a format is made of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ospq_export.formats.kernels import FakeQuantize, steps_between


@dataclass(frozen=True)
class Granularity:
    """Which elements of a tensor share a scale: all; those at one place along an axis; or a block of them along it.

    Attributes:
        axis: None where one scale serves the whole tensor.
        block_size: elements along the axis that share a scale; None where a place along the axis has its own.
    """

    axis: int | None = None
    block_size: int | None = None

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor."""
        if self.axis is None:
            return ()
        if self.block_size is None:
            return (shape[self.axis],)
        blocks = -(-shape[self.axis] // self.block_size)
        return (*shape[: self.axis], blocks, *shape[self.axis + 1 :])

    def spread(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """The scale so that it broadcasts with a tensor of the shape."""
        if self.axis is None:
            return scale
        if self.block_size is None:
            return scale.reshape([-1 if axis == self.axis else 1 for axis in range(len(shape))])
        repeated = scale.repeat_interleave(self.block_size, self.axis)
        return repeated.narrow(self.axis, 0, shape[self.axis])


PER_TENSOR = Granularity()


class Role(StrEnum):
    """What a quantizable operator is: a linear, a convolution, or a product of two activations."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"


class Rounding(Protocol):
    """The levels of a format, to which scaled values are rounded."""

    @property
    def lo(self) -> float:
        """The smallest level."""
        raise NotImplementedError

    @property
    def hi(self) -> float:
        """The largest level."""
        raise NotImplementedError

    @property
    def all(self) -> Sequence[float]:
        """Every level that a code's type can hold, ascending, with zero in the middle or right behind it."""
        raise NotImplementedError

    @property
    def edge(self) -> float:
        """How far beyond the last level a value may lie that still is rounded and not clipped."""
        raise NotImplementedError

    def round_(self, x: Tensor) -> Tensor:
        """The nearest levels of x, ties to even, in place."""
        raise NotImplementedError

    def neighbours(self, x: Tensor) -> Neighbours:
        """The level at or below each value and the next one above it; both the end's where x lies outside."""
        raise NotImplementedError

    def ranks(self, x: Tensor) -> Tensor:
        """Values on a line where the levels are integers, zero is 0 and rounding changes at halves."""
        raise NotImplementedError


@dataclass(frozen=True)
class Neighbours:
    """The two levels between which a value may be rounded: float32, the shape of the values.

    Attributes:
        lower, upper: equal where the value lies outside of the format's range.
        position: how far the value lies from the lower one towards the upper one, in [0, 1].
    """

    lower: Tensor
    upper: Tensor
    position: Tensor


@dataclass(frozen=True)
class Range:
    """The outcome of a search.

    Attributes:
        format: with the levels that were found.
        scale, offset: in the units of the tensor.
        mse: mean squared error on the sample.
    """

    format: Format
    scale: float
    offset: float
    mse: float


class Scales(NamedTuple):
    """Scales of a weight.

    Attributes:
        scale: float32, of `granularity.scale_shape`: by what levels are multiplied.
        tensor_scale: float32 scalar; None but where what is stored is the scales' quotients by it, in a smaller type.
    """

    scale: Tensor
    tensor_scale: Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """Weighted values that stand for a tensor's distribution: float32 (n,), sorted, and weights that sum to one."""

    values: Tensor
    weights: Tensor


class Format(ABC):
    """A number format. Scales are float32, and everything divides by the scale as it is stored.

    Attributes:
        family: name of the module that writes it as ONNX, in `export/lower/`; storage: torch dtype of the codes.
        engine_type: what TensorRT calls an operand in it.
        opset: of ONNX, from which its operators exist.
        onnxruntime_without: names of ONNX Runtime's optimisations that make something invalid of it.
        fallback: name of the format that takes the operands which this one cannot; None where it can take all.
        learns_scale: whether an activation's scale can be learned; block scales that are computed from the values cannot.
        has_tensor_scale: whether a weight has one; see `Scales`.
        bits, scale_bits: of a code, and of a block's scale as it is stored.
        levels: what scaled values are rounded to.
        granularity: of the scales.
    """

    family: ClassVar[str]
    storage: ClassVar[torch.dtype]
    engine_type: ClassVar[str]
    opset: ClassVar[int]
    onnxruntime_without: ClassVar[tuple[str, ...]] = ()
    fallback: ClassVar[str | None] = None
    learns_scale: ClassVar[bool] = True
    has_tensor_scale: ClassVar[bool] = False
    scale_bits: ClassVar[int] = 32
    bits: int
    levels: Rounding
    granularity: Granularity

    @property
    @abstractmethod
    def name(self) -> str:
        """As recipes call it, such as "int4"."""

    @property
    def has_offset(self) -> bool:
        """Whether a float offset is subtracted before the values are scaled."""
        return False

    def refuses(self, role: Role, inner: int) -> str:
        """Why an operator whose products sum over `inner` elements cannot have the format; empty where it can."""
        return ""

    def search_scale(self, weight: Tensor) -> Scales:
        """The scales of a weight with the least squared error under rounding to nearest; only of a weight's format."""
        raise NotImplementedError

    def search_range(self, sample: Sample, *, may_shift: bool) -> Range:
        """The deployable range of an activation with the least mean squared error on a sample; only of an activation's format.

        Args:
            sample: what `search.compress` returned.
            may_shift: whether an offset can be deployed.
        """
        raise NotImplementedError

    def activation_scales(self, x: Tensor, scale: Tensor, stored: Tensor | None = None) -> Tensor:
        """By what an activation's levels are multiplied, broadcasting with x: its blocks' scales, or the scale itself.

        `stored` is as `steps_apart` has it.
        """
        return scale

    def unrounded(self, x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """clip((x - offset) / scale, lo, hi): in units of the levels, not rounded; scale broadcasts with x."""
        shifted = x if offset is None else x - offset
        return torch.clamp(shifted / self.activation_scales(x, scale), self.levels.lo, self.levels.hi)

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """The nearest levels of x, ties to even; float32, the shape of x; scale broadcasts with x."""
        return self.levels.round_((x if offset is None else x - offset) / self.activation_scales(x, scale))

    def neighbours(self, x: Tensor, scale: Tensor) -> Neighbours:
        """The levels around x; scale broadcasts with x."""
        return self.levels.neighbours(x / scale)

    def fake_quantize(self, x: Tensor, scale: Tensor, offset: Tensor | None, kept: Tensor | None) -> Tensor:
        """The real values of the nearest levels, differentiable; elements may be left float.

        Gradients: straight-through in x inside the range and zero outside; in scale as in LSQ (Esser et al. 2020, eq. 3),
        without its gradient scaling factor; in offset 1 where x is clipped, 0 elsewhere.

        Args:
            x: float32, any shape.
            scale: float32 scalar.
            offset: float32 scalar, None where the format has none.
            kept: 1 where the element is quantized, 0 where it stays float (QDrop), the shape of x; None quantizes all.
        """
        out: Tensor = FakeQuantize.apply(x, scale, offset, kept, self.levels)
        return out

    def dequantize(self, levels: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """Real values of levels: levels * scale (+ offset); scale broadcasts."""
        real = levels * scale
        return real if offset is None else real + offset

    def encode(self, levels: Tensor) -> Tensor:
        """Codes as they are stored."""
        return levels.to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes, float32, NaN where a code is no number; the codes as stored, or as ONNX Runtime returns them."""
        return codes.float()

    @abstractmethod
    def holds(self, codes: Tensor) -> bool:
        """Whether all codes are codes of this format."""

    def stores(self, scales: Scales) -> bool:
        """Whether scales of a weight are what the format stores of them; positive ones."""
        return True

    def steps_apart(
        self, x: Tensor, scale: Tensor, offset: Tensor | None, levels: Tensor, stored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """How far deployed levels lie from those that values should have.

        Args:
            x: float32 or float64, any shape.
            scale: scalar.
            offset: scalar, None where the format has none.
            levels: of the deployed codes.
            stored: scales that were computed from the values, as they were stored; None where there are none to be had.

        Returns:
            Steps between the levels and the values' nearest ones; and steps by which the levels lie farther from the values
            than the half step that rounding takes, where at most 0 is right.
        """
        return steps_between(self.unrounded(x, scale, offset), levels, self.levels)

    def histogram(self, codes: Tensor) -> list[int]:
        """How often each of `levels.all` occurs; NaN, which a deployed network may give, is none."""
        levels, kinds = self.decode(codes), len(self.levels.all)
        places = self.levels.ranks(levels[~levels.isnan()]).long() + kinds // 2
        counts: list[int] = torch.bincount(places, minlength=kinds).tolist()
        return counts

    def scale_histogram(self, scales: Scales) -> dict[int, int]:
        """How many scales of a weight lie in [2^k, 2^(k+1)) as they are stored, by k; empty where float32 holds them."""
        return {}

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What a manifest says of it: values that JSON has, "format" being the name."""

    @abstractmethod
    def read(self, record: dict[str, Any]) -> Format:
        """The format of a record, which has this one's name.

        Raises:
            ValueError: the record is of no such format.
        """
