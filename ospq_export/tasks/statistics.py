"""Statistics of paired predictions: intervals and exact tests from scipy, calibration error, accuracy per class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import special, stats

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
CONFIDENCE = 0.95
_ROWS = 4096


def row_parts(count: int) -> Iterator[slice]:
    """Slices of a few thousand rows that cover `count`: copies of all logits would be what a validation's memory peaks at."""
    for start in range(0, count, _ROWS):
        yield slice(start, min(count, start + _ROWS))


class Record(BaseModel):
    """What a report is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Rate(Record):
    """A share of images in percent, with the ends of its 95 % Wilson interval."""

    percent: float
    low: float
    high: float


class McNemar(Record):
    """McNemar's exact test on images that exactly one of two executions classifies correctly.

    Attributes:
        only_reference: images that only the reference gets right.
        only_deployed: images that only the deployed execution gets right.
        p_value: two-sided; the chance of a split at least this uneven where neither execution is better.
    """

    only_reference: int
    only_deployed: int
    p_value: float


class ClassChange(Record):
    """One class's Top-1 in two executions, percent."""

    label: int
    images: int
    reference: float
    deployed: float


def wilson(successes: int, trials: int) -> Rate:
    """A share with its Wilson score interval (Wilson 1927), 95 %.

    Args:
        successes: between 0 and trials.
        trials: 1 or more.

    Raises:
        ValueError: the counts do not fit each other.
    """
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return Rate(
        percent=100.0 * successes / trials, low=100.0 * float(interval.low), high=100.0 * float(interval.high)
    )


def mcnemar(reference_correct: BoolArray, deployed_correct: BoolArray) -> McNemar:
    """McNemar's test in its exact binomial form (McNemar 1947): discordant images fall either way with probability 1/2.

    Args:
        reference_correct: whether the reference classifies each image correctly, (N,).
        deployed_correct: the same of the deployed execution, (N,).
    """
    only_reference = int((reference_correct & ~deployed_correct).sum())
    only_deployed = int((deployed_correct & ~reference_correct).sum())
    discordant = only_reference + only_deployed
    p_value = float(stats.binomtest(only_reference, discordant).pvalue) if discordant else 1.0
    return McNemar(only_reference=only_reference, only_deployed=only_deployed, p_value=p_value)


def excess_p_value(flips: int, images: int, floor_flips: int, floor_images: int) -> float:
    """Fisher's exact test, one-sided: the chance of so many flips where the true rate is no higher than the floor's.

    Both counts are uncertain: the floor is measured on a sample, and a small sample of it proves little either way.

    Args:
        flips: images with another prediction, out of `images`.
        images: 1 or more.
        floor_flips: images on which the fake-quantized network disagrees with itself, out of `floor_images`.
        floor_images: 1 or more.
    """
    table = [[flips, images - flips], [floor_flips, floor_images - floor_flips]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)


def expected_calibration_error(logits: FloatArray, labels: IntArray, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over equal-width bins of confidence (Guo et al. 2017, eq. 3), in percent.

    Args:
        logits: (N, K); rows that are not finite count as confidence 0.
        labels: (N,).
        bins: 1 or more.
    """
    gaps = np.zeros(bins)
    for part in row_parts(len(labels)):
        gaps += _calibration_gaps(logits[part], labels[part], bins)
    return float(np.abs(gaps).sum() / len(labels) * 100.0)


def _calibration_gaps(logits: FloatArray, labels: IntArray, bins: int) -> NDArray[np.float64]:
    """Hits minus confidence, summed over each bin."""
    finite: BoolArray = np.asarray(np.isfinite(logits).all(axis=1), dtype=np.bool_)
    safe = np.where(finite.reshape(-1, 1), logits, 0.0).astype(np.float64)
    confidence = np.where(finite, special.softmax(safe, axis=1).max(axis=1), 0.0)
    correct = (safe.argmax(axis=1) == labels) & finite
    # A bin is open below and closed above, as in the paper; confidence 0 joins the first.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return np.bincount(index, weights=correct - confidence, minlength=bins).astype(np.float64)


def class_changes(
    reference_correct: BoolArray, deployed_correct: BoolArray, labels: IntArray
) -> list[ClassChange]:
    """Top-1 of every class that has images, in the order of the labels."""
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ours = np.bincount(inverse, weights=reference_correct) / counts * 100.0
    theirs = np.bincount(inverse, weights=deployed_correct) / counts * 100.0
    columns: Any = zip(classes, counts, ours, theirs, strict=True)
    return [
        ClassChange(label=int(label), images=int(n), reference=float(a), deployed=float(b))
        for label, n, a, b in columns
    ]
