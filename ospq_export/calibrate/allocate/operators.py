"""The quantizable operators of a network, what they read and compute, and which of them have to share a format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from ospq_export.formats.base import Role
from ospq_export.formats.choice import FLOAT, named
from ospq_export.graph.capture import operator_names
from ospq_export.graph.insertion import inner_dimension, quantized_tensor, role_of, source_product
from ospq_export.graph.rewrite import parameter
from ospq_export.graph.slicing import cut_points

FLOAT_BITS = 16
"""Of an operand that is left in float: engines and their files have FP16 there."""
_FAR = 12


@dataclass(frozen=True)
class Attention:
    """One of the two products of an attention.

    Attributes:
        is_first: whether it multiplies queries and keys.
        matrix: elements of the scores, for one image.
        keys, head_size: of each head.
    """

    is_first: bool
    matrix: int
    keys: int
    head_size: int


@dataclass(frozen=True)
class Operator:
    """One quantizable operator; counts are for one image.

    Attributes:
        name: as `operator_names` has it.
        role: what it is.
        inner: elements that its products sum over.
        macs: multiply-adds.
        weights: elements of its weight; 0 where both operands are activations.
        inputs: elements of the activations that it reads.
        outputs: elements of its result.
        tensors: names of the nodes that it reads, before pure data movement.
        source: the operator whose result it reads by way of element-wise operators alone; None where there is none.
        attention: of a product of an attention, what its kernel has to hold.
    """

    name: str
    role: Role
    inner: int
    macs: int
    weights: int
    inputs: int
    outputs: int
    tensors: tuple[str, ...]
    source: str | None
    attention: Attention | None = None

    def format_names(self, wanted: str) -> tuple[str, str]:
        """The formats of weight and activation when one is wanted: what takes over where that refuses.

        A product of two activations has that of activations twice.
        """
        found = []
        for is_weight in (self.role is not Role.ATTENTION, False):
            name: str = wanted
            while name != FLOAT and (kind := named(name, weight=is_weight)).refuses(self.role, self.inner):
                assert kind.fallback is not None
                name = kind.fallback
            found.append(name)
        return found[0], found[1]

    def bits(self, wanted: str) -> float:
        """Bits of its two operands on average, with those of block scales."""
        names = self.format_names(wanted)
        kinds = (self.role is not Role.ATTENTION, False)
        return sum(stored_bits(n, weight=w) for n, w in zip(names, kinds, strict=True)) / 2


def stored_bits(name: str, *, weight: bool) -> float:
    """Bits of a format's code, and its share of a block's scale."""
    if name == FLOAT:
        return FLOAT_BITS
    kind = named(name, weight=weight)
    block = kind.granularity.block_size
    return kind.bits + (0.0 if block is None else kind.scale_bits / block)


def operators_of(captured: fx.GraphModule) -> list[Operator]:
    """All of them, in graph order.

    Args:
        captured: the float network.
    """
    batch = next(n for n in captured.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    names, found = operator_names(captured.graph), []
    attentions, cuts = _attentions(names, batch), set(cut_points(captured.graph))
    for node, name in names.items():
        role, inner = role_of(node), inner_dimension(node)
        reads = [a for a in node.args[: 2 if role is Role.ATTENTION else 1] if isinstance(a, fx.Node)]
        outputs = _per_image(node, batch)
        weight = None if role is Role.ATTENTION else parameter(node, 1)
        sources = [names[s] for s in (_element_wise_source(r) for r in reads) if s in names]
        found.append(
            Operator(
                name=name,
                role=role,
                inner=inner,
                macs=outputs * inner,
                weights=0 if weight is None else weight.meta["val"].numel(),
                inputs=sum(_per_image(r, batch) for r in reads),
                outputs=outputs,
                tensors=tuple(quantized_tensor(node, r, cuts)[0].name for r in reads),
                source=sources[0] if sources else None,
                attention=attentions.get(node),
            )
        )
    return found


def _per_image(node: fx.Node, batch: torch.SymInt | int) -> int:
    """Elements of a node's value for one image; a constant's are all its own."""
    value = node.meta["val"]
    return int(value.numel() if node.op == "get_attr" else value.numel() // batch)


def _attentions(names: dict[fx.Node, str], batch: torch.SymInt | int) -> dict[fx.Node, Attention]:
    found = {}
    for second in names:
        first = _scores(second, names) if role_of(second) is Role.ATTENTION else None
        if first is not None:
            keys, head_size = second.args[1].meta["val"].shape[-2:]  # type: ignore[union-attr]
            matrix = _per_image(first, batch)
            found[first] = Attention(True, matrix, int(keys), int(head_size))
            found[second] = Attention(False, matrix, int(keys), int(head_size))
    return found


def _element_wise_source(node: fx.Node) -> fx.Node | None:
    """The product whose result a tensor is, but for operators on single elements and data movement."""
    for _ in range(_FAR):
        kind = _kind(node)
        if node.op != "call_function" or kind in _PRODUCTS:
            return node
        tensors = [n for n in node.all_input_nodes if n.op == "call_function"]
        if len(tensors) != 1 or any(word in kind for word in _MIXES):
            return None
        node = tensors[0]
    return None


def _kind(node: fx.Node) -> str:
    """An operator's name: "linear" of aten.linear.default."""
    return str(node.target).split(".")[1] if isinstance(node.target, OpOverload) else ""


_PRODUCTS = ("linear", "conv2d", "matmul")
_MIXES = ("norm", "softmax", "mean", "sum", "pool")


def groups_of(captured: fx.GraphModule, operators: Sequence[Operator]) -> list[list[int]]:
    """Which operators share a format, by their indices.

    The readers of one tensor do, so that it is quantized once; and the two products of an attention and the linear behind it, so
    that they are one kernel.
    """
    place = {o.name: i for i, o in enumerate(operators)}
    root = list(range(len(operators)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    def join(a: int, b: int) -> None:
        first, second = sorted((find(a), find(b)))
        root[second] = first

    readers: dict[str, int] = {}
    for index, operator in enumerate(operators):
        for tensor in operator.tensors:
            join(index, readers.setdefault(tensor, index))
    names = operator_names(captured.graph)
    for node, name in names.items():
        product = source_product(node.args[0])
        if product in names and product is not node:
            join(place[name], place[names[product]])
        scores = _scores(node, names) if role_of(node) is Role.ATTENTION else None
        if scores is not None:
            join(place[name], place[names[scores]])
    members: dict[int, list[int]] = {}
    for index in range(len(operators)):
        members.setdefault(find(index), []).append(index)
    return list(members.values())


def _scores(node: fx.Node, names: dict[fx.Node, str]) -> fx.Node | None:
    """The product of queries and keys whose softmax a product reads."""
    found = node.args[0]
    passed_softmax = False
    for _ in range(_FAR):
        if not isinstance(found, fx.Node) or not found.all_input_nodes:
            return None
        passed_softmax |= "softmax" in _kind(found)
        found = found.all_input_nodes[0]
        if found in names:
            return found if passed_softmax and role_of(found) is Role.ATTENTION else None
    return None
