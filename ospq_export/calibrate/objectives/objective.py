"""Each slice's objective: the recipe's loss with the weights that it needs, found from the graph and the float network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ospq_export.calibrate.cost import kept_bytes_per_image
from ospq_export.calibrate.objectives.losses import Objective, channel_weight, class_logits
from ospq_export.calibrate.reconstruct.reconstructor import weight_quantizers
from ospq_export.calibrate.reconstruct.walk import MakeObjective
from ospq_export.graph.capture import QUANTIZABLE
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.slicing import Slice
from ospq_export.recipes import Reconstruction

aten = torch.ops.aten
_FISHER_BATCH = 32
# Autograd keeps the whole network's activations of a batch: of large networks at large sizes the batch is smaller.
_FISHER_BYTES = 1 << 30
# What the classifier does not look at still has to look roughly like itself to what comes between.
_FISHER_FLOOR = 0.05


def objectives(
    network: QuantizedGraph,
    slices: Sequence[Slice],
    images: Tensor,
    settings: Reconstruction,
    device: torch.device,
    seed: int,
    fisher: Mapping[str, Tensor] | None = None,
) -> MakeObjective:
    """What `walk` asks for each slice's objective.

    Args:
        network: observed.
        slices: its slicing.
        images: float32 (N, C, H, W): for the Fisher weights, where the recipe's loss has them.
        settings: the recipe's.
        device: where the network lies.
        seed: of the labels that the Fisher information is sampled with.
        fisher: the Fisher weights at all slices' ends, where they are at hand already.
    """
    nodes = {n.name: n for n in network.module.graph.nodes}
    if settings.loss == "fisher" and fisher is None:
        ends = [s.end for s in slices]
        fisher = fisher_weights(network, ends, images, device, seed, settings.fisher_temperature)

    def make(index: int, piece: fx.GraphModule, target: Tensor) -> Objective:
        last = index == len(slices) - 1
        weight = None
        if settings.loss == "channel":
            weight = channel_weight(target, channel_axis(nodes[slices[index].end])).to(device)
        elif settings.loss == "fisher" and fisher is not None:
            weight = fisher[slices[index].end]
        return Objective(
            settings,
            weight_quantizers(piece),
            weight=None if last else weight,
            kl=last and settings.final_loss == "kl",
        )

    return make


def channel_axis(node: fx.Node) -> int:
    """The dimension of a tensor that holds channels: 1 where the next quantizable operator is a convolution, else the last."""
    if node.meta["val"].dim() != 4:
        return -1
    seen, queue = {node}, [node]
    while queue:
        current = queue.pop(0)
        if current is not node and current.target in QUANTIZABLE:
            return 1 if current.target is aten.conv2d.default else -1
        fresh = [user for user in current.users if user not in seen]
        seen.update(fresh)
        queue += fresh
    return -1


def fisher_weights(
    network: QuantizedGraph,
    ends: Collection[str],
    images: Tensor,
    device: torch.device,
    seed: int,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of the tensors at cut points: the squared gradient of the log-likelihood of sampled labels.

    BRECQ (Li et al. 2021, eq. 10) weighs each image's error by its own squared gradient; ours is the mean over the calibration
    images, so that one pass over the network serves all slices and no gradient is stored per image. Held above a twentieth of
    its mean. Of a network that is sure of most images, the few others make up nearly all of that mean, which then is chance;
    softened logits let more images speak (ours; docs/settings.md has the figures). The labels of a network with one output are
    Bernoulli, of its sigmoid.

    Args:
        network: any mode; left in Mode.FLOAT.
        ends: names of the cut points, from slices' ends.
        images: float32 (N, C, H, W).
        device: where the network lies.
        seed: of the sampled labels.
        temperature: divides the logits.

    Returns:
        By cut point float32 (1, ...) of mean one, which broadcasts with the tensor there.
    """
    generator = torch.Generator().manual_seed(seed)
    network.set_mode(Mode.FLOAT)
    sums: dict[str, Tensor | float] = dict.fromkeys(ends, 0.0)
    most = _FISHER_BYTES // max(1, kept_bytes_per_image(network.module.graph))
    for batch in images.split(max(1, min(_FISHER_BATCH, most))):
        keeper = _Keeper(network.module, sums)
        logits = class_logits(keeper.run(batch.to(device).requires_grad_(True)) / temperature)
        labels = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)
        F.cross_entropy(logits, labels.squeeze(1).to(device), reduction="sum").backward()
        for name, tensor in keeper.kept.items():
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            sums[name] = sums[name] + gradient.square().sum(0, keepdim=True)
    weights = {name: torch.as_tensor(s) for name, s in sums.items()}
    return {name: (w / w.mean().clamp_min(1e-30)).clamp_min(_FISHER_FLOOR) for name, w in weights.items()}


class _Keeper(fx.Interpreter):
    """Runs a graph and keeps the named tensors, whose gradients autograd is to keep as well."""

    def __init__(self, module: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(module)
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            result.retain_grad()
            self.kept[n.name] = result
        return result
