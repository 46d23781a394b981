"""Integer levels and the grids that they lie on; search of ranges by minimum mean squared error, on compressed samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ospq_export.formats.base import Neighbours, Rounding, Sample

INT8_MIN, INT8_MAX = -128, 127
# [-127, 127]: an `embedded` grid never touches -128, so that its negative is an int8 grid as well.
EMBEDDED_MIN, EMBEDDED_MAX = -127, 127
_TAIL = 512
# Scales are positive; below this a float32 product of two of them is no normal number. Zeros alone take the second.
_SMALLEST_SCALE, _SCALE_OF_ZEROS = 1e-18, 1e-8
_GROUPS = 4096
_ELEMENTS_AT_ONCE = 1 << 18
# A shifted grid costs a subtraction in the deployed network, so it has to earn its place.
_SHIFT_MUST_GAIN = 0.9


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
    def all(self) -> Sequence[float]:
        """Those of int8."""
        return range(INT8_MIN, INT8_MAX + 1)

    @property
    def edge(self) -> float:
        """Half a step."""
        return 0.5

    def round_(self, x: Tensor) -> Tensor:
        """The nearest levels, ties to even, in place."""
        return x.round_().clamp_(self.lo, self.hi)

    def neighbours(self, x: Tensor) -> Neighbours:
        """floor(x) and the next integer, both taken into the levels."""
        floor = torch.floor(x)
        return Neighbours(floor.clamp(self.lo, self.hi), (floor + 1.0).clamp(self.lo, self.hi), x - floor)

    def ranks(self, x: Tensor) -> Tensor:
        """The integers themselves."""
        return x

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


@dataclass(frozen=True)
class ActivationRange:
    """The outcome of a search: which grid, its integer levels, the scale and the offset (units of the tensor)."""

    grid: Grid
    levels: Levels
    scale: float
    offset: float
    mse: float


def compress(values: Tensor, *, groups: int = _GROUPS, tail: int = _TAIL) -> Sample:
    """Stand for many values by few: the largest and smallest alone, the rest as means of equally full groups.

    Args:
        values: float, any shape, at least one element, finite.
        groups: how many groups.
        tail: how many values at each end stand for themselves.
    """
    ordered = values.detach().flatten().float().sort().values
    if ordered.numel() <= groups + 2 * tail:
        return Sample(ordered, torch.full_like(ordered, 1.0 / ordered.numel()))
    body = ordered[tail:-tail]
    edges = torch.linspace(0, body.numel(), groups + 1, device=body.device).round().long()
    counts = edges.diff()
    sums = torch.cumsum(body.double(), 0)
    sums = torch.cat([sums.new_zeros(1), sums])[edges].diff()
    ones = counts.new_ones(tail)
    weights = torch.cat([ones, counts, ones]).double() / ordered.numel()
    means = (sums / counts).float()
    return Sample(torch.cat([ordered[:tail], means, ordered[-tail:]]), weights.float())


def _least(
    sample: Sample, levels: Rounding, scales: Tensor, offsets: Tensor | None = None
) -> tuple[float, float, float]:
    """Of candidate scales, and offsets, (candidates,) each, those with the least weighted squared error; and that error."""
    scale = scales.unsqueeze(-1)
    x = sample.values if offsets is None else sample.values - offsets.unsqueeze(-1)
    error = levels.round_(x / scale) * scale - x
    errors = (error.square() * sample.weights).sum(-1)
    best = int(errors.argmin())
    return float(scales[best]), 0.0 if offsets is None else float(offsets[best]), float(errors[best])


def positive(scales: Tensor) -> Tensor:
    """Scales that divide: small ones stay small, for all-zero values any serves."""
    return torch.where(scales > 0, scales.clamp_min(_SMALLEST_SCALE), _SCALE_OF_ZEROS)


# Candidate ranges as shares of the full one, denser (in ratio) than uniform near zero, for heavy tails.
_SHARES = torch.logspace(0, -2.2, 64)


def search_symmetric(sample: Sample, levels: Rounding, shares: Tensor = _SHARES) -> tuple[float, float]:
    """The scale with the least mean squared error on the sample, without an offset, and that error.

    Args:
        sample: what `compress` returned.
        levels: of the codes.
        shares: float32 (candidates,), the ranges that are tried as shares of the full one.
    """
    low, high = sample.values.min(), sample.values.max()
    full = positive(torch.maximum(high / levels.hi, low / levels.lo))
    scale, _, error = _least(sample, levels, full * shares.to(full.device))
    return scale, error


def _search_embedded(sample: Sample, bits: int) -> ActivationRange:
    """Every lo that keeps zero in the grid (or touches it), with every scale of a ladder; at most 127 x 64 candidates."""
    steps = 2**bits - 1
    low, high = min(0.0, float(sample.values.min())), max(0.0, float(sample.values.max()))
    full = float(positive(torch.tensor((high - low) / steps, dtype=torch.float64)))
    # Few levels on one side of zero need a larger step than the full range does, so the ladder starts at twice that.
    ladder = 2.0 * full * _SHARES.to(sample.values.device)
    scales = torch.cat([ladder, ladder.new_tensor([full])])
    starts = torch.arange(max(-steps, EMBEDDED_MIN), min(0, EMBEDDED_MAX - steps) + 1, device=scales.device)
    if starts.numel() > 32:
        starts = starts[:: starts.numel() // 32]
    tried = (embedded_levels(bits, lo) for lo in starts.tolist())
    found = (ActivationRange(Grid.EMBEDDED, levels, *_least(sample, levels, scales)) for levels in tried)
    return min(found, key=lambda best: best.mse)


def _search_shifted(sample: Sample, bits: int) -> ActivationRange:
    """Both ends of the range shrink independently; the offset maps the range's ends to the first and last level."""
    levels = symmetric_levels(bits)
    low, high = sample.values.min(), sample.values.max()
    middle = (sample.values * sample.weights).sum()
    shares = torch.logspace(0, -2.2, 24, device=low.device)
    lows = (middle - (middle - low) * shares).unsqueeze(1).expand(-1, 24).flatten()
    highs = (middle + (high - middle) * shares).unsqueeze(0).expand(24, -1).flatten()
    scales = positive((highs - lows) / (levels.hi - levels.lo))
    best = _least(sample, levels, scales, lows - levels.lo * scales)
    return ActivationRange(Grid.SHIFTED, levels, *best)


def search_activation_range(sample: Sample, bits: int, *, may_shift: bool) -> ActivationRange:
    """The deployable range with the least mean squared error on the sample.

    Below 8 bits the grid is `embedded`; at 8 bits it is `symmetric`, or `shifted` where the consumers allow an offset and the
    error falls by more than a tenth.

    Args:
        sample: what `compress` returned.
        bits: 2 to 8.
        may_shift: whether every consumer is a linear or an unpadded convolution.

    Raises:
        ValueError: bits is not in 2..8.
    """
    if bits < 8:
        return _search_embedded(sample, bits)
    levels = symmetric_levels(bits)
    scale, error = search_symmetric(sample, levels)
    symmetric = ActivationRange(Grid.SYMMETRIC, levels, scale, 0.0, error)
    if not may_shift:
        return symmetric
    shifted = _search_shifted(sample, bits)
    return shifted if shifted.mse < _SHIFT_MUST_GAIN * symmetric.mse else symmetric


def search_weight_scale(weight: Tensor, levels: Rounding) -> Tensor:
    """Scale per output channel with the least squared error under round to nearest.

    Args:
        weight: float32 (out_channels, ...).
        levels: of its codes.

    Returns:
        float32 (out_channels,), positive.
    """
    rows = weight.detach().flatten(1)
    # A few rows at a time: every candidate passes over them, and small parts stay in a processor's cache. A GPU has few launches.
    count = len(rows) if rows.is_cuda else max(1, _ELEMENTS_AT_ONCE // rows.shape[1])
    parts = rows.split(count)
    return torch.cat([_search_rows(part, levels) for part in parts])


def _search_rows(rows: Tensor, levels: Rounding) -> Tensor:
    full = positive(torch.maximum(rows.amax(1) / levels.hi, rows.amin(1) / levels.lo))
    best_scale, best_error = full.clone(), torch.full_like(full, torch.inf)
    for share in torch.linspace(1.0, 0.3, 57).tolist():
        scale = full * share
        codes = levels.round_(rows / scale.unsqueeze(1))
        error = (codes * scale.unsqueeze(1) - rows).square().sum(1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale
