"""What a slice is optimised for: the reconstruction losses, and the term that drives soft rounding to integers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ospq_export.formats.soft import rectified_sigmoid
from ospq_export.graph.quantizers import WeightQuantizer
from ospq_export.recipes import Reconstruction


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """Sum of 1 - |2 h(V) - 1| ** beta (AdaRound, eq. 24)."""
    return (1.0 - (2.0 * rectified_sigmoid(v) - 1.0).abs().pow(beta)).sum()


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


def channel_weight(target: Tensor, axis: int) -> Tensor:
    """Weights 1 / var(channel), so that every channel counts alike and outlier channels do not drown the rest (ours).

    Channels of next to no variance are held at a thousandth of the mean variance, and the weights have mean one.

    Args:
        target: float32, any shape with images first.
        axis: the channels' dimension.

    Returns:
        float32 that broadcasts with `target`.
    """
    others = [d for d in range(target.dim()) if d != axis % target.dim()]
    variance = target.float().var(dim=others, correction=0, keepdim=True)
    weight = 1.0 / variance.clamp_min(1e-3 * float(variance.mean()) + 1e-20)
    return weight / weight.mean()


class Objective:
    """Reconstruction loss of one slice, and the weight of its rounding term, in the recipe's normalisation.

    Attributes:
        rounding_weight: of the rounding term summed over all weights of the slice.
        weight: float32 that broadcasts with the slice's output, for `channel` and `fisher`; None where all elements count alike.
        kl: whether the output is the network's logits and is judged by its KL divergence.
        before: the reconstruction loss with nearest rounding, before learning; 0 until `normalise_by` has said.
    """

    def __init__(
        self,
        settings: Reconstruction,
        weights: list[WeightQuantizer],
        *,
        weight: Tensor | None = None,
        kl: bool = False,
    ) -> None:
        self.settings, self.weight, self.kl = settings, weight, kl
        self.normaliser = 1.0
        self.before = 0.0
        self.rounding_weight = settings.rounding_weight
        if settings.loss != "literal":
            # Mean instead of sum: the balance of both terms then depends neither on a slice's size nor on a layout.
            self.rounding_weight /= max(sum(w.codes.numel() for w in weights), 1)

    def normalise_by(self, initial: float) -> None:
        """Divide the reconstruction loss by its value before learning (APHQ-ViT); the literal form stays as it is."""
        if self.settings.loss != "literal":
            self.normaliser = max(initial, 1e-12)
        self.before = initial / self.normaliser

    def raw(self, output: Tensor, target: Tensor) -> Tensor:
        """The reconstruction loss of a batch, not normalised; scalar, a mean over the images."""
        if self.kl:
            return kl_divergence(output, target)
        if self.settings.loss == "literal":
            return literal_loss(output, target)
        if self.weight is not None:
            return ((output - target).square() * self.weight).mean()
        return F.mse_loss(output, target)

    def reconstruction(self, output: Tensor, target: Tensor) -> Tensor:
        """The reconstruction loss of a batch, normalised."""
        return self.raw(output, target) / self.normaliser
