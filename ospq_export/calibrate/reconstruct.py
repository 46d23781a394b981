"""Reconstruction of one slice: learn weight rounding and activation scales so that the quantized slice gives the float output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ospq_export.graph import quantize as q
from ospq_export.graph.quantizers import ActivationQuantizer, Mode, WeightQuantizer, quantizers_of, set_mode
from ospq_export.recipes import Reconstruction


@dataclass(frozen=True)
class SliceData:
    """A slice's inputs and target on the calibration images; tensors of any shape with images first, on any device.

    Attributes:
        float_input: the float network's activation at the slice's start.
        quantized_input: the quantized prefix's activation there.
        target: the float network's activation at the slice's end.
    """

    float_input: Tensor
    quantized_input: Tensor
    target: Tensor


@dataclass(frozen=True)
class SliceMetrics:
    """What a reconstruction achieved. Errors are mean squared errors over the target's variance, on all calibration images.

    Attributes:
        error_before: with the searched ranges and nearest rounding.
        error_after: with the learned ones, hardened.
        iterations: optimisation steps taken.
        kept: whether the learned state was kept (False: it was no better than nearest rounding, which was restored).
        losses: reconstruction loss at up to 50 evenly spaced steps.
    """

    error_before: float
    error_after: float
    iterations: int
    kept: bool
    losses: list[float]


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """Sum of 1 - |2 h(V) - 1| ** beta (AdaRound, eq. 24)."""
    return (1.0 - (2.0 * q.rectified_sigmoid(v) - 1.0).abs().pow(beta)).sum()


def annealed_beta(step: int, settings: Reconstruction) -> float | None:
    """Beta of the rounding term: None during warm-up, then linear from `beta_start` to `beta_end`."""
    warm_up = settings.warm_up * settings.iterations
    if step < warm_up:
        return None
    progress = (step - warm_up) / max(1.0, settings.iterations - warm_up)
    return settings.beta_start + (settings.beta_end - settings.beta_start) * progress


def literal_loss(output: Tensor, target: Tensor) -> Tensor:
    """The loss of BRECQ's and QDrop's code: squared error summed over dimension 1, averaged over the rest."""
    return (output - target).square().sum(1).mean()


class _Objective:
    """Reconstruction loss plus rounding term, in the recipe's normalisation."""

    def __init__(
        self, settings: Reconstruction, data: SliceData, weights: list[WeightQuantizer], scale: float
    ) -> None:
        self.settings, self.weights = settings, weights
        self.normaliser = 1.0 if settings.loss == "literal" else max(scale, 1e-12)
        count = sum(w.codes.numel() for w in weights)
        self.rounding_weight = settings.rounding_weight
        if settings.loss == "normalized":
            # Mean instead of sum: the balance of both terms then depends neither on a slice's size nor on a layout.
            self.rounding_weight /= max(count, 1)

    def reconstruction(self, output: Tensor, target: Tensor) -> Tensor:
        if self.settings.loss == "literal":
            return literal_loss(output, target)
        return F.mse_loss(output, target) / self.normaliser

    def rounding(self, beta: float) -> Tensor:
        terms = [rounding_regularizer(w.v, beta) for w in self.weights if w.v is not None]
        return self.rounding_weight * torch.stack(terms).sum()


@dataclass
class Reconstructor:
    """Optimises one slice after another with one set of settings.

    Attributes:
        settings: from the recipe.
        device: where the slices run; the data may lie elsewhere.
        advance: called after each step, for a progress bar.
    """

    settings: Reconstruction
    device: torch.device
    advance: Callable[[], None] = lambda: None

    def run(self, piece: fx.GraphModule, data: SliceData, seed: int) -> SliceMetrics:
        """Learn the slice's rounding and scales; afterwards its quantizers hold integer codes and constant scales.

        Args:
            piece: from `extract`; its weight quantizers hold nearest codes, its activation quantizers searched ranges.
            data: inputs and target on all calibration images.
            seed: fixes the batches and the dropped elements.
        """
        before = self.error(piece, data)
        initial = _snapshot(piece)
        if self.settings.refinement_images > 0 and self.settings.iterations > 0:
            refine_scales(piece, _head(data, self.settings.refinement_images), self.device)
        losses: list[float] = []
        devices = [self.device] if self.device.type == "cuda" else []
        if self.settings.iterations > 0:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                losses = self._learn(piece, data, self.error(piece, data))
        after = self.error(piece, data)
        kept = math.isfinite(after) and (after <= before or self.settings.loss == "literal")
        if not kept:
            _restore(piece, initial)
        return SliceMetrics(before, after if kept else before, self.settings.iterations, kept, losses)

    def error(self, piece: fx.GraphModule, data: SliceData) -> float:
        """Mean squared error of the quantized slice on its quantized input, over the target's variance."""
        total, count = 0.0, 0
        set_mode(piece, Mode.QUANTIZE)
        with torch.no_grad():
            for start in range(0, len(data.target), self.settings.batch_size):
                chosen = slice(start, start + self.settings.batch_size)
                x = data.quantized_input[chosen].to(self.device)
                target = data.target[chosen].to(self.device)
                total += float((piece(x, len(x)) - target).square().sum(dtype=torch.float64))
                count += target.numel()
        variance = float(data.target.float().var())
        return total / count / max(variance, 1e-12)

    def _learn(self, piece: fx.GraphModule, data: SliceData, error_before: float) -> list[float]:
        settings = self.settings
        weights = [m for m in quantizers_of(piece) if isinstance(m, WeightQuantizer)]
        activations = [m for m in quantizers_of(piece) if isinstance(m, ActivationQuantizer)]
        optimizers = self._optimizers(piece, weights, activations)
        variance = max(float(data.target.float().var()), 1e-12)
        objective = _Objective(settings, data, weights, error_before * variance)
        set_mode(piece, Mode.LEARN)
        for activation in activations:
            activation.drop_probability = settings.drop_probability
        losses, every = [], max(1, settings.iterations // 50)
        for step in range(settings.iterations):
            x, target = self._batch(data)
            loss = objective.reconstruction(piece(x, len(x)), target)
            beta = annealed_beta(step, settings)
            total = loss if beta is None or not weights else loss + objective.rounding(beta)
            for optimizer, _ in optimizers:
                optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            for optimizer, scheduler in optimizers:
                optimizer.step()
                scheduler.step()
            if step % every == 0:
                losses.append(float(loss.detach()))
            self.advance()
        for weight in weights:
            weight.settle()
        for activation in activations:
            activation.settle()
        return losses

    def _optimizers(
        self, piece: fx.GraphModule, weights: list[WeightQuantizer], activations: list[ActivationQuantizer]
    ) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """Adam on V at a constant rate; Adam on the activation scales with cosine decay (QDrop)."""
        settings = self.settings
        result: list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]] = []
        constant = [w.start_learning(piece.get_buffer(w.constant)) for w in weights]
        if constant:
            rounding = torch.optim.Adam(constant, lr=settings.learning_rate_rounding, foreach=True)
            result.append((rounding, torch.optim.lr_scheduler.ConstantLR(rounding, factor=1.0)))
        logarithmic = settings.scale_parametrization == "logarithmic"
        scales: list[nn.Parameter] = [a.start_learning(logarithmic=logarithmic) for a in activations]
        if scales:
            adam = torch.optim.Adam(scales, lr=settings.learning_rate_scale)
            result.append((adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.iterations)))
        return result

    def _batch(self, data: SliceData) -> tuple[Tensor, Tensor]:
        """A random batch whose input mixes quantized and float elements (QDrop)."""
        count = len(data.target)
        picks = torch.randperm(count)[: min(self.settings.batch_size, count)]
        chosen = picks.to(data.target.device)
        x = data.quantized_input[chosen].to(self.device)
        original = data.float_input[chosen].to(self.device)
        x = q.mix(x, original, self.settings.drop_probability)
        return x, data.target[chosen].to(self.device)


# Multiples of the scale that refinement tries; below one it clips more, above one it rounds more coarsely.
_MULTIPLES = (0.25, 0.35, 0.5, 0.65, 0.8, 0.9, 1.1, 1.25)


def refine_scales(piece: fx.GraphModule, data: SliceData, device: torch.device) -> None:
    """Choose each activation scale of a slice by the slice's output error, one after the other in graph order (ours).

    The mean squared error of a tensor says little about tensors whose small values matter together, such as attention
    probabilities: there the error of what is computed from them has to decide.

    Args:
        piece: from `extract`; its quantizers hold searched ranges and nearest codes.
        data: a few images.
        device: where the slice runs.
    """
    x, target = data.quantized_input.to(device), data.target.to(device)
    set_mode(piece, Mode.QUANTIZE)

    def error() -> float:
        return float((piece(x, len(x)) - target).square().mean())

    with torch.no_grad():
        best = error()
        for quantizer in quantizers_of(piece):
            if not isinstance(quantizer, ActivationQuantizer):
                continue
            searched = quantizer.scale.clone()
            chosen = searched.clone()
            for multiple in _MULTIPLES:
                quantizer.scale.copy_(searched * multiple)
                found = error()
                if found < best:
                    best, chosen = found, quantizer.scale.clone()
            quantizer.scale.copy_(chosen)


def _head(data: SliceData, count: int) -> SliceData:
    return SliceData(data.float_input[:count], data.quantized_input[:count], data.target[:count])


def _snapshot(piece: fx.GraphModule) -> list[tuple[Tensor, Tensor]]:
    """Copies of what learning can change: codes or scale of each quantizer."""
    return [(m, m.clone()) for m in (_state(quantizer) for quantizer in quantizers_of(piece))]


def _state(quantizer: ActivationQuantizer | WeightQuantizer) -> Tensor:
    return quantizer.codes if isinstance(quantizer, WeightQuantizer) else quantizer.scale


def _restore(piece: fx.GraphModule, saved: list[tuple[Tensor, Tensor]]) -> None:
    for live, copy in saved:
        live.copy_(copy)
