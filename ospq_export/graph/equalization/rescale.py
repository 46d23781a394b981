"""Function-preserving changes of a captured graph's constants: factors and shifts of channels (see `channels`)."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ospq_export.graph.equalization.sites import Consumer, Site, parameter

aten = torch.ops.aten


def weight_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The buffer that is the weight of a linear, convolution or layer_norm node; writing to it changes the network."""
    node_of_weight = parameter(node, 2 if node.target is aten.layer_norm.default else 1)
    assert node_of_weight is not None
    return module.get_buffer(str(node_of_weight.target))


def bias_of(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The buffer that is the bias, or None where there is none."""
    node_of_bias = parameter(node, 3 if node.target is aten.layer_norm.default else 2)
    return None if node_of_bias is None else module.get_buffer(str(node_of_bias.target))


def column_values(values: Tensor, consumer: Consumer, neutral: float) -> Tensor:
    """Per-channel values of a producer as values per input channel of a consumer; `neutral` where no channel arrives."""
    columns = consumer.columns.to(values.device)
    picked = values[columns.clamp_min(0)]
    return torch.where(columns >= 0, picked, torch.full_like(picked, neutral))


def scaled_weight(weight: Tensor, factors: Tensor) -> Tensor:
    """A consumer's weight (out, in, ...) with its input channels multiplied by factors (in,); float64."""
    return weight.double() * factors.double().reshape(1, -1, *[1] * (weight.dim() - 2))


@torch.no_grad()
def rescale(module: fx.GraphModule, site: Site, scale: Tensor, shift: Tensor | None = None) -> None:
    """Divide a site's channels by `scale`, after taking `shift` off them, and undo both in the consumers; in place.

    Exact up to float32 rounding of the constants: producer' = (producer - shift) / scale, W' = W * scale, b' = b + W shift.

    Args:
        module: the captured graph that the site was found in, or one that shares its constants.
        site: from `find_sites`.
        scale: float (channels,), positive; 1 where the channel is not free.
        shift: float (channels,), in the units of the channels; 0 where the channel is not shiftable. None is no shift.

    Raises:
        ValueError: a scale is not positive, or a channel that must not move is moved.
    """
    scale = scale.detach().double()
    shift = torch.zeros_like(scale) if shift is None else shift.detach().double()
    free, shiftable = site.free.to(scale.device), site.shiftable.to(scale.device)
    if not bool((scale > 0).all()) or not bool(torch.isfinite(scale).all()):
        raise ValueError("scales must be positive and finite")
    if bool((scale[~free] != 1).any()) or bool((shift[~shiftable] != 0).any()):
        raise ValueError(
            f"{site.producer.name}: a channel that is read elsewhere cannot be rescaled or shifted"
        )
    for consumer in site.consumers:
        weight, bias = weight_of(module, consumer.node), bias_of(module, consumer.node)
        moved = column_values(shift, consumer, 0.0)
        if bool((moved != 0).any()):
            assert bias is not None
            correction = scaled_weight(weight, moved).flatten(1).sum(1)
            bias.copy_(bias.double() + correction)
        weight.copy_(scaled_weight(weight, column_values(scale, consumer, 1.0)))
    weight, bias = weight_of(module, site.producer), bias_of(module, site.producer)
    weight.copy_(weight.double() / scale.reshape(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        bias.copy_((bias.double() - shift) / scale)
