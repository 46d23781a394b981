"""A rule about the branches of an If: what the builder of TensorRT-RTX 1.7 fails on, quantized or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ospq_export.onnx.lint.findings import Finding, refusal
from ospq_export.onnx.lint.network import Network
from ospq_export.onnx.view import QUANTIZE

_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "SpaceToDepth", "DepthToSpace"}
_NO_LAYERS = {"Identity", "Dropout"}
ELEMENTWISE = {
    *("Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Neg", "Abs", "Exp"),
    *("Log", "Sqrt", "Erf", "Clip", "Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Cast"),
}


def reshaped_into_branch(network: Network) -> Iterator[Finding]:
    """No elementwise operator of a branch is the first to read what was reshaped outside, by an operator or for a product."""
    graph = network.graph
    readers: dict[tuple[tuple[str, ...], str], list[Any]] = defaultdict(list)
    for node in graph.nodes:
        scope = graph.scope(node)
        if scope and scope[-1].startswith("If:") and node.op_type not in _NO_LAYERS:
            for name in (graph.behind(name, _NO_LAYERS) for name in node.input):
                maker = graph.producer.get(name)
                if maker is not None and graph.scope(maker) != scope:
                    readers[scope, name].append(node)
    for (_, name), nodes in readers.items():
        source = graph.producer.get(graph.behind(name, ELEMENTWISE | _NO_LAYERS))
        if source is None or graph.is_constant(name):
            continue
        # Behind a convolution in 1-D, elementwise operators on both sides become one; a QuantizeLinear is one of them.
        joins = source.op_type == "Conv" and graph.producer[name] is not source
        first = ELEMENTWISE | {QUANTIZE} if joins else ELEMENTWISE
        if all(node.op_type in first for node in nodes) and _ends_in_reshape(network, source):
            yield refusal(
                "reshaped-into-branch",
                nodes[0],
                f"an elementwise operator in the branch of an If reads what {source.op_type} reshaped outside",
                "put the reshape into the branch, or the elementwise operator outside",
            )


def _ends_in_reshape(network: Network, node: Any) -> bool:
    """Whether a layer's last step is a reshape: TensorRT flattens the rows of products, and makes 1-D convolutions 2-D.

    A reshape of dequantized values goes where the DequantizeLinear goes, and does no harm.
    """
    ranks = [len(network.shape(name) or ()) for name in node.input[:2]]
    if node.op_type in ("MatMul", "Einsum"):
        return max(ranks) > 3 or (ranks[0] > 2 and ranks[1] == 2)
    if node.op_type in _RESHAPES:
        return network.graph.behind(node.input[0], ELEMENTWISE | _RESHAPES | _NO_LAYERS) not in network.pairs
    return bool(node.op_type == "Conv" and ranks[0] == 3)
