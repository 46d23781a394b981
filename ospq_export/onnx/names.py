"""Readable names in an exported file: nodes, tensors and constants are called by the model's module paths.

blocks.0.mlp.fc1/MatMul             a node: module path and operator, numbered where a module has several
blocks.0.mlp.fc1/MatMul.out         its output, unless it is a probe, the input or the logits
blocks.0.mlp.fc1.input.codes        what a quantizer gives; its constants are blocks.0.mlp.fc1.input.scale and .zero_point
blocks.0.mlp.fc1.weight.codes       a weight's integers; beside it .scale and .zero_point
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection
from typing import Any

TENSORRT_DOMAIN, DYNAMIC_QUANTIZE = "trt", "TRT_FP4DynamicQuantize"
"""TensorRT's operator that quantizes to E2M1 in blocks, with scales that it computes."""
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_CODES = ".codes"


def constant(graph: Any, name: str, array: Any) -> Any:
    """The constant of that name in an onnx_ir graph; it is made where there is none."""
    import onnx_ir as ir

    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def drop_unread(graph: Any) -> None:
    """Take constants that no node reads out of an onnx_ir graph."""
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def name_everything(model: Any, keep: Collection[str]) -> None:
    """Rename the nodes, tensors and constants of an onnx_ir model in place.

    Args:
        model: what torch's exporter made, with its provenance metadata.
        keep: names of tensors that stay: inputs, outputs, probes.
    """
    _name_nodes(model.graph)
    _name_quantizer_constants(model.graph)
    _separate_zero_points(model.graph)
    _name_constants(model.graph)
    for node in model.graph:
        for index, value in enumerate(node.outputs):
            if value.name not in keep:
                value.name = f"{node.name}.out" + (f"_{index}" if index else "")


def name_as_views(graph: Any) -> None:
    """Write reshapes of an onnx_ir graph as torch's exporter writes views, in place; the two differ only where a size is 0."""
    import onnx_ir as ir

    for node in (n for n in graph if n.op_type == "Reshape"):
        shape = node.inputs[1]
        # A 0 of a shape may stand for the size that there is.
        if not shape.is_initializer() or 0 in shape.const_value.numpy():
            continue
        if "allowzero" in node.attributes:
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)
        if shape.name.startswith("reshape"):
            shape.name = f"view{shape.name.removeprefix('reshape')}"


def name_sizes(graph: Any) -> None:
    """Call the images' free dimensions batch, height and width in an onnx_ir graph, wherever they stand alone; in place."""
    import onnx_ir as ir

    images = graph.inputs[0].shape
    pairs = zip((0, 2, 3), ("batch", "height", "width"), strict=True)
    names = {images[axis].value: name for axis, name in pairs if isinstance(images[axis], ir.SymbolicDim)}
    inner = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.outputs, *inner):
        if value.shape is not None and not value.shape.frozen:
            for axis, size in enumerate(value.shape):
                if isinstance(size, ir.SymbolicDim) and size.value in names:
                    value.shape[axis] = ir.SymbolicDim(names[size.value])


def _name_nodes(graph: Any) -> None:
    seen = Counter[str]()
    for node in graph:
        scope = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        # torch labels nodes that belong to no module with a name of its own that starts with an underscore.
        parts = [part for part in _literal_list(scope)[:-1] if part and not part.startswith("_")]
        base = f"{parts[-1] if parts else 'network'}/{node.op_type}"
        node.name = f"{base}_{seen[base]}" if base in seen else base
        seen[base] += 1


def _name_quantizer_constants(graph: Any) -> None:
    """Scales after their quantizer. The exporter merges equal constants: a shared one keeps the name of its first reader."""
    for node in graph:
        if node.op_type not in _QUANTIZERS:
            continue
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        if codes.name.endswith(_CODES):
            owner = codes.name.removesuffix(_CODES)
            for value, part in zip(node.inputs[1:], ("scale", "zero_point"), strict=False):
                _rename(graph, value, f"{owner}.{part}")


def _separate_zero_points(graph: Any) -> None:
    """A zero point of its own for every weight: what ONNX Runtime makes of each has one name (s8_to_u8.cc).

    With `session.x64quantprecision`, the option for processors that saturate, it converts weights with their zero points to
    uint8, and refuses a file in which two weights share one.
    """
    import onnx_ir as ir

    for node in graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3 or not node.inputs[0].is_initializer():
            continue
        codes, zero = node.inputs[0], node.inputs[2]
        if zero is None or len(zero.uses()) == 1:
            continue
        name = f"{codes.name.removesuffix(_CODES)}.zero_point"
        if name in graph.initializers:
            continue
        tensor = ir.tensor(zero.const_value.numpy(), name=name)
        own = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=zero.shape)
        graph.register_initializer(own)
        node.replace_input_with(2, own)


def _name_constants(graph: Any) -> None:
    """Constants that the exporter numbered, after the first node that reads them."""
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer():
                _rename(graph, value, f"{node.name}.constant_{index}")


def _rename(graph: Any, value: Any, name: str) -> None:
    if value is not None and value.name.startswith("val_") and name not in graph.initializers:
        value.name = name


def _literal_list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []


def hide_outputs(model: Any, kept: int) -> None:
    """Take the last outputs off an onnx_ir model, in place; their tensors become inner ones.

    Args:
        model: an onnx_ir model.
        kept: how many outputs stay.
    """
    # One at a time: a value that `del outputs[kept:]` removes still takes itself for an output, and is then never described.
    while len(model.graph.outputs) > kept:
        model.graph.outputs.pop()


def describe_inner_only(proto: Any) -> None:
    """Drop the descriptions of all but inner tensors from an `onnx.ModelProto`, in place; of two of a tensor, the first stays."""
    graph = proto.graph
    inner = {name for node in graph.node for name in node.output if name}
    inner -= {value.name for value in graph.output}
    kept: dict[str, Any] = {}
    for info in graph.value_info:
        if info.name in inner:
            kept.setdefault(info.name, info.SerializeToString())
    del graph.value_info[:]
    for info in kept.values():
        graph.value_info.add().ParseFromString(info)
