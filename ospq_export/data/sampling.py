"""Choosing a part of a set of labelled images."""

import numpy as np
from numpy.typing import NDArray


def stratified(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Places of a random sample in which every class has its share, so that it stands for the whole set.

    Classes get their proportional part, rounded down, and those with the largest remainders one more until `count` is reached
    (Hamilton's method; equal remainders are drawn by lot).

    Args:
        labels: Classes of all images, (N,); images without a class are a class of their own.
        count: How many, at most N.
        seed: The choice depends on nothing else.

    Returns:
        The places, (count,), in ascending order.
    """
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    sizes = np.array([len(group) for group in groups])
    parts, remainders = np.divmod(sizes * count, len(labels))
    # lexsort: the last key decides first.
    largest = np.lexsort((rng.permutation(len(groups)), -remainders))
    parts[largest[: count - parts.sum()]] += 1
    chosen = [rng.choice(group, part, replace=False) for group, part in zip(groups, parts, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
