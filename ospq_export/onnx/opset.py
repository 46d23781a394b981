"""Versions of ONNX's operators that a file can be written in, and the last step down, to what torch's exporter does not write.

torch's exporter writes 18 and above, and decomposes what came later: below 20 there is no Gelu. From 18 to 17 the operators are
rewritten here one by one. A form of 18 that 17 does not have is refused, whatever operator it belongs to: the two versions of its
schema tell. What an older opset has but older parsers do not know, or read otherwise, is rewritten in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ospq_export.errors import InputError
from ospq_export.onnx.names import constant, drop_unread

LOWEST = 17
# What torch's exporter starts from.
EXPORTED = 18
# Q and DQ take float16 from here on; below they are float32.
HALF_QUANTIZERS = 19
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


def ir_version(opset: int) -> int:
    """The first version of ONNX's file format that has an opset."""
    from onnx import helper

    return int(helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))


def for_older_parsers(model: Any) -> None:
    """Write without CastLike, and without a Shape of some dimensions only, in place.

    TensorRT 8.6 has no CastLike, and 9.1 still reads a Shape without its start and end: onnx/lint/versions.json.

    Args:
        model: an onnx_ir model, as torch's exporter translated it.
    """
    for node in list(model.graph):
        if rewrite := _FOR_OLDER_PARSERS.get(node.op_type):
            rewrite(model.graph, node)


def to_lowest(model: Any) -> None:
    """Rewrite a graph of opset 18 in opset 17, in place; what it computes stays the same.

    Args:
        model: an onnx_ir model, as torch's exporter translated it.

    Raises:
        InputError: an operator has a form that opset 17 lacks.
    """
    for node in list(model.graph):
        rewrite = _REWRITES.get(node.op_type)
        if rewrite is not None:
            rewrite(model.graph, node)
        if problem := _newer(node):
            raise InputError(
                f"the network needs {problem}, which ONNX has from opset {EXPORTED} on",
                where=f"`opset` {LOWEST}",
                fix=f"give {EXPORTED} or more",
            )
    drop_unread(model.graph)
    model.graph.opset_imports[""] = LOWEST


def _newer(node: Any) -> str:
    """What of an operator opset 17 does not have; empty where it has all."""
    from onnx import defs

    if node.domain not in ("", "ai.onnx") or _since(node.op_type, LOWEST) == _since(node.op_type, EXPORTED):
        return ""
    if not _since(node.op_type, LOWEST):
        return str(node.op_type)
    schema = defs.get_schema(node.op_type, LOWEST)
    unknown = sorted(node.attributes.keys() - schema.attributes.keys())
    inputs = [value for value in node.inputs[schema.max_input :] if value is not None]
    if unknown or inputs:
        return f"{node.op_type} with {unknown[0] if unknown else f'{len(node.inputs)} inputs'}"
    if node.op_type.startswith("Scatter") and _text(node, "reduction", "none") not in ("none", "add", "mul"):
        return f"{node.op_type} with reduction {_text(node, 'reduction', '')}"
    return ""


def _since(operator: str, opset: int) -> int:
    from onnx import defs

    if not defs.has(operator, domain="", max_inclusive_version=opset):
        return 0
    return int(defs.get_schema(operator, opset).since_version)


def _text(node: Any, name: str, default: str) -> str:
    return str(node.attributes[name].as_string()) if name in node.attributes else default


def _reduce(_graph: Any, node: Any) -> None:
    """Axes are an attribute, and no axes are all of them."""
    import onnx_ir as ir

    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = None if given is None else _constant_values(given)
    if given is not None and axes is None:
        return
    if axes is not None and axes.size:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes.ravel().tolist())
    elif node.attributes.get_int("noop_with_empty_axes", 0):
        return
    node.attributes.pop("noop_with_empty_axes", None)
    if given is not None:
        node.resize_inputs(1)


def _split(graph: Any, node: Any) -> None:
    """Parts have their sizes written down."""
    parts = node.attributes.get_int("num_outputs", 0)
    shape = node.inputs[0].shape
    size = shape[node.attributes.get_int("axis", 0)] if parts and shape is not None else None
    if isinstance(size, int):
        each = -(-size // parts)
        sizes = [each] * (parts - 1) + [size - each * (parts - 1)]
        name = f"sizes_{'_'.join(map(str, sizes))}"
        node.resize_inputs(2)
        node.replace_input_with(1, constant(graph, name, np.array(sizes, np.int64)))
        del node.attributes["num_outputs"]


def _cast_like(_graph: Any, node: Any) -> None:
    """The type is known: TensorRT 8.6 has a Cast and no CastLike."""
    import onnx_ir as ir

    kind = node.inputs[1].dtype
    if kind is not None:
        node.resize_inputs(1)
        node.op_type = "Cast"
        node.attributes["to"] = ir.AttrInt64("to", int(kind))


def _shape(graph: Any, node: Any) -> None:
    """A Shape, and a Slice of it."""
    import onnx_ir as ir

    start, end = (node.attributes.get_int(name, None) for name in ("start", "end"))
    if not start and end is None:
        return
    bounds = [constant(graph, f"from_{start or 0}", np.array([start or 0], np.int64))]
    last = np.iinfo(np.int64).max if end is None else end
    bounds.append(constant(graph, f"to_{'end' if end is None else end}", np.array([last], np.int64)))
    node.attributes.pop("start", None)
    node.attributes.pop("end", None)
    whole = node.outputs[0]
    part = ir.node("Slice", [whole, *bounds])
    part.metadata_props.update(node.metadata_props)
    graph.insert_after(node, part)
    result = part.outputs[0]
    result.shape, result.type = whole.shape, whole.type
    for reader, index in list(whole.uses()):
        if reader is not part:
            reader.replace_input_with(index, result)
    rank = node.inputs[0].shape
    whole.shape = None if rank is None else ir.Shape([len(rank)])


def _resize(_graph: Any, node: Any) -> None:
    """Without attributes that only say what is so anyway."""
    if not node.attributes.get_int("antialias", 0):
        node.attributes.pop("antialias", None)
    if _text(node, "keep_aspect_ratio_policy", "stretch") == "stretch":
        node.attributes.pop("keep_aspect_ratio_policy", None)


def _mish(graph: Any, node: Any) -> None:
    """Mish as x * tanh(softplus(x))."""
    import onnx_ir as ir

    x, result = node.inputs[0], node.outputs[0]
    made = list[Any]()
    for operator in ("Softplus", "Tanh"):
        step = ir.node(operator, [made[-1] if made else x])
        step.metadata_props.update(node.metadata_props)
        graph.insert_before(node, step)
        step.outputs[0].shape, step.outputs[0].type = result.shape, result.type
        made.append(step.outputs[0])
    node.op_type = "Mul"
    node.resize_inputs(2)
    node.replace_input_with(1, made[-1])


def _constant_values(value: Any) -> Any:
    """A constant's values, of an initializer or a Constant; None where the value is computed."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


_REWRITES: dict[str, Callable[[Any, Any], None]] = {
    **{f"Reduce{name}": _reduce for name in _REDUCTIONS},
    "Split": _split,
    "Resize": _resize,
    "Mish": _mish,
}
_FOR_OLDER_PARSERS: dict[str, Callable[[Any, Any], None]] = {"CastLike": _cast_like, "Shape": _shape}
