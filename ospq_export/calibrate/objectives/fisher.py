"""Squared error weighed by Fisher information: what moves the network's output counts (BRECQ, Li et al. 2021, eq. 10)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.calibrate.cost import kept_bytes_per_image
from ospq_export.calibrate.objectives.base import Context
from ospq_export.calibrate.objectives.squared import Squared
from ospq_export.graph.outputs import as_tuple
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.rewrite import Tap
from ospq_export.recipes import FisherLoss
from ospq_export.tasks.base import Task
from ospq_export.tasks.classify import CLASSIFY

_FISHER_BATCH = 32
# Autograd keeps the whole network's activations of a batch: of large networks at large sizes the batch is smaller.
_FISHER_BYTES = 1 << 30
# What the classifier does not look at still has to look roughly like itself to what comes between.
_FISHER_FLOOR = 0.05


class Fisher(Squared):
    """mean(F (output - target)^2), F the diagonal Fisher information of the slice's output; one pass over all images."""

    preparation = 1.0

    @classmethod
    def prepare(cls, context: Context) -> Mapping[str, Tensor]:
        """F at every slice's end; see `fisher_weights`."""
        c = context
        assert isinstance(c.settings.loss, FisherLoss)
        ends, temperature = [s.end for s in c.slices], c.settings.loss.temperature
        return fisher_weights(c.network, ends, c.images, c.device, c.seed, temperature, c.task)

    @classmethod
    def weight_of(cls, context: Context, prepared: Any, index: int, target: Tensor) -> Tensor | None:
        """F at the slice's end."""
        weight: Tensor = prepared[context.slices[index].end]
        return weight


def fisher_weights(
    network: QuantizedGraph,
    ends: Collection[str],
    images: Tensor,
    device: torch.device,
    seed: int,
    temperature: float = 1.0,
    task: Task = CLASSIFY,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of the tensors at cut points: the squared gradient of the log-likelihood of sampled labels.

    BRECQ (Li et al. 2021, eq. 10) weighs each image's error by its own squared gradient; ours is the mean over the calibration
    images, so that one pass over the network serves all slices and no gradient is stored per image. Held above a twentieth of
    its mean. Of a network that is sure of most images, the few others make up nearly all of that mean, which then is chance;
    softened logits let more images speak (ours; notes/results.md has the figures). The labels of a network with one output are
    Bernoulli, of its sigmoid.

    Args:
        network: any mode; left in Mode.FLOAT.
        ends: names of the cut points, from slices' ends.
        images: float32 (N, C, H, W).
        device: where the network lies.
        seed: of the sampled labels.
        temperature: divides the logits.
        task: what the network's output is.

    Returns:
        By cut point float32 (1, ...) of mean one, which broadcasts with the tensor there.
    """
    generator = torch.Generator().manual_seed(seed)
    network.set_mode(Mode.FLOAT)
    sums: dict[str, Tensor | float] = dict.fromkeys(ends, 0.0)
    most = _FISHER_BYTES // max(1, kept_bytes_per_image(network.module.graph))
    kept: dict[str, Tensor] = {}

    def keep(_tap: Tap, n: fx.Node, value: Tensor) -> None:
        value.retain_grad()
        kept[n.name] = value

    tap = Tap(network.module, {n: keep for n in network.module.graph.nodes if n.name in sums})
    for batch in images.split(max(1, min(_FISHER_BATCH, most))):
        output = tap.run(batch.to(device).requires_grad_(True))
        task.sampled_loss(as_tuple(output), generator, temperature).backward()
        for name, tensor in kept.items():
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            sums[name] = sums[name] + gradient.square().sum(0, keepdim=True)
        # The next batch has its own: no more than one lies in memory.
        kept.clear()
    weights = {name: torch.as_tensor(s) for name, s in sums.items()}
    return {name: (w / w.mean().clamp_min(1e-30)).clamp_min(_FISHER_FLOOR) for name, w in weights.items()}
