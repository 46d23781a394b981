"""Weights as they are deployed: codes counted, and the noise that quantizing added."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from ospq_export.runs.files import FLOAT_TENSORS, QUANTIZED_TENSORS
from ospq_export.runs.tensors import read_tensors
from ospq_export.validate.codes.records import Power

if TYPE_CHECKING:
    from ospq_export.runs.run import Run


class WeightComparison(BaseModel):
    """One weight's codes against the float weight.

    Attributes:
        sqnr: signal-to-quantization-noise ratio, dB.
        histogram: how often each code occurs, in ascending order: of integers -128 .. 127.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    slice: str
    bits: int
    sqnr: float
    histogram: list[int]


def weight_comparisons(run: Run) -> list[WeightComparison]:
    """Every weight of a run, in graph order; from its two tensor files alone.

    Raises:
        InputError: a tensor file cannot be read.
    """
    integers, _ = read_tensors(run.file(QUANTIZED_TENSORS))
    floats, _ = read_tensors(run.file(FLOAT_TENSORS))
    result = []
    for record in run.manifest.quantizers:
        if record.kind != "weight" or record.constant is None:
            continue
        codes, weight = integers[f"{record.name}.codes"], floats[record.constant]
        format_ = record.read_format()
        scale = format_.granularity.spread(integers[f"{record.name}.scale"], weight.shape)
        power = Power()
        power.add(weight, format_.dequantize(format_.decode(codes), scale))
        result.append(
            WeightComparison(
                name=record.name,
                slice=run.manifest.slices[record.slice].name,
                bits=format_.bits,
                sqnr=power.decibel,
                histogram=format_.histogram(codes),
            )
        )
    return result
