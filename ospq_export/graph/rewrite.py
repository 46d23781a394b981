"""Edits of a captured graph that keep every node's fake value and provenance, and a tap that looks at its values."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.errors import InputError

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def unsupported(node: fx.Node, detail: str) -> InputError:
    """What is raised of an operator that has no canonical form; `detail` goes on after "cannot be"."""
    return InputError(
        f"operator {node.target} cannot be {detail}",
        where=f"module {node.meta.get('module_path') or '(root)'}",
        fix="this model is not supported",
    )


def argument(node: fx.Node, index: int, default: Any = None) -> Any:
    """An operator's positional argument, or its default where the call leaves it out."""
    return node.args[index] if len(node.args) > index else default


def parameter(node: fx.Node, index: int) -> fx.Node | None:
    """The constant that is argument `index` of an operator; None where it is absent or computed."""
    value = argument(node, index)
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def is_padded(conv: fx.Node) -> bool:
    """Whether a convolution adds zeros at the edges."""
    padding = argument(conv, 4, 0)
    return any(p != 0 for p in (padding if isinstance(padding, list | tuple) else [padding]))


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


def insert_call(before: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Insert a call with the module path of `before`; its fake value is computed from the arguments' fake values."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    fake = fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta.update(_provenance(before), val=target(*fake))
    return node


def _provenance(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("module_stack", "module_path")}


def constant_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a get_attr node reads."""
    value = operator.attrgetter(str(node.target))(module)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is not a tensor")
    return value.detach()


def add_constant(module: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """Register a buffer "folded.<name>" and a get_attr node for it ahead of `before`; a name that is taken gets a number."""
    if not hasattr(module, "folded"):
        module.add_module("folded", torch.nn.Module())
    # One weight in two places may become two constants.
    names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    name = next(free for free in names if not hasattr(module.folded, free))
    module.folded.register_buffer(name, value.clone().contiguous())  # type: ignore[union-attr]
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(f"folded.{name}")
    mode = getattr(before.meta.get("val"), "fake_mode", None)
    node.meta.update(_provenance(before), val=mode.from_tensor(value) if mode is not None else value)
    return node


OnValue = Callable[["Tap", fx.Node, Any], Any]
"""Tap, node, value -> None, or the value that the rest of the graph sees in its place."""


class Tap(fx.Interpreter):
    """Runs a graph and hands over the values of chosen nodes, as they are computed, to what `watched` has for each."""

    def __init__(self, module: fx.GraphModule, watched: Mapping[fx.Node, OnValue]) -> None:
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
        is_norm = node.target is aten._native_batch_norm_legit_no_training.default
        if is_norm and (producer := _producer(node)) is not None:
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
    if not isinstance(node, fx.Node) or len(node.users) != 1 or parameter(node, 1) is None:
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
    bias = _channel_values(module, argument(producer, 2))
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
