"""Parity of two executions: pure functions on logits, and the record of what they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from ospq_export.tasks.statistics import (
    ClassChange,
    FloatArray,
    IntArray,
    McNemar,
    Rate,
    Record,
    class_changes,
    mcnemar,
    row_parts,
    wilson,
)

_MARGIN_BINS = 40
# JSON has neither infinity nor NaN: the largest float32 stands for both.
LARGEST = float(np.finfo(np.float32).max)


class Flip(Record):
    """An image that two executions classify differently.

    Margins are between the first and second logit, 3.4e38 where that is not finite.
    """

    id: str
    label: int
    reference: int
    deployed: int
    reference_margin: float
    deployed_margin: float


class MarginHistogram(Record):
    """Images by the reference's margin.

    Attributes:
        edges: of the bins, ascending, evenly spaced on a logarithmic scale; the first bin takes what lies below, too.
        images: how many fall into each bin; infinite margins and NaN are left out.
        flips: how many of those the deployed execution classifies otherwise.
    """

    edges: list[float]
    images: list[int]
    flips: list[int]


class ImageError(Record):
    """An image and the relative error of an output for it: the norm of the difference over the reference's."""

    id: str
    error: float


class OutputChange(Record):
    """One output of a deployed execution against a reference's, over all images; 3.4e38 where not finite.

    Attributes:
        name: of the output.
        mean_error: mean over the images of the relative error: the norm of the difference over the reference's norm.
        max_error: the largest.
        error_deviation: standard deviation over the images.
        max_difference: of two elements.
        mean_cosine: of the angle between both, as vectors.
        min_cosine: the smallest.
        noise: the largest relative error that is noise; None where that was not measured.
        mean_noise: the largest mean that is.
        beyond: images with a larger error than that.
        holds: another output of the reference that this one is much closer to than to its own: both are swapped.
        worst: the images with the largest errors.
    """

    name: str
    mean_error: float
    max_error: float
    error_deviation: float
    max_difference: float
    mean_cosine: float
    min_cosine: float
    noise: float | None = None
    mean_noise: float | None = None
    beyond: int | None = None
    holds: str | None = None
    worst: list[ImageError] = Field(default_factory=list)


class Comparison(Record):
    """A deployed execution against a reference, on the same images; logit differences are 3.4e38 where not finite.

    Without labels there is no score, no test of McNemar's and no class. Agreement is of predictions, of neighbours or of pixels;
    outputs that decide nothing have none. The median of logit differences is that of the images' means. `outputs` is empty for
    classifiers, whose logits are compared as decisions.
    """

    reference: str
    deployed: str
    images: int
    reference_score: float | None
    deployed_score: float | None
    score_difference: float | None
    agreement: float | None
    agreement_interval: Rate | None
    mcnemar: McNemar | None
    max_logit_difference: float
    mean_logit_difference: float
    median_logit_difference: float = 0.0
    flips: list[Flip]
    margins: MarginHistogram
    classes: list[ClassChange]
    outputs: list[OutputChange] = Field(default_factory=list)


def finite(value: float | np.floating[Any]) -> float:
    """The value, or the largest float32 in place of infinity and NaN."""
    return float(np.nan_to_num(value, nan=LARGEST, posinf=LARGEST, neginf=-LARGEST))


def predictions(logits: FloatArray) -> IntArray:
    """Class of the largest logit, (N,); ties go to the lowest index, NaN counts as smallest."""
    result: IntArray = np.empty(len(logits), np.int64)
    for part in row_parts(len(logits)):
        result[part] = np.argmax(_nan_as_smallest(logits[part]), axis=1)
    return result


def has_labels(labels: IntArray) -> bool:
    """Whether every image's class is known."""
    return bool((labels >= 0).all())


def two_classes(logits: FloatArray, threshold: float) -> FloatArray:
    """Logits of two classes (N, 2) that a single logit (N, 1) stands for: the second class where it exceeds the threshold.

    The first class's logit is the threshold, so that the larger one decides and their difference is the margin.
    """
    return np.concatenate([np.full_like(logits, threshold), logits], axis=1)


def margin_change(reference: FloatArray, other: FloatArray) -> float:
    """The most by which the reference's class gained or lost on another class, over all images; logits (N, K).

    A flip needs a change as large as the reference's margin.
    """
    change = other.astype(np.float64) - reference
    own = np.take_along_axis(change, predictions(reference)[:, None], axis=1)
    return float(np.abs(change - own).max(initial=0.0))


def topk_accuracy(logits: FloatArray, labels: IntArray, k: int) -> float:
    """Percent of images whose label is among the k largest logits; ties go to the lowest class index.

    Args:
        logits: (N, K); with K < k every class counts.
        labels: (N,).
        k: 1 or more.
    """
    hits = sum(int((_ranks(logits[part], labels[part]) < k).sum()) for part in row_parts(len(labels)))
    return hits / len(labels) * 100.0


def _nan_as_smallest(logits: FloatArray) -> FloatArray:
    return np.where(np.isnan(logits), np.float32(-np.inf), logits)


def _ranks(logits: FloatArray, labels: IntArray) -> IntArray:
    """How many classes come before the label, (N,)."""
    safe = _nan_as_smallest(logits)
    own = np.take_along_axis(safe, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]
    return ((safe > own) | ((safe == own) & earlier)).sum(axis=1)


def margins(logits: FloatArray) -> FloatArray:
    """Difference of the largest and second largest logit, (N,); infinite for a single class."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf, np.float32)
    result = np.empty(len(logits), np.float32)
    for part in row_parts(len(logits)):
        top = np.partition(logits[part], -2, axis=1)
        result[part] = top[:, -1] - top[:, -2]
    return result


def margin_histogram(reference: FloatArray, deployed: FloatArray) -> MarginHistogram:
    """Images and flips by the reference's margin, in up to 40 bins over its last five decades; logits (N, K)."""
    found = margins(reference)
    finite = np.isfinite(found)
    differ = (predictions(reference) != predictions(deployed)) & finite
    largest = float(found[finite].max()) if finite.any() else 0.0
    if largest <= 0:
        return MarginHistogram(edges=[], images=[], flips=[])
    # One float32 step above the largest, so that it falls inside.
    edges = np.geomspace(largest * 1e-5, largest * (1 + 1e-6), _MARGIN_BINS + 1)
    values = np.clip(found.astype(np.float64), edges[0], None)
    counts = [np.histogram(values[chosen], edges)[0].tolist() for chosen in (finite, differ)]
    return MarginHistogram(edges=edges.tolist(), images=counts[0], flips=counts[1])


def agreement(first: FloatArray, second: FloatArray) -> float:
    """Percent of images with equal predictions."""
    return float((predictions(first) == predictions(second)).mean() * 100.0)


def flipped(reference: FloatArray, deployed: FloatArray, labels: IntArray, ids: Sequence[str]) -> list[Flip]:
    """Images with different predictions, the surest (by the reference's margin) first."""
    ours, theirs = predictions(reference), predictions(deployed)
    our_margins, their_margins = margins(reference), margins(deployed)
    indices = np.flatnonzero(ours != theirs)
    order = indices[np.argsort(-our_margins[indices], kind="stable")]
    return [
        Flip(
            id=ids[i],
            label=int(labels[i]),
            reference=int(ours[i]),
            deployed=int(theirs[i]),
            reference_margin=finite(our_margins[i]),
            deployed_margin=finite(their_margins[i]),
        )
        for i in order
    ]


def compare(
    reference: tuple[str, FloatArray], deployed: tuple[str, FloatArray], labels: IntArray, ids: Sequence[str]
) -> Comparison:
    """All statistics of one pair.

    Args:
        reference: name and logits (N, K).
        deployed: name and logits (N, K).
        labels: (N,); negative where images have none.
        ids: N names.
    """
    (reference_name, ours), (deployed_name, theirs) = reference, deployed
    largest, mean, median = _logit_difference(ours, theirs)
    correct = predictions(ours) == labels, predictions(theirs) == labels
    labelled = has_labels(labels)
    top1 = [100.0 * float(hits.mean()) for hits in correct]
    return Comparison(
        reference=reference_name,
        deployed=deployed_name,
        images=len(labels),
        reference_score=top1[0] if labelled else None,
        deployed_score=top1[1] if labelled else None,
        score_difference=top1[1] - top1[0] if labelled else None,
        agreement=agreement(ours, theirs),
        agreement_interval=wilson(int((predictions(ours) == predictions(theirs)).sum()), len(labels)),
        mcnemar=mcnemar(*correct) if labelled else None,
        max_logit_difference=finite(largest),
        mean_logit_difference=finite(mean),
        median_logit_difference=finite(median),
        flips=flipped(ours, theirs, labels, ids),
        margins=margin_histogram(ours, theirs),
        classes=class_changes(*correct, labels) if labelled else [],
    )


def _logit_difference(first: FloatArray, second: FloatArray) -> tuple[float, float, float]:
    """Largest and mean absolute difference, and the median of the images' means; NaN where there is one."""
    largest, means = 0.0, []
    for part in row_parts(len(first)):
        difference = np.abs(first[part].astype(np.float64) - second[part])
        largest = float(np.maximum(largest, difference.max()))
        means.append(difference.mean(axis=1))
    every = np.concatenate(means)
    return largest, float(every.mean()), float(np.median(every))
