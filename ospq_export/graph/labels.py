"""The number of the channel that every element of a tensor belongs to, and what operators make of these numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.graph.rewrite import VIEWS, argument
from ospq_export.graph.sizes import is_size

aten = torch.ops.aten
_BATCH = 2
PADDING = -1  # the channel number of values that an operator put in: zeros
_MOVES = (
    *VIEWS,
    aten.permute.default,
    aten.transpose.int,
    aten.clone.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.roll.default,
    aten.flip.default,
    aten.repeat.default,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    operator.getitem,
)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


def concrete(value: Any) -> int:
    """A size, or the node that computes it, as a number; symbolic ones for a batch of two."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if not isinstance(value, torch.SymInt):
        return int(value)
    expression = value.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _BATCH)))


@dataclass(frozen=True)
class Label:
    """The channel number of every element of a tensor, and whether a shift of the channel stays one constant shift."""

    numbers: Tensor
    shifts: bool


def channel_axis(producer: fx.Node) -> int:
    """Where the channels lie in the output of a layer_norm, linear or convolution."""
    return 1 if producer.target is aten.conv2d.default else -1


def numbered(producer: fx.Node, axis: int) -> Label:
    """The channels of a node's output, along an axis, by number."""
    shape = [concrete(size) for size in producer.meta["val"].shape]
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return Label(torch.arange(shape[axis], dtype=torch.int32).view(view).expand(shape), True)


def flat(label: Any) -> list[Label]:
    """The labels of a tensor, or of each of several."""
    return label if isinstance(label, list) else [label]


def moved(node: fx.Node, label: Any) -> Any:
    """Run the operator itself on the channel numbers."""

    def value(argument: fx.Node) -> Any:
        if is_size(argument):
            return concrete(argument)
        return [item.numbers for item in label] if isinstance(label, list) else label.numbers

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    shifts = all(item.shifts for item in flat(label))
    if isinstance(result, list | tuple):
        return [Label(part, shifts) for part in result]
    return Label(result, shifts)


def _pad(node: fx.Node, _source: fx.Node, label: Label) -> Label | None:
    """Zeros stay zeros under a factor, not under a shift; they are marked."""
    rest = node.args[2:]
    if node.target is aten.pad.default:
        if rest[:1] not in ((), ("constant",)):
            return None
        rest = rest[1:]
    if rest[:1] not in ((), (0,), (0.0,), (None,)):
        return None
    sizes: Any = node.args[1]
    return Label(aten.constant_pad_nd(label.numbers, [concrete(s) for s in sizes], PADDING), label.shifts)


def _mean(node: fx.Node, _source: fx.Node, label: Label) -> Label | None:
    """An average over values of one channel."""
    axes, keep = argument(node, 1), bool(argument(node, 2))
    if axes is None:
        return None
    low, high = label.numbers.amin(axes, keep), label.numbers.amax(axes, keep)
    return Label(high, label.shifts) if torch.equal(low, high) and bool((low >= 0).all()) else None


def _multiply(node: fx.Node, source: fx.Node, label: Label) -> Label | None:
    """A product with a number or a constant commutes with a factor, and turns a shift into another one."""
    other = node.args[1] if node.args[0] is source else node.args[0]
    if isinstance(other, fx.Node) and other.op != "get_attr":
        return None
    shape = [concrete(size) for size in node.meta["val"].shape]
    return Label(label.numbers.expand(shape), False) if len(shape) >= label.numbers.dim() else None


def _mix(node: fx.Node, source: fx.Node, label: Label) -> Label | None:
    """A matrix product that sums over values of one channel; where the other operand is a softmax, its weights sum to one."""
    axis = -2 if node.args[1] is source else -1
    first = label.numbers.narrow(axis, 0, 1)
    if not bool((label.numbers == first).all()) or bool((first < 0).any()):
        return None
    shape = [concrete(size) for size in node.meta["val"].shape]
    if len(shape) < label.numbers.dim():
        return None
    other = node.args[0] if axis == -2 else node.args[1]
    averages = axis == -2 and isinstance(other, fx.Node) and _sums_to_one(other)
    return Label(first.expand(shape), label.shifts and averages)


def _sums_to_one(node: fx.Node) -> bool:
    """Whether a tensor is a softmax over its last axis, perhaps copied or with its leading axes regrouped."""
    while node.target in (aten.clone.default, aten.expand.default, *VIEWS):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.meta["val"].shape[-1] != source.meta["val"].shape[-1]:
            return False
        node = source
    return is_row_softmax(node)


def is_row_softmax(node: fx.Node) -> bool:
    """Whether it is a softmax over its last axis."""
    return node.target in _SOFTMAX and node.args[1] in (-1, node.meta["val"].dim() - 1)


_RULES: dict[Any, Callable[[fx.Node, fx.Node, Label], Label | None]] = {
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    aten.mean.dim: _mean,
    aten.mul.Tensor: _multiply,
    aten.mul.Scalar: _multiply,
    # relu(x / s) = relu(x) / s for positive s
    aten.relu.default: lambda _node, _source, label: Label(label.numbers, False),
    aten.matmul.default: _mix,
}


def passed_on(node: fx.Node, source: fx.Node, label: Any) -> Any:
    """The labels of a node's output, from those of its one labelled input; None where it does not keep channels apart."""
    if node.target in _MOVES:
        return moved(node, label)
    rule = None if isinstance(label, list) else _RULES.get(node.target)
    return None if rule is None else rule(node, source, label)
