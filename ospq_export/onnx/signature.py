"""What an ONNX file takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ospq_export.errors import InputError, reason_of


@dataclass(frozen=True)
class TensorType:
    """An input or output.

    Attributes:
        name: as the file has it.
        dtype: numpy's name of its type, "float32".
        shape: the batch in front; -1 is a size that the file leaves free.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a file, and its version of ONNX's operators."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    opset: int


def signature_of(path: Path) -> Signature:
    """Read a file's signature; its weights stay where they are.

    Raises:
        InputError: it is no ONNX file.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        inputs, outputs = (tuple(map(_tensor, side)) for side in (model.graph.input, model.graph.output))
    except Exception as error:
        # protobuf's errors have no public common base.
        raise InputError(
            f"the file is not readable ONNX: {reason_of(error)}", where=path, fix="export the run again"
        ) from error
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    return Signature(inputs, outputs, opset)


def _tensor(value: Any) -> TensorType:
    from onnx import helper

    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return TensorType(value.name, str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape)
