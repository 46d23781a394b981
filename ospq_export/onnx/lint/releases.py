"""Rules about releases of TensorRT other than RTX: what each refuses, reads otherwise or was reported to get wrong.

Which release a rule counts for, and from where that is known, is in versions.json.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from ospq_export.onnx.lint.findings import Finding, different, name_of, refusal, warning
from ospq_export.onnx.lint.network import CODES, HALVES, Network, shown
from ospq_export.onnx.names import DYNAMIC_QUANTIZE
from ospq_export.onnx.view import DEQUANTIZE, PRODUCTS, QUANTIZE

# ReduceSum has had its axes as an input since opset 13, which the importers know.
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Elu", "HardSwish", "PRelu")
_SCATTERS = ("ScatterElements", "ScatterND")
_HALF_QUANTIZERS = 19


def opsets(network: Network) -> Iterator[Finding]:
    """The file's opset is one that the release is documented to read."""
    limit = network.version.opset
    if limit is not None and network.graph.opset > limit:
        what = f"opset {network.graph.opset}: {network.version.name} is documented up to {limit}"
        yield warning("opset-above", "the file", what, f"export with opset {limit} or less")


def formats(network: Network) -> Iterator[Finding]:
    """The release has the types of the file's codes; one finding per type."""
    first = {pair.format: pair.node for pair in reversed(network.pairs.values())}
    for kind in sorted(first.keys() - network.version.formats):
        what = f"{CODES.get(kind, shown(kind))} codes: {network.version.name} has no such type"
        yield refusal("format-unknown", first[kind], what, "use int8, or a later release")


def reduction_axes(network: Network) -> Iterator[Finding]:
    """No reduction but ReduceSum has its axes as an input, the form of opset 18."""
    for node in network.graph.nodes:
        reduces = node.op_type.removeprefix("Reduce") in _REDUCTIONS
        if reduces and len(node.input) > 1 and node.input[1]:
            yield different(
                "reduction-axes",
                node,
                f"{node.op_type} with its axes as an input: they are not read, and it reduces over all axes",
                "export with opset 17, which has them as an attribute",
            )


def ignored_attributes(network: Network) -> Iterator[Finding]:
    """No attribute says something that the importer does not read."""
    graph = network.graph
    for node in graph.nodes:
        start, end = (graph.attribute(node, name) for name in ("start", "end"))
        if node.op_type == "Shape" and (start or end is not None):
            what, fix = "Shape with start or end: the importer gives all dimensions", "put a Slice behind it"
        elif node.op_type in _SCATTERS and graph.attribute(node, "reduction", b"none") != b"none":
            what, fix = f"{node.op_type} with a reduction: the importer overwrites", "add what is scattered"
        else:
            continue
        yield different("attribute-ignored", node, what, fix)


def half_quantizers(network: Network) -> Iterator[Finding]:
    """Q and DQ are float32 below opset 19."""
    if network.graph.opset >= _HALF_QUANTIZERS:
        return
    for pair in network.pairs.values():
        kinds = {network.types.get(name, 0) for name in (pair.scale, pair.data)} & set(HALVES)
        if kinds and pair.node.op_type in (QUANTIZE, DEQUANTIZE):
            what = f"{shown(min(kinds))} in opset {network.graph.opset}: ONNX has it in Q and DQ from 19 on"
            yield warning("quantizer-half", pair.node, what, "write opset 19, or float32 around Q and DQ")


def bare_products(network: Network) -> Iterator[Finding]:
    """In a quantized file every product's operands come from DequantizeLinear; a file without any is not quantized."""
    graph = network.graph
    products = [node for node in graph.nodes if node.op_type in PRODUCTS]
    if not network.pairs and products:
        yield warning(
            "not-quantized",
            products[0],
            "no Q and DQ in the file: no flag of the builder makes INT8, FP8 or FP4 of it",
            "lint the quantized file; precisions are in the file, by Q and DQ and by types",
        )
    for node in products if network.pairs else ():
        if problem := graph.unquantized(node):
            yield warning("product-bare", node, problem, "put Q and DQ on both operands")


def decomposed_norms(network: Network) -> Iterator[Finding]:
    """A LayerNorm is one operator: its square overflows in float16."""
    graph = network.graph
    for node in graph.nodes:
        square = node.op_type == "Pow" or (node.op_type == "Mul" and node.input[0] == node.input[1])
        if not square or graph.operator(node.input[0]) not in ("Sub", "Cast"):
            continue
        centred = graph.producer[graph.behind(node.input[0], ("Cast",))]
        means = any(graph.operator(graph.behind(name, ("Cast",))) == "ReduceMean" for name in centred.input)
        averaged = any(reader.op_type == "ReduceMean" for reader in graph.readers[node.output[0]])
        kind = network.types.get(node.output[0])
        if means and averaged and (kind == TensorProto.FLOAT16 or not network.version.strongly_typed):
            when = "" if kind == TensorProto.FLOAT16 else " where the builder has the FP16 flag"
            yield warning(
                "norm-decomposed",
                node,
                f"a LayerNorm in parts: {node.op_type} overflows in float16{when}",
                "export LayerNormalization, opset 17",
            )


def depthwise_sums(network: Network) -> Iterator[Finding]:
    """No quantized depthwise convolution is added to right away."""
    graph = network.graph
    for node in graph.nodes:
        grouped = node.op_type == "Conv" and graph.attribute(node, "group", 1) > 1
        if not grouped or graph.operator(node.input[1]) != DEQUANTIZE:
            continue
        added = [reader for reader in graph.readers[node.output[0]] if reader.op_type == "Add"]
        if added:
            what = f"a quantized convolution in groups before {name_of(added[0])}: no kernel was found for the two in one"
            yield warning(
                "depthwise-add", node, what, "keep this convolution float, or quantize its output first"
            )


def transposed_activations(network: Network) -> Iterator[Finding]:
    """No activation lies between a quantized ConvTranspose and the quantizer of its output."""
    graph = network.graph
    for node in graph.nodes:
        if node.op_type != "ConvTranspose" or graph.operator(node.input[0]) != DEQUANTIZE:
            continue
        for reader in graph.readers[node.output[0]]:
            quantized = any(user.op_type == QUANTIZE for user in graph.readers[reader.output[0]])
            if reader.op_type in _ACTIVATIONS and quantized:
                what = f"{reader.op_type} between it and QuantizeLinear: wrong values were reported"
                fix = "put Q and DQ before the activation as well"
                yield warning("convtranspose-activation", node, what, fix)


def dynamic_fp4(network: Network) -> Iterator[Finding]:
    """Activations are not quantized to FP4 while the engine runs."""
    for node in network.graph.nodes:
        if node.op_type == DYNAMIC_QUANTIZE:
            what = f"{node.op_type}: TensorRT 10 does not build it"
            yield refusal("fp4-dynamic", node, what, "use FP8, or TensorRT 11")
