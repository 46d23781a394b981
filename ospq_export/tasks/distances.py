"""How far outputs of any shape are apart, image by image: what tasks share whose outputs are no logits of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ospq_export.tasks.comparison import Comparison, ImageError, MarginHistogram, OutputChange, finite
from ospq_export.tasks.measure import Collector, Columns, Measure, Noise, Outputs, Pair, Variation
from ospq_export.tasks.statistics import FloatArray

_WORST = 20
# Two outputs are swapped where each is at least so many times closer to the other's reference than to its own.
_SWAPPED = 4.0
_TINY = 1e-30
_ERROR, _DIFFERENCE, _COSINE, _MEAN = range(4)


def distances(reference: FloatArray, other: FloatArray) -> NDArray[np.float64]:
    """Of each image: relative error, largest and mean absolute difference, cosine.

    The relative error is |other - reference| / |reference| (Euclidean norms), infinite where it is not finite.

    Args:
        reference: (B, ...).
        other: (B, ...).

    Returns:
        float64 (B, 4): relative error, largest difference, cosine, mean difference.
    """
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (reference, other))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(a - b)
        norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        error = np.linalg.norm(difference, axis=1) / np.maximum(norms[0], _TINY)
        cosine = (a * b).sum(1) / np.maximum(norms[0] * norms[1], _TINY)
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    found = np.stack([error, difference.max(1), np.where(both_zero, 1.0, cosine), difference.mean(1)], 1)
    return np.where(np.isfinite(found), found, np.array([np.inf, np.inf, -1.0, np.inf]))


def only(outputs: Outputs) -> FloatArray:
    """The one output of a task that is about one."""
    (values,) = outputs.values()
    return values


class Distances(Measure):
    """Keeps the distances of every pair of executions, output by output; four numbers for each image."""

    def __init__(self, pairs: Sequence[Pair], images: int | None, threshold: float | None = None) -> None:
        super().__init__(pairs, images, threshold)
        self.swapped: dict[Pair, dict[str, str]] = {}

    def distance_columns(self, outputs: Mapping[str, Outputs]) -> Columns:
        """The distances of a batch."""
        result: Columns = {}
        for reference, deployed in self.pairs:
            ours, theirs = outputs[reference], outputs[deployed]
            self.swapped.setdefault((reference, deployed), _swapped(ours, theirs))
            for name in ours:
                result[_column(reference, deployed, name)] = distances(ours[name], theirs[name])
        return result

    def vary(self, reference: Outputs, other: Outputs) -> Variation:
        """The relative errors of each output."""
        found = {name: distances(reference[name], other[name]) for name in reference}
        mean = np.mean([d[:, _MEAN].mean() for d in found.values()])
        return Variation(flips=0, difference=finite(mean), errors=_noise(found))

    def spread(self, collector: Collector, reference: str, other: str) -> Variation:
        """The relative errors of each output."""
        errors = _noise(self._found(collector, reference, other))
        return Variation(0, self.difference(collector, reference, other)[1], errors=errors)

    def difference(self, collector: Collector, reference: str, deployed: str) -> tuple[float, float]:
        """Largest and mean absolute difference over all outputs."""
        found = self._found(collector, reference, deployed).values()
        largest = max(float(d[:, _DIFFERENCE].max()) for d in found)
        return finite(largest), finite(np.mean([d[:, _MEAN].mean() for d in found]))

    def errors(self, collector: Collector, reference: str, deployed: str) -> NDArray[np.float64]:
        """The mean relative error over the outputs, image by image, (N,)."""
        found = self._found(collector, reference, deployed).values()
        return np.mean([d[:, _ERROR] for d in found], axis=0)

    def changes(
        self, collector: Collector, reference: str, deployed: str, noise: Mapping[str, Noise] | None
    ) -> list[OutputChange]:
        """Every output of a pair."""
        swapped = self.swapped.get((reference, deployed), {})
        return [
            _change(name, d, collector.ids, None if noise is None else noise.get(name), swapped.get(name))
            for name, d in self._found(collector, reference, deployed).items()
        ]

    def undecided(
        self,
        collector: Collector,
        reference: str,
        deployed: str,
        noise: Mapping[str, Noise] | None,
        *,
        agreement: float | None = None,
        scores: tuple[float | None, float | None] = (None, None),
    ) -> Comparison:
        """A comparison of outputs that decide nothing for an image as a whole.

        Args:
            collector: what was kept.
            reference: of the pair.
            deployed: of the pair.
            noise: as `Measure.compare` has it.
            agreement: percent of equal decisions within the images.
            scores: of the reference and of the deployed execution, percent.
        """
        largest, mean = self.difference(collector, reference, deployed)
        ours, theirs = scores
        return Comparison(
            reference=reference,
            deployed=deployed,
            images=len(collector.ids),
            reference_score=ours,
            deployed_score=theirs,
            score_difference=None if ours is None or theirs is None else theirs - ours,
            agreement=agreement,
            agreement_interval=None,
            mcnemar=None,
            max_logit_difference=largest,
            mean_logit_difference=mean,
            flips=[],
            margins=MarginHistogram(edges=[], images=[], flips=[]),
            classes=[],
            outputs=self.changes(collector, reference, deployed, noise),
        )

    def _found(self, collector: Collector, reference: str, deployed: str) -> dict[str, NDArray[np.float64]]:
        start = _column(reference, deployed, "")
        names = [name for name in collector.names if name.startswith(start)]
        return {name.removeprefix(start): collector.column(name) for name in names}


def _noise(found: Mapping[str, NDArray[np.float64]]) -> dict[str, Noise]:
    errors = {name: d[:, _ERROR] for name, d in found.items()}
    return {name: Noise(mean=finite(e.mean()), largest=finite(e.max())) for name, e in errors.items()}


def _column(reference: str, deployed: str, output: str) -> str:
    return f"{reference} | {deployed} | {output}"


def _change(
    name: str, d: NDArray[np.float64], ids: Sequence[str], noise: Noise | None, holds: str | None
) -> OutputChange:
    error = d[:, _ERROR]
    order = np.argsort(-error, kind="stable")[:_WORST]
    return OutputChange(
        name=name,
        mean_error=finite(error.mean()),
        max_error=finite(error.max()),
        error_deviation=finite(error.std()),
        max_difference=finite(d[:, _DIFFERENCE].max()),
        mean_cosine=float(d[:, _COSINE].mean()),
        min_cosine=float(d[:, _COSINE].min()),
        noise=None if noise is None else noise.largest,
        mean_noise=None if noise is None else noise.mean,
        beyond=None if noise is None else int((error > noise.largest).sum()),
        holds=holds,
        worst=[ImageError(id=ids[i], error=finite(error[i])) for i in order if error[i] > 0],
    )


def _swapped(reference: Outputs, deployed: Outputs) -> dict[str, str]:
    """Outputs of a batch that hold each other's values: the names of two that do, either way."""
    result: dict[str, str] = {}
    for one, other in combinations(reference, 2):
        if reference[one].shape != reference[other].shape:
            continue
        own = _mean_error(reference[one], deployed[one]) + _mean_error(reference[other], deployed[other])
        crossed = _mean_error(reference[other], deployed[one]) + _mean_error(reference[one], deployed[other])
        if own > _SWAPPED * crossed:
            result |= {one: other, other: one}
    return result


def _mean_error(reference: FloatArray, deployed: FloatArray) -> float:
    return float(distances(reference, deployed)[:, _ERROR].mean())
