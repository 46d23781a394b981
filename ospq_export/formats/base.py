"""What a number format is: one value that is asked wherever something quantizes, stores, exports or compares codes.

A format is a grid of *levels*, which a scale turns into real values. Its codes are what is stored of the levels. To add a
format is to write a module here and one in `export/lower/`; nothing else knows what a format is made of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Sample:
    """Weighted values that stand for a tensor's distribution: float32 (n,), sorted, and weights that sum to one."""

    values: Tensor
    weights: Tensor


class Format(ABC):
    """A number format. Scales are float32, and everything divides by the scale as it is stored.

    Attributes:
        family: name of the module that writes it as ONNX, in `export/lower/`.
        storage: torch dtype of the codes.
        engine_type: what TensorRT calls an operand in it.
        opset: of ONNX, from which its operators exist.
        bits: of a code.
        granularity: of the scales.
    """

    family: ClassVar[str]
    storage: ClassVar[torch.dtype]
    engine_type: ClassVar[str]
    opset: ClassVar[int]
    bits: int
    granularity: Granularity

    @property
    @abstractmethod
    def name(self) -> str:
        """As recipes call it, such as "int4"."""

    @property
    def has_offset(self) -> bool:
        """Whether a float offset is subtracted before the values are scaled."""
        return False

    @abstractmethod
    def search_scale(self, weight: Tensor) -> Tensor:
        """The scales of a weight with the least squared error under rounding to nearest, of `granularity.scale_shape`."""

    @abstractmethod
    def search_range(self, sample: Sample, *, may_shift: bool) -> Range:
        """The deployable range of an activation with the least mean squared error on a sample.

        Args:
            sample: what `search.compress` returned.
            may_shift: whether an offset can be deployed.
        """

    @abstractmethod
    def unrounded(self, x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """X in units of the levels, taken into their range but not rounded; scale broadcasts with x."""

    @abstractmethod
    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """The nearest levels of x, ties to even; float32, the shape of x; scale broadcasts with x."""

    @abstractmethod
    def neighbours(self, x: Tensor, scale: Tensor) -> Neighbours:
        """The levels around x; scale broadcasts with x."""

    @abstractmethod
    def fake_quantize(self, x: Tensor, scale: Tensor, offset: Tensor | None, kept: Tensor | None) -> Tensor:
        """The real values of the nearest levels, differentiable in x, scale and offset.

        Args:
            x: float32, any shape.
            scale: float32 scalar.
            offset: float32 scalar, None where the format has none.
            kept: 1 where the element is quantized, 0 where it stays float (QDrop), the shape of x; None quantizes all.
        """

    def dequantize(self, levels: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """Real values of levels: levels * scale (+ offset); scale broadcasts."""
        real = levels * scale
        return real if offset is None else real + offset

    def encode(self, levels: Tensor) -> Tensor:
        """Codes as they are stored."""
        return levels.to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes, float32."""
        return codes.float()

    @abstractmethod
    def holds(self, codes: Tensor) -> bool:
        """Whether all codes are codes of this format."""

    @abstractmethod
    def steps_apart(self, unrounded: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """How far codes lie from those that values should have.

        Args:
            unrounded: of `unrounded`.
            codes: as stored, any dtype.

        Returns:
            Steps between the codes and the values' nearest ones; and steps by which the codes lie farther from the values than
            the half step that rounding takes, where at most 0 is right.
        """

    @abstractmethod
    def histogram(self, codes: Tensor) -> list[int]:
        """How often each code of the storage type occurs, in ascending order."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What a manifest says of it: values that JSON has, "format" being the name."""

    @abstractmethod
    def read(self, record: dict[str, Any]) -> Format:
        """The format of a record, which has this one's name.

        Raises:
            ValueError: the record is of no such format.
        """
