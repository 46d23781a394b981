"""What a reconstruction is measured against: a plain loop of the papers' formulas, and the floor that its steps cannot beat."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from ospq_export.calibrate.reconstruct.activations import SliceData
from ospq_export.calibrate.reconstruct.graphed import Graphed
from ospq_export.formats.base import Format
from ospq_export.formats.integer import Integer
from ospq_export.formats.search import Levels
from ospq_export.graph.capture import QUANTIZABLE
from ospq_export.graph.quantizers import ActivationQuantizer, WeightQuantizer, own_quantizers
from ospq_export.recipes import Reconstruction


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Clock = Callable[[], float]


def best_seconds(
    function: Callable[[], object],
    device: torch.device,
    clock: Clock = time.perf_counter,
    seconds: float = 2.0,
) -> float:
    """Shortest time of one call within some seconds of calls."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        best = min(best, clock() - start)
    return best


@dataclass(frozen=True)
class Machine:
    """Best measured rates: float32 products in operations per second, copies in bytes per second (read plus written)."""

    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, device: torch.device, clock: Clock = time.perf_counter) -> Machine:
        """Time products of three sizes, and copies of a tensor too large for most caches."""
        rates = []
        for size in (512, 1024, 2048):
            a = torch.randn(size, size, device=device)
            b, c = torch.randn_like(a), torch.empty_like(a)
            product = partial(torch.mm, a, b, out=c)
            rates.append(2.0 * size**3 / best_seconds(product, device, clock))
        source = torch.randn(1 << 24, device=device)
        target = source.clone()
        copy = best_seconds(lambda: target.copy_(source), device, clock)
        return cls(max(rates), 2.0 * source.numel() * source.element_size() / copy)


@dataclass(frozen=True)
class Work:
    """What one step has to do: floating-point operations, and bytes that cross memory."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """The floor."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


def unrecorded(step: Callable[[SliceData], Tensor]) -> Callable[[SliceData], Tensor]:
    """The step behind a recorded one: in the replay of a CUDA graph there is nothing to be counted."""
    return step.step if isinstance(step, Graphed) else step


def work_of(
    piece: fx.GraphModule, inputs: tuple[Tensor, ...], step: Callable[[], object], weights: int
) -> Work:
    """Count one step.

    Args:
        piece: the slice.
        inputs: a batch of its input, and how many images it has.
        step: does one whole step with such a batch.
        weights: elements of V.
    """
    traffic = _Traffic(piece)
    with torch.no_grad():
        traffic.run(*inputs)
    with FlopCounterMode(display=False) as counter:
        step()
    adam = 4.0 * 7 * weights  # V, its gradient and both moments are read; V and both moments are written
    return Work(float(counter.get_total_flops()), 3.0 * traffic.bytes + adam)


class _Traffic(fx.Interpreter):
    """Adds up the bytes of the operands and results of the quantizable operators."""

    bytes = 0.0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in QUANTIZABLE:
            operands: Any = self.map_nodes_to_values(n.args[:2], n)
            tensors = [t for t in (*operands, result) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def round_through(x: Tensor) -> Tensor:
    """Round with the straight-through estimator."""
    return (x.round() - x).detach() + x


def levels_of(format_: Format) -> Levels:
    """The levels of an integer format."""
    assert isinstance(format_, Integer)
    return format_.levels


class PlainActivation(nn.Module):
    """LSQ: a learned scale; QDrop: elements are left float at random."""

    def __init__(self, source: ActivationQuantizer, settings: Reconstruction) -> None:
        super().__init__()
        self.initial = source.scale.clone()
        self.logarithmic = settings.scale_parametrization == "logarithmic"
        self.delta = nn.Parameter(torch.zeros_like(self.initial))
        self.offset = None if source.used_offset is None else source.used_offset.clone()
        self.lo, self.hi, self.drop = (
            levels_of(source.format).lo,
            levels_of(source.format).hi,
            settings.drop_probability,
        )

    def scale(self) -> Tensor:
        """The learned scale."""
        return self.initial * self.delta.exp() if self.logarithmic else self.initial + self.delta

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize, and leave elements float at random."""
        scale = self.scale()
        shifted = x if self.offset is None else x - self.offset
        real = torch.clamp(round_through(shifted / scale), self.lo, self.hi) * scale
        real = real if self.offset is None else real + self.offset
        return torch.where(torch.rand_like(x) < self.drop, x, real) if self.drop > 0 else real


class PlainWeight(nn.Module):
    """AdaRound: round down, plus a rectified sigmoid of V."""

    def __init__(self, source: WeightQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.scale = source.scale.reshape(-1, *[1] * (weight.dim() - 1)).clone()
        self.lo, self.hi = levels_of(source.format).lo, levels_of(source.format).hi
        rest = weight / self.scale - torch.floor(weight / self.scale)
        self.v = nn.Parameter(-torch.log(1.2 / (rest + 0.1) - 1.0))

    def h(self) -> Tensor:
        """AdaRound, equation 23."""
        return torch.clamp(torch.sigmoid(self.v) * 1.2 - 0.1, 0.0, 1.0)

    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight."""
        return self.scale * torch.clamp(torch.floor(weight / self.scale) + self.h(), self.lo, self.hi)


class PlainLoop:
    """Reconstruction of a copy of a slice, step by step.

    Attributes:
        losses: normalised reconstruction loss of every step.
    """

    def __init__(
        self,
        piece: fx.GraphModule,
        data: SliceData,
        settings: Reconstruction,
        normaliser: float,
        device: torch.device,
    ) -> None:
        self.data, self.settings, self.normaliser, self.device = data, settings, normaliser, device
        own = set(own_quantizers(piece))
        self.piece = copy.deepcopy(piece)
        self.weights: list[PlainWeight] = []
        self.activations: list[PlainActivation] = []
        for name, module in piece.named_modules():
            if module in own:
                self._replace(name, module)
        self.losses: list[Tensor] = []
        self.adam_v = torch.optim.Adam([w.v for w in self.weights], lr=settings.learning_rate_rounding)
        self.adam_scale = torch.optim.Adam(
            [a.delta for a in self.activations], lr=settings.learning_rate_scale
        )
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam_scale, settings.iterations)
        self.elements = sum(w.v.numel() for w in self.weights)

    def _replace(self, name: str, module: nn.Module) -> None:
        plain: PlainWeight | PlainActivation
        if isinstance(module, WeightQuantizer):
            plain = PlainWeight(module, self.piece.get_buffer(module.constant))
            self.weights.append(plain)
        else:
            assert isinstance(module, ActivationQuantizer)
            plain = PlainActivation(module, self.settings)
            self.activations.append(plain)
        self.piece.set_submodule(name, plain)

    def _beta(self, step: int) -> float | None:
        settings = self.settings
        start = settings.warm_up * settings.iterations
        if step < start:
            return None
        done = (step - start) / max(1.0, settings.iterations - start)
        return settings.beta_start + (settings.beta_end - settings.beta_start) * done

    def step(self, index: int) -> None:
        """Draw a batch, mix its input, run, differentiate, descend."""
        picks = torch.randperm(self.data.images)[: self.settings.batch_size]
        original = self.data.float_input[0][picks].to(self.device)
        quantized = self.data.quantized_input[0][picks].to(self.device)
        target = self.data.target[picks].to(self.device)
        mixed = torch.where(torch.rand_like(original) < self.settings.drop_probability, original, quantized)
        output = self.piece(mixed, len(picks))
        loss = (output - target).pow(2).mean() / self.normaliser
        total, beta = loss, self._beta(index)
        if beta is not None:
            for weight in self.weights:
                term = (1.0 - (2.0 * weight.h() - 1.0).abs().pow(beta)).sum()
                total = total + self.settings.rounding_weight / self.elements * term
        self.adam_v.zero_grad()
        self.adam_scale.zero_grad()
        total.backward()
        self.adam_v.step()
        self.adam_scale.step()
        self.cosine.step()
        self.losses.append(loss.detach())

    def hardened_loss(self) -> float:
        """Normalised loss over all images with weights rounded for good and every activation quantized."""
        for weight in self.weights:
            weight.v.data = torch.where(weight.v.data >= 0.0, math.inf, -math.inf)
        for activation in self.activations:
            activation.drop = 0.0
        total, batch = 0.0, self.settings.batch_size
        with torch.no_grad():
            for start in range(0, self.data.images, batch):
                target = self.data.target[start : start + batch].to(self.device)
                output = self.piece(
                    self.data.quantized_input[0][start : start + batch].to(self.device), len(target)
                )
                total += float((output - target).pow(2).mean()) * len(target)
        return total / self.data.images / self.normaliser
