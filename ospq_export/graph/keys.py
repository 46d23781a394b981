"""Constants of attention's keys that the softmax cancels.

    softmax_j(q_i . (k_j + c)) = softmax_j(q_i . k_j + q_i . c) = softmax_j(q_i . k_j)

for any constant c per channel, because q_i . c is the same for all keys j. So the bias of a linear that makes keys may be any:
nothing has to make up for it. Keys are found as `equalization` finds its sites, by the numbers of their channels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.graph.equalization import constant_reads, is_producer
from ospq_export.graph.labels import Label, channel_axis, flat, is_row_softmax, numbered, passed_on
from ospq_export.graph.rewrite import VIEWS, argument, parameter

aten = torch.ops.aten
# What a row has in common stays that under all of these, as long as the row stays one.
_ROWWISE = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.clone.default,
    aten.expand.default,
    *VIEWS,
)


@dataclass
class Keys:
    """A linear or convolution, some of whose channels are read as keys only.

    Attributes:
        producer: the node.
        channels: bool (channels,): read by nothing but products with queries whose rows a softmax normalises.
        products: these products, matmul nodes.
    """

    producer: fx.Node
    channels: Tensor
    products: list[fx.Node] = field(default_factory=list)


def find_keys(graph: fx.Graph) -> list[Keys]:
    """All producers of keys in a captured graph whose bias is theirs alone, in topological order."""
    reads = constant_reads(graph)
    found = (_trace(graph, node) for node in graph.nodes if _has_own_bias(node, reads))
    return [keys for keys in found if bool(keys.channels.any())]


def _has_own_bias(node: fx.Node, reads: Counter[str]) -> bool:
    is_norm = node.target is aten.layer_norm.default
    return not is_norm and is_producer(node, reads) and parameter(node, 2) is not None


def _trace(graph: fx.Graph, producer: fx.Node) -> Keys:
    """Follow the channels to everything that reads them."""
    start = numbered(producer, channel_axis(producer))
    elsewhere = torch.zeros(int(start.numbers.max()) + 1, dtype=torch.bool)
    keys = Keys(producer, torch.zeros_like(elsewhere))
    labels: dict[fx.Node, Any] = {producer: start}
    nodes = list(graph.nodes)
    for node in nodes[nodes.index(producer) + 1 :]:
        sources = [n for n in node.all_input_nodes if n in labels]
        if not sources:
            continue
        label = _passed_on(node, sources[0], labels[sources[0]]) if len(sources) == 1 else None
        if label is not None:
            labels[node] = label
            continue
        for source in sources:
            is_key = _multiplies_keys(node, source, labels[source])
            if is_key:
                keys.products.append(node)
            for item in flat(labels[source]):
                found = item.numbers.unique()
                (keys.channels if is_key else elsewhere)[found[found >= 0].long()] = True
    keys.channels &= ~elsewhere
    return keys


def _passed_on(node: fx.Node, source: fx.Node, label: Any) -> Any:
    """As for equalization; besides, a number times a constant is a constant still."""
    found = passed_on(node, source, label) if node.op == "call_function" else None
    is_scaled = node.target in (aten.mul.Tensor, aten.mul.Scalar) and not isinstance(
        argument(node, 1), fx.Node
    )
    return Label(found.numbers, label.shifts) if is_scaled and found is not None else found


def _multiplies_keys(node: fx.Node, source: fx.Node, label: Any) -> bool:
    """Whether it multiplies queries with `source`: keys whose positions lie last and whose channels are summed over."""
    is_second = node.target is aten.matmul.default and node.args[1] is source and node.args[0] is not source
    if not is_second or isinstance(label, list):
        return False
    numbers = label.numbers
    same = bool((numbers == numbers[..., :1]).all()) and bool((numbers >= 0).all())
    return same and label.shifts and _cancels(node)


def _cancels(node: fx.Node) -> bool:
    """Whether what a row's elements have in common is lost on all readers."""
    return bool(node.users) and all(_reader_cancels(user, node) for user in node.users)


def _reader_cancels(reader: fx.Node, node: fx.Node) -> bool:
    if is_row_softmax(reader):
        return True
    if reader.target not in _ROWWISE or reader.meta["val"].shape[-1] != node.meta["val"].shape[-1]:
        return False
    is_factor = reader.target in (aten.mul.Tensor, aten.div.Tensor)
    return (not is_factor or _scales_rows(reader, node)) and _cancels(reader)


def _scales_rows(reader: fx.Node, node: fx.Node) -> bool:
    """Whether a product or quotient has one factor for each row."""
    if reader.args[0] is not node and reader.target is aten.div.Tensor:
        return False
    other = reader.args[1] if reader.args[0] is node else reader.args[0]
    if not isinstance(other, fx.Node):
        return True
    shape = other.meta["val"].shape
    return other is not node and (not len(shape) or shape[-1] == 1)


@torch.no_grad()
def move_keys(module: fx.GraphModule, keys: Keys, constant: Tensor) -> None:
    """Take a constant off the keys, in place; the network's function stays the same.

    Args:
        module: the captured graph that the keys were found in, or one that shares its constants.
        keys: from `find_keys`.
        constant: float (channels,), in the units of the producer's output; only the keys' channels count.
    """
    bias = parameter(keys.producer, 2)
    assert bias is not None
    held = module.get_buffer(str(bias.target))
    moved = constant.detach().double().where(keys.channels.to(constant.device), 0.0)
    held.copy_(held.double() - moved)
