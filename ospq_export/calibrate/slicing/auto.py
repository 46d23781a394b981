"""`slicing = "auto"`: the granularity is chosen by trial reconstructions (our reading of the paper's Algorithm 1).

The paper says that its algorithm determines the granularity per model and then optimises. How is not known here, so all of
this is ours: candidates are the ladder of uniform granularities and one slicing that avoids outlier-ridden cuts. The
activation scales are refined once, block by block; from there each candidate is reconstructed on a part of the calibration
images and judged on the rest by the total variation between the softened class probabilities of the float and of the quantized
network. The best is taken. The run then starts from the searched ranges, as if nothing had been tried: started from the scales
that a trial learned, it ended lower. Trials are long before they are many: in short ones fine slices are ahead of those that
would overtake them later (docs/granularity.md has the measurements).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ospq_export.calibrate.cost import step_bytes
from ospq_export.calibrate.objectives.losses import total_variation
from ospq_export.calibrate.objectives.objective import fisher_weights, objectives
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor
from ospq_export.calibrate.reconstruct.refinement import REFINEMENT_TRIALS
from ospq_export.calibrate.reconstruct.walk import walk
from ospq_export.calibrate.slicing.outlier_aware import outlier_aware_slicing
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.slicing import Slice
from ospq_export.recipes import Recipe, Reconstruction
from ospq_export.runs.manifest import CandidateRecord, SlicingRecord
from ospq_export.world.memory import total_memory

log = logging.getLogger(__name__)

OUTLIER_AWARE = "outlier-aware"
# Where the budget does not carry all candidates, those first in this list are tried.
_PREFERENCE = ("block", "atom", "blocks:2", OUTLIER_AWARE, "stage", "blocks:4", "model", "layer")
# Fewer steps, or of fewer images, do not know the order of the finished networks: fine slices are ahead early.
_MIN_ITERATIONS = 60
_MIN_BATCH = 8
_PILOT_IMAGES = 256
_MOST_JUDGED = 1024
_PILOT_ERROR_IMAGES = 24
_PILOT_REFINEMENT = 16
# A step costs as much as so many images more, whatever its batch: about what it is on small networks, where it is most.
_STEP_OVERHEAD = 8
# A trial's few steps have to carry the rounding as far as the full run's many do.
_TRIAL_RATE = 4.0
# Of a difference between two trials less is chance than at 1 (benchmarks/noise.py).
_TEMPERATURE = 2.0


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
        if not _can_judge(recipe, images):
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
    if not _can_judge(recipe, images):
        return untried
    seen, judged = division(recipe, images)
    judging = judged / 3
    fisher = float(settings.loss == "fisher")
    full = image_steps(settings, images) + fisher * images
    refinement = _refinement(settings)
    refined = image_steps(refinement, seen, _PILOT_ERROR_IMAGES) if refinement.refinement_images else 0.0
    once = refined + fisher * seen + judging
    fixed = image_steps(_trial(settings, 0, batch), seen, _PILOT_ERROR_IMAGES) + judging
    for count in range(len(candidates), 1, -1):
        step = batch + _STEP_OVERHEAD
        iterations = int((recipe.pilot.budget * full - once - fixed * count) / (step * count))
        if iterations >= _MIN_ITERATIONS:
            spent = once + count * (fixed + step * iterations)
            return Plan(list(candidates[:count]), iterations, batch, spent / full)
    return untried


def _fitting(
    candidates: Sequence[Candidate], graph: fx.Graph, batch_size: int, device: torch.device
) -> Sequence[Candidate]:
    """Those whose largest slice can be learned in half of the device's memory; of what is free now no result may depend."""
    most = total_memory(device) // 2
    return [c for c in candidates if step_bytes(graph, c.slices, batch_size) <= most] or candidates[:1]


def _can_judge(recipe: Recipe, images: int) -> bool:
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


def _refinement(settings: Reconstruction) -> Reconstruction:
    images = min(settings.refinement_images, _PILOT_REFINEMENT)
    return settings.model_copy(
        update={"iterations": 0, "refinement_images": images, "bias_correction": False}
    )


def _trial(
    settings: Reconstruction, iterations: int, batch_size: int, most_rate: float = _TRIAL_RATE
) -> Reconstruction:
    rate = min(most_rate, max(1.0, settings.iterations / max(iterations, 1)))
    changes = {
        "learning_rate_rounding": rate * settings.learning_rate_rounding,
        "learning_rate_scale": rate**0.5 * settings.learning_rate_scale,
        "iterations": iterations,
        "batch_size": batch_size,
        "refinement_images": 0,
        "bias_images": 32,
    }
    return settings.model_copy(update=changes)


class Trials:
    """Runs trials; every one starts from the observed network with its activation scales refined block by block.

    Args:
        network: observed.
        block: its block slicing.
        candidates: all that are going to be tried.
        recipe: says how many images are held out, and how slices are learned.
        images: float32 (N, C, H, W), normalised.
        device: where the network lies.
        seed: of every trial.
        advance: called after every step.
    """

    def __init__(
        self,
        network: QuantizedGraph,
        block: Sequence[Slice],
        candidates: Sequence[Candidate],
        recipe: Recipe,
        images: Tensor,
        device: torch.device,
        seed: int,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.network, self.recipe, self.device, self.seed, self.advance = (
            network,
            recipe,
            device,
            seed,
            advance,
        )
        learned, judged = division(recipe, len(images))
        self.train = images[:learned]
        self.judge_on(images[-judged:])
        # The float network's alone: one pass serves the slices of all candidates.
        ends = {s.end for slices in (block, *(c.slices for c in candidates)) for s in slices}
        settings = recipe.reconstruction
        self.fisher = (
            fisher_weights(network, ends, self.train, device, seed, settings.fisher_temperature)
            if settings.loss == "fisher"
            else None
        )
        refinement = _refinement(settings)
        if refinement.refinement_images:
            self._walk(block, refinement)
        self.initial = network.state()

    def judge_on(self, images: Tensor) -> None:
        """Judge all further trials on other images.

        Args:
            images: float32 (N, C, H, W), normalised.
        """
        self.judge = images
        self.network.set_mode(Mode.FLOAT)
        self.reference = self._logits()

    def _logits(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.network.module(x.to(self.device)) for x in self.judge.split(64)])

    def run(
        self, candidate: Candidate, iterations: int, batch_size: int, most_rate: float = _TRIAL_RATE
    ) -> float:
        """Total variation between the softened class probabilities on the held-out images; arguments as `outputs` has them."""
        found = self.outputs(candidate, iterations, batch_size, most_rate)
        return float(total_variation(found, self.reference, _TEMPERATURE))

    def outputs(
        self, candidate: Candidate, iterations: int, batch_size: int, most_rate: float = _TRIAL_RATE
    ) -> Tensor:
        """The quantized network's logits on the held-out images, (N, classes), after a trial.

        Args:
            candidate: one of those that were announced.
            iterations: per slice.
            batch_size: images per step.
            most_rate: by which the learning rate of the rounding is raised at most, and never by more than the full run's
                steps are as many; that of the scales by its root.
        """
        self._walk(candidate.slices, _trial(self.recipe.reconstruction, iterations, batch_size, most_rate))
        self.network.set_mode(Mode.QUANTIZE)
        found = self._logits()
        self.network.load_state(self.initial)
        return found

    def _walk(self, slices: Sequence[Slice], settings: Reconstruction) -> None:
        reconstructor = Reconstructor(settings, self.device, self.advance, _PILOT_ERROR_IMAGES)
        make = objectives(self.network, slices, self.train, settings, self.device, self.seed, self.fisher)
        for _ in walk(self.network, slices, self.train, reconstructor, self.seed, make_objective=make):
            continue


def choose_slicing(
    network: QuantizedGraph,
    graph: fx.Graph,
    recipe: Recipe,
    images: Tensor,
    dominances: Mapping[str, float],
    device: torch.device,
    seed: int,
    advance_of: Callable[[int], Callable[[], None]] = lambda _steps: lambda: None,
    say: Callable[[str], None] = log.info,
) -> tuple[list[Slice], SlicingRecord]:
    """Choose the reconstruction granularity by trial; deterministic for a seed.

    Candidates with a slice too large for the device are left out. Where half of the images are too few to judge trials on, or the
    budget carries no two trials, the first candidate is taken untried.

    Args:
        network: observed; afterwards as it was before.
        graph: captured, without quantizers.
        recipe: its pilot settings bound the cost.
        images: float32 (N, C, H, W), normalised.
        dominances: of outliers at the cut points, by name; from the profile.
        device: where the network lies.
        seed: of every trial.
        advance_of: given the number of steps, returns what advances a progress bar by one.
        say: told beforehand, in a line, what will be tried and what it costs, or why nothing is.
    """
    fitting = _fitting(candidates_of(graph, dominances), graph, recipe.reconstruction.batch_size, device)
    chosen = plan(recipe, len(images), fitting)
    say(chosen.summary(recipe, len(images)))
    if len(chosen.candidates) == 1:
        winner, records, held = chosen.candidates[0], [_record(chosen.candidates[0])], 0
    else:
        advance, block, observed = advance_of(chosen.steps), slicing_of(graph, "block"), network.state()
        trials = Trials(network, block, chosen.candidates, recipe, images, device, seed, advance)
        winner, records = _best(trials, chosen)
        network.load_state(observed)
        held = len(trials.judge)
    record = SlicingRecord(
        choice=winner.name, share=chosen.share, held_out=held, candidates=records, dominance=dict(dominances)
    )
    return winner.slices, record


def _best(trials: Trials, plan: Plan) -> tuple[Candidate, list[CandidateRecord]]:
    scores = [trials.run(c, plan.iterations, plan.batch_size) for c in plan.candidates]
    winner = plan.candidates[scores.index(min(scores))]
    return winner, [_record(c, score) for c, score in zip(plan.candidates, scores, strict=True)]


def _record(candidate: Candidate, *scores: float) -> CandidateRecord:
    return CandidateRecord(
        name=candidate.name, ends=[s.end for s in candidate.slices], divergence=list(scores)
    )
