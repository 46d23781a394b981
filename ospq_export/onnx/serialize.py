"""Writing a model to one file without holding its weights twice.

protobuf builds a whole message in memory, and once more as bytes. Here the graph is serialized, and checked, without its large
constants; these follow one by one, as more of the same message's fields: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ospq_export.errors import InputError
from ospq_export.onnx.sizes import ONNX_BYTES

# Constants beyond this size, in bytes, are streamed; shapes, axes, scales and zero points stay where shape inference sees them.
STREAMED_BYTES = 1 << 18
# What is larger goes to two files, see `external`.
MAX_BYTES = ONNX_BYTES
# Field numbers of onnx.proto3: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_LENGTH_DELIMITED = 2


def split(model: Any) -> tuple[Any, list[Any]]:
    """A model's protobuf without its large constants, and these as onnx_ir tensors.

    Args:
        model: an onnx_ir model; its large constants are taken out of it.
    """
    import onnx_ir as ir

    graph = model.graph
    large = [v for v in graph.initializers.values() if v.const_value.nbytes > STREAMED_BYTES]
    tensors = [value.const_value for value in large]
    for value in large:
        del graph.initializers[value.name]
        # onnxscript's rules hold on to the last graph they saw.
        value.const_value = None
    return ir.serde.serialize_model(model), tensors


def check(proto: Any, tensors: list[Any], where: Path) -> None:
    """Hold a split model to the ONNX standard, shapes and types included; the tensors stand in as inputs.

    Raises:
        InputError: it is not valid.
    """
    import onnx

    declared = len(proto.graph.input)
    for tensor in tensors:
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, int(tensor.dtype), tensor.shape.numpy())
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            f"the exported file is not valid ONNX: {error}", where=where, fix="report this model"
        ) from error
    finally:
        del proto.graph.input[declared:]


def file_bytes(proto: Any, tensors: Sequence[Any]) -> int:
    """What `write` would make of a split model, in bytes: known before anything is written."""
    streamed = sum(_streamed_bytes(tensor) for tensor in tensors)
    # Tag and length of the graph, once more: with the streamed constants the length may need more bytes.
    return int(proto.ByteSize()) + streamed + len(_field(_GRAPH, streamed))


def _streamed_bytes(tensor: Any) -> int:
    size = len(_header(tensor)) + int(tensor.nbytes)
    return len(_field(_INITIALIZER, size)) + size


def write(proto: Any, tensors: list[Any], path: Path, where: Path) -> None:
    """Write a split model as one ordinary ONNX file.

    Args:
        proto: what `split` gave; its graph is cleared.
        tensors: the constants that it lacks.
        path: the file to write.
        where: what an error names.

    Raises:
        InputError: the file would be larger than `MAX_BYTES`.
    """
    graph = proto.graph.SerializeToString(deterministic=True)
    headers = [_header(tensor) for tensor in tensors]
    sizes = [len(header) + tensor.nbytes for header, tensor in zip(headers, tensors, strict=True)]
    total = len(graph) + sum(len(_field(_INITIALIZER, size)) + size for size in sizes)
    if total > MAX_BYTES:
        raise InputError(
            f"the file would have {total / 1e9:.2f} GB, one ONNX file holds {MAX_BYTES / 1e9:.2f}",
            where=where,
            fix="this model is too large",
        )
    proto.ClearField("graph")
    with path.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.write(_field(_GRAPH, total))
        file.write(graph)
        for header, tensor, size in zip(headers, tensors, sizes, strict=True):
            file.write(_field(_INITIALIZER, size))
            file.write(header)
            file.write(tensor.tobytes())


def _header(tensor: Any) -> bytes:
    """A TensorProto up to its data."""
    import onnx

    proto = onnx.TensorProto(dims=tensor.shape.numpy(), data_type=int(tensor.dtype), name=tensor.name)
    return bytes(proto.SerializeToString(deterministic=True)) + _field(_RAW_DATA, tensor.nbytes)


def _field(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return bytes([*_varint(number << 3 | _LENGTH_DELIMITED), *_varint(length)])


def _varint(value: int) -> Iterator[int]:
    """Seven bits per byte, the least first; the eighth says that more follow."""
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
