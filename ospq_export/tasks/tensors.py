"""Any outputs: each is judged by its error, which has to stay within the noise floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from ospq_export.tasks.accuracy import ERROR, FEWEST, AccuracyChange, bootstrap_bounds
from ospq_export.tasks.base import Task, Tensors, relative_error
from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.distances import Distances
from ospq_export.tasks.measure import Collector, Columns, Noise, Outputs
from ospq_export.tasks.statistics import IntArray, Rate


class Errors(Distances):
    """Relative errors are all that is known of the outputs."""

    uses_labels = False

    def reduce(self, outputs: Mapping[str, Outputs], labels: IntArray, ids: Sequence[str]) -> Columns:
        """The distances of every pair."""
        return self.distance_columns(outputs)

    def compare(
        self, collector: Collector, reference: str, deployed: str, noise: Mapping[str, Noise] | None
    ) -> Comparison:
        """The outputs' distances; nothing is decided, so nothing agrees."""
        return self.undecided(collector, reference, deployed, noise)

    def accuracy(
        self, collector: Collector, reference: str, deployed: str, confidence: float
    ) -> AccuracyChange:
        """The mean relative error against the float network, with bounds by bootstrap; of few images the bound is the largest."""
        errors = 100 * self.errors(collector, reference, deployed)
        low, high = 0.0, float(errors.max())
        if len(errors) >= FEWEST:
            low, high = bootstrap_bounds(errors, lambda sums: sums / len(errors), confidence)
        return AccuracyChange(
            deployed=deployed,
            reference=reference,
            measure=ERROR,
            images=len(errors),
            differing=0,
            share=float(errors.mean()),
            low=low,
            high=high,
        )

    def scores(self, collector: Collector, execution: str) -> dict[str, float | Rate]:
        """None."""
        return {}


class TensorsTask(Task):
    """Outputs of any shape, several of them too; labels mean nothing."""

    name = "tensors"
    about = None
    output = "output"
    measure = Errors
    divergence = staticmethod(relative_error)

    def sampled_loss(self, outputs: Tensors, generator: Generator, temperature: float) -> Tensor:
        """A normal likelihood around the outputs, each in units of its spread; see `gaussian_loss`."""
        return gaussian_loss(outputs, generator)

    def distance(self, outputs: Tensors, targets: Tensors, temperature: float) -> Tensor:
        """The mean of the outputs' relative errors."""
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([relative_error(output, target) for output, target in pairs]).mean()


def gaussian_loss(outputs: Tensors, generator: Generator) -> Tensor:
    """-log N(t; output, I) but for constants, of targets t drawn from it, in units of each output's spread; summed.

    Its gradient is J^T e with e standard normal, so that squared and averaged it is the Fisher information of that likelihood.
    """
    total = outputs[0].new_zeros(())
    for output in outputs:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        spread = output.detach().std(correction=0).clamp_min(1e-6)
        # Each output counts alike, however many elements it has.
        total = total + (noise * output).sum() / (spread * output[0].numel() ** 0.5)
    return total
