"""Short reconstructions of a part of the images, judged on the rest by the network's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ospq_export.calibrate.objectives import objective_class, objectives
from ospq_export.calibrate.objectives.base import Context
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor
from ospq_export.calibrate.reconstruct.walk import walk
from ospq_export.calibrate.slicing.plan import (
    PILOT_ERROR_IMAGES,
    TRIAL_RATE,
    Candidate,
    division,
    refinement_of,
    trial_of,
)
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.slicing import Slice
from ospq_export.recipes import Recipe, Reconstruction
from ospq_export.tasks.base import Task
from ospq_export.tasks.classify import CLASSIFY

# Of a difference between two trials less is chance than at 1 (benchmarks/noise.py).
_TEMPERATURE = 2.0


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
        self.task = task
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
        self.reference = self._logits()

    def _logits(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.network.module(x.to(self.device)) for x in self.judge.split(64)])

    def run(
        self, candidate: Candidate, iterations: int, batch_size: int, most_rate: float = TRIAL_RATE
    ) -> float:
        """Total variation between the softened class probabilities on the held-out images; arguments as `outputs` has them."""
        found = self.outputs(candidate, iterations, batch_size, most_rate)
        return float(self.task.distance(found, self.reference, _TEMPERATURE))

    def outputs(
        self, candidate: Candidate, iterations: int, batch_size: int, most_rate: float = TRIAL_RATE
    ) -> Tensor:
        """The quantized network's logits on the held-out images, (N, classes), after a trial.

        Args:
            candidate: one of those that were announced.
            iterations: per slice.
            batch_size: images per step.
            most_rate: by which the learning rate of the rounding is raised at most, and never by more than the full run's
                steps are as many; that of the scales by its root.
        """
        self._walk(candidate.slices, trial_of(self.recipe.reconstruction, iterations, batch_size, most_rate))
        self.network.set_mode(Mode.QUANTIZE)
        found = self._logits()
        self.network.load_state(self.initial)
        return found

    def _walk(self, slices: Sequence[Slice], settings: Reconstruction) -> None:
        reconstructor = Reconstructor(settings, self.device, self.advance, PILOT_ERROR_IMAGES)
        context = Context(self.network, slices, self.train, settings, self.device, self.seed, self.task)
        make = objectives(context, self.prepared)
        for _ in walk(self.network, slices, self.train, reconstructor, self.seed, make_objective=make):
            continue
