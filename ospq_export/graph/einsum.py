"""Einsum as one matrix product per pair of operands, between permutations and reshapes.

An index of two operands is a batch index where the result has it, and is contracted where it does not; an index of one operand
is free, or is summed ahead of the product. What contracts nothing is an elementwise product. More operands go pair by pair.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ospq_export.graph.rewrite import argument, call_functions, insert_call, replace_node, unsupported

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """An operand: a tensor and the index of each of its dimensions."""

    node: fx.Node
    labels: tuple[str, ...]
    constant: bool

    def at(self, label: str) -> int:
        return self.labels.index(label)

    def size(self, label: str) -> int | torch.SymInt:
        return self.node.meta["val"].shape[self.at(label)]


def parse_equation(equation: str, ranks: Sequence[int]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The indices of each operand and of the result of an einsum.

    Args:
        equation: as `torch.einsum` has it: with or without an ellipsis and a right side.
        ranks: number of dimensions of each operand.

    Returns:
        Per operand an index per dimension, and the result's; those of an ellipsis are ".0", ".1", ... counted from its right end.

    Raises:
        ValueError: the equation does not fit the operands.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    if len(parts) != len(ranks):
        raise ValueError(f"{len(parts)} operands in the equation, {len(ranks)} tensors")
    hidden = [
        rank - len(part.replace("...", "")) if "..." in part else 0
        for part, rank in zip(parts, ranks, strict=True)
    ]
    operands = [_labels(part, count) for part, count in zip(parts, hidden, strict=True)]
    if any(len(labels) != rank for labels, rank in zip(operands, ranks, strict=True)):
        raise ValueError("an operand has another number of dimensions than the equation says")
    if arrow:
        return operands, _labels(right, max(hidden))
    letters = left.replace(",", "").replace("...", "")
    once = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return operands, _labels("..." + once, max(hidden))


def _labels(part: str, hidden: int) -> tuple[str, ...]:
    before, ellipsis, after = part.partition("...")
    middle = [f".{i}" for i in reversed(range(hidden))] if ellipsis else []
    return (*before, *middle, *after)


def expand_einsums(module: fx.GraphModule) -> None:
    """Replace every einsum that depends on the images; those of constants alone are left to be folded.

    Raises:
        InputError: an einsum has no such form; names it and its module.
    """
    dependent: set[fx.Node] = set()
    for node in list(module.graph.nodes):
        if node.op == "placeholder" or any(n in dependent for n in node.all_input_nodes):
            dependent.add(node)
    for node in call_functions(module.graph):
        if node.target is aten.einsum.default and node in dependent:
            _expand(node, dependent)


def _expand(node: fx.Node, dependent: set[fx.Node]) -> None:
    equation, operands = str(node.args[0]), node.args[1]
    path = node.kwargs.get("path", argument(node, 2))
    assert isinstance(operands, list | tuple)
    tensors = [n for n in operands if isinstance(n, fx.Node)]
    try:
        indices, out = parse_equation(equation, [n.meta["val"].dim() for n in tensors])
        terms = [_Term(n, labels, n not in dependent) for n, labels in zip(tensors, indices, strict=True)]
        result = _Expansion(node).contract(terms, out, [int(i) for i in path or ()])
    except (ValueError, RuntimeError) as error:
        raise unsupported(node, f"written as matrix products: equation {equation}: {error}") from error
    replace_node(node, result)


class _Expansion:
    """Writes the operators of one einsum ahead of it."""

    def __init__(self, einsum: fx.Node) -> None:
        self.einsum = einsum

    def call(self, target: Any, *args: object) -> fx.Node:
        return insert_call(self.einsum, target, *args)

    def contract(self, terms: list[_Term], out: tuple[str, ...], path: Sequence[int]) -> fx.Node:
        """All operands, pair by pair: in the order of `path` (opt_einsum's form, flat), or from the left."""
        terms = [self.diagonals(term) for term in terms]
        pairs = list(zip(path[::2], path[1::2], strict=True)) if len(path) == 2 * (len(terms) - 1) else []
        while len(terms) > 1:
            first, second = pairs.pop(0) if pairs else (0, 1)
            rest = [term for i, term in enumerate(terms) if i not in (first, second)]
            later = [label for term in rest for label in term.labels]
            product = self.product(terms[first], terms[second], tuple(dict.fromkeys([*out, *later])))
            # Of two, the product comes first; opt_einsum's paths have it at the end.
            terms = [*rest, product] if path else [product, *rest]
        return self.permute(self.sum(terms[0], out), out).node

    def diagonals(self, term: _Term) -> _Term:
        """One dimension per index: of an index that comes twice, the diagonal."""
        for label in dict.fromkeys(term.labels):
            while term.labels.count(label) > 1:
                first, second = [i for i, other in enumerate(term.labels) if other == label][:2]
                node = self.call(aten.diagonal.default, term.node, 0, first, second)
                rest = [other for i, other in enumerate(term.labels) if i not in (first, second)]
                term = _Term(node, (*rest, label), term.constant)
        return term

    def sum(self, term: _Term, kept: Collection[str]) -> _Term:
        """The sum over all indices but `kept`."""
        gone = [i for i, label in enumerate(term.labels) if label not in kept]
        if not gone:
            return term
        labels = tuple(label for label in term.labels if label in kept)
        return _Term(self.call(aten.sum.dim_IntList, term.node, gone), labels, term.constant)

    def squeeze(self, term: _Term, other: _Term) -> _Term:
        """Without the dimensions of size 1 that `other` has as well: they broadcast."""
        for label in [c for c in term.labels if c in other.labels]:
            if isinstance(size := term.size(label), int) and size == 1:
                node = self.call(aten.squeeze.dim, term.node, term.at(label))
                term = _Term(node, tuple(c for c in term.labels if c != label), term.constant)
        return term

    def permute(self, term: _Term, labels: Sequence[str]) -> _Term:
        order = [term.at(label) for label in labels]
        if order == sorted(order):
            return term
        return _Term(self.call(aten.permute.default, term.node, order), tuple(labels), term.constant)

    def size(self, term: _Term, label: str) -> int | fx.Node:
        found = term.size(label)
        return found if isinstance(found, int) else self.call(aten.sym_size.int, term.node, term.at(label))

    def multiply(self, sizes: Sequence[int | fx.Node]) -> int | fx.Node:
        result: int | fx.Node = 1
        for size in sizes:
            if isinstance(result, int) and isinstance(size, int):
                result *= size
            elif isinstance(result, int) and result == 1:
                result = size
            else:
                result = self.call(operator.mul, result, size)
        return result

    def product(self, left: _Term, right: _Term, kept: Sequence[str]) -> _Term:
        """The product of two operands, with those of their indices that are in `kept`."""
        if left.constant:
            # A weight belongs on the right: linear layers have it there, and runtimes quantize it there.
            left, right = right, left
        right = self.squeeze(right, left)
        left = self.squeeze(left, right)
        left = self.sum(left, {*kept, *right.labels})
        right = self.sum(right, {*kept, *left.labels})
        summed = [c for c in left.labels if c in right.labels and c not in kept]
        if not summed:
            return self.elementwise(left, right, kept)
        batch = [c for c in kept if c in left.labels and c in right.labels]
        rows = [c for c in kept if c in left.labels and c not in right.labels]
        columns = [c for c in kept if c in right.labels and c not in left.labels]
        # Without batch indices the rows stay dimensions of their own, as those of a linear layer do.
        row_groups = [[c] for c in rows] if rows and not batch else [rows]
        lhs = self.grouped(left, [*([c] for c in batch), *row_groups, summed])
        rhs = self.grouped(right, [*([c] for c in batch), summed, columns])
        node = self.call(aten.matmul.default, lhs, rhs)
        labels = (*batch, *rows, *columns)
        if len(columns) != 1 or not rows or (batch and len(rows) > 1):
            sizes = [*(self.size(left, c) for c in (*batch, *rows)), *(self.size(right, c) for c in columns)]
            node = self.call(aten.reshape.default, node, sizes)
        return _Term(node, labels, left.constant)

    def grouped(self, term: _Term, groups: Sequence[Sequence[str]]) -> fx.Node:
        """The operand's tensor with its dimensions in the order of `groups`, and one dimension per group."""
        ordered = self.permute(term, [c for group in groups for c in group])
        sizes = [[self.size(ordered, c) for c in group] for group in groups]
        if all(len(group) == 1 for group in groups):
            return ordered.node
        return self.call(aten.reshape.default, ordered.node, [self.multiply(group) for group in sizes])

    def elementwise(self, left: _Term, right: _Term, kept: Sequence[str]) -> _Term:
        labels = [c for c in kept if c in left.labels or c in right.labels]
        nodes = []
        for term in (left, right):
            node = self.permute(term, [c for c in labels if c in term.labels]).node
            for i, label in enumerate(labels):
                if label not in term.labels:
                    node = self.call(aten.unsqueeze.default, node, i)
            nodes.append(node)
        return _Term(self.call(aten.mul.Tensor, *nodes), tuple(labels), left.constant)
