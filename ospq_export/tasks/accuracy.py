"""What a deployed execution lost against the float network, and bounds for figures that are no shares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.paired import drop_bounds, share_bounds
from ospq_export.tasks.statistics import Record

TOP1, ERROR = "Top-1", "relative error"
FEWEST = 30
"""Images below which a bootstrap says nothing."""
_RESAMPLES, _CHUNK = 2000, 100


class AccuracyChange(Record):
    """What a deployed execution lost against the float network; percent and points.

    Attributes:
        deployed: the execution.
        reference: the float execution.
        measure: what is compared: "Top-1", "k-NN Top-1", "mIoU", "relative error", or, without labels, what may differ.
        images: on which both were compared.
        differing: images with another prediction; of pixels and errors 0.
        share: percent that differ, of images or of pixels; of errors the mean relative error.
        reference_score: None without labels, like the next five.
        deployed_score: in percent.
        drop: points lost; negative where accuracy rose.
        low: one-sided lower bound of the drop, at the report's confidence.
        high: upper bound; without labels, of the share, which the drop cannot exceed.
        lost: images that only the float network gets right.
        gained: images that only the deployed network gets right.
    """

    deployed: str
    reference: str
    measure: str = TOP1
    images: int
    differing: int
    share: float = 0.0
    reference_score: float | None = None
    deployed_score: float | None = None
    drop: float | None = None
    low: float | None = None
    high: float
    lost: int | None = None
    gained: int | None = None


def accuracy_change(
    c: Comparison, confidence: float, measure: str = TOP1, unlabelled: str = TOP1
) -> AccuracyChange:
    """The drop of one deployed execution whose every image is right or wrong, with exact bounds.

    Args:
        c: the deployed execution against the float network.
        confidence: of each bound alone, in [0.5, 1).
        measure: what the scores are called.
        unlabelled: what may differ where there are no labels.
    """
    differing = len(c.flips)
    common = {"deployed": c.deployed, "reference": c.reference, "images": c.images, "differing": differing}
    common["share"] = 100 * differing / c.images
    if c.mcnemar is None:
        high = 100 * share_bounds(differing, c.images, confidence)[1]
        return AccuracyChange(**common, measure=unlabelled, high=high)
    lost, gained = c.mcnemar.only_reference, c.mcnemar.only_deployed
    low, high = drop_bounds(lost, gained, c.images, confidence)
    return AccuracyChange(
        **common,
        measure=measure,
        reference_score=c.reference_score,
        deployed_score=c.deployed_score,
        drop=100 * (lost - gained) / c.images,
        low=100 * low,
        high=100 * high,
        lost=lost,
        gained=gained,
    )


def bootstrap_bounds(
    rows: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    confidence: float,
    seed: int = 0,
) -> tuple[float, float]:
    """One-sided bounds of a figure of sums over images: percentiles of 2,000 resamples (Efron 1979).

    Args:
        rows: (N, ...) what each image adds.
        statistic: from sums (R, ...) of R resamples to figures (R,).
        confidence: of each bound alone, in [0.5, 1); at 0.5 both are the estimate.
        seed: of the resamples.
    """
    if confidence == 0.5:
        estimate = float(statistic(rows.sum(0, keepdims=True))[0])
        return estimate, estimate
    rng, flat, found = np.random.default_rng(seed), rows.reshape(len(rows), -1), []
    for _ in range(_RESAMPLES // _CHUNK):
        counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_CHUNK)
        found.append(statistic((counts @ flat).reshape(_CHUNK, *rows.shape[1:])))
    low, high = np.quantile(np.concatenate(found), [1 - confidence, confidence])
    return float(low), float(high)
