"""Rules about products: which run in float, which two formats cannot be multiplied, and where K is quantized."""

from __future__ import annotations

from collections.abc import Iterator

from ospq_export.onnx.lint.findings import Finding, different, name_of, refusal, warning
from ospq_export.onnx.lint.network import Network
from ospq_export.onnx.lint.precision import ProductKind, product_kinds
from ospq_export.onnx.lint.trace import MOVES, SAME_ON_CODES, Operand
from ospq_export.onnx.own import BLOCK_SIZE
from ospq_export.onnx.view import DEQUANTIZE, QUANTIZE

_IN_FLOAT = "put Q and DQ directly on both operands, with one scale per tensor or per output channel"


def products(network: Network) -> Iterator[Finding]:
    """Both operands of every product are quantized, in one format, with scales along the output's axes."""
    kinds = product_kinds(network)
    for product in kinds:
        if product.refused:
            yield refusal(
                product.rule,
                product.node,
                product.refused,
                "quantize both operands to one format, with constant scales",
            )
            continue
        yield from _scales_astray(network, product)
        yield from _four_bits(product)
        if product.kind == "float":
            yield warning(
                "product-in-float",
                product.node,
                product.reason,
                product.fix or _IN_FLOAT,
            )
    yield from _requantized_by_computed(network, kinds)
    yield from _joined_by_computed(network)


def _requantized_by_computed(network: Network, kinds: list[ProductKind]) -> Iterator[Finding]:
    """The builder fails to fold a computed scale into a quantized product in front of it.

    It does not try with a convolution, a bias or scales per channel.
    """
    folded = {
        product.node.output[0]: product.kind
        for product in kinds
        if product.kind != "float" and len(product.node.input) == 2 and product.node.op_type != "Conv"
        if not any(isinstance(operand, Operand) and operand.axes for operand in product.operands)
    }
    for pair in network.pairs.values():
        if not pair.quantizes or network.graph.is_constant(pair.scale):
            continue
        name = network.graph.behind(pair.data, MOVES | SAME_ON_CODES)
        if name in folded:
            what = (
                f"a computed scale behind the {folded[name]} product {name_of(network.graph.producer[name])}"
            )
            yield refusal("scale-computed", pair.node, what, "make the scale a constant")


def _joined_by_computed(network: Network) -> Iterator[Finding]:
    """The builder fails on a Concat of values that computed scales dequantize."""
    graph = network.graph
    for node in graph.nodes:
        pairs = [network.pairs.get(graph.behind(name, MOVES | SAME_ON_CODES)) for name in node.input]
        if node.op_type == "Concat" and all(
            pair
            and not pair.quantizes
            and not graph.is_constant(pair.scale)
            and network.block_scales(pair) is None
            for pair in pairs
        ):
            what = "Concat of values that were dequantized with a computed scale"
            yield refusal("scale-computed", node, what, "make the scale a constant")


def _scales_astray(network: Network, product: ProductKind) -> Iterator[Finding]:
    """Names the DequantizeLinear whose scales keep a product in float."""
    operand = next(
        (o for o in product.operands if isinstance(o, Operand) and o.pair.node is product.culprit), None
    )
    if operand is None or product.kind != "float":
        return
    count = sum(network.shape(operand.pair.scale) or [1])
    if count == 1:
        return
    if operand.constant:
        shape = network.shape(operand.pair.data)
        axis = network.axis(operand.pair) % len(shape or [0])
        yield warning(
            "weight-axis",
            operand.pair.node,
            f"scales along axis {axis} of a {shape} weight, which is not its outputs'",
            "use one scale per output channel",
        )
    else:
        yield warning(
            "activation-per-channel",
            operand.pair.node,
            f"{count} scales on an activation: the product {name_of(product.node)} runs in float",
            "use one scale per tensor",
        )


def _four_bits(product: ProductKind) -> Iterator[Finding]:
    quantized = [o for o in product.operands if isinstance(o, Operand)]
    if len(quantized) < 2:
        return
    for operand in quantized:
        if operand.blocked and product.miscomputed:
            if operand.block != BLOCK_SIZE:
                yield _misread(operand)
        elif operand.format == "int4":
            yield warning(
                "int4-beside-int8",
                operand.pair.node,
                "4-bit codes beside a quantized operand: unpacked in a kernel of its own",
                "store the codes as int8",
            )


def _misread(operand: Operand) -> Finding:
    if operand.block:
        what = f"blocks of {operand.block}: the kernel reads a scale for every {BLOCK_SIZE} codes"
        return different("blocks", operand.pair.node, what, f"quantize in blocks of {BLOCK_SIZE}")
    return different(
        "int4-blocks" if operand.format == "int4" else "blocks",
        operand.pair.node,
        f"{operand.format} blocks beside a quantized operand: the scales are applied after the sum over all blocks",
        "use one scale per output channel, or leave the other operand float",
    )


def doubled(network: Network) -> Iterator[Finding]:
    """No pair directly follows another."""
    for pair in network.pairs.values():
        if pair.quantizes and network.graph.operator(pair.data) == DEQUANTIZE:
            what = f"requantizes what {name_of(network.graph.producer[pair.data])} dequantized"
            yield warning("doubled", pair.node, what, "keep one pair")


def key_transpose(network: Network) -> Iterator[Finding]:
    """K is quantized before its transpose: quantized after it, the product that made it drops to half precision."""
    graph = network.graph
    for node in graph.nodes:
        if node.op_type != "MatMul" or graph.operator(node.input[1]) != DEQUANTIZE:
            continue
        quantizer = graph.producer.get(graph.producer[node.input[1]].input[0])
        if quantizer is None or quantizer.op_type != QUANTIZE or graph.is_constant(quantizer.input[0]):
            continue
        if graph.operator(quantizer.input[0]) != "Transpose":
            continue
        source = graph.producer[quantizer.input[0]]
        permutation = list(graph.attribute(source, "perm", []))
        if permutation and permutation[-1] != len(permutation) - 1:
            what = f"quantizes what {name_of(source)} transposed"
            yield warning("key-transposed-first", quantizer, what, "put Q and DQ before the transpose")
