"""Shapes and types of an ONNX graph's inner tensors, inferred without its weights.

onnx serializes a model to infer its shapes, and protobuf serializes no message of more than 2 GiB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ospq_export.errors import InputError, reason_of
from ospq_export.onnx.read import SMALL_BYTES, is_external


def infer_shapes(
    model: Any, where: Path | None = None, *, strict: bool = False, data_prop: bool = False
) -> Any:
    """A model's structure with the shapes and element types of its inner tensors, without its large values.

    Element types that are written down count only where the operators do not give them: no parser reads them, tools that
    change types leave old ones behind (nvidia-modelopt does), and inference gives up where the two differ.

    Args:
        model: an `onnx.ModelProto`, of any size.
        where: the file that it was read from, for the error.
        strict: whether an operator whose shapes cannot be inferred is an error.
        data_prop: whether small values, shapes say, are propagated as well.

    Raises:
        InputError: those written down contradict the operators. ONNX's checker does not look at them.
    """
    from onnx import shape_inference

    from ospq_export.onnx import own

    structure = hollow(model)
    own.describe(structure)
    written = _forget_types(structure.graph)
    try:
        inferred = shape_inference.infer_shapes(structure, strict_mode=strict, data_prop=data_prop)
    except shape_inference.InferenceError as error:
        what = f"the ONNX graph's shapes or types contradict each other: {reason_of(error)}"
        raise InputError(what, where=where, fix="export it again") from error
    for value in inferred.graph.value_info:
        kind = value.type.tensor_type
        kind.elem_type = kind.elem_type or written.get(value.name, 0)
    return inferred


def _forget_types(graph: Any) -> dict[str, int]:
    """Take the element types from a graph's `value_info`, in place; they are returned by name."""
    written = {
        v.name: v.type.tensor_type.elem_type for v in graph.value_info if v.type.HasField("tensor_type")
    }
    for value in graph.value_info:
        if value.name in written:
            value.type.tensor_type.elem_type = 0
    return written


def hollow(model: Any) -> Any:
    """A copy of an `onnx.ModelProto` whose large constants have a name, a shape and a type, but no values.

    They are marked as external data that nobody reads, which inference of shapes takes for "not known". Bodies of If, Loop
    and Scan get their own copies of small integers from outside: inference looks for axes and shapes in the same graph only.
    """
    from onnx import ModelProto

    result = ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            _hollow_graph(value, result.graph, {})
        elif field.name == "functions":
            for function in value:
                _hollow_graph(function, result.functions.add(), {})
        else:
            _take(result, field.name, value)
    return result


def _hollow_graph(source: Any, target: Any, outer: dict[str, Any]) -> None:
    """Of a graph or of a function; `outer` has the small integers of the graphs around it by name."""
    known = {**outer, **_small_integers(source)}
    for field, value in source.ListFields():
        if field.name == "initializer":
            target.initializer.extend(_stand_in(tensor) for tensor in value)
        elif field.name == "node":
            for node in value:
                _hollow_node(node, target.node.add(), known)
        else:
            _take(target, field.name, value)
    if outer:
        read = {name for node in source.node for name in node.input}
        own = {value.name for value in (*source.input, *source.initializer)}
        own.update(name for node in source.node for name in node.output)
        target.initializer.extend(outer[name] for name in sorted(read & outer.keys() - own))


def _small_integers(graph: Any) -> dict[str, Any]:
    """Integer constants of a graph that inference may ask for, by name, each under its own name."""
    from onnx import TensorProto

    tensors = {tensor.name: tensor for tensor in getattr(graph, "initializer", ())}
    for node in graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    result = {}
    for name, tensor in tensors.items():
        small = not is_external(tensor) and tensor.ByteSize() <= SMALL_BYTES
        if small and tensor.data_type in (TensorProto.INT64, TensorProto.INT32):
            result[name] = TensorProto()
            result[name].CopyFrom(tensor)
            result[name].name = name
    return result


def _hollow_node(source: Any, target: Any, known: dict[str, Any]) -> None:
    from onnx import GraphProto

    target.CopyFrom(source)
    for attribute in target.attribute:
        if attribute.HasField("t"):
            attribute.t.CopyFrom(_stand_in(attribute.t))
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            emptied = GraphProto()
            _hollow_graph(graph, emptied, known)
            graph.CopyFrom(emptied)


def _take(target: Any, name: str, value: Any) -> None:
    if isinstance(value, str | bytes | int | float):
        setattr(target, name, value)
    else:
        getattr(target, name).MergeFrom(value)


def _stand_in(tensor: Any) -> Any:
    from onnx import StringStringEntryProto, TensorProto

    if is_external(tensor) or tensor.ByteSize() <= SMALL_BYTES:
        return tensor
    return TensorProto(
        name=tensor.name,
        dims=tensor.dims,
        data_type=tensor.data_type,
        data_location=TensorProto.EXTERNAL,
        external_data=[StringStringEntryProto(key="location", value="nowhere")],
    )
