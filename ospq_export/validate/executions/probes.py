"""The exported file with its inner tensors as outputs: codes of every quantizer, the tensor at the end of every slice.

The file itself stays as it is; a copy in memory gets more outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ospq_export.errors import InputError
from ospq_export.onnx.read import check_place, check_text, why_unreadable
from ospq_export.onnx.shapes import hollow, infer_shapes
from ospq_export.tasks.statistics import FloatArray

Tensors = Mapping[str, NDArray[Any]]
CODES, BLOCK_SCALES, OUTPUT = ".codes", ".block_scales", ".output"
OPENED = ", opened"
"""Behind the name of an engine: another one of the same file, which returns its inner tensors."""


@dataclass(frozen=True)
class Probed:
    """An exported file, opened with its inner tensors as outputs.

    Attributes:
        run: images (B, C, H, W) float32 -> tensors by name, the file's own outputs among them.
        names: the inner tensors, "<quantizer>.codes" and "<slice>.output".
        batch_size: fixed, or None.
        half: whether the file computes in FP16 between its integer operators.
    """

    run: Callable[[FloatArray], Tensors]
    names: frozenset[str]
    half: bool
    batch_size: int | None = None


def read_proto(path: Path) -> Any:
    """An ONNX file as a protobuf; external data stays where it is.

    Raises:
        InputError: missing, truncated, or not ONNX.
    """
    import onnx

    check_place(path)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        # protobuf's errors have no public common base.
        what = f"not a valid ONNX file: {why_unreadable(error)}"
        raise InputError(what, where=path, fix="export it again") from error
    check_text(proto, path)
    if not proto.graph.node:
        raise InputError("the file holds no network", where=path, fix="export it again")
    return proto


@dataclass(frozen=True)
class InnerTensors:
    """What a file can be made to return.

    Attributes:
        returned: its own outputs.
        present: the wanted inner tensors that it has, with their element types; those of FP4 and INT4, which no runtime returns,
            are left out.
        half: whether it computes in FP16 between its quantized operators.
    """

    returned: list[str]
    present: dict[str, int]
    half: bool


def inner_tensors(proto: Any, path: Path, wanted: frozenset[str]) -> InnerTensors:
    """The inner tensors of a file that `read_proto` read from `path`."""
    from onnx import TensorProto

    returned = [output.name for output in proto.graph.output]
    made = [o for n in proto.graph.node for o in n.output if o in wanted and o not in returned]
    half = any(t.data_type == TensorProto.FLOAT16 for t in proto.graph.initializer) or any(
        n.op_type == "Cast" and any(a.i == TensorProto.FLOAT16 for a in n.attribute) for n in proto.graph.node
    )
    known = _element_types(proto, path)
    kinds = {n: known.get(n, TensorProto.INT8 if n.endswith(CODES) else TensorProto.FLOAT) for n in made}
    closed = (TensorProto.FLOAT4E2M1, TensorProto.INT4, TensorProto.UINT4)
    return InnerTensors(returned, {n: kind for n, kind in kinds.items() if kind not in closed}, half)


def open_probed(path: Path, wanted: frozenset[str], *, optimize: bool, provider: str) -> Probed:
    """Open a file so that it returns the wanted inner tensors that it has.

    Args:
        path: what `export` wrote.
        wanted: names of inner tensors.
        optimize: with ONNX Runtime's graph optimisations or without.
        provider: "cpu", "cuda" or "tensorrt".

    Raises:
        InputError: the file cannot be loaded, or the provider is not there.
    """
    from onnx import helper

    from ospq_export.validate.executions.backends import open_session

    proto = read_proto(path)
    inner = inner_tensors(proto, path, wanted)
    for name, kind in inner.present.items():
        proto.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    session = open_session(proto.SerializeToString(), path, optimize=optimize, provider=provider)
    feed, outputs = session.get_inputs()[0].name, [*inner.returned, *inner.present]

    def run(images: FloatArray) -> Tensors:
        return dict(zip(outputs, session.run(outputs, {feed: images}), strict=True))

    size = session.get_inputs()[0].shape[0]
    return Probed(run, frozenset(outputs), inner.half, size if isinstance(size, int) else None)


def _element_types(proto: Any, path: Path) -> dict[str, int]:
    """Element types of inner tensors, inferred anew: those written down may be of before a change to FP16."""
    bare = hollow(proto)
    del bare.graph.value_info[:]
    return {v.name: v.type.tensor_type.elem_type for v in infer_shapes(bare, path).graph.value_info}
