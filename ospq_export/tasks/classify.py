"""Classification: the output is a logit for each class, or one that stands for two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ospq_export.errors import InputError
from ospq_export.tasks.accuracy import TOP1, AccuracyChange, accuracy_change
from ospq_export.tasks.base import Task, Tensors
from ospq_export.tasks.comparison import (
    Comparison,
    compare,
    finite,
    has_labels,
    margin_change,
    predictions,
    topk_accuracy,
    two_classes,
)
from ospq_export.tasks.measure import Collector, Columns, Measure, Noise, Outputs, Pair, Variation
from ospq_export.tasks.statistics import (
    FloatArray,
    IntArray,
    Rate,
    expected_calibration_error,
    row_parts,
    wilson,
)

ECE = "expected calibration error (ECE)"


def class_logits(output: Tensor) -> Tensor:
    """Logits whose softmax gives every class's probability: of one output x, whose probability is its sigmoid, (x, 0).

    Args:
        output: (..., K) float.

    Returns:
        (..., K), or (..., 2) where K is 1: the softmax over one number is 1, whatever the number.
    """
    return torch.cat([output, torch.zeros_like(output)], -1) if output.shape[-1] == 1 else output


def kl_divergence(output: Tensor, target: Tensor) -> Tensor:
    """KL(target || output) of the class probabilities in nats, averaged over all but the last dimension (logits)."""
    log_p, log_q = F.log_softmax(class_logits(target), -1), F.log_softmax(class_logits(output), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def total_variation(output: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Half of the sum of |softmax(output / T) - softmax(target / T)|: in [0, 1], averaged over all but the last dimension.

    Of one output, |sigmoid(output / T) - sigmoid(target / T)|.

    Its spread over images, relative to its mean, is about half of the KL divergence's, so that few images say more; a
    temperature T above 1 lets classes speak that are not near the top, and lessens it further.
    """
    found, wanted = (class_logits(logits / temperature).softmax(-1) for logits in (output, target))
    return (found - wanted).abs().sum(-1).mean() / 2


class Logits(Measure):
    """Keeps every execution's logits, (N, K) float32 each."""

    def __init__(self, pairs: Sequence[Pair], images: int | None, threshold: float | None = None) -> None:
        super().__init__(pairs, images, threshold)
        self._single = False

    @property
    def decision_threshold(self) -> float | None:
        """The threshold that decided, of a network with a single logit; None for all others."""
        return (self.threshold or 0.0) if self._single else None

    def logits(self, outputs: Outputs) -> FloatArray:
        """A logit for each class, (B, K) with K of 2 at least, from the only output (B, K).

        Raises:
            InputError: a threshold was given for a network with a logit for each class.
        """
        (output,) = outputs.values()
        self._single = output.shape[1] == 1
        if self._single:
            return two_classes(output, self.threshold or 0.0)
        if self.threshold is not None:
            raise InputError(
                f"the network has {output.shape[1]} logits, the largest one decides",
                where="`decision_threshold`",
                fix="leave it out: it is for networks with a single logit",
            )
        return output

    def reduce(self, outputs: Mapping[str, Outputs], labels: IntArray, ids: Sequence[str]) -> Columns:
        """All logits."""
        found: Columns = {name: self.logits(held) for name, held in outputs.items()}
        classes = next(iter(found.values())).shape[1]
        if labels.ndim > 1 or bool((labels >= classes).any()):
            what = "masks" if labels.ndim > 1 else f"label {int(labels.max())}"
            raise InputError(
                f"{what}, but the network has {classes} classes",
                where="`data`",
                fix="give this network's own data",
            )
        return found

    def vary(self, reference: Outputs, other: Outputs) -> Variation:
        """Other predictions, and how far they moved margins."""
        return _variation(self.logits(reference), self.logits(other))

    def spread(self, collector: Collector, reference: str, other: str) -> Variation:
        """The same over all images."""
        return _variation(collector.column(reference), collector.column(other))

    def compare(
        self, collector: Collector, reference: str, deployed: str, noise: Mapping[str, Noise] | None
    ) -> Comparison:
        """See `comparison.compare`; what noise does to a margin is judged flip by flip."""
        ours, theirs = collector.column(reference), collector.column(deployed)
        return compare((reference, ours), (deployed, theirs), collector.labels(), collector.ids)

    def accuracy(
        self, collector: Collector, reference: str, deployed: str, confidence: float
    ) -> AccuracyChange:
        """Points of Top-1; without labels, the share of other predictions."""
        return accuracy_change(self.compare(collector, reference, deployed, None), confidence)

    def scores(self, collector: Collector, execution: str) -> dict[str, float | Rate]:
        """Top-1, Top-5 and the expected calibration error."""
        logits, labels = collector.column(execution), collector.labels()
        if not has_labels(labels):
            return {}
        hits, top5 = int((predictions(logits) == labels).sum()), topk_accuracy(logits, labels, 5)
        return {
            TOP1: wilson(hits, len(labels)),
            "Top-5": wilson(round(top5 * len(labels) / 100), len(labels)),
            ECE: expected_calibration_error(logits, labels),
        }


def _variation(reference: FloatArray, other: FloatArray) -> Variation:
    flips = int((predictions(other) != predictions(reference)).sum())
    mean = sum(float(np.abs(other[p].astype(np.float64) - reference[p]).sum()) for p in row_parts(len(other)))
    return Variation(flips, finite(mean / other.size), finite(margin_change(reference, other)))


class Classify(Task):
    """Logits (B, K) float32; labels are class numbers."""

    name = "classify"
    about = ("a logit for each class", 1)
    measure = Logits
    divergence = staticmethod(kl_divergence)

    def distance(self, outputs: Tensors, targets: Tensors, temperature: float) -> Tensor:
        """Total variation of the softened class probabilities."""
        return total_variation(outputs[0], targets[0], temperature)

    def sampled_loss(self, outputs: Tensors, generator: Generator, temperature: float) -> Tensor:
        """Cross entropy of labels drawn from the softened probabilities; of one output Bernoulli's, by its sigmoid."""
        logits = class_logits(outputs[0] / temperature)
        labels = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)
        return F.cross_entropy(logits, labels.squeeze(1).to(logits.device), reduction="sum")


CLASSIFY = Classify()
