"""FP8: E4M3 with static scales, per output channel for weights and per tensor for activations.

Codes are those of ONNX's QuantizeLinear to FLOAT8E4M3FN: x divided by the stored scale, rounded half to even, saturated at 448.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospq_export.formats.base import PER_TENSOR, Format, Granularity, Range, Sample, Scales
from ospq_export.formats.minifloat import E4M3, Minifloat
from ospq_export.formats.search import search_symmetric, search_weight_scale

NAMES = ("fp8",)
# Levels repeat from one power of two to the next, so where values cluster, as in images, the place within one decides.
_SHARES = torch.logspace(1, -4, 321, base=2.0)
# All of its bits but the sign; where all are set, the code is NaN.
_MAGNITUDE = 0x7F


@functools.cache
def _numbers(device: torch.device) -> Tensor:
    """What every byte stands for; float32 (256,)."""
    # Kept for the next call, which may want gradients where the first one had none.
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@dataclass(frozen=True)
class Fp8(Format):
    """E4M3 codes, symmetric by nature: no offset, no zero point."""

    family = "fp8"
    # The bits: a floating-point buffer would become another type with the rest of a module.
    storage = torch.uint8
    engine_type = "FP8"
    opset = 19
    # It makes a MatMulIntegerToFloat of FP8 operands, which its own type inference refuses.
    onnxruntime_without = ("QDQSelectorActionTransformer",)

    granularity: Granularity = PER_TENSOR
    bits: int = 8
    levels: Minifloat = E4M3
    name: str = "fp8"

    def search_scale(self, weight: Tensor) -> Scales:
        """See `search.search_weight_scale`; the largest scale is amax / 448."""
        return Scales(search_weight_scale(weight, self.levels))

    def search_range(self, sample: Sample, *, may_shift: bool) -> Range:
        """See `search.search_symmetric`; scales up to twice the one that maps the largest value to 448."""
        scale, error = search_symmetric(sample, self.levels, _SHARES)
        return Range(self, scale, 0.0, error)

    def encode(self, levels: Tensor) -> Tensor:
        """The bits of E4M3, uint8."""
        return levels.to(torch.float8_e4m3fn).view(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes, float32, NaN of its two codes: by a table, three times faster than torch's conversion on a CPU."""
        places = codes.view(torch.uint8).flatten().int()
        return _numbers(codes.device).index_select(0, places).view(codes.shape)

    def holds(self, codes: Tensor) -> bool:
        """Whether all codes are numbers: E4M3 has a NaN."""
        return codes.dtype == self.storage and bool(((codes & _MAGNITUDE) != _MAGNITUDE).all())

    def record(self) -> dict[str, Any]:
        """Name and the axis of the scales."""
        return {"format": self.name, "bits": self.bits, "axis": self.granularity.axis}

    def read(self, record: dict[str, Any]) -> Fp8:
        """The format of a record."""
        if record["bits"] != self.bits or record["axis"] != self.granularity.axis:
            raise ValueError(f"fp8 with {record['bits']} bits along axis {record['axis']}")
        return self


def find(name: str, *, weight: bool) -> Fp8 | None:
    """FP8 per output channel for weights, per tensor for activations, if that is the name."""
    return Fp8(Granularity(0) if weight else PER_TENSOR) if name == "fp8" else None
