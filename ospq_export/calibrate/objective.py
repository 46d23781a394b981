"""Each slice's objective: the recipe's loss with the weights that it needs, found from the graph and the float network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ospq_export.calibrate.losses import Objective, channel_weight
from ospq_export.calibrate.reconstruct import weight_quantizers
from ospq_export.calibrate.walk import MakeObjective
from ospq_export.graph.capture import QUANTIZABLE
from ospq_export.graph.quantizers import Mode, QuantizedGraph, set_mode
from ospq_export.graph.slicing import Slice, extract, run_slice
from ospq_export.recipes import Reconstruction

aten = torch.ops.aten
_FISHER_BATCH = 32
# What the classifier does not look at still has to look roughly like itself to what comes between.
_FISHER_FLOOR = 0.05


def objectives(
    network: QuantizedGraph,
    slices: Sequence[Slice],
    images: Tensor,
    settings: Reconstruction,
    device: torch.device,
    seed: int,
) -> MakeObjective:
    """What `walk` asks for each slice's objective.

    Args:
        network: observed.
        slices: its slicing.
        images: float32 (N, C, H, W): for the Fisher weights, where the recipe's loss has them.
        settings: the recipe's.
        device: where the network lies.
        seed: of the labels that the Fisher information is sampled with.
    """
    nodes = {n.name: n for n in network.module.graph.nodes}
    fisher = None
    if settings.loss == "fisher":
        fisher = fisher_weights(network, slices, images, device, seed)

    def make(index: int, piece: fx.GraphModule, target: Tensor) -> Objective:
        last = index == len(slices) - 1
        weight = None
        if settings.loss == "channel":
            weight = channel_weight(target, channel_axis(nodes[slices[index].end])).to(device)
        elif fisher is not None:
            weight = fisher[index]
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
    network: QuantizedGraph, slices: Sequence[Slice], images: Tensor, device: torch.device, seed: int
) -> list[Tensor]:
    """Diagonal Fisher information of every slice's output: the squared gradient of the log-likelihood of sampled labels.

    BRECQ (Li et al. 2021, eq. 10) weighs each image's error by its own squared gradient; ours is the mean over the calibration
    images, so that one pass over the network serves all slices and no gradient is stored per image. Held above a twentieth of
    its mean.

    Args:
        network: any mode; left in Mode.FLOAT.
        slices: a slicing of the network.
        images: float32 (N, C, H, W).
        device: where the network lies.
        seed: of the sampled labels.

    Returns:
        Per slice float32 (1, ...) of mean one, which broadcasts with the slice's output.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = [extract(network.module, s) for s in slices]
    set_mode(network.module, Mode.FLOAT)
    sums: list[Tensor | float] = [0.0] * len(pieces)
    for batch in images.split(_FISHER_BATCH):
        tensors: tuple[Tensor, ...] = (batch.to(device).requires_grad_(True),)
        ends = []
        for piece in pieces:
            tensors = run_slice(piece, tensors, len(batch))
            tensors[0].retain_grad()
            ends.append(tensors[0])
        labels = torch.multinomial(ends[-1].detach().cpu().softmax(-1), 1, generator=generator)
        F.cross_entropy(ends[-1], labels.squeeze(1).to(device), reduction="sum").backward()
        for index, end in enumerate(ends):
            gradient = torch.zeros_like(end) if end.grad is None else end.grad
            sums[index] = sums[index] + gradient.square().sum(0, keepdim=True)
    weights = [torch.as_tensor(s) for s in sums]
    return [(w / w.mean().clamp_min(1e-30)).clamp_min(_FISHER_FLOOR) for w in weights]
