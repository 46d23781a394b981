"""`slicing = "auto"`: the granularity is chosen by trial reconstructions (our reading of the paper's Algorithm 1).

The paper says that its algorithm determines the granularity per model and then optimises. How is not known here, so all of
this is ours: candidates are the ladder of uniform granularities and one slicing that avoids outlier-ridden cuts. The
activation scales are refined once, block by block; from there each candidate is reconstructed on a part of the calibration
images and judged on the rest by the total variation between the softened class probabilities of the float and of the quantized
network. The best is taken. The run then starts from the searched ranges, as if nothing had been tried: started from the scales
that a trial learned, it ended lower. Trials are long before they are many: in short ones fine slices are ahead of those that
would overtake them later (notes/granularity.md has the measurements).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from ospq_export.calibrate.checkpoints import Scores
from ospq_export.calibrate.cost import step_bytes
from ospq_export.calibrate.objectives import objective_class, objectives
from ospq_export.calibrate.objectives.base import Context
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, walk
from ospq_export.calibrate.slicing.plan import (
    PILOT_ERROR_IMAGES,
    TRIAL_RATE,
    Candidate,
    candidates_of,
    division,
    plan,
    refinement_of,
    trial_of,
)
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.outputs import as_tuple
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.slicing import Slice
from ospq_export.recipes import Recipe, Reconstruction
from ospq_export.runs.manifest import CandidateRecord, SlicingRecord
from ospq_export.tasks.base import Task
from ospq_export.tasks.classify import CLASSIFY
from ospq_export.world.memory import total_memory

# Of a difference between two trials less is chance than at 1 (benchmarks/studies_of_trials.py noise).
_TEMPERATURE = 2.0
log = logging.getLogger(__name__)


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
        task: what the network's output is; its distance judges.
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
        task: Task = CLASSIFY,
    ) -> None:
        self.network, self.recipe, self.task = network, recipe, task
        self.device, self.seed, self.advance = device, seed, advance
        learned, judged = division(recipe, len(images))
        self.train = images[:learned]
        self.judge_on(images[-judged:])
        # The float network's alone: one pass serves the slices of all candidates.
        every = [s for slices in (block, *(c.slices for c in candidates)) for s in slices]
        settings = recipe.reconstruction
        context = Context(network, every, self.train, settings, device, seed, task)
        self.prepared = objective_class(settings).prepare(context)
        refinement = refinement_of(settings)
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
        self.reference = self._outputs()

    def _outputs(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            parts = [as_tuple(self.network.module(x.to(self.device))) for x in self.judge.split(64)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def run(
        self, candidate: Candidate, iterations: int, batch_size: int, most_rate: float = TRIAL_RATE
    ) -> float:
        """The task's distance from the float network on the held-out images; arguments as `outputs` has them."""
        found = self.outputs(candidate, iterations, batch_size, most_rate)
        return float(self.task.distance(found, self.reference, _TEMPERATURE))

    def outputs(
        self, candidate: Candidate, iterations: int, batch_size: int, most_rate: float = TRIAL_RATE
    ) -> tuple[Tensor, ...]:
        """The quantized network's outputs on the held-out images, (N, ...) each, after a trial.

        Args:
            candidate: one of those that were announced.
            iterations: per slice.
            batch_size: images per step.
            most_rate: by which the learning rate of the rounding is raised at most, and never by more than the full run's
                steps are as many; that of the scales by its root.
        """
        self._walk(candidate.slices, trial_of(self.recipe.reconstruction, iterations, batch_size, most_rate))
        self.network.set_mode(Mode.QUANTIZE)
        found = self._outputs()
        self.network.load_state(self.initial)
        return found

    def _walk(self, slices: Sequence[Slice], settings: Reconstruction) -> None:
        reconstructor = Reconstructor(settings, self.device, self.advance, PILOT_ERROR_IMAGES)
        context = Context(self.network, slices, self.train, settings, self.device, self.seed, self.task)
        make = objectives(context, self.prepared)
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
    task: Task = CLASSIFY,
    scores: Scores | None = None,
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
        task: what the network's output is.
        scores: of trials that an interrupted run has made; those are not made again.
    """
    every, batch_size = candidates_of(graph, dominances), recipe.reconstruction.batch_size
    # A slice is learned in half of the device's memory; of what is free now no result may depend.
    most = total_memory(device) // 2
    fitting = [c for c in every if step_bytes(graph, c.slices, batch_size) <= most]
    chosen = plan(recipe, len(images), fitting or every[:1])
    say(chosen.summary(recipe, len(images)))
    winner, held = chosen.candidates[0], 0
    found: list[list[float]] = [[]]
    if len(chosen.candidates) > 1:
        known, observed = scores or Scores(), network.state()
        names = {
            c.name: f"{c.name}, {chosen.iterations} steps of {chosen.batch_size}" for c in chosen.candidates
        }
        left = [c for c in chosen.candidates if names[c.name] not in known.known]
        advance = advance_of(chosen.iterations * sum(len(c.slices) for c in left))

        @functools.cache
        def trials() -> Trials:
            block = slicing_of(graph, "block")
            return Trials(network, block, chosen.candidates, recipe, images, device, seed, advance, task)

        for candidate in left:
            started = time.monotonic()
            score = trials().run(candidate, chosen.iterations, chosen.batch_size)
            known.keep(names[candidate.name], score, time.monotonic() - started)
        found = [[known.known[names[c.name]]] for c in chosen.candidates]
        winner = chosen.candidates[found.index(min(found))]
        network.load_state(observed)
        held = division(recipe, len(images))[1]
    records = [
        CandidateRecord(name=c.name, ends=[s.end for s in c.slices], divergence=divergence)
        for c, divergence in zip(chosen.candidates, found, strict=True)
    ]
    record = SlicingRecord(
        choice=winner.name, share=chosen.share, held_out=held, candidates=records, dominance=dict(dominances)
    )
    return winner.slices, record
