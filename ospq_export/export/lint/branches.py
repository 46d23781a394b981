"""A rule about the branches of an If: what the builder of TensorRT-RTX 1.7 fails on, quantized or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ospq_export.export.lint.findings import Finding, refusal
from ospq_export.export.lint.network import Network

_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "SpaceToDepth", "DepthToSpace"}
_POINTWISE = {
    *(
        "Identity",
        "Dropout",
        "Relu",
        "LeakyRelu",
        "Elu",
        "Sigmoid",
        "Tanh",
        "HardSigmoid",
        "HardSwish",
        "Gelu",
    ),
    *(
        "Neg",
        "Abs",
        "Exp",
        "Log",
        "Sqrt",
        "Erf",
        "Clip",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Max",
        "Min",
        "Pow",
        "Cast",
    ),
}


def reshaped_into_branch(network: Network) -> Iterator[Finding]:
    """A branch that holds elementwise operators only does not read what was reshaped outside, by an operator or for a product."""
    branches: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for node in network.graph.nodes:
        scope = network.graph.scope(node)
        if scope and scope[-1].startswith("If:") and node.op_type != "Constant":
            branches[scope].append(node)
    for scope, nodes in branches.items():
        if all(node.op_type in _POINTWISE for node in nodes):
            yield from _reshaped_inputs(network, scope, nodes)


def _reshaped_inputs(network: Network, scope: tuple[str, ...], nodes: list[Any]) -> Iterator[Finding]:
    for node in nodes:
        for name in node.input:
            maker = network.graph.producer.get(name)
            if maker is None or network.graph.scope(maker) == scope:
                continue
            while maker is not None and maker.op_type in _POINTWISE:
                maker = network.graph.producer.get(maker.input[0])
            if maker is not None and _reshapes(network, maker):
                yield refusal(
                    "reshaped-into-branch",
                    node,
                    f"an If's branch of elementwise operators reads what {maker.op_type} reshaped outside",
                    "put the reshape into the branch, or the elementwise operators outside",
                )


def _reshapes(network: Network, node: Any) -> bool:
    """Whether a layer ends in a reshape: TensorRT flattens the rows of a product by a matrix, and pads a convolution in 1-D."""
    ranks = [len(network.shape(name) or ()) for name in node.input[:2]]
    if node.op_type in ("MatMul", "Einsum"):
        return max(ranks) > 3 or (ranks[0] > 2 and ranks[1] == 2)
    return node.op_type in _RESHAPES or (node.op_type == "Conv" and ranks[0] == 3)
