"""What an exported file says of its inner tensors: each once, by its present type and shape, and nothing of any other tensor.

`GraphProto.value_info` is for the tensors between nodes. Constants, inputs and outputs are described where they are declared; a
second description contradicts the first as soon as a tool transposes a weight or gives an input another shape.
"""

from __future__ import annotations

from typing import Any


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
