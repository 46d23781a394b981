"""What a comparison of codes finds: differences summed batch by batch, and the records that a report keeps of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ospq_export.errors import damaged
from ospq_export.formats.base import Scales
from ospq_export.graph.quantizers import ActivationQuantizer, Mode, WeightQuantizer
from ospq_export.runs.files import FLOAT_TENSORS, QUANTIZED_TENSORS
from ospq_export.runs.quantizers import load_quantizer
from ospq_export.runs.tensors import read_tensors
from ospq_export.tasks.statistics import Record

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_NO_NOISE = 200.0


class QuantizerComparison(Record):
    """One quantizer's deployed codes against the fake-quantized network's.

    Attributes:
        free_share: percent of the codes that differ when both run freely.
        free_max_step: largest difference there, in codes.
        share: percent that differ with equal inputs.
        max_step: largest difference there, in codes.
        excess: with equal inputs, how far the deployed code lies from the real-valued one beyond the half step that rounding
            takes, at most, in steps; about 0 is a rounding edge.
        sqnr: of quantizing this tensor in the fake-quantized network, dB.
        histogram: how often each level was deployed, in ascending order: of integers -128 .. 127, of FP8 the 253 numbers from
            -448 to 448, of NVFP4 the 15 from -6 to 6.
    """

    name: str
    slice: str
    free_share: float
    free_max_step: int
    share: float
    max_step: int
    excess: float
    sqnr: float
    histogram: list[int]


class SliceComparison(Record):
    """Signal-to-quantization-noise ratios at the end of one slice, dB (200 where there is no noise).

    Attributes:
        quantization: float against fake-quantized.
        floor: fake-quantized in float32 against float64.
        deployed: fake-quantized against deployed, both free-running; None where the file does not tell.
        equal_input: the same with equal inputs.
    """

    name: str
    quantization: float
    floor: float
    deployed: float | None
    equal_input: float | None


class Location(Record):
    """The code-level comparison of one deployed file.

    Attributes:
        first_diverging: the first slice with a difference that rounding does not explain.
        faults: every such difference in words, in the network's order.
        unknown: quantizers of the run that the file does not have under their names.
    """

    deployed: str
    images: int
    max_excess: float
    min_sqnr: float
    first_diverging: str | None
    faults: list[str]
    unknown: list[str]
    quantizers: list[QuantizerComparison]
    slices: list[SliceComparison]


@dataclass
class Power:
    """Signal and noise power, summed batch by batch in float64."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Add a batch; both of one shape."""
        ours, difference = reference.double(), reference.double() - other.double()
        self.signal += float((ours * ours).sum())
        self.noise += float((difference * difference).sum())

    @property
    def decibel(self) -> float:
        """10 log10(signal / noise), within -200 and 200."""
        if not np.isfinite(self.noise + self.signal):
            return -_NO_NOISE
        if self.noise <= 0 or self.signal <= 0:
            return _NO_NOISE if self.noise <= 0 else -_NO_NOISE
        return float(np.clip(10 * np.log10(self.signal / self.noise), -_NO_NOISE, _NO_NOISE))


@dataclass
class CodeDifferences:
    """Differences of codes, summed batch by batch."""

    total: int = 0
    differing: int = 0
    max_step: int = 0
    excess: float = 0.0
    histogram: NDArray[np.int64] | None = None

    def add(
        self, quantizer: ActivationQuantizer, x: Tensor, deployed: Tensor, stored: Tensor | None = None
    ) -> None:
        """Compare the codes that x should have with deployed ones; one that is no number is as far off as any can be.

        Args:
            quantizer: of the fake-quantized network.
            x: what it quantizes.
            deployed: codes.
            stored: scales that the deployed network computed for them; None where it has none.
        """
        format_, levels = quantizer.format, quantizer.format.decode(deployed)
        steps, excess = format_.steps_apart(x, quantizer.scale, quantizer.used_offset, levels, stored)
        ends = format_.levels.ranks(torch.tensor([format_.levels.lo, format_.levels.hi], dtype=torch.float32))
        steps, excess = (t.nan_to_num(float(ends.diff())) for t in (steps, excess))
        self.total += steps.numel()
        self.differing += int((steps != 0).sum())
        self.max_step = max(self.max_step, int(steps.max()))
        self.excess = max(self.excess, float(excess.max()))
        counts = np.array(format_.histogram(deployed))
        self.histogram = counts if self.histogram is None else self.histogram + counts

    @property
    def share(self) -> float:
        """Percent of the codes that differ."""
        return 100.0 * self.differing / max(self.total, 1)


class WeightComparison(Record):
    """One weight's codes against the float weight.

    Attributes:
        sqnr: signal-to-quantization-noise ratio, dB.
        histogram: how often each level occurs; as of a `QuantizerComparison`.
        scales: of a format with block scales that are stored in a smaller type: how many lie in [2^k, 2^(k+1)), by k.
    """

    name: str
    slice: str
    bits: int
    sqnr: float
    histogram: list[int]
    scales: dict[int, int]


def weight_comparisons(run: Run) -> list[WeightComparison]:
    """Every weight of a run, in graph order; from its two tensor files alone.

    Raises:
        InputError: a tensor file is damaged.
    """
    path = run.file(QUANTIZED_TENSORS)
    tensors, _ = read_tensors(path)
    floats, _ = read_tensors(run.file(FLOAT_TENSORS))
    result = []
    for record in run.manifest.quantizers:
        if record.kind != "weight":
            continue
        weight, format_, constant = floats.get(record.constant or ""), record.read_format(), record.constant
        if weight is None or constant is None:
            raise damaged(f"{record.name}: there is no constant {constant!r}", run.path / FLOAT_TENSORS)
        quantizer = WeightQuantizer(record.name, format_, constant, weight)
        load_quantizer(quantizer, record, tensors, path)
        quantizer.mode = Mode.QUANTIZE
        power = Power()
        power.add(weight, quantizer(weight))
        result.append(
            WeightComparison(
                name=record.name,
                slice=run.manifest.slices[record.slice].name,
                bits=format_.bits,
                sqnr=power.decibel,
                histogram=format_.histogram(quantizer.codes),
                scales=format_.scale_histogram(Scales(quantizer.scale, quantizer.tensor_scale)),
            )
        )
    return result
