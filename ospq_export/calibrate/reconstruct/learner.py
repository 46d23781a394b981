"""The optimisation loop of one slice: what does not change is computed once, what changes is computed in few passes.

AdaRound's V, LSQ's scales and QDrop's random choices are those of `rounding` and `formats.kernels`. What is ours is how a step is
computed: soft weights and the gradient of V in closed form over one flat tensor, fake quantization in blocks, one fused Adam,
and no value that the host waits for between two looks at the loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ospq_export.calibrate.objectives.base import Objective
from ospq_export.calibrate.reconstruct.activations import Batches, SliceData
from ospq_export.calibrate.reconstruct.graphed import Graphed, Step
from ospq_export.calibrate.reconstruct.rounding import SoftRounding, annealed_beta
from ospq_export.formats.kernels import mix
from ospq_export.graph.quantizers import ActivationQuantizer, Mode, WeightQuantizer, own_quantizers, set_mode
from ospq_export.graph.slicing import run_slice
from ospq_export.recipes import Reconstruction
from ospq_export.world.processes import SOLO, World

# Between the generators of processes that share a slice: what they drop must not be alike.
_SEEDS_APART = 7_919_000_003
LOOKS = 50
"""How often, at most, the host looks at the loss in one slice."""
DIVERGED = 1000.0
"""Growth of the loss, over its first value and over that of nearest rounding, that counts as divergence."""


class Learner:
    """Learns the rounding and the scales of one slice, step by step.

    Attributes:
        losses: reconstruction loss at the steps that were looked at.
        diverged_at: the step at which learning was given up; None while all is well.
    """

    def __init__(
        self,
        piece: fx.GraphModule,
        data: SliceData,
        objective: Objective,
        settings: Reconstruction,
        device: torch.device,
        rate: float = 1.0,
        world: World = SOLO,
    ) -> None:
        """Make the slice's quantizers learnable.

        Args:
            piece: from `extract`; its weight quantizers hold nearest codes, its activation quantizers ranges.
            data: inputs and target on all calibration images.
            objective: what to lower, normalised.
            settings: from the recipe.
            device: where the slice runs.
            rate: what both learning rates are multiplied by.
            world: who shares the batches; all have drawn the same random numbers so far.
        """
        self.piece, self.objective, self.settings = piece, objective, settings
        self.rate, self.world = rate, world
        # Of a generator of its own: the next batch can be fetched while this step draws what it drops.
        self.batches = Batches(data, settings.batch_size, device, int(torch.randint(2**62, ())), world)
        if world.rank > 0:
            torch.manual_seed(torch.initial_seed() + _SEEDS_APART * world.rank)
        self.losses: list[float] = []
        self.diverged_at: int | None = None
        self.every = max(1, settings.iterations // LOOKS)
        self.own = own_quantizers(piece)
        weights = [m for m in self.own if isinstance(m, WeightQuantizer)]
        self.rounding = SoftRounding(piece, weights) if weights else None
        self.scales = self._start_scales()
        # A recorded step reads what changes from step to step out of the device's memory; elsewhere numbers are cheaper.
        recorded = device.type == "cuda" and world.size == 1
        start: Callable[[float], float | Tensor] = partial(torch.tensor, device=device) if recorded else float
        self.strength, self.beta = start(0.0), start(2.0)
        self.optimizer = self._adam(start(rate * settings.learning_rate_scale), recorded=recorded)
        self.learn: Step = Graphed(self._learn) if recorded else self._learn
        set_mode(piece, Mode.LEARN)

    def _start_scales(self) -> list[nn.Parameter]:
        settings = self.settings
        logarithmic = settings.scale_parametrization == "logarithmic"
        found: list[nn.Parameter] = []
        for quantizer in self.own:
            if isinstance(quantizer, ActivationQuantizer):
                found += quantizer.start_learning(logarithmic=logarithmic, offsets=settings.learn_offsets)
                quantizer.drop_probability = settings.drop_probability
        return found

    def _adam(self, scale_rate: float | Tensor, *, recorded: bool) -> torch.optim.Adam | None:
        """One Adam: V at a constant rate, the scales with cosine decay (QDrop)."""
        groups: list[dict[str, Any]] = []
        if self.rounding is not None:
            groups.append(
                {"params": [self.rounding.v], "lr": self.rate * self.settings.learning_rate_rounding}
            )
        if self.scales:
            groups.append({"params": self.scales, "lr": scale_rate})
        return torch.optim.Adam(groups, fused=True, capturable=recorded) if groups else None

    def step(self, index: int) -> bool:
        """One optimisation step; False where the loss is looked at and has diverged."""
        self._anneal(index)
        loss = self.learn(self.batches.next())
        if index % self.every and index + 1 < self.settings.iterations:
            return True
        averaged = loss.clone()
        self.world.average([averaged])
        seen = float(averaged)
        if index % self.every == 0:
            self.losses.append(seen)
        # Soft rounding begins at the float weights: where no input is quantized or dropped, its first loss is all but zero.
        start = max(self.losses[0], self.objective.before, 1e-12)
        if math.isfinite(seen) and seen <= DIVERGED * start:
            return True
        self.diverged_at = index
        return False

    def _anneal(self, index: int) -> None:
        """Set what depends on the step: the rounding term's weight and exponent, and the rate of the scales."""
        beta = annealed_beta(index, self.settings)
        self.strength = _put(self.strength, 0.0 if beta is None else self.objective.rounding_weight)
        self.beta = _put(self.beta, beta or 2.0)
        if self.optimizer is not None and self.scales:
            decay = 0.5 * (1.0 + math.cos(math.pi * index / self.settings.iterations))
            group = self.optimizer.param_groups[-1]
            group["lr"] = _put(group["lr"], self.rate * self.settings.learning_rate_scale * decay)

    def _learn(self, part: SliceData) -> Tensor:
        """Forward, backward and one step of Adam on a batch whose input mixes quantized and float elements (QDrop)."""
        pairs = zip(part.quantized_input, part.float_input, strict=True)
        inputs = [mix(quantized, original, self.settings.drop_probability) for quantized, original in pairs]
        if self.rounding is not None:
            self.rounding.refresh()
        with arithmetic(self.settings.precision, part.target.device):
            outputs = run_slice(self.piece, inputs, part.images)
        loss = self.objective.reconstruction([output.to(part.target.dtype) for output in outputs], part)
        if loss.requires_grad:
            torch.autograd.backward(loss)
        self._descend()
        return loss.detach()

    def _descend(self) -> None:
        if self.rounding is not None:
            self.rounding.collect(self.strength, self.beta, self.world)
        if self.optimizer is None:
            return
        self.world.average([s.grad for s in self.scales if s.grad is not None])
        self.optimizer.step()
        for scale in self.scales:
            scale.grad = None

    def settle(self) -> None:
        """Harden: the quantizers hold integer codes and constant scales afterwards."""
        self.batches.close()
        if isinstance(self.learn, Graphed):
            self.learn.release()
        for quantizer in self.own:
            quantizer.settle()


def _put(held: float | Tensor, value: float) -> float | Tensor:
    """The value, in the tensor that holds it where there is one."""
    return held.fill_(value) if isinstance(held, Tensor) else value


@contextlib.contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """How a slice's products are computed: in float32; with tf32's or bf16's factors and float32's sums.

    Args:
        precision: a recipe's `reconstruction.precision`.
        device: where; tf32 is float32 on a device that lacks it.
    """
    if precision == "bf16":
        # The cache would outlive a recorded step.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
