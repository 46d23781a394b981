"""Embeddings: a feature vector for each image, judged by its direction and by its nearest neighbours."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

from ospq_export.tasks.accuracy import AccuracyChange, accuracy_change
from ospq_export.tasks.base import Task, Tensors, relative_error
from ospq_export.tasks.comparison import Comparison, compare, has_labels, predictions
from ospq_export.tasks.distances import Distances, only
from ospq_export.tasks.measure import Collector, Columns, Noise, Outputs, Pair
from ospq_export.tasks.statistics import FloatArray, IntArray, Rate, wilson
from ospq_export.tasks.tensors import gaussian_loss

KNN, NEIGHBOURS = "k-NN Top-1", "nearest neighbours"
NEIGHBOUR_IMAGES = 2000
"""About how many images' embeddings are kept, each of which is looked up among the others."""
K, TEMPERATURE = 20, 0.07
"""Votes of the 20 nearest neighbours, weighed by exp(cosine / 0.07) (Caron et al. 2021, DINO, section 4.1)."""
_SAMPLE = "sample"


class Neighbours(Distances):
    """Distances of every image; of a sample the embeddings themselves, whose neighbours are looked up at the end."""

    def __init__(self, pairs: Sequence[Pair], images: int | None, threshold: float | None = None) -> None:
        super().__init__(pairs, images, threshold)
        self._seen = 0

    def reduce(self, outputs: Mapping[str, Outputs], labels: IntArray, ids: Sequence[str]) -> Columns:
        """Distances of all, embeddings of those in the sample."""
        chosen = sampled(ids, self.images, self._seen)
        self._seen += len(ids)
        kept = {f"{name}: {_SAMPLE}": only(held)[chosen] for name, held in outputs.items()}
        return self.distance_columns(outputs) | kept

    def compare(
        self, collector: Collector, reference: str, deployed: str, noise: Mapping[str, Noise] | None
    ) -> Comparison:
        """Predictions by neighbours as a classifier's; without labels, the nearest neighbour is what an image is taken for."""
        labels, ids = self._sample(collector)
        votes = {name: self._votes(collector, name, labels) for name in (reference, deployed)}
        found = compare((reference, votes[reference]), (deployed, votes[deployed]), labels, ids)
        largest, mean = self.difference(collector, reference, deployed)
        changed = {"max_logit_difference": largest, "mean_logit_difference": mean}
        changed["outputs"] = self.changes(collector, reference, deployed, noise)  # type: ignore[assignment]
        return found.model_copy(update=changed)

    def accuracy(
        self, collector: Collector, reference: str, deployed: str, confidence: float
    ) -> AccuracyChange:
        """Points of k-NN Top-1; without labels, the share of images with another nearest neighbour."""
        found = self.compare(collector, reference, deployed, None)
        return accuracy_change(found, confidence, KNN, NEIGHBOURS)

    def scores(self, collector: Collector, execution: str) -> dict[str, float | Rate]:
        """k-NN Top-1, leave-one-out in the sample."""
        labels, _ = self._sample(collector)
        if not has_labels(labels):
            return {}
        hits = int((predictions(self._votes(collector, execution, labels)) == labels).sum())
        return {KNN: wilson(hits, len(labels))}

    def _sample(self, collector: Collector) -> tuple[IntArray, list[str]]:
        chosen = np.flatnonzero(sampled(collector.ids, self.images))
        return collector.labels()[chosen], [collector.ids[i] for i in chosen]

    def _votes(self, collector: Collector, execution: str, labels: IntArray) -> FloatArray:
        embeddings = collector.column(f"{execution}: {_SAMPLE}")
        similarity = similarities(embeddings)
        return neighbour_votes(similarity, labels) if has_labels(labels) else similarity


def sampled(ids: Sequence[str], images: int | None, seen: int = 0) -> NDArray[np.bool_]:
    """Which images are in the sample: all where there are few, else those whose names have a small checksum.

    Args:
        ids: their names.
        images: how many there are in all; None where that is not known, and then the first are taken.
        seen: how many came before these.
    """
    if images is None:
        return np.arange(seen, seen + len(ids)) < NEIGHBOUR_IMAGES
    share = NEIGHBOUR_IMAGES / max(images, 1)
    if share >= 1:
        return np.ones(len(ids), np.bool_)
    limit = share * 2**32
    return np.array([zlib.crc32(name.encode()) < limit for name in ids], np.bool_)


def similarities(embeddings: FloatArray) -> FloatArray:
    """Cosine of every pair, (n, n) float32; -1 of an image with itself, so that it is nobody's neighbour."""
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    unit = np.nan_to_num(embeddings / np.maximum(norms, 1e-30)).astype(np.float32)
    result: FloatArray = unit @ unit.T
    np.fill_diagonal(result, -1.0)
    return result


def neighbour_votes(similarity: FloatArray, labels: IntArray) -> FloatArray:
    """Votes for each class, (n, classes) float32: of the nearest neighbours, weighed by exp(cosine / temperature)."""
    k = min(K, len(labels) - 1)
    votes = np.zeros((len(labels), int(labels.max()) + 1), np.float32)
    if k < 1:
        return votes
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    # Relative to the largest cosine there is: the weights stay within float32.
    weights = np.exp((np.take_along_axis(similarity, nearest, 1) - 1.0) / TEMPERATURE)
    rows = np.repeat(np.arange(len(labels)), k)
    np.add.at(votes, (rows, labels[nearest].ravel()), weights.ravel())
    return votes


class Embed(Task):
    """A vector (B, D) float32 for each image; labels are class numbers, where there are any."""

    name = "embed"
    about = ("one vector for each image", 1)
    output = "embeddings"
    measure = Neighbours
    divergence = staticmethod(relative_error)

    def sampled_loss(self, outputs: Tensors, generator: Generator, temperature: float) -> Tensor:
        """A normal likelihood around the embedding's direction."""
        return gaussian_loss([F.normalize(outputs[0], dim=-1)], generator)

    def distance(self, outputs: Tensors, targets: Tensors, temperature: float) -> Tensor:
        """One minus the cosine, averaged over the images."""
        return (1 - torch.cosine_similarity(outputs[0], targets[0], -1)).mean()
