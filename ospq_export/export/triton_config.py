"""config.pbtxt of a model in Triton, made of Triton's own messages (package `tritonclient`) and read back before it is written.

Format: https://github.com/triton-inference-server/server, docs/user_guide/model_configuration.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ospq_export.errors import InputError, reason_of
from ospq_export.onnx.signature import TensorType
from ospq_export.runs.files import PLAN, QUANTIZED_ONNX, QUANTIZED_TENSORS
from ospq_export.runs.run import Run

LABELS = "labels.txt"
# How long a request waits for others, in microseconds: where Triton's guide starts. config.pbtxt may be edited.
_DELAY = 100
_TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "uint8": "UINT8", "int64": "INT64"}
# ONNX Runtime's levels as Triton's backend counts them: -1 is basic, which fuses no Q/DQ.
_BASIC = -1


@dataclass(frozen=True)
class Served:
    """A file of a run as Triton serves it.

    Attributes:
        path: the file.
        kind: "tensorrt" or "onnxruntime", the backend.
        input, outputs: what it takes and returns.
        batches: the smallest, the likely and the largest batch; None where the file has a fixed one.
        example: heights and widths that are free in the file, as the calibration had them, for the warm-up.
    """

    path: Path
    kind: str
    input: TensorType
    outputs: tuple[TensorType, ...]
    batches: tuple[int, int, int] | None
    example: tuple[int, ...]


def file_name(served: Served) -> str:
    """What Triton calls the file inside of a version."""
    return PLAN if served.kind == "tensorrt" else QUANTIZED_ONNX


def messages() -> tuple[Any, Any]:
    """Triton's messages, and protobuf's text format.

    Raises:
        InputError: the package tritonclient is missing.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        fix = "pip install 'ospq-export[triton]'"
        raise InputError(f"Triton's configuration cannot be written: {reason_of(error)}", fix=fix) from error
    return model_config_pb2, text_format


def configuration(run: Run, served: Served, name: str, *, labelled: bool) -> str:
    """config.pbtxt as text.

    Args:
        run: what is served; its identity is kept under `parameters`, so that `validate` can tell another run's.
        served: the file.
        name: of the model.
        labelled: whether labels.txt has the classes' names.
    """
    proto, text_format = messages()
    config = proto.ModelConfig(name=name, backend=served.kind)
    config.max_batch_size = served.batches[-1] if served.batches else 0
    config.platform = "tensorrt_plan" if served.kind == "tensorrt" else "onnxruntime_onnx"
    config.default_model_filename = file_name(served)
    _describe(config.input.add(), served.input, batched=served.batches is not None)
    for tensor in served.outputs:
        described = config.output.add()
        _describe(described, tensor, batched=served.batches is not None)
        if labelled:
            described.label_filename = LABELS
    group = proto.ModelInstanceGroup
    kind = group.KIND_GPU if served.kind == "tensorrt" else group.KIND_AUTO
    config.instance_group.add(count=1, kind=kind)
    if served.batches is not None:
        config.dynamic_batching.max_queue_delay_microseconds = _DELAY
        # Only an engine was tuned for one size.
        config.dynamic_batching.preferred_batch_size.extend(
            served.batches[1:2] if kind == group.KIND_GPU else ()
        )
    if served.kind == "onnxruntime" and run.unoptimized():
        config.optimization.graph.level = _BASIC
    _warm_up(config, served)
    for key, value in identity(run, served).items():
        config.parameters[key].string_value = value
    text = text_format.MessageToString(config, use_index_order=True)
    assert text_format.Parse(text, proto.ModelConfig()) == config
    return str(text)


def identity(run: Run, served: Served) -> dict[str, str]:
    """Which run a served model is of: the digest of its codes, and the file with its own."""
    files = run.manifest.files
    return {
        "quantized_sha256": files[QUANTIZED_TENSORS],
        "file": served.path.name,
        "file_sha256": files[served.path.name],
    }


def _describe(message: Any, tensor: TensorType, *, batched: bool) -> None:
    if tensor.dtype not in _TYPES:
        raise InputError(f"Triton has no type {tensor.dtype}", where=tensor.name, fix="export the run again")
    dims = tensor.shape[1:] if batched else tensor.shape
    message.name = tensor.name
    message.data_type = messages()[0].DataType.Value(f"TYPE_{_TYPES[tensor.dtype]}")
    if not dims:
        # A number for each image: Triton wants a dimension, and takes it away again.
        message.reshape.SetInParent()
    message.dims.extend(dims or (1,))


def _warm_up(config: Any, served: Served) -> None:
    """Random images at start, so that the first request does not pay for what is made on demand."""
    sides = iter(served.example)
    shape = [next(sides) if size < 0 else size for size in served.input.shape[1:]]
    batched = served.batches is not None
    for size in sorted(set((served.batches or (1,))[:2])):
        request = config.model_warmup.add(name=f"batch of {size if batched else served.input.shape[0]}")
        request.batch_size = size
        held = request.inputs[served.input.name]
        held.data_type, held.random_data = config.input[0].data_type, True
        held.dims.extend(shape if batched else [served.input.shape[0], *shape])
