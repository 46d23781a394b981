"""Integer levels and the grids that they lie on: DESIGN section 3."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

INT8_MIN, INT8_MAX = -128, 127
# [-127, 127]: an `embedded` grid never touches -128, so that its negative is an int8 grid as well.
EMBEDDED_MIN, EMBEDDED_MAX = -127, 127


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
