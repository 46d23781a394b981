"""Rules about what TensorRT's parser refuses whatever is quantized: operators, constants, names, types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from onnx import TensorProto

from ospq_export.onnx.lint.findings import Finding, refusal
from ospq_export.onnx.lint.network import CODES, FLOATS, PRODUCTS, Network, Pair, shown
from ospq_export.onnx.view import DEQUANTIZE, QUANTIZE

# Operators whose inputs must have one type.
_ONE_TYPE = {
    *("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Pow", "PRelu", "Equal", "Greater", "Less"),
    *("Concat", *PRODUCTS),
}
# Operators that need a float: the parser, or the builder after it, refuses int8 there.
_NOT_ON_CODES = {
    *("Elu", "Selu", "Celu", "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Gelu", "Mish", "Softplus", "Floor"),
    *("Ceil", "Round", "Not", "Sin", "Cos", "IsNaN", "Softmax", "LogSoftmax", "Hardmax", "ReduceMean"),
    *("ReduceL2", "NonZero", "LpNormalization", "GlobalAveragePool", "MeanVarianceNormalization"),
    *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"),
    *("Pow", "And", "Or", "Mod", "CumSum", *PRODUCTS),
}
# All that codes other than int8 may pass through.
_SHUFFLES = {
    *("Concat", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Dropout"),
}
_PARAMETER_INPUTS = {"Clip": (1, 2), "Pad": (2,), QUANTIZE: (2,), DEQUANTIZE: (2,)}


def operators(network: Network) -> Iterator[Finding]:
    """The parser has an importer for the operator."""
    for node in network.graph.nodes:
        if node.op_type not in network.version.operators:
            domain = f"{node.domain}::" if node.domain else ""
            yield refusal(
                "operator-unknown",
                node,
                f"{network.version.name} has no importer for {domain}{node.op_type}",
                "export it in operators that TensorRT knows; quantize as QuantizeLinear and DequantizeLinear",
            )


def constants(network: Network) -> Iterator[Finding]:
    """Constants have a type that the parser takes."""
    taken = network.version.constants
    for name, tensor in network.graph.constants.items():
        kind = TensorProto.DataType.Name(tensor.data_type)
        if kind not in taken:
            yield refusal("constant-type", name, f"a constant of {kind.lower()}", "store it as int8 or float")
    for node in network.graph.nodes:
        if node.op_type == "Constant" and node.output[0] not in network.graph.constants:
            yield refusal("constant-type", node, "a sparse or text constant", "write its values out")


def names(network: Network) -> Iterator[Finding]:
    """No Q or DQ is named like an operator before it: the parser names its layers after the nodes."""
    seen: set[str] = set()
    for kind, name in network.graph.layer_names:
        if name and name in seen and kind.endswith((QUANTIZE, DEQUANTIZE)):
            yield refusal(
                "name-twice", name, f"a second operator of this name, a {kind}", "give it another name"
            )
        # These are no layers.
        if kind not in ("Constant", "Dropout"):
            seen.add(name)
    for pair in network.pairs.values():
        if pair.node.name and pair.node.name in network.graph.constants:
            yield refusal("name-twice", pair.node, "a constant has the same name", "give it another name")


def outputs_computed_twice(network: Network) -> Iterator[Finding]:
    """No two constants have one name."""
    graph = network.graph
    count = Counter(name for node in graph.nodes for name in node.output if name)
    for name, times in count.items():
        if times > 1 or (name in graph.constants and graph.operator(name) != "Constant"):
            yield refusal("name-twice", name, "computed twice", "give each tensor a name of its own")


def types(network: Network) -> Iterator[Finding]:
    """Operands of one operator have one type, as TensorRT sees them."""
    for node in network.graph.nodes:
        if node.op_type not in _ONE_TYPE:
            continue
        known = {network.types.get(name, 0) for name in node.input if name} & (FLOATS | CODES.keys())
        if node.op_type == "ConvTranspose" and known == {TensorProto.BFLOAT16}:
            yield refusal(
                "types-differ", node, "a ConvTranspose in bfloat16", "compute it in float16 or float32"
            )
        if len(known) > 1:
            kinds = " and ".join(sorted(map(shown, known)))
            dequantized = any(network.graph.operator(name) == DEQUANTIZE for name in node.input)
            why = ": a DequantizeLinear gives the type of its scale" if dequantized else ""
            fix = "make the types equal, with Cast" + (" or output_dtype" if dequantized else "")
            yield refusal("types-differ", node, f"{node.op_type} of {kinds}{why}", fix)


def codes(network: Network) -> Iterator[Finding]:
    """Codes pass only through operators that TensorRT has on their type."""
    graph = network.graph
    for node in graph.nodes:
        if node.output and node.output[0] in network.pairs:
            continue
        yield from _padded_codes(network, node)
        parameters = _PARAMETER_INPUTS.get(node.op_type, ())
        for index, name in enumerate(node.input):
            kind = network.types.get(name, 0)
            if index not in parameters and kind in CODES:
                yield from _code_reader(network, node, name, kind)
    yield from _code_constants(network)


def _code_reader(network: Network, node: Any, name: str, kind: int) -> Iterator[Finding]:
    if name in network.graph.constants:
        if _is_zero_point(network, node):
            return
        yield refusal(
            "codes-constant",
            node,
            f"{node.op_type} reads quantized constants: only DequantizeLinear may",
            "put DequantizeLinear first, or store what it gives",
        )
    elif node.op_type in _NOT_ON_CODES or (kind != TensorProto.INT8 and node.op_type not in _SHUFFLES):
        what = f"{node.op_type} of {shown(kind)} codes"
        yield refusal("codes-read", node, what, "put DequantizeLinear in front of it")


def _padded_codes(network: Network, node: Any) -> Iterator[Finding]:
    """Codes are padded with 0 as long as nobody writes that 0 down."""
    written = node.op_type == "Pad" and len(node.input) > 2 and node.input[2]
    if not written or network.types.get(node.input[0], 0) not in CODES:
        return
    pads = network.graph.array(node.input[1])
    if network.graph.attribute(node, "mode", b"constant") == b"constant" and (pads is None or pads.any()):
        yield refusal("codes-constant", node, "Pad of codes with a constant", "leave the value 0 out")


def _is_zero_point(network: Network, node: Any) -> bool:
    """Whether a node only passes a zero point on."""
    zeros = {pair.zero for pair in network.pairs.values()}
    data = {pair.data for pair in network.pairs.values()}
    return node.op_type in ("Identity", "Cast") and node.output[0] in zeros - data


def _code_constants(network: Network) -> Iterator[Finding]:
    graph = network.graph
    for pair in network.pairs.values():
        yield from _codes_into_body(network, pair)
        computed = graph.operator(pair.data) == "ConstantOfShape"
        scalar = pair.data in graph.constants and not network.shape(pair.data)
        if not pair.quantizes and (scalar or computed):
            yield refusal(
                "codes-constant",
                pair.node,
                "a quantized constant of rank 0" if scalar else "codes of ConstantOfShape",
                "store it as float, or with a dimension",
            )


def _codes_into_body(network: Network, pair: Pair) -> Iterator[Finding]:
    """Codes of 4 bits or FP8 do not pass into the branch of an If."""
    graph = network.graph
    maker = graph.producer.get(pair.data)
    if pair.quantizes or maker is None or pair.data in graph.constants or pair.format == TensorProto.INT8:
        return
    if any(level.startswith("If:") for level in graph.scope(pair.node)[len(graph.scope(maker)) :]):
        yield refusal(
            "codes-into-body",
            pair.node,
            f"{CODES[pair.format]} codes from outside of the If",
            "put QuantizeLinear into the branch, or DequantizeLinear outside",
        )
