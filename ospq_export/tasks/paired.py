"""How much accuracy was lost between two executions on the same images: exact bounds, and how many images would tell.

Each image falls into one of three cells: only the reference is right (lost), only the deployed execution is right
(gained), or both agree. The drop is `(lost - gained) / images`. Its one-sided bounds invert an exact unconditional
test whose order of outcomes is the score statistic of Tango (Statistics in Medicine 17, 1998, eq. 3 and 5) and whose
nuisance parameter, the share of gained images, is maximised over a confidence set (Berger and Boos, JASA 89, 1994).
The plain score interval is asymptotic: with no image lost it calls a margin of one point held from 268 images on,
where one in fifteen such samples comes from a network that loses more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[Any]
_GRID = 24
# The part of the error rate that the confidence set of the nuisance parameter may use up.
_NUISANCE_SHARE = 0.005
_DEVIATIONS = 6.0
_MOST_IMAGES = 10_000_000
_SMALLEST = 1e-9


def drop_bounds(lost: int, gained: int, images: int, confidence: float) -> tuple[float, float]:
    """Lower and upper one-sided bound of the drop, as shares of the images.

    Args:
        lost: images that only the reference classifies correctly.
        gained: images that only the deployed execution classifies correctly.
        images: all images, 1 or more.
        confidence: of each bound alone, in [0.5, 1); at 0.5 both are the estimate itself.

    Raises:
        ValueError: the counts do not fit each other, or the confidence is not in its range.
    """
    if min(lost, gained) < 0 or images < 1 or lost + gained > images:
        raise ValueError(f"{lost} lost and {gained} gained of {images} images do not fit each other")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence {confidence}: a number from 0.5 to below 1 is needed")
    estimate = (lost - gained) / images
    if confidence == 0.5:
        return estimate, estimate
    return -_upper(gained, lost, images, confidence), _upper(lost, gained, images, confidence)


def below(lost: int, gained: int, images: int, margin: float, confidence: float) -> bool:
    """Whether the drop is shown to lie below a margin: what the upper of `drop_bounds` says, at a twentieth of its cost.

    Counts are as there, the margin is a share between -1 and 1, the confidence above 0.5.
    """
    return _p_value(lost, gained, images, margin, 1 - confidence) <= 1 - confidence


def share_bounds(count: float, images: float, confidence: float) -> tuple[float, float]:
    """Lower and upper one-sided bound of a share (Clopper and Pearson, Biometrika 26, 1934); at confidence 0.5 the estimate.

    Args:
        count: between 0 and `images`; a fraction stands for what larger samples would find.
        images: 1 or more.
        confidence: of each bound alone, in [0.5, 1).
    """
    if confidence == 0.5:
        return count / images, count / images
    low = stats.beta.ppf(1 - confidence, count, images - count + 1) if count > 0 else 0.0
    high = stats.beta.ppf(confidence, count + 1, images - count) if count < images else 1.0
    return float(low), float(high)


def images_for_drop(lost: int, gained: int, images: int, margin: float, confidence: float) -> int | None:
    """About how many images would show which side of the margin the drop lies on, were its rates those seen so far.

    Arguments are as in `drop_bounds`; the margin is the drop that is allowed, as a share.

    Returns:
        The number, to two digits; None where the estimate is the margin itself, or ten million images would not do.
    """
    estimate = (lost - gained) / images
    if estimate == margin or not -1 < margin < 1:
        return None
    bad, good, limit = (lost, gained, margin) if estimate < margin else (gained, lost, -margin)

    def told(size: int) -> bool:
        found = round(bad * size / images), round(good * size / images)
        return below(*found, size, limit, confidence)

    return _smallest(told)


def images_for_share(count: int, images: int, limit: float, confidence: float) -> int | None:
    """About how many images would show whether a share is at most `limit`, were it that seen so far; see `images_for_drop`."""
    share = count / images
    if share == limit or not 0 < limit < 1:
        return None

    def told(size: int) -> bool:
        low, high = share_bounds(share * size, size, confidence)
        return high <= limit or low > limit

    return _smallest(told)


def _smallest(told: Callable[[int], bool]) -> int | None:
    """The smallest size that tells, to two digits, where larger sizes do as well."""
    size = 1
    while not told(size):
        size *= 2
        if size > _MOST_IMAGES:
            return None
    low, high = size // 2, size
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if told(middle) else (middle, high)
    unit = 10 ** max(0, len(str(high)) - 2)
    return -(-high // unit) * unit


@functools.lru_cache(maxsize=4096)
def _upper(lost: int, gained: int, images: int, confidence: float) -> float:
    """The largest drop that the counts do not contradict."""
    alpha, estimate = 1 - confidence, (lost - gained) / images

    def excess(margin: float) -> float:
        return _p_value(lost, gained, images, margin, alpha) - alpha

    low, high = max(estimate, _SMALLEST - 1), 1 - _SMALLEST
    if excess(high) > 0:
        return 1.0
    if excess(low) <= 0:
        return low
    return float(optimize.brentq(excess, low, high, xtol=1e-7))


def _p_value(lost: int, gained: int, images: int, margin: float, alpha: float) -> float:
    """The largest chance of counts at least as favourable where the true drop is `margin` or more.

    For a fixed number of gained images the favourable outcomes are those with the fewest lost ones, so more losses only lower the
    chance, and the worst case has a drop of exactly `margin`.
    """
    gamma = alpha * _NUISANCE_SHARE
    low, high = share_bounds(gained, images, 1 - gamma / 2)
    least, most = max(0.0, -margin), (1 - margin) / 2
    rates = np.linspace(np.sqrt(np.clip(low, least, most)), np.sqrt(np.clip(high, least, most)), _GRID) ** 2
    reach = _DEVIATIONS * np.sqrt(images * rates[-1]) + _DEVIATIONS
    first = int(max(0, images * rates[0] - reach))
    last = int(min(images, images * rates[-1] + reach))
    gains = np.arange(first, last + 1)
    observed = float(_score(np.array([lost]), np.array([gained]), images, margin)[0])
    limits = _most_losses(gains, images, margin, observed)
    chance = _chance(gains, limits, images, rates[:, None], margin)
    return float(chance.max()) + gamma


def _chance(gains: Floats, limits: Floats, images: int, rates: Floats, margin: float) -> Floats:
    """Chance of at most limits[i] lost images beside gains[i] gained ones, summed over i, for every rate of gains (rates, 1)."""
    others = np.clip((rates + margin) / np.maximum(1 - rates, _SMALLEST), 0, 1)
    given = stats.binom.cdf(limits, images - gains, others)
    return (stats.binom.pmf(gains, images, rates) * given).sum(axis=1)


def _most_losses(gains: Floats, images: int, margin: float, observed: float) -> Floats:
    """The most lost images beside each number of gained ones that are no less favourable than what was observed; -1 for none."""
    low, high = np.full(len(gains), -1), images - gains
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = _score(np.maximum(middle, 0), gains, images, margin) <= observed + _SMALLEST
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def _score(lost: Floats, gained: Floats, images: int, margin: float) -> Floats:
    """Tango's statistic: the drop less the margin, over its standard error where the drop is the margin."""
    a = 2.0 * images
    b = -lost - gained + (2 * images - lost + gained) * margin
    c = -gained * margin * (1 - margin)
    restricted = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a)
    variance = images * (2 * restricted + margin * (1 - margin))
    difference = lost - gained - images * margin
    return np.where(variance > 0, difference / np.sqrt(np.maximum(variance, _SMALLEST)), 0.0)
