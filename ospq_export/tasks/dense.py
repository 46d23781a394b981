"""Dense prediction: logits for every pixel, judged by the pixels that agree and by the mean intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

from ospq_export.errors import InputError
from ospq_export.tasks.accuracy import FEWEST, AccuracyChange, bootstrap_bounds
from ospq_export.tasks.base import Task, Tensors
from ospq_export.tasks.classify import kl_divergence, total_variation
from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.distances import Distances, only
from ospq_export.tasks.measure import Collector, Columns, Noise, Outputs
from ospq_export.tasks.statistics import FloatArray, IntArray, Rate

MIOU, PIXELS = "mIoU", "pixels"
Counts = NDArray[np.int32]


class Pixels(Distances):
    """Keeps, for each image, the share of pixels that differ and, with labels, each class's intersection and union."""

    def label_of(self, labels: IntArray) -> IntArray:
        """0 for an image with labelled pixels, -1 for one without."""
        return labels if labels.ndim == 1 else np.where((labels >= 0).any(axis=(1, 2)), 0, -1)

    def reduce(self, outputs: Mapping[str, Outputs], labels: IntArray, ids: Sequence[str]) -> Columns:
        """Shares of differing pixels of every pair; intersections and unions of every execution."""
        result = self.distance_columns(outputs)
        classes = {name: pixel_classes(only(held)) for name, held in outputs.items()}
        for reference, deployed in self.pairs:
            differ = classes[reference] != classes[deployed]
            result[_differ(reference, deployed)] = differ.reshape(len(differ), -1).mean(1)
        if labels.ndim == 3:
            for name, held in outputs.items():
                result[f"{name}: {MIOU}"] = overlaps(only(held), labels)
        return result

    def compare(
        self, collector: Collector, reference: str, deployed: str, noise: Mapping[str, Noise] | None
    ) -> Comparison:
        """Agreement of pixels, and mIoU where pixels have labels."""
        scores = self._miou(collector, reference), self._miou(collector, deployed)
        equal = 100 * (1 - float(collector.column(_differ(reference, deployed)).mean()))
        return self.undecided(collector, reference, deployed, noise, agreement=equal, scores=scores)

    def accuracy(
        self, collector: Collector, reference: str, deployed: str, confidence: float
    ) -> AccuracyChange:
        """Points of mIoU with bounds by bootstrap over the images; without labels, the share of pixels that differ."""
        differ = 100 * collector.column(_differ(reference, deployed)).astype(np.float64)
        few = len(differ) < FEWEST
        common: dict[str, Any] = {"deployed": deployed, "reference": reference, "images": len(differ)}
        common |= {"differing": 0, "share": float(differ.mean())}
        ours, theirs = self._miou(collector, reference), self._miou(collector, deployed)
        if ours is None or theirs is None:
            bound = (
                (0.0, 100.0) if few else bootstrap_bounds(differ, lambda sums: sums / len(differ), confidence)
            )
            return AccuracyChange(**common, measure=PIXELS, high=bound[1])
        names = (f"{name}: {MIOU}" for name in (reference, deployed))
        both = np.stack([collector.column(name) for name in names], 1).astype(np.float64)
        low, high = (-100.0, 100.0) if few else bootstrap_bounds(both, _drop, confidence)
        scores = {"reference_score": ours, "deployed_score": theirs, "drop": ours - theirs}
        return AccuracyChange(**common, measure=MIOU, **scores, low=low, high=high)

    def scores(self, collector: Collector, execution: str) -> dict[str, float | Rate]:
        """Mean intersection over union, and the share of labelled pixels that are right."""
        found = self._miou(collector, execution)
        return {} if found is None else {MIOU: found}

    def _miou(self, collector: Collector, execution: str) -> float | None:
        name = f"{execution}: {MIOU}"
        return float(miou(collector.column(name).sum(0)[None])[0]) if name in collector.names else None


def _drop(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points of mIoU lost, (R,), from sums (R, 2, 2, K) of the reference and the deployed execution."""
    return miou(sums[:, 0]) - miou(sums[:, 1])


def _differ(reference: str, deployed: str) -> str:
    return f"{reference} / {deployed}: {PIXELS}"


def pixel_classes(logits: FloatArray) -> IntArray:
    """The class of every pixel, (B, h, w), from logits (B, K, h, w); of a single one, 1 where it is above 0."""
    found = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
    return found.astype(np.int64)


def overlaps(logits: FloatArray, labels: IntArray) -> Counts:
    """Intersection and union of every class with its labels, (B, 2, K), in labelled pixels.

    Args:
        logits: (B, K, h, w); scaled bilinearly to the labels' size where that is another.
        labels: (B, H, W); pixels below 0 do not count.

    Raises:
        InputError: a label is none of the classes.
    """
    classes = max(logits.shape[1], 2)
    if labels.max(initial=0) >= classes:
        raise InputError(
            f"a pixel has the label {int(labels.max())}, but the network has {classes} classes",
            where="`data`",
            fix="give this network's own labels; 255 and -1 stand for none",
        )
    if logits.shape[2:] != labels.shape[1:]:
        size = tuple(labels.shape[1:])
        logits = F.interpolate(torch.from_numpy(logits), size, mode="bilinear", align_corners=False).numpy()
    known = labels >= 0
    found = np.where(known, pixel_classes(logits), -1)
    result = np.zeros((len(labels), 2, classes), np.int32)
    for k in range(classes):
        mine, theirs = found == k, labels == k
        result[:, 0, k] = (mine & theirs).sum((1, 2))
        result[:, 1, k] = (mine | theirs).sum((1, 2))
    return result


def miou(sums: NDArray[Any]) -> NDArray[np.float64]:
    """Mean intersection over union in percent, (R,), over the classes that occur, from sums (R, 2, K)."""
    intersection, union = sums[:, 0].astype(np.float64), sums[:, 1].astype(np.float64)
    share = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return 100 * share.sum(1) / np.maximum((union > 0).sum(1), 1)


def _pixels_last(output: Tensor) -> Tensor:
    """(B, K, h, w) as (B, h, w, K), whose last dimension is a classifier's."""
    return output.movedim(1, -1)


class Dense(Task):
    """Logits (B, K, h, w) float32 for every pixel; labels are masks of class numbers, -1 or 255 for none."""

    name = "dense"
    about = ("logits for every pixel", 3)
    measure = Pixels

    def sampled_loss(self, outputs: Tensors, generator: Generator, temperature: float) -> Tensor:
        """Cross entropy of labels drawn for every pixel, averaged over an image's pixels."""
        from ospq_export.tasks.classify import CLASSIFY

        rows = _pixels_last(outputs[0]).flatten(0, 2)
        pixels = outputs[0].shape[2] * outputs[0].shape[3]
        return CLASSIFY.sampled_loss([rows], generator, temperature) / pixels**0.5

    def divergence(self, output: Tensor, target: Tensor) -> Tensor:
        """KL divergence of the pixels' class probabilities."""
        return kl_divergence(_pixels_last(output), _pixels_last(target))

    def distance(self, outputs: Tensors, targets: Tensors, temperature: float) -> Tensor:
        """Total variation of the pixels' softened class probabilities."""
        return total_variation(_pixels_last(outputs[0]), _pixels_last(targets[0]), temperature)
