"""What a validation keeps of every batch of outputs: columns with a row for each image, and what they say of two executions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ospq_export.errors import InputError
from ospq_export.tasks.accuracy import AccuracyChange
from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.statistics import FloatArray, IntArray, Rate, Record

Outputs = Mapping[str, FloatArray]
"""What an execution returned for a batch, by name; (B, ...) float32 each."""
Columns = dict[str, NDArray[Any]]
Pair = tuple[str, str]
"""Names of a reference and of what is held to it."""
FINITE = "finite"


def _doubled(values: NDArray[Any]) -> NDArray[Any]:
    """The values, with as much room again behind them."""
    return np.concatenate([values, np.empty_like(values)])


class Collector:
    """Keeps columns batch by batch; memory grows with them only.

    Everything is allocated at once: small arrays kept from batch to batch would lie between the large ones that are freed, and
    the holes that those leave could not be used again. Memory that was never written to is not taken.

    Args:
        capacity: images that are expected; where more come, room is doubled.
    """

    def __init__(self, capacity: int) -> None:
        self.ids: list[str] = []
        self._columns: Columns = {}
        self._rows: dict[str, int] = {}
        self._labels = np.empty(capacity, np.int64)

    def add(self, columns: Mapping[str, NDArray[Any]], labels: IntArray, ids: Sequence[str]) -> None:
        """Add one batch: columns with up to B rows, labels (B,), ids."""
        while len(self.ids) + len(ids) > len(self._labels):
            self._labels = _doubled(self._labels)
            self._columns = {name: _doubled(values) for name, values in self._columns.items()}
        for name, values in columns.items():
            if name not in self._columns:
                self._columns[name] = np.empty((len(self._labels), *values.shape[1:]), values.dtype)
                self._rows[name] = 0
            self._columns[name][self._rows[name] : self._rows[name] + len(values)] = values
            self._rows[name] += len(values)
        self._labels[len(self.ids) : len(self.ids) + len(ids)] = labels
        self.ids += ids

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    def column(self, name: str) -> NDArray[Any]:
        """All rows of a column."""
        return self._columns[name][: self._rows[name]]

    def labels(self) -> IntArray:
        """All labels, (N,)."""
        return self._labels[: len(self.ids)]


class Noise(Record):
    """Relative errors of an output over images: the mean, and the largest."""

    mean: float
    largest: float


@dataclass(frozen=True)
class Variation:
    """How far two executions of one network are apart.

    Attributes:
        flips: images with another decision; 0 where outputs decide nothing.
        difference: mean absolute difference of all elements.
        margin: the most by which a margin between two decisions changed.
        errors: the relative errors of the images, by output.
    """

    flips: int
    difference: float
    margin: float = 0.0
    errors: Mapping[str, Noise] = field(default_factory=dict)


class Measure(ABC):
    """What is kept of outputs, and what two executions' are compared by.

    Args:
        pairs: of executions that will be compared.
        images: how many there will be, in all processes; None where that is not known.
        threshold: of a network with a single logit, above which it stands for the second class; None is 0.
    """

    uses_labels: ClassVar[bool] = True

    def __init__(self, pairs: Sequence[Pair], images: int | None, threshold: float | None = None) -> None:
        self.pairs, self.images, self.threshold = list(dict.fromkeys(pairs)), images, threshold

    @property
    def decision_threshold(self) -> float | None:
        """The threshold that decided, of a network with a single logit; None for all others."""
        return None

    def columns(self, outputs: Mapping[str, Outputs], labels: IntArray, ids: Sequence[str]) -> Columns:
        """What is kept of a batch.

        Args:
            outputs: of every execution, by its name.
            labels: (B,), or (B, H, W) where pixels have labels; -1 where there is none.
            ids: B names.

        Raises:
            InputError: executions have other outputs, or the labels do not fit.
        """
        _check_same(outputs)
        finite = {f"{name}: {FINITE}": _finite(held) for name, held in outputs.items()}
        return finite | self.reduce(outputs, labels, ids)

    def is_finite(self, collector: Collector, execution: str) -> bool:
        """Whether an execution gave finite numbers for every image."""
        return bool(collector.column(f"{execution}: {FINITE}").all())

    def label_of(self, labels: IntArray) -> IntArray:
        """A label for each image, (B,)."""
        return labels

    @abstractmethod
    def reduce(self, outputs: Mapping[str, Outputs], labels: IntArray, ids: Sequence[str]) -> Columns:
        """As `columns`."""

    @abstractmethod
    def vary(self, reference: Outputs, other: Outputs) -> Variation:
        """How far another execution of the same network is from the reference, on one batch."""

    @abstractmethod
    def spread(self, collector: Collector, reference: str, other: str) -> Variation:
        """The same of two executions that were collected."""

    @abstractmethod
    def compare(
        self, collector: Collector, reference: str, deployed: str, noise: Mapping[str, Noise] | None
    ) -> Comparison:
        """All statistics of one of the pairs.

        Args:
            collector: what was kept.
            reference: of the pair.
            deployed: of the pair.
            noise: relative errors that are noise, by output; None where they are not known.
        """

    @abstractmethod
    def accuracy(
        self, collector: Collector, reference: str, deployed: str, confidence: float
    ) -> AccuracyChange:
        """What an execution lost against the float network; the confidence is of each bound alone, in [0.5, 1)."""

    @abstractmethod
    def scores(self, collector: Collector, execution: str) -> dict[str, float | Rate]:
        """An execution's scores in percent, as the report's `BackendResult` has them; none without labels."""


def _finite(outputs: Outputs) -> NDArray[np.bool_]:
    rows = [np.isfinite(values.reshape(len(values), -1)).all(axis=1) for values in outputs.values()]
    return np.logical_and.reduce(rows)


def _check_same(outputs: Mapping[str, Outputs]) -> None:
    """Hold all executions to the outputs of the first.

    Raises:
        InputError: one has other outputs.
    """
    shapes = {name: {k: v.shape[1:] for k, v in held.items()} for name, held in outputs.items()}
    first, expected = next(iter(shapes.items()))
    for name, found in shapes.items():
        if found != expected:
            raise InputError(
                f"{name} returns {_shown(found)}, {first} {_shown(expected)}",
                where="the executions",
                fix="export the run again, or compare with a baseline with the same outputs",
            )


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
