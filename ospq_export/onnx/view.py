"""Questions about an ONNX graph that linting and plan reading share: who computes, who reads, which shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ospq_export.onnx import own
from ospq_export.onnx.read import values
from ospq_export.onnx.shapes import infer_shapes

PRODUCTS = ("MatMul", "Gemm", "Conv")
# What lies between an operand and its DequantizeLinear without changing values.
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Flatten", "Slice", "Expand")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# What else may lie there where it is quantized on the way.
_QUANTIZED = (*MOVES, QUANTIZE, DEQUANTIZE, *own.QUANTIZERS, *own.DEQUANTIZERS, "Clip", "Sub")


class OnnxGraph:
    """Read-only view of an `onnx.ModelProto`, flat: local functions inlined, the bodies of If, Loop and Scan beside the rest.

    Args:
        model: an `onnx.ModelProto`.
        where: the file that it was read from, for errors and for what lies beside it.

    Raises:
        InputError: its shapes or types contradict each other.

    Attributes:
        folder: where its external data lies.
        opset: version of the standard operators.
        layer_names: operator and name of every node as the file has them, those of a local function once per call.
        nodes: in the file's order; a body's nodes come before the node it belongs to. A body's tensor whose name is taken
            elsewhere has another name here.
        scopes: by a node's first output: the operators whose bodies it lies in, outermost first; empty in the main graph.
        producer: node by the name of the tensor it computes.
        readers: nodes by the name of a tensor they read.
        constants: initializers and Constant nodes by name.
        inputs, outputs: the main graph's names.
        shapes: inferred dimensions by tensor name; 0 where unknown or symbolic. A tensor of unknown rank is missing.
        dtypes: inferred element types by tensor name.
    """

    def __init__(self, model: Any, where: Path | None = None) -> None:
        from onnx import inliner

        self.folder = Path() if where is None else where.parent
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        functions = {(f.domain, f.name): f for f in model.functions}
        self.layer_names = list(_layer_names(model.graph.node, functions))
        if functions:
            model = inliner.inline_local_functions(model)
        self.nodes: list[Any] = []
        self.scopes: dict[str, tuple[str, ...]] = {}
        self.constants: dict[str, Any] = {}
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, int] = {}
        self.inputs = {value.name for value in model.graph.input}
        self.outputs = {value.name for value in model.graph.output}
        self._flatten(model.graph, infer_shapes(model, where).graph, (), {})
        self.producer: dict[str, Any] = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def _flatten(self, graph: Any, inferred: Any, scope: tuple[str, ...], outer: dict[str, str]) -> None:
        names = dict(outer)
        for name in _defined(graph):
            taken = any(name in known for known in (self.shapes, self.dtypes, self.scopes, self.constants))
            names[name] = "/".join((*scope, name, str(len(self.nodes)))) if scope and taken else name
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            kind = value.type.tensor_type
            self.dtypes[names.get(value.name, value.name)] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[names.get(value.name, value.name)] = [d.dim_value for d in kind.shape.dim]
        for tensor in graph.initializer:
            self._constant(names[tensor.name], tensor)
        for node, typed in zip(graph.node, inferred.node, strict=True):
            for attribute, body in zip(node.attribute, typed.attribute, strict=True):
                if attribute.HasField("g"):
                    inner = (*scope, f"{node.op_type}:{attribute.name}")
                    self._flatten(attribute.g, body.g, inner, names)
            self._add(_renamed(node, names) if scope else node, scope)

    def _add(self, node: Any, scope: tuple[str, ...]) -> None:
        self.nodes.append(node)
        self.scopes.update((name, scope) for name in node.output if name)
        if node.op_type == "Constant" and (tensor := _constant_tensor(node)) is not None:
            self._constant(node.output[0], tensor)

    def _constant(self, name: str, tensor: Any) -> None:
        self.constants[name] = tensor
        self.shapes[name] = list(tensor.dims)
        self.dtypes[name] = tensor.data_type

    def scope(self, node: Any) -> tuple[str, ...]:
        """The operators whose bodies a node lies in, outermost first."""
        return self.scopes.get(node.output[0], ())

    def array(self, name: str) -> Any:
        """A constant's values, or None where the tensor is computed."""
        tensor = self.constants.get(name)
        return None if tensor is None else values(tensor, self.folder)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor depends on no input: a constant, or computed from constants only."""
        variable = self.ancestors([name]) - self.constants.keys() - {""}
        makers = [self.producer.get(name) for name in variable]
        return all(node is not None and node.op_type not in ("If", "Loop", "Scan") for node in makers)

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """These tensors and all that they are computed from."""
        known: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in known and name in self.producer:
                waiting.extend(self.producer[name].input)
            known.add(name)
        return known

    def source(self, name: str, steps: int = 1) -> Any:
        """The node that computes a tensor, past what only moves it; None for an input or a constant.

        Args:
            name: the tensor.
            steps: how many such nodes to go back, each time to the first input.
        """
        node = self.producer.get(self.behind(name, MOVES))
        return node if node is None or steps == 1 else self.source(node.input[0], steps - 1)

    def operator(self, name: str) -> str:
        """The type of the operator that computes a tensor; empty for an input or a constant."""
        return self.producer[name].op_type if name in self.producer else ""

    def unquantized(self, node: Any) -> str:
        """Which of a product's two operands come from no DequantizeLinear, in words; empty where none."""
        sources = [self.source(name) for name in node.input[:2]]
        return ", ".join(
            f"operand {index} is not quantized"
            for index, source in enumerate(sources)
            if source is None or source.op_type != DEQUANTIZE
        )

    def behind(self, name: str, operators: Collection[str]) -> str:
        """The tensor that a tensor is made of, past operators of these types, each followed to its first input."""
        while self.operator(name) in operators:
            name = self.producer[name].input[0]
        return name

    def ahead(self, name: str, operators: Collection[str]) -> Iterator[Any]:
        """The nodes that read a tensor, past operators of these types."""
        for reader in self.readers[name]:
            if reader.op_type in operators:
                yield from self.ahead(reader.output[0], operators)
            else:
                yield reader

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        from onnx import helper

        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    def reads_softmax(self, node: Any) -> bool:
        """Whether a product's left operand is a softmax's output, quantized or not: the second half of an attention."""
        return node.op_type == "MatMul" and self.operator(self.behind(node.input[0], _QUANTIZED)) == "Softmax"

    def logits(self, node: Any) -> str:
        """What the softmax reads whose output is a product's left operand (`reads_softmax`)."""
        return str(self.producer[self.behind(node.input[0], _QUANTIZED)].input[0])


def _layer_names(nodes: Any, functions: dict[tuple[str, str], Any]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _layer_names(attribute.g.node, functions)
        function = functions.get((node.domain, node.op_type))
        if function is None:
            yield node.op_type, node.name
        else:
            yield from _layer_names(function.node, functions)


def _defined(graph: Any) -> Iterator[str]:
    """Names that a graph gives to tensors, without those of its bodies."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from (name for name in node.output if name)


def _renamed(node: Any, names: dict[str, str]) -> Any:
    from onnx import NodeProto

    result = NodeProto()
    result.CopyFrom(node)
    for side in (result.input, result.output):
        for index, name in enumerate(side):
            side[index] = names.get(name, name)
    return result


def _constant_tensor(node: Any) -> Any:
    """A Constant node's value as a tensor; None for a sparse one or a string."""
    import numpy as np
    from onnx import helper, numpy_helper

    if not node.attribute:
        return None
    name = node.attribute[0].name
    value = helper.get_attribute_value(node.attribute[0])
    if name == "value":
        return value
    kind = {"value_float": np.float32, "value_int": np.int64}.get(name.removesuffix("s"))
    return None if kind is None else numpy_helper.from_array(np.asarray(value, kind), node.output[0])
