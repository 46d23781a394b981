"""Writing a model to one file without holding its weights twice.

protobuf builds a whole message in memory, and once more as bytes. Here the graph is serialized, and checked, without its large
constants; these follow one by one, as more of the same message's fields: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ospq_export.errors import InputError
from ospq_export.onnx.read import DATA_SHA256
from ospq_export.runs.files import (
    FLOAT_ONNX,
    FLOAT_TENSORS,
    QUANTIZED_ONNX,
    QUANTIZED_TENSORS,
    data_file,
    replacing,
    sha256,
)
from ospq_export.world.room import gigabytes

# What protobuf allows one message to have, less room for those who read a file and write it again with more in it: the shapes of
# all inner tensors, more outputs, another graph of the same weights.
ONNX_BYTES = (1 << 31) - 1 - (1 << 26)
# Constants beyond this size, in bytes, are streamed; shapes, axes, scales and zero points stay where shape inference sees them.
STREAMED_BYTES = 1 << 18
# What is larger goes to two files, see `save`.
MAX_BYTES = ONNX_BYTES
# Field numbers of onnx.proto3: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_LENGTH_DELIMITED = 2
log = logging.getLogger(__name__)
# In a file that is too large, constants beyond this size, in bytes, lie beside it; the rest, shapes above all, stays inside.
EXTERNAL_BYTES = 1 << 10
# What the standard recommends for mapping into memory: a page, and for large tensors the unit that Windows maps in.
_PAGE, _WINDOWS_UNIT, _LARGE = 1 << 12, 1 << 16, 1 << 20


def files_summary(weights: int, quantized: int, most: int) -> str:
    """One line for people: what the files of a run and of its export will weigh.

    Args:
        weights: bytes of the float constants.
        quantized: bytes of the same where the quantized weights are codes of one byte.
        most: bytes that one ONNX file holds; more lies beside it.
    """
    exported = [
        f"{name} {gigabytes(size)}{' (its weights in a file beside it)' if size > most else ''}"
        for name, size in ((QUANTIZED_ONNX, quantized), (FLOAT_ONNX, weights))
    ]
    kept = f"{FLOAT_TENSORS} {gigabytes(weights)}, {QUANTIZED_TENSORS} {gigabytes(quantized)}"
    return f"files: {kept}; of an export: {', '.join(exported)}"


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
        value = onnx.helper.make_tensor_value_info(tensor.name, int(tensor.dtype), tensor.shape.numpy())
        proto.graph.input.append(value)
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
    streamed = sum(len(_header(tensor)) + int(tensor.nbytes) for tensor in tensors)
    # Tag and length of the graph, once more: with the streamed constants the length may need more bytes.
    return int(proto.ByteSize()) + streamed + len(_field(_GRAPH, streamed))


def write(proto: Any, tensors: Sequence[Any], path: Path, where: Path) -> None:
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
    total = len(graph) + sum(map(len, headers)) + sum(tensor.nbytes for tensor in tensors)
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
        for header, tensor in zip(headers, tensors, strict=True):
            file.write(header)
            file.write(tensor.tobytes())


def _header(tensor: Any) -> bytes:
    """A graph's initializer up to its data."""
    import onnx

    proto = onnx.TensorProto(dims=tensor.shape.numpy(), data_type=int(tensor.dtype), name=tensor.name)
    described = bytes(proto.SerializeToString(deterministic=True)) + _field(_RAW_DATA, tensor.nbytes)
    return _field(_INITIALIZER, len(described) + int(tensor.nbytes)) + described


def _field(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return bytes([*_varint(number << 3 | _LENGTH_DELIMITED), *_varint(length)])


def _varint(value: int) -> Iterator[int]:
    """Seven bits per byte, the least first; the eighth says that more follow."""
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def save(proto: Any, tensors: Sequence[Any], path: Path) -> None:
    """Write a split model as one file, or as two where one would be too large; whichever it was before.

    Args:
        proto: what `split` gave; its graph is cleared.
        tensors: the constants that it lacks.
        path: the ONNX file; its weights go to `runs.files.data_file(path)`.

    Raises:
        InputError: a file cannot be written, or is too large even without its weights.
    """
    data = data_file(path)
    if file_bytes(proto, tensors) <= MAX_BYTES:
        with replacing(path) as temporary:
            write(proto, tensors, temporary, path)
        data.unlink(missing_ok=True)
        return
    outside = [*tensors, *_unloaded(proto)]
    # The weights take their place first: an ONNX file never stands beside those of the one before it.
    with replacing(path) as temporary, replacing(data) as weights:
        offsets = _write(outside, weights)
        proto.graph.initializer.extend(
            _reference(tensor, data.name, offset) for tensor, offset in zip(outside, offsets, strict=True)
        )
        proto.metadata_props.add(key=DATA_SHA256, value=sha256(weights))
        write(proto, [], temporary, path)
    log.info("%s is too large for one file: its weights are in %s", path.name, data.name)


def _unloaded(proto: Any) -> list[Any]:
    """Take the constants of medium size out of a split model, as onnx_ir tensors; integers that may be shapes stay."""
    import onnx_ir as ir
    from onnx import TensorProto

    kept: list[Any] = []
    taken: list[Any] = []
    for tensor in proto.graph.initializer:
        moves = tensor.ByteSize() > EXTERNAL_BYTES and tensor.data_type != TensorProto.INT64
        copy = TensorProto()
        copy.CopyFrom(tensor)
        (taken if moves else kept).append(copy)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return [ir.serde.TensorProtoTensor(tensor) for tensor in taken]


def _write(tensors: Sequence[Any], path: Path) -> list[int]:
    """Write tensors one after the other, each where it may be mapped; where each begins, in bytes."""
    offsets = []
    with path.open("wb") as file:
        for tensor in tensors:
            unit = _WINDOWS_UNIT if tensor.nbytes > _LARGE else _PAGE
            file.seek(-file.tell() % unit, 1)
            offsets.append(file.tell())
            tensor.tofile(file)
    return offsets


def _reference(tensor: Any, location: str, offset: int) -> Any:
    """A TensorProto that says where its values lie."""
    from onnx import StringStringEntryProto, TensorProto

    entries = {"location": location, "offset": str(offset), "length": str(tensor.nbytes)}
    return TensorProto(
        dims=tensor.shape.numpy(),
        data_type=int(tensor.dtype),
        name=tensor.name,
        data_location=TensorProto.EXTERNAL,
        external_data=[StringStringEntryProto(key=key, value=value) for key, value in entries.items()],
    )
