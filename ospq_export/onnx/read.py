"""Reading any ONNX file, whatever it weighs.

Weights may lie in the file or beside it as external data (https://onnx.ai/onnx/repo-docs/ExternalData.html). The large ones
beside it stay there: who asks for their values gets them from the file, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ospq_export.errors import InputError, reason_of
from ospq_export.runs.files import sha256

# protobuf's own limit of a message.
PROTOBUF_BYTES = (1 << 31) - 1
# Constants up to this size are read with the file: scales, zero points, axes and shapes are among them.
SMALL_BYTES = 1 << 18
# A file of ours says here what the file of its external data must be.
DATA_SHA256 = "external_data_sha256"
_AGAIN = "export it again"
_BOTH = "put it back beside the ONNX file, or export again"


def read_model(path: Path) -> Any:
    """Read and check an ONNX file.

    Args:
        path: protobuf, or a text form that onnx knows by its extension.

    Returns:
        An `onnx.ModelProto`; constants above `SMALL_BYTES` that lie beside the file are still marked as external: `values` reads
        them.

    Raises:
        InputError: it cannot be read, is not valid ONNX, or its external data is missing, too short, outside of the file's
            folder or another export's.
    """
    import onnx

    _check_size(path)
    try:
        if _is_text(path):
            model = _load(path)
            onnx.checker.check_model(model)
        elif (shapeless := _without_output_shapes(path)) is not None:
            model = shapeless
        else:
            # By its path: the checker sees the external data then, and serializes nothing. It comes first: what it needs in
            # memory is free again when the file is read.
            onnx.checker.check_model(str(path))
            model = _load(path)
    except InputError:
        raise
    except Exception as error:
        # protobuf, the checker and the file system each raise their own types.
        _check_external_data(path)
        raise InputError(f"not a valid ONNX file: {why_unreadable(error)}", where=path, fix=_AGAIN) from error
    check_external(model, path)
    return model


def _load(path: Path) -> Any:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    check_text(model, path)
    return model


def check_text(model: Any, path: Path) -> None:
    """Refuse a model with text that is not UTF-8: protobuf hands it over as bytes, which nobody expects in a name's place.

    Args:
        model: an `onnx.ModelProto` as read from `path`.
        path: its file.

    Raises:
        InputError: there is such text.
    """
    waiting = [model]
    while waiting:
        message = waiting.pop()
        for field in message.DESCRIPTOR.fields:
            # Values of tensors are of other types: they are not touched.
            if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
                continue
            held = getattr(message, field.name)
            if field.type == field.TYPE_MESSAGE:
                single = hasattr(held, "DESCRIPTOR")
                waiting.extend(held if not single else [held] if message.HasField(field.name) else [])
            elif any(isinstance(text, bytes) for text in ([held] if isinstance(held, str | bytes) else held)):
                what = f"not a valid ONNX file: {field.full_name} is not UTF-8"
                raise InputError(what, where=path, fix=_AGAIN)


def why_unreadable(error: Exception) -> str:
    """What an exception of reading an ONNX file says; protobuf's own says nothing to whoever has not written a parser."""
    return (
        "it is damaged, or of another format" if type(error).__name__ == "DecodeError" else reason_of(error)
    )


def check_place(path: Path) -> None:
    """Refuse what cannot be opened as a file.

    Raises:
        InputError: it is a directory, there is no such file, or it may not be read.
    """
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.onnx"))
        fix = f"give its {' or '.join(inside)}" if inside else "give a file, such as the model.onnx of a run"
        raise InputError("a directory, not an ONNX file", where=path, fix=fix)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        what = f"the ONNX file cannot be read: {reason_of(error)}"
        raise InputError(what, where=path, fix="check the path") from error


def _check_size(path: Path) -> None:
    check_place(path)
    size = path.stat().st_size
    if size > PROTOBUF_BYTES:
        raise InputError(
            f"not a valid ONNX file: it has {size / 2**30:.2f} GiB, one protobuf message holds 2",
            where=path,
            fix="save the model with external data",
        )


def _without_output_shapes(path: Path) -> Any:
    """The model of a file with an output that states no shape, checked but for that; None where all state one.

    The format allows it (`TypeProto.Tensor.shape` is optional), onnx's checker does not.
    """
    import onnx

    model = _load(path)
    tensors = [v.type.tensor_type for v in model.graph.output if v.type.HasField("tensor_type")]
    bare = [kind for kind in tensors if not kind.HasField("shape")]
    if not bare:
        return None
    # The checker finds external data by the file's path only, and by its path it would see the file as it is.
    if not any(map(is_external, tensors_of(model))):
        for kind in bare:
            kind.shape.SetInParent()
        onnx.checker.check_model(model)
        for kind in bare:
            kind.ClearField("shape")
    return model


def _is_text(path: Path) -> bool:
    from onnx.serialization import registry

    return registry.get_format_from_file_extension(path.suffix) not in (None, "protobuf")


def _check_external_data(path: Path) -> None:
    """Say what is wrong with external data in words of ours, where that is what the checker found."""
    try:
        model = _load(path)
    except InputError:
        raise
    except Exception:
        # Whatever the reader raises: the file is not ONNX at all, and the caller says so.
        return
    check_external(model, path)


def check_external(model: Any, path: Path) -> None:
    """Hold a model's external data to what the model says of it, and read the small constants of it.

    Args:
        model: an `onnx.ModelProto` as read from `path`.
        path: its file.

    Raises:
        InputError: a data file is missing, too short, outside of the file's folder, or not the one it was written with.
    """
    from onnx import numpy_helper

    files: dict[str, int] = {}
    for tensor in filter(is_external, tensors_of(model)):
        location, end = _place(tensor, path)
        if location not in files:
            files[location] = _data_size(path, location)
        if end > files[location]:
            raise InputError(
                f"the external data {location} has {files[location]:,} bytes, {tensor.name} ends at {end:,}",
                where=path,
                fix=_BOTH,
            )
        if _raw_bytes(tensor) <= SMALL_BYTES:
            tensor.CopyFrom(numpy_helper.from_array(values(tensor, path.parent), tensor.name))
    wanted = next((p.value for p in model.metadata_props if p.key == DATA_SHA256), None)
    if wanted is not None and len(files) == 1 and sha256(path.parent / location) != wanted:
        raise InputError(
            f"the external data {location} is not the one that the file was written with: its hash differs",
            where=path,
            fix=_BOTH,
        )


def is_external(tensor: Any) -> bool:
    """Whether a tensor's values lie in a file beside the model's."""
    from onnx import TensorProto

    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _place(tensor: Any, path: Path) -> tuple[str, int]:
    """The file that a tensor's values lie in, and where in it they end."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        what = f"{tensor.name} names external data outside of the file's folder: {location!r}"
        raise InputError(what, where=path, fix=_AGAIN)
    try:
        size = _raw_bytes(tensor)
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except (ValueError, TypeError) as error:
        # A type of no fixed size, or an offset or a length that is no number.
        raise InputError(
            f"{tensor.name}'s external data cannot be read: {reason_of(error)}", where=path, fix=_AGAIN
        ) from error
    if offset < 0 or length != size:
        raise InputError(
            f"{tensor.name} has {size:,} bytes, its external data is {length:,} at {offset:,}",
            where=path,
            fix=_AGAIN,
        )
    return location, offset + length


def _raw_bytes(tensor: Any) -> int:
    """Bytes of a tensor's values by its shape and type; 4-bit and 2-bit types are packed."""
    import onnx_ir as ir

    elements = int(np.prod(tensor.dims, dtype=np.int64))
    return int(np.ceil(elements * ir.DataType(tensor.data_type).bitwidth / 8))


def _data_size(path: Path, location: str) -> int:
    data = path.parent / location
    try:
        return data.stat().st_size
    except OSError as error:
        raise InputError(
            f"the external data {location} cannot be read: {error.strerror or error}", where=path, fix=_BOTH
        ) from error


def values(tensor: Any, folder: Path) -> NDArray[Any]:
    """A constant's values, wherever they lie.

    Args:
        tensor: an `onnx.TensorProto`; it stays as it is.
        folder: where the model's file lies.
    """
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor, str(folder)))


def tensors_of(model: Any) -> Iterator[Any]:
    """Every constant of an `onnx.ModelProto`: initializers and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graph_tensors(graph)
