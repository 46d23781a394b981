"""The learned rounding of all weights of a slice, as one flat tensor with its gradient in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ospq_export.formats.kernels import SHIFT, STRETCH, blocks, rectified_sigmoid
from ospq_export.graph.quantizers import WeightQuantizer
from ospq_export.recipes import Reconstruction
from ospq_export.world.processes import SOLO, World


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


class SoftRounding:
    """V of every weight of a slice, side by side, and what the forward and the backward pass need of it.

    The soft weight is `base + gain * h(V)` with constants that are computed once: base = s * lower, and gain = s * (upper -
    lower), which is 0 where a weight lies outside of its format's range and V does not matter.

    Attributes:
        v: float32 (n,), the parameter.
        weight: float32 (n,), the soft weights of the last `refresh`; the quantizers hold views of it.
    """

    def __init__(self, piece: fx.GraphModule, quantizers: list[WeightQuantizer]) -> None:
        self.quantizers = quantizers
        started = [w.start_learning(piece.get_buffer(w.constant)) for w in quantizers]
        self.v = nn.Parameter(torch.cat([v.detach().flatten() for v in started]))
        parts = [_base_and_gain(w) for w in quantizers]
        self.base, self.gain = (torch.cat(column) for column in zip(*parts, strict=True))
        self.weight = torch.empty_like(self.base)
        self.sigmoid = torch.empty_like(self.base)
        self.v.grad = torch.zeros_like(self.base)
        self._share()

    def _share(self) -> None:
        """Let each quantizer see its part of V and of the soft weights."""
        sizes = [w.codes.numel() for w in self.quantizers]
        columns = zip(self.quantizers, self.v.detach().split(sizes), self.weight.split(sizes), strict=True)
        for quantizer, v, weight in columns:
            quantizer.v = nn.Parameter(v.view(quantizer.codes.shape), requires_grad=False)
            quantizer.soft = weight.view(quantizer.codes.shape).requires_grad_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the soft weights from V; forget the weights' gradients."""
        for block in blocks(self.v):
            sigmoid, weight = self.sigmoid[block], self.weight[block]
            torch.sigmoid(self.v[block], out=sigmoid)
            torch.mul(sigmoid, STRETCH, out=weight).add_(SHIFT).clamp_(0.0, 1.0)
            weight.mul_(self.gain[block]).add_(self.base[block])
        for quantizer in self.quantizers:
            assert quantizer.soft is not None
            quantizer.soft.grad = None

    @torch.no_grad()
    def collect(self, strength: float | Tensor, beta: float | Tensor, world: World = SOLO) -> None:
        """Set V's gradient from the soft weights' gradients and from the rounding term.

        d(1 - |2h - 1|^beta)/dh = -2 beta |2h - 1|^(beta - 1) sign(2h - 1), and dh/dV = 1.2 sigmoid (1 - sigmoid) where h is not
        clipped (AdaRound, eq. 23 and 24).

        Args:
            strength: weight of the rounding term; 0 while it is off.
            beta: its exponent, at least 1.
            world: whose gradients of the weights are averaged.
        """
        gradient = self.v.grad
        assert gradient is not None
        torch.cat([_gradient(w) for w in self.quantizers], out=gradient)
        world.average([gradient])
        on = isinstance(strength, Tensor) or strength > 0
        for block in blocks(gradient):
            part, sigmoid = gradient[block].mul_(self.gain[block]), self.sigmoid[block]
            h = (sigmoid * STRETCH).add_(SHIFT)
            if on:
                part.sub_(_rounding_slope(h, beta).mul_(2.0 * beta * strength))
            clipped = torch.ne(h.clamp(0.0, 1.0), h, out=torch.empty_like(h))
            slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1.0).mul_(STRETCH)
            part.mul_(slope.mul_(clipped.neg_().add_(1.0)))


def _rounding_slope(h: Tensor, beta: float | Tensor) -> Tensor:
    """|2h - 1|^(beta - 1) sign(2h - 1), with h taken into [0, 1]."""
    signed = h.clamp(0.0, 1.0).mul_(2.0).sub_(1.0)
    return signed.abs().pow_(beta - 1.0).copysign_(signed)


def _gradient(quantizer: WeightQuantizer) -> Tensor:
    assert quantizer.soft is not None
    found = quantizer.soft.grad
    return (torch.zeros_like(quantizer.soft) if found is None else found).flatten()


def _base_and_gain(quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    around, scale = quantizer.around, quantizer.spread_scale()
    assert around is not None
    return (around.lower * scale).flatten(), ((around.upper - around.lower) * scale).flatten()
