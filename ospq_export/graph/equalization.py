"""Which channels of a captured graph can be rescaled and shifted without changing what the network computes.

A *site* is a producer of channels (a LayerNorm's affine, or the rows of a linear or convolution) all of whose readers, seen
through operators that only move, average or mix values within a channel, are linears or convolutions. There, for any positive
factors s and any shifts z,

    producer'(x) = (producer(x) - z) / s,    W'[:, c] = W[:, c] * s[c],    b' = b + W z

is the same function. Sites are found by sending the number of each channel through the very operators of the graph: whatever
permutes, pads, rolls, splits or joins, the numbers say which channel arrives in which column. No architecture is known by name.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.graph.labels import PADDING, channel_axis, flat, numbered, passed_on
from ospq_export.graph.rewrite import argument, is_padded, parameter

aten = torch.ops.aten


@dataclass(frozen=True)
class Consumer:
    """A linear or convolution that reads a site's channels.

    Attributes:
        node: the operator.
        columns: int64 (in_channels,): the producer's channel in each input channel, -1 where there is none.
    """

    node: fx.Node
    columns: Tensor


@dataclass
class Site:
    """A producer of channels that can be rescaled, and everything that reads them.

    Attributes:
        producer: a layer_norm, linear or conv2d node.
        axis: of the channels in the producer's output; 1 for a convolution, else -1.
        free: bool (channels,): may be rescaled.
        shiftable: bool (channels,): may be shifted besides.
        consumers: every reader of a free channel.
        path: the nodes that carry the channels from the producer to the consumers, both left out.
    """

    producer: fx.Node
    axis: int
    free: Tensor
    shiftable: Tensor
    consumers: list[Consumer] = field(default_factory=list)
    path: list[fx.Node] = field(default_factory=list)

    @property
    def is_norm(self) -> bool:
        """Whether the producer is a LayerNorm's affine."""
        return self.producer.target is aten.layer_norm.default


def find_sites(graph: fx.Graph) -> list[Site]:
    """All sites of a captured graph with at least one free channel, in topological order.

    Constants that several operators read are never touched: their producers are no sites, their readers fix the channels.
    """
    reads = constant_reads(graph)
    sites = (_Tracer(graph, node, reads).trace() for node in graph.nodes if is_producer(node, reads))
    return [site for site in sites if bool(site.free.any())]


def constant_reads(graph: fx.Graph) -> Counter[str]:
    """How many operator arguments read each constant."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "get_attr" for _ in node.users)


def _weight_index(node: fx.Node) -> int:
    """Which argument of a linear, convolution or layer_norm is its weight; the bias comes after it."""
    return 2 if node.target is aten.layer_norm.default else 1


def is_producer(node: fx.Node, reads: Counter[str]) -> bool:
    """Whether a layer_norm, linear or convolution has constants of its own."""
    if node.target is aten.layer_norm.default:
        if len(node.args[1]) != 1:  # type: ignore[arg-type]
            return False
    elif node.target not in (aten.linear.default, aten.conv2d.default):
        return False
    weight = _weight_index(node)
    given = [p for p in node.args[weight : weight + 2] if isinstance(p, fx.Node)]
    return parameter(node, weight) is not None and all(reads[str(p.target)] == 1 for p in given)


class _Tracer:
    """Follows the channels of one producer through the graph."""

    def __init__(self, graph: fx.Graph, producer: fx.Node, reads: Counter[str]) -> None:
        self.graph, self.reads = graph, reads
        index = _weight_index(producer)
        weight, bias = parameter(producer, index), parameter(producer, index + 1)
        assert weight is not None
        axis = channel_axis(producer)
        free = torch.ones(int(weight.meta["val"].shape[0]), dtype=torch.bool)
        self.site = Site(producer, axis, free, torch.full_like(free, bias is not None))
        self.labels: dict[fx.Node, Any] = {producer: numbered(producer, axis)}

    def trace(self) -> Site:
        """Visit everything that the channels reach, until nothing is free or all are consumed."""
        nodes = list(self.graph.nodes)
        for node in nodes[nodes.index(self.site.producer) + 1 :]:
            sources = [n for n in node.all_input_nodes if n in self.labels]
            if not sources:
                continue
            if not bool(self.site.free.any()):
                break
            alone = node.op == "call_function" and len(sources) == 1
            label = passed_on(node, sources[0], self.labels[sources[0]]) if alone else None
            if label is not None:
                self.labels[node] = label
                self.site.path.append(node)
            elif not self._consume(node, sources):
                self._fix(sources)
        self.site.shiftable &= self.site.free
        return self.site

    def _fix(self, sources: list[fx.Node]) -> None:
        for source in sources:
            for label in flat(self.labels[source]):
                found = label.numbers.unique()
                self.site.free[found[found >= 0].long()] = False

    def _consume(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Take the node up as a consumer; False where it is none."""
        weight = parameter(node, 1)
        is_conv = node.target is aten.conv2d.default
        if not (is_conv or node.target is aten.linear.default) or weight is None or len(sources) != 1:
            return False
        grouped = is_conv and argument(node, 6, 1) != 1
        if node.args[0] is not sources[0] or self.reads[str(weight.target)] != 1 or grouped:
            return False
        label = self.labels[sources[0]]
        columns, mixed, padded = _columns(label.numbers, 1 if is_conv else -1)
        self.site.free[mixed] = False
        arriving = columns[columns >= 0]
        bias = parameter(node, 2)
        owns_bias = bias is not None and self.reads[str(bias.target)] == 1
        if not label.shifts or not owns_bias or (is_conv and is_padded(node)):
            padded = arriving
        self.site.shiftable[padded] = False
        self.site.consumers.append(Consumer(node, columns))
        return True


def _columns(numbers: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per input channel its channel number; the numbers that share a column with others; those padded with zeros."""
    rows = numbers.movedim(axis, -1).flatten(0, -2).long()
    high = rows.amax(0)
    low = torch.where(rows == PADDING, high, rows).amin(0)
    mixed_rows = rows[:, high != low]
    mixed = mixed_rows[mixed_rows >= 0].unique()
    padded = high[(rows == PADDING).any(0) & (high >= 0)].unique()
    return torch.where(high == low, high, PADDING), mixed, padded


def weight_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The buffer that is the weight of a linear, convolution or layer_norm node; writing to it changes the network."""
    weight = parameter(node, _weight_index(node))
    assert weight is not None
    return module.get_buffer(str(weight.target))


def bias_of(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The buffer that is the bias, or None where there is none."""
    bias = parameter(node, _weight_index(node) + 1)
    return None if bias is None else module.get_buffer(str(bias.target))


def column_values(values: Tensor, consumer: Consumer, neutral: float) -> Tensor:
    """Per-channel values of a producer as values per input channel of a consumer; `neutral` where no channel arrives."""
    columns = consumer.columns.to(values.device)
    picked = values[columns.clamp_min(0)]
    return picked.where(columns >= 0, torch.full_like(picked, neutral))


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
