"""Which attentions a release of TensorRT other than RTX fuses, by its documentation and by reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto

from ospq_export.onnx.lint.attention import logits_product
from ospq_export.onnx.lint.findings import Finding, warning
from ospq_export.onnx.lint.network import HALVES, Network, Pair
from ospq_export.onnx.view import DEQUANTIZE, QUANTIZE

# Limits of the fused kernels, from the documentation of TensorRT 10 as NVIDIA/TensorRT#4167 quotes it.
INT8_HEADS, INT8_SEQUENCE = (16, 32, 64), 512
HALF_HEADS, HALF_STEP = (16, 256), 8
_LAYOUT = ("Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Flatten", "Transpose")
_BETWEEN = ("Mul", "Div", "Transpose")


@dataclass(frozen=True)
class _Attention:
    """One attention: softmax(first) times a value.

    Attributes:
        first, second: its two products.
        pairs: the DequantizeLinear behind each of the four operands, None where an operand is not quantized.
        size: of a head; 0 where unknown.
        lengths: of queries and keys; 0 where unknown.
    """

    first: Any
    second: Any
    pairs: tuple[Pair | None, ...]
    size: int
    lengths: tuple[int, int]

    @property
    def kind(self) -> int:
        """Type of the codes of the first product's operands; 0 where one of them is float."""
        found = [pair.format if pair is not None else 0 for pair in self.pairs[:2]]
        return found[0] if found[0] == found[1] else 0


def attentions(network: Network) -> Iterator[Finding]:
    """What keeps an attention from becoming one kernel, and which kernels were reported to be wrong."""
    for attention in _all(network):
        yield from _in_part(network, attention)
        if attention.kind == TensorProto.INT8:
            yield from _int8(attention)
        elif attention.kind == TensorProto.FLOAT8E4M3FN:
            yield from _fp8(network, attention)
        elif not any(attention.pairs):
            yield from _plain(network, attention)


def _all(network: Network) -> Iterator[_Attention]:
    graph = network.graph
    for second in graph.nodes:
        first = logits_product(graph, graph.logits(second)) if graph.reads_softmax(second) else None
        if first is None:
            continue
        pairs = tuple(_pair(network, name) for node in (first, second) for name in node.input[:2])
        queries, keys = (network.shape(node.input[0]) or [0, 0] for node in (first, second))
        yield _Attention(first, second, pairs, queries[-1], (queries[-2], keys[-1]))


def _pair(network: Network, name: str) -> Pair | None:
    """The DequantizeLinear that an operand comes from, past what moves or scales it."""
    graph = network.graph
    name = graph.behind(name, (*_LAYOUT, *_BETWEEN, "Slice", "Gather", "Split", "Expand"))
    return network.pairs.get(name) if graph.operator(name) == DEQUANTIZE else None


def _in_part(network: Network, attention: _Attention) -> Iterator[Finding]:
    if not attention.kind:
        return
    if attention.pairs[2] is None:
        yield warning(
            "attention-softmax-bare",
            attention.second,
            "the softmax's output is not quantized: the two products run apart, or in 16 bits",
            "put Q and DQ behind the softmax",
        )
    readers = network.graph.ahead(attention.second.output[0], (*_LAYOUT, "Clip", "Sub"))
    if attention.kind == TensorProto.INT8 and not any(reader.op_type == QUANTIZE for reader in readers):
        what = "the output is not quantized, which the fused INT8 kernel needs"
        yield warning("attention-output-bare", attention.second, what, "put Q and DQ behind the product")


def _int8(attention: _Attention) -> Iterator[Finding]:
    longest = max(attention.lengths)
    if attention.size and attention.size not in INT8_HEADS:
        what = f"heads of {attention.size}: the fused INT8 kernel takes {', '.join(map(str, INT8_HEADS))}"
        yield warning("attention-size", attention.second, what, "leave this attention in 16 bits, or use FP8")
    if longest > INT8_SEQUENCE:
        what = f"a sequence of {longest}: the fused INT8 kernel takes up to {INT8_SEQUENCE}"
        yield warning("attention-size", attention.second, what, "leave this attention in 16 bits, or use FP8")


def _fp8(network: Network, attention: _Attention) -> Iterator[Finding]:
    yield warning(
        "attention-fp8",
        attention.second,
        "FP8 attention on Ada is fused from TensorRT 10.6 on",
        "use a later release, or leave this attention in 16 bits",
    )
    for product in (attention.first, attention.second):
        for name in product.input[:2]:
            maker = network.graph.producer.get(network.graph.behind(name, ("Cast", "Identity")))
            if maker is not None and maker.op_type in _BETWEEN and _pair(network, name) is not None:
                yield warning(
                    "attention-between",
                    product,
                    f"{maker.op_type} between DequantizeLinear and the product: FP8 attention is not fused over it",
                    "scale and transpose before the quantizer",
                )


def _plain(network: Network, attention: _Attention) -> Iterator[Finding]:
    """In 16 or 32 bits."""
    kind = network.types.get(attention.first.input[0])
    if kind == TensorProto.FLOAT:
        what = "in float32: the fused kernels take FP16, BF16, INT8 and FP8"
        yield warning(
            "attention-float32", attention.second, what, "write float16 around it, as the FP16 files have"
        )
    if kind not in HALVES:
        return
    low, high = HALF_HEADS
    if attention.size and (not low <= attention.size <= high or attention.size % HALF_STEP):
        what = f"heads of {attention.size}: the fused kernel in 16 bits takes multiples of {HALF_STEP} from {low} to {high}"
        yield warning("attention-size", attention.second, what, "use heads of another size")
    targets = network.targets
    if network.version.key != "tensorrt-10.13" or not targets or "SM120" in targets:
        where = "on SM120" if network.version.key == "tensorrt-10.13" else "of ViTs"
        yield warning(
            "attention-half-wrong",
            attention.second,
            f"attention in 16 bits: wrong results {where} were reported, without any error",
            "hold the engine to the float network before quantization is judged by it",
        )
