"""Which slicings are tried, and how long, within the budget of a recipe."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ospq_export.calibrate.objectives import objective_class
from ospq_export.calibrate.reconstruct.refinement import REFINEMENT_TRIALS
from ospq_export.graph.granularity import block_slicing, join, slicing_of
from ospq_export.graph.slicing import Slice, atoms
from ospq_export.recipes import Recipe, Reconstruction
from ospq_export.runs.manifest import OutlierRecord

_WEIGHT = 0.25
_MOST_EXCESS = 8.0
OUTLIER_AWARE = "outlier-aware"
# Where the budget does not carry all candidates, those first in this list are tried.
_PREFERENCE = ("block", "atom", "blocks:2", OUTLIER_AWARE, "stage", "blocks:4", "model", "layer")
# Fewer steps, or of fewer images, do not know the order of the finished networks: fine slices are ahead early.
_MIN_ITERATIONS = 60
_MIN_BATCH = 8
_PILOT_IMAGES = 256
_MOST_JUDGED = 1024
PILOT_ERROR_IMAGES = 24
_PILOT_REFINEMENT = 16
# A step costs as much as so many images more, whatever its batch: about what it is on small networks, where it is most.
_STEP_OVERHEAD = 8
# A trial's few steps have to carry the rounding as far as the full run's many do.
TRIAL_RATE = 4.0


def cut_dominance(profile: Sequence[OutlierRecord]) -> dict[str, float]:
    """Dominance of outliers at every cut point: the share of the squared norm that the largest 0.1 % of the elements hold.

    In [0, 1], by the cut point's name; a Gaussian has about 0.013.
    """
    return {record.name: record.largest_share for record in profile if record.kind == "cut"}


def outlier_aware_slicing(graph: fx.Graph, dominances: Mapping[str, float]) -> list[Slice]:
    """The slicing of least cost, by dynamic programming over the cut points; O(A^2) for A atoms.

    The cost of a slice of n atoms that ends at cut point e is

        0.25 * min(8, max(0, dominance(e) / median(dominance) - 1)) + 0.25 * ((n - n0) / n0) ** 2

    where n0 is the mean number of atoms per block: without outliers slices are as long as blocks, and outliers stretch them,
    to at most four times that. The last slice ends at the logits whatever they are like, so there the first term is left out.

    Args:
        graph: captured.
        dominances: of the cut points at the atoms' ends.
    """
    pieces = atoms(graph)
    at_ends = [dominances[p.end] for p in pieces]
    usual = max(statistics.median(at_ends), 1e-12)
    costs = [_WEIGHT * min(_MOST_EXCESS, max(0.0, d / usual - 1.0)) for d in at_ends[:-1]] + [0.0]
    ideal = len(pieces) / len(block_slicing(graph))
    best, origin = [0.0], [0]
    for end in range(1, len(pieces) + 1):
        options = [
            best[start] + costs[end - 1] + _WEIGHT * ((end - start - ideal) / ideal) ** 2
            for start in range(end)
        ]
        origin.append(min(range(end), key=options.__getitem__))
        best.append(options[origin[end]])
    groups: list[Sequence[Slice]] = []
    end = len(pieces)
    while end > 0:
        groups.insert(0, pieces[origin[end] : end])
        end = origin[end]
    return join(graph, groups)


@dataclass(frozen=True)
class Candidate:
    """A slicing that is tried."""

    name: str
    slices: list[Slice]


@dataclass(frozen=True)
class Plan:
    """What the trials will cost, in image-steps: one image through one step of the whole network, forward and backward.

    Attributes:
        candidates: those that are tried.
        iterations: per slice and trial.
        batch_size: of the trials.
        share: cost of all trials over the cost of the full reconstruction.
    """

    candidates: list[Candidate]
    iterations: int
    batch_size: int
    share: float

    @property
    def steps(self) -> int:
        """Optimisation steps of all trials together."""
        return self.iterations * sum(len(c.slices) for c in self.candidates)

    def summary(self, recipe: Recipe, images: int) -> str:
        """In a line, what will be tried and what it costs, or why nothing is."""
        names = ", ".join(c.name for c in self.candidates)
        if len(self.candidates) > 1:
            return f"slicing: trying {names}, for {100 * self.share:.0f} % of the reconstruction's time"
        if not can_judge(recipe, images):
            held = recipe.pilot.held_out
            return f"slicing: {names}; no trials: {images} images are too few to hold {held} out (pilot.held_out)"
        return f"slicing: {names}; no trials: {100 * recipe.pilot.budget:.0f} % of so few steps pays for none"


def image_steps(settings: Reconstruction, images: int, error_images: int | None = None) -> float:
    """Cost of a reconstruction of the whole network; a forward pass counts a third of a step.

    Two passes over the images per slice, three for the errors, and the refinement of the scales come on top of the steps; the
    Fisher weights, which trials share, do not.

    Args:
        settings: the recipe's.
        images: calibration images.
        error_images: on which errors are measured; None means all.
    """
    judged = images if error_images is None else error_images
    passes = 2 * images + 3 * judged + settings.refinement_images * REFINEMENT_TRIALS
    return settings.iterations * (settings.batch_size + _STEP_OVERHEAD) + passes / 3


def candidates_of(graph: fx.Graph, dominances: Mapping[str, float]) -> list[Candidate]:
    """All different candidates in order of preference.

    Args:
        graph: captured, without quantizers.
        dominances: of outliers at the cut points, by name.
    """
    found: dict[tuple[str, ...], Candidate] = {}
    for name in _PREFERENCE:
        candidate = candidate_of(graph, name, dominances)
        found.setdefault(tuple(s.end for s in candidate.slices), candidate)
    return list(found.values())


def candidate_of(graph: fx.Graph, name: str, dominances: Mapping[str, float]) -> Candidate:
    """A uniform granularity, or the slicing that avoids outliers.

    Args:
        graph: captured, without quantizers.
        name: of a granularity, or `OUTLIER_AWARE`.
        dominances: of outliers at the cut points, by name; only the latter looks at them.
    """
    if name == OUTLIER_AWARE:
        return Candidate(name, outlier_aware_slicing(graph, dominances))
    return Candidate(name, slicing_of(graph, name))


def plan(recipe: Recipe, images: int, candidates: Sequence[Candidate]) -> Plan:
    """As many candidates, and as long trials, as the budget carries; where it carries no two, the first one untried.

    Untried as well where half of the images are too few to judge on: trials would learn from next to nothing.
    """
    settings, batch = recipe.reconstruction, _trial_batch(recipe)
    untried = Plan(list(candidates[:1]), 0, batch, 0.0)
    if not can_judge(recipe, images):
        return untried
    seen, judged = division(recipe, images)
    judging = judged / 3
    prepared = objective_class(settings).preparation
    full = image_steps(settings, images) + prepared * images
    refinement = refinement_of(settings)
    refined = image_steps(refinement, seen, PILOT_ERROR_IMAGES) if refinement.refinement_images else 0.0
    once = refined + prepared * seen + judging
    fixed = image_steps(trial_of(settings, 0, batch), seen, PILOT_ERROR_IMAGES) + judging
    for count in range(len(candidates), 1, -1):
        step = batch + _STEP_OVERHEAD
        iterations = int((recipe.pilot.budget * full - once - fixed * count) / (step * count))
        if iterations >= _MIN_ITERATIONS:
            spent = once + count * (fixed + step * iterations)
            return Plan(list(candidates[:count]), iterations, batch, spent / full)
    return untried


def can_judge(recipe: Recipe, images: int) -> bool:
    """Whether enough images are left to judge on."""
    left = images - recipe.pilot.held_out
    return left >= max(recipe.pilot.held_out, _trial_batch(recipe))


def _trial_batch(recipe: Recipe) -> int:
    size = recipe.reconstruction.batch_size
    return min(size, max(_MIN_BATCH, size // 4))


def division(recipe: Recipe, images: int) -> tuple[int, int]:
    """How many calibration images, at the front, trials learn from, and how many, at the end, they are judged on.

    All that are not learned from are judged on: on 256 images, chance alone moves a score by as much as a slicing does.
    """
    learned = min(_PILOT_IMAGES, images - recipe.pilot.held_out)
    return learned, min(images - learned, max(recipe.pilot.held_out, _MOST_JUDGED))


def refinement_of(settings: Reconstruction) -> Reconstruction:
    """Settings of the refinement that all trials start from."""
    images = min(settings.refinement_images, _PILOT_REFINEMENT)
    changes = {
        "iterations": 0,
        "refinement_images": images,
        "compensation_images": 0,
        "bias_correction": False,
    }
    return settings.model_copy(update=changes)


def trial_of(
    settings: Reconstruction, iterations: int, batch_size: int, most_rate: float = TRIAL_RATE
) -> Reconstruction:
    """Settings of one trial; arguments as `Trials.outputs` has them."""
    rate = min(most_rate, max(1.0, settings.iterations / max(iterations, 1)))
    changes = {
        "learning_rate_rounding": rate * settings.learning_rate_rounding,
        "learning_rate_scale": rate**0.5 * settings.learning_rate_scale,
        "iterations": iterations,
        "batch_size": batch_size,
        "refinement_images": 0,
        "compensation_images": 0,
        "bias_images": 32,
    }
    return settings.model_copy(update=changes)
