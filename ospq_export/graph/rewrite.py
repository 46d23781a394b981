"""Edits of a captured graph that keep every node's fake value and provenance, and a tap that looks at its values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def call_functions(graph: fx.Graph) -> Iterator[fx.Node]:
    """The operator calls, as a copy that survives edits of the graph."""
    return (node for node in list(graph.nodes) if node.op == "call_function")


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Let `new` take the place and the provenance of `old`."""
    for key in ("val", "module_stack", "module_path"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def insert_call(before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """Insert a call with the module path of `like`; its fake value is computed from the arguments' fake values."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    node.meta["module_stack"], node.meta["module_path"] = like.meta["module_stack"], like.meta["module_path"]
    fake = fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*fake)
    return node


def constant_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a get_attr node reads."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is not a tensor")
    return value.detach()


def add_constant(module: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """Register a buffer "folded.<name>" and a get_attr node for it ahead of `before`; a name that is taken gets a number."""
    if not hasattr(module, "folded"):
        module.add_module("folded", torch.nn.Module())
    name = _free_name(module.folded, name)
    module.folded.register_buffer(name, value.clone().contiguous())  # type: ignore[union-attr]
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(f"folded.{name}")
    fake = before.meta.get("val")
    mode = getattr(fake, "fake_mode", None)
    node.meta["val"] = mode.from_tensor(value) if mode is not None else value
    node.meta["module_stack"], node.meta["module_path"] = (
        before.meta["module_stack"],
        before.meta["module_path"],
    )
    return node


def _free_name(holder: object, name: str) -> str:
    """`name`, or the first of "name_1", "name_2", ... that is free: one weight in two places may become two constants."""
    count, free = 0, name
    while hasattr(holder, free):
        count += 1
        free = f"{name}_{count}"
    return free


OnValue = Callable[["Tap", fx.Node, Any], Any]
"""Tap, node, value -> None, or the value that the rest of the graph sees in its place."""


class Tap(fx.Interpreter):
    """Runs a graph and hands over the values of chosen nodes as they are computed."""

    def __init__(self, module: fx.GraphModule, watched: Mapping[fx.Node, OnValue]) -> None:
        """Choose what to look at.

        Args:
            module: whose nodes are watched.
            watched: what is called with the value of each node.
        """
        super().__init__(module)
        self.watched = watched

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator; a value that its watcher returns takes the place of its own."""
        result = super().run_node(n)
        watch = self.watched.get(n)
        given = None if watch is None else watch(self, n, result)
        return result if given is None else given


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
