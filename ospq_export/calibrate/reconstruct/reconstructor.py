"""Reconstruction of one slice: learn weight rounding and activation scales so that the quantized slice gives the float output."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ospq_export.calibrate.objectives import objective_class
from ospq_export.calibrate.objectives.base import MakeObjective, Objective, weight_quantizers
from ospq_export.calibrate.reconstruct.activations import SliceData, Tensors, forward
from ospq_export.calibrate.reconstruct.bias import correct_biases, learned_tensors
from ospq_export.calibrate.reconstruct.compensation import compensate, forget
from ospq_export.calibrate.reconstruct.learner import Learner
from ospq_export.calibrate.reconstruct.refinement import refine_scales, refinement_images
from ospq_export.calibrate.reconstruct.store import Store
from ospq_export.graph.quantizers import Mode, QuantizedGraph, set_mode
from ospq_export.graph.slicing import Slice, extract, run_slice
from ospq_export.recipes import Reconstruction
from ospq_export.world.processes import SOLO, World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceMetrics:
    """What a reconstruction achieved. Errors are mean squared errors over the target's variance, on all calibration images.

    Attributes:
        error_before: with the searched ranges and nearest rounding.
        error_after: with the learned ones, hardened.
        iterations: optimisation steps taken.
        kept: whether the learned state was kept (False: it was no better than nearest rounding, which was restored).
        losses: reconstruction loss at up to 50 evenly spaced steps.
        warning: what went wrong and what was done about it; empty where nothing did.
    """

    error_before: float
    error_after: float
    iterations: int
    kept: bool
    losses: list[float]
    warning: str = ""


RETRY_RATE = 0.1
"""A slice that diverges is learned again at this share of its learning rates, once."""


@dataclass
class Reconstructor:
    """Optimises one slice after another with one set of settings.

    Attributes:
        settings: from the recipe.
        device: where the slices run; the data may lie elsewhere.
        advance: called after each step, for a progress bar.
        error_images: measure errors on the first so many images; None takes all.
        world: who shares each slice's batches.
    """

    settings: Reconstruction
    device: torch.device
    advance: Callable[[], None] = lambda: None
    error_images: int | None = None
    world: World = SOLO

    def run(
        self, piece: fx.GraphModule, data: SliceData, seed: int, objective: Objective | None = None
    ) -> SliceMetrics:
        """Learn the slice's rounding and scales; afterwards its quantizers hold integer codes and constant scales.

        Args:
            piece: from `extract`; its weight quantizers hold nearest codes, its activation quantizers searched ranges.
            data: inputs and target on all calibration images.
            seed: fixes the batches and the dropped elements.
            objective: what to lower; None takes the recipe's loss where it needs no weights.
        """
        settings = self.settings
        objective = objective or objective_class(settings)(settings, weight_quantizers(piece))
        objective.weigh_sides(data)
        before, loss_before = self.error(piece, data, objective)
        initial = _snapshot(piece)
        if settings.refinement_images > 0:
            head = data.select(slice(0, refinement_images(piece, settings.refinement_images)))
            refine_scales(piece, head.to(self.device), objective)
        fitted = self._compensate(piece, data, objective) if settings.compensation_images > 0 else None
        losses: list[float] = []
        warning = ""
        if settings.iterations > 0:
            objective.normalise_by(self.error(piece, data, objective)[1] if fitted is None else fitted)
            losses, warning = self._learn(piece, data, objective, seed)
        forget(piece)
        after, loss_after = self.error(piece, data, objective)
        kept = math.isfinite(loss_after) and (loss_after <= loss_before or objective.keeps_worse)
        if not kept:
            _restore(piece, initial)
            after, loss_after = before, loss_before
        if settings.bias_correction:
            after = self._correct_biases(piece, data, objective, after, loss_after)
        return SliceMetrics(before, after, settings.iterations, kept, losses, warning)

    def _learn(
        self, piece: fx.GraphModule, data: SliceData, objective: Objective, seed: int
    ) -> tuple[list[float], str]:
        """Learn; where that diverges once more at a lower rate; where that does too, leave the slice as it was.

        Returns:
            The loss where it was looked at, and a warning or nothing.
        """
        start, all_losses = _snapshot(piece), []
        devices = [self.device] if self.device.type == "cuda" else []
        for rate, warning in ((1.0, ""), (RETRY_RATE, "diverged; learned again at a tenth of its rates")):
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                learner = Learner(piece, data, objective, self.settings, self.device, rate, self.world)
                for step in range(self.settings.iterations):
                    self.advance()
                    if not learner.step(step):
                        break
                learner.settle()
            all_losses += learner.losses
            if learner.diverged_at is None:
                return learner.losses, warning
            log.warning("a slice diverged at step %d, at %g of its learning rates", learner.diverged_at, rate)
            _restore(piece, start)
        warning = "diverged, also at a tenth of its rates; left with searched scales and nearest rounding"
        return [loss for loss in all_losses if math.isfinite(loss)], warning

    def _compensate(self, piece: fx.GraphModule, data: SliceData, objective: Objective) -> float:
        """Fit the weights to their inputs, where the slice gains by it; the objective afterwards."""
        initial, loss = _snapshot(piece), self.error(piece, data, objective)[1]
        compensate(piece, data.select(slice(0, self.settings.compensation_images)), self.device)
        found = self.error(piece, data, objective)[1]
        if found < loss:
            return found
        forget(piece)
        _restore(piece, initial)
        return loss

    def _correct_biases(
        self, piece: fx.GraphModule, data: SliceData, objective: Objective, error: float, loss: float
    ) -> float:
        initial = _snapshot(piece)
        correct_biases(piece, data.select(slice(0, self.settings.bias_images)), self.device)
        corrected, lower = self.error(piece, data, objective)
        if lower <= loss:
            return corrected
        _restore(piece, initial)
        return error

    def error(
        self, piece: fx.GraphModule, data: SliceData, objective: Objective | None = None
    ) -> tuple[float, float]:
        """Of the quantized slice on its quantized input: mean squared error over the target's variance, and the objective.

        Of a slice with outputs of the network on its way, the error is the mean over all of them.
        """
        judge = objective or objective_class(self.settings)(self.settings, [])
        if objective is None:
            judge.weigh_sides(data)
        data = data if self.error_images is None else data.select(slice(0, self.error_images))
        targets = (data.target, *data.sides)
        totals, loss = [0.0] * len(targets), 0.0
        set_mode(piece, Mode.QUANTIZE)
        with torch.no_grad():
            for start in range(0, data.images, self.settings.batch_size):
                part = data.select(slice(start, start + self.settings.batch_size)).to(self.device)
                outputs = run_slice(piece, part.quantized_input, part.images)
                for index, (output, target) in enumerate(zip(*part.pairs(outputs), strict=True)):
                    totals[index] += float((output - target).square().sum(dtype=torch.float64))
                loss += float(judge.of(outputs, part)) * part.images
        errors = [
            t / x.numel() / max(float(x.float().var()), 1e-12) for t, x in zip(totals, targets, strict=True)
        ]
        return sum(errors) / len(errors), loss / data.images


def _snapshot(piece: fx.GraphModule) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.clone()) for tensor in learned_tensors(piece).values()]


def _restore(piece: fx.GraphModule, saved: list[tuple[Tensor, Tensor]]) -> None:
    for live, copy in saved:
        live.copy_(copy)


@dataclass(frozen=True)
class Step:
    """One slice of the walk, done."""

    index: int
    piece: fx.GraphModule
    metrics: SliceMetrics
    seconds: float


def walk(
    network: QuantizedGraph,
    slices: Sequence[Slice],
    images: Tensor,
    reconstructor: Reconstructor,
    seed: int,
    restore: Callable[[int, fx.GraphModule], bool] = lambda _index, _piece: False,
    make_objective: MakeObjective | None = None,
    store: Store | None = None,
) -> Iterator[Step]:
    """Reconstruct slice after slice and yield each one when it is done.

    Each slice costs one float and one quantized forward pass over the calibration images besides its iterations; memory holds
    the activations at two neighbouring cuts, float and quantized.

    Args:
        network: observed (ranges searched, nearest codes).
        slices: a slicing of the network, in order.
        images: float32 (N, C, H, W), normalised.
        reconstructor: settings and device.
        seed: slice k uses a generator seeded from it and k, so a resumed walk takes the same steps.
        restore: called first for each slice; returns True after it has put an already finished slice's state back.
        make_objective: what each slice is optimised for; None takes the recipe's loss without weights.
        store: holds the activations; None keeps them where the images lie.
    """
    count, device = len(images), reconstructor.device
    float_input: Tensors = (images,)
    quantized_input: Tensors = (images,)
    for index, bounds in enumerate(slices):
        started = time.monotonic()
        piece, alive = extract(network.module, bounds), 1 + len(bounds.carried)
        float_output = forward(piece, float_input, Mode.FLOAT, device, count, store)
        if not restore(index, piece):
            data = SliceData(float_input, quantized_input, float_output[0], count, float_output[alive:])
            objective = None if make_objective is None else make_objective(index, piece, float_output[0])
            metrics = reconstructor.run(piece, data, seed + 1_000_003 * (index + 1), objective)
            yield Step(index, piece, metrics, time.monotonic() - started)
            del data, objective
        if index + 1 < len(slices):
            quantized_input = forward(piece, quantized_input, Mode.QUANTIZE, device, count, store)[:alive]
            float_input = float_output[:alive]
