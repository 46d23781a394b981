"""Folding of inference BatchNorm into the convolution or linear before it."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ospq_export.graph.rewrite import VIEWS, add_constant, call_functions, constant_of, replace_node

aten = torch.ops.aten


def fold_batch_norm(module: fx.GraphModule) -> None:
    """Fold each BatchNorm whose input is used by it alone; the others stay, exact, as float operators.

    W' = W * g / sqrt(var + eps) per output channel, b' = (b - mean) * g / sqrt(var + eps) + beta, in float64.
    """
    for node in call_functions(module.graph):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        producer = _producer(node)
        if producer is not None:
            _fold(module, producer, node)


def _producer(norm: fx.Node) -> fx.Node | None:
    """The conv2d or linear that feeds `norm` alone, looking through views that keep a linear's channels last."""
    node = norm.args[0]
    through_view = False
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.target in VIEWS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.meta["val"].shape[-1] != source.meta["val"].shape[-1]:
            return None
        node, through_view = source, True
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    weight = node.args[1] if len(node.args) > 1 else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if node.target is aten.conv2d.default and not through_view:
        return node
    channels_last = norm.meta["val"][0].dim() == 2
    return node if node.target is aten.linear.default and channels_last else None


def _fold(module: fx.GraphModule, producer: fx.Node, norm: fx.Node) -> None:
    gamma, beta, mean, variance = (_channel_values(module, arg) for arg in norm.args[1:5])
    epsilon = float(norm.args[6])  # type: ignore[arg-type]
    weight_node = producer.args[1]
    assert isinstance(weight_node, fx.Node) and mean is not None and variance is not None
    weight = constant_of(module, weight_node).double()
    bias = _channel_values(module, producer.args[2] if len(producer.args) > 2 else None)
    factor = (variance + epsilon).rsqrt() * (1.0 if gamma is None else gamma)
    folded_bias = ((0.0 if bias is None else bias) - mean) * factor + (0.0 if beta is None else beta)
    folded_weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    path = str(weight_node.target).removesuffix(".weight").replace(".", "_")
    new_weight = add_constant(module, f"{path}_weight", folded_weight.float(), producer)
    new_bias = add_constant(module, f"{path}_bias", folded_bias.float(), producer)
    producer.args = (producer.args[0], new_weight, new_bias, *producer.args[3:])
    for user in list(norm.users):
        if user.target is operator.getitem and user.args[1] == 0:
            source = norm.args[0]
            assert isinstance(source, fx.Node)
            replace_node(user, source)


def _channel_values(module: fx.GraphModule, node: object) -> Tensor | None:
    return constant_of(module, node).double() if isinstance(node, fx.Node) else None
