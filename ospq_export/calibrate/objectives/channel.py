"""Squared error per channel over its variance, so that outlier channels do not drown the rest (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.calibrate.objectives.base import Context
from ospq_export.calibrate.objectives.squared import Squared
from ospq_export.graph.capture import QUANTIZABLE

aten = torch.ops.aten


class PerChannel(Squared):
    """mean((output - target)^2 / var(channel)). Costs nothing beforehand."""

    @classmethod
    def weight_of(cls, context: Context, prepared: Any, index: int, target: Tensor) -> Tensor | None:
        """See `channel_weight`."""
        end = context.slices[index].end
        node = next(n for n in context.network.module.graph.nodes if n.name == end)
        return channel_weight(target, channel_axis(node)).to(context.device)


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
