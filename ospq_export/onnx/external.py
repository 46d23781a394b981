"""Weights beside an ONNX file, where one protobuf message cannot hold them: ONNX's external data.

One file of weights belongs to one ONNX file, is always written anew, and its hash stands in the ONNX file's metadata, so that the
one is never taken for another's: https://onnx.ai/onnx/repo-docs/ExternalData.html.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ospq_export.onnx import serialize
from ospq_export.onnx.read import DATA_SHA256
from ospq_export.runs.files import data_file, replacing, sha256

log = logging.getLogger(__name__)

# In a file that is too large, constants beyond this size, in bytes, lie beside it; the rest, shapes above all, stays inside.
EXTERNAL_BYTES = 1 << 10
# What the standard recommends for mapping into memory: a page, and for large tensors the unit that Windows maps in.
_PAGE, _WINDOWS_UNIT, _LARGE = 1 << 12, 1 << 16, 1 << 20


def save(proto: Any, tensors: Sequence[Any], path: Path) -> None:
    """Write a split model as one file, or as two where one would be too large; whichever it was before.

    Args:
        proto: what `serialize.split` gave; its graph is cleared.
        tensors: the constants that it lacks.
        path: the ONNX file; its weights go to `runs.files.data_file(path)`.

    Raises:
        InputError: a file cannot be written, or is too large even without its weights.
    """
    data = data_file(path)
    if serialize.file_bytes(proto, tensors) <= serialize.MAX_BYTES:
        with replacing(path) as temporary:
            serialize.write(proto, list(tensors), temporary, path)
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
        serialize.write(proto, [], temporary, path)
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
