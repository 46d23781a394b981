"""The optimisation loop of one slice: what does not change is computed once, what changes is computed in few passes.

AdaRound's V, LSQ's scales and QDrop's random choices are those of `losses` and `graph.quantize`. What is ours is how a step is
computed: soft weights and the gradient of V in closed form over one flat tensor, fake quantization in blocks, one fused Adam,
and no value that the host waits for between two looks at the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from ospq_export.calibrate.activations import SliceData
from ospq_export.calibrate.batches import Batches
from ospq_export.calibrate.losses import Objective, annealed_beta
from ospq_export.calibrate.rounding import SoftRounding
from ospq_export.calibrate.world import SOLO, World
from ospq_export.graph import quantize as q
from ospq_export.graph.quantizers import (
    ActivationQuantizer,
    Mode,
    WeightQuantizer,
    own_quantizers,
    set_mode,
)
from ospq_export.graph.slicing import run_slice
from ospq_export.recipes import Reconstruction

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
        self.optimizer = self._adam()
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

    def _adam(self) -> torch.optim.Adam | None:
        """One Adam: V at a constant rate, the scales with cosine decay (QDrop)."""
        groups = []
        if self.rounding is not None:
            groups.append(
                {"params": [self.rounding.v], "lr": self.rate * self.settings.learning_rate_rounding}
            )
        if self.scales:
            groups.append({"params": self.scales, "lr": self.rate * self.settings.learning_rate_scale})
        return torch.optim.Adam(groups, fused=True) if groups else None

    def step(self, index: int) -> bool:
        """One optimisation step; False where the loss is looked at and has diverged."""
        inputs, target, images = self._batch()
        if self.rounding is not None:
            self.rounding.refresh()
        loss = self.objective.reconstruction(run_slice(self.piece, inputs, images)[0], target)
        if loss.requires_grad:
            torch.autograd.backward(loss)
        self._descend(index)
        last = index + 1 == self.settings.iterations
        if index % self.every and not last:
            return True
        seen = loss.detach().clone()
        self.world.average([seen])
        return self._look(index, float(seen), keep=index % self.every == 0)

    def _look(self, index: int, loss: float, *, keep: bool) -> bool:
        if keep:
            self.losses.append(loss)
        # Soft rounding begins at the float weights: where no input is quantized or dropped, its first loss is all but zero.
        start = max(self.losses[0], self.objective.before, 1e-12)
        if math.isfinite(loss) and loss <= DIVERGED * start:
            return True
        self.diverged_at = index
        return False

    def _descend(self, index: int) -> None:
        if self.rounding is not None:
            beta = annealed_beta(index, self.settings)
            strength = 0.0 if beta is None else self.objective.rounding_weight
            self.rounding.collect(strength, beta or 2.0, self.world)
        if self.optimizer is None:
            return
        self.world.average([s.grad for s in self.scales if s.grad is not None])
        if self.scales:
            decay = 0.5 * (1.0 + math.cos(math.pi * index / self.settings.iterations))
            self.optimizer.param_groups[-1]["lr"] = self.rate * self.settings.learning_rate_scale * decay
        self.optimizer.step()
        for scale in self.scales:
            scale.grad = None

    def _batch(self) -> tuple[list[Tensor], Tensor, int]:
        """A random batch whose input mixes quantized and float elements (QDrop), its target, and how many images it has."""
        part = self.batches.next()
        pairs = zip(part.quantized_input, part.float_input, strict=True)
        inputs = [q.mix(quantized, original, self.settings.drop_probability) for quantized, original in pairs]
        return inputs, part.target, part.images

    def settle(self) -> None:
        """Harden: the quantizers hold integer codes and constant scales afterwards."""
        self.batches.close()
        for quantizer in self.own:
            quantizer.settle()
