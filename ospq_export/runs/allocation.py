"""What a search for formats was asked, and what it found and tried: a file of a run whose formats were searched."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ospq_export.errors import damaged, refusal_of
from ospq_export.runs.files import ALLOCATION, write_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Record):
    """What a network may lose or cost, and the formats to keep to it with.

    With `max_drop` alone the fewest bits, or with `gpu` the least time, that keep it are looked for; with `bits` or `latency` the
    least loss.

    Attributes:
        formats: names of formats; "float" among them lets operators be left alone.
        max_drop: points of the task's score that may be lost against the float network.
        bits: average bits of weights and activations, each weighed by the multiply-adds that read it.
        latency: estimated time as a share of FP16's, on `gpu`.
        gpu: whose published rates are taken.
        confidence: with which the drop has to be shown to be at most `max_drop`; 0.5 takes the bare estimate.
    """

    formats: tuple[str, ...] = Field(min_length=1)
    max_drop: float | None = Field(default=None, ge=0, le=100)
    bits: float | None = Field(default=None, gt=0)
    latency: float | None = Field(default=None, gt=0)
    gpu: str | None = None
    confidence: float = Field(default=0.95, ge=0.5, lt=1)

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.max_drop is None and self.bits is None and self.latency is None:
            raise ValueError("a budget needs max_drop, bits or latency")
        if self.latency is not None and self.gpu is None:
            raise ValueError("a latency needs a GPU")
        return self


class Attempt(_Record):
    """Formats for every operator: what they cost, what they are expected to lose, and what they were seen to lose.

    Attributes:
        formats: by operator, in graph order.
        bits: on average, see `Budget`.
        latency: share of FP16's; None without a GPU.
        loss: the sum of the operators' losses, of rounding to nearest.
        images: held-out images that the drop was measured on; 0 where it was not.
        differing: those with another prediction.
        drop: points lost; None without labels.
        high: the most that may have been lost, at the budget's confidence: of the drop, or of the share that differs.
    """

    formats: dict[str, str]
    bits: float
    latency: float | None = None
    loss: float
    images: int = 0
    differing: int = 0
    drop: float | None = None
    high: float | None = None


class Allocation(_Record):
    """A search for formats.

    Attributes:
        budget: what it was asked.
        losses: divergence that each operator alone causes in a format, by format and operator.
        attempts: the formats that no others beat in both cost and expected loss, from the cheapest on; some were tried.
        taken: index of the attempt that the run has; None where none kept the budget.
    """

    budget: Budget
    losses: dict[str, dict[str, float]]
    attempts: list[Attempt]
    taken: int | None = None


def write_allocation(folder: Path, allocation: Allocation) -> None:
    """Write it atomically."""
    write_json(folder / ALLOCATION, allocation.model_dump(mode="json"))


def read_allocation(path: Path) -> Allocation:
    """Read and check it.

    Raises:
        InputError: it is damaged.
    """
    try:
        return Allocation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise damaged(f"it is no allocation: {refusal_of(error.errors()[0])}", path) from error
    except (OSError, ValueError) as error:
        raise damaged(f"cannot be read: {error}", path) from error
