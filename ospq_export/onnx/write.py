"""From a lowered graph to a checked ONNX file.

torch's exporter translates the operators; an onnx-ir pass then tidies names and metadata, and the result is checked before it
takes its place.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ospq_export.errors import InputError
from ospq_export.onnx import serialize
from ospq_export.onnx.names import (
    DYNAMIC_QUANTIZE,
    describe_inner_only,
    hide_outputs,
    name_as_views,
    name_everything,
    name_sizes,
)
from ospq_export.onnx.opset import EXPORTED, LOWEST, for_older_parsers, ir_version, to_lowest

# Unless a format needs more or another is asked for. From 21 on, ONNX Runtime's QDQ propagation inserts QuantizeLinear nodes with
# both a zero_point and an output_dtype, which its own type inference then refuses; at 20 the attribute does not exist.
OPSET = 20
INPUT = "images"
# The zero point that carries int8 codes as uint8, and the metadata that says so.
UINT8_ZERO = 128
ACTIVATION_LAYOUT = "activation_layout"
_FIXED: Mapping[int, Any] = MappingProxyType({})
_STANDARD_DOMAINS = ("", "ai.onnx")


def write_onnx(
    module: fx.GraphModule,
    path: Path,
    *,
    input_size: tuple[int, int, int],
    batch_size: int | None,
    metadata: Mapping[str, str],
    dimensions: Mapping[int, Any] = _FIXED,
    outputs: Sequence[str] = ("logits",),
    probes: Sequence[str] = (),
    expose_probes: bool = False,
    passes: Sequence[Callable[[Any], None]] = (),
    opset: int = OPSET,
) -> None:
    """Translate a graph to ONNX and write it atomically: `translate` and `write_translated` in one.

    Raises:
        InputError: an operator has no translation, or the file cannot be written.
    """
    returned = (*outputs, *probes)
    model = translate(
        module,
        input_size=input_size,
        batch_size=batch_size,
        dimensions=dimensions,
        outputs=returned,
        opset=opset,
    )
    write_translated(
        model, path, metadata=metadata, probes=probes, expose_probes=expose_probes, passes=passes
    )


def write_translated(
    model: Any,
    path: Path,
    *,
    metadata: Mapping[str, str],
    probes: Sequence[str] = (),
    expose_probes: bool = False,
    passes: Sequence[Callable[[Any], None]] = (),
) -> None:
    """Finish a translated graph and write it atomically.

    Args:
        model: what `translate` returned, or a clone of it; it is changed.
        path: the file; replaced only by a complete and checked one. Where it would be too large, its weights lie beside it in
            `runs.files.data_file(path)`.
        metadata: key-value pairs for the model's metadata.
        probes: names of what the graph returns behind its outputs; tensors inside the file are called so.
        expose_probes: whether they are outputs of the file too, for debugging.
        passes: changes of the finished onnx_ir model, in order: other precisions, storage or inputs.

    Raises:
        InputError: the file cannot be written.
    """
    if not expose_probes:
        hide_outputs(model, len(model.graph.outputs) - len(probes))
    _tidy(model, metadata, {INPUT, *(value.name for value in model.graph.outputs), *probes})
    for change in passes:
        change(model)
    proto, tensors = serialize.split(model)
    del model
    describe_inner_only(proto)
    serialize.check(proto, tensors, path)
    check_deployable(proto, path)
    serialize.save(proto, tensors, path)


def translate(
    module: fx.GraphModule,
    *,
    input_size: tuple[int, int, int],
    batch_size: int | None,
    dimensions: Mapping[int, Any] = _FIXED,
    outputs: Sequence[str],
    opset: int = OPSET,
) -> Any:
    """Translate a graph to ONNX.

    Args:
        module: from images (B, C, H, W) float32 to a tensor or a tuple of tensors; on the CPU.
        input_size: (channels, height, width) in pixels.
        batch_size: a fixed batch, or None for a dynamic one.
        dimensions: those of the images that are free besides the batch, by number, as torch.export has them.
        outputs: names of what the graph returns, probes among them.
        opset: of ONNX's operators, `onnx.opset.LOWEST` or more; the formats in the graph need theirs.

    Returns:
        An `onnx_ir.Model`, whose tensors are the module's.

    Raises:
        InputError: an operator has no translation, or none in the opset.
    """
    example = torch.zeros(batch_size or 2, *input_size)
    free = {**({0: torch.export.Dim("batch")} if batch_size is None else {}), **dimensions}
    dynamic = (free,) if free else None
    try:
        # The exporter prints its progress and warns about its own internals; errors carry everything that matters.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            with _decomposed_once():
                program = torch.onnx.export(
                    module,
                    (example,),
                    dynamo=True,
                    opset_version=max(opset, EXPORTED),
                    dynamic_shapes=dynamic,
                    input_names=[INPUT],
                    output_names=list(outputs),
                    verbose=False,
                )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise InputError(
            f"the network cannot be written as ONNX: {reason}", fix="this model is not supported"
        ) from error
    assert program is not None
    name_as_views(program.model.graph)
    if opset == LOWEST:
        to_lowest(program.model)
    if opset < OPSET:
        for_older_parsers(program.model)
        # Parsers that know no later operators were built for no later file either.
        program.model.ir_version = ir_version(opset)
    if dimensions:
        name_sizes(program.model.graph)
    return program.model


@contextlib.contextmanager
def _decomposed_once() -> Iterator[None]:
    """Keep torch's exporter from decomposing a graph that needs none.

    It decomposes by running the whole graph, a third of its time; a captured graph consists of operators that have translations.
    One with an operator that has none is decomposed.
    """
    decompose = ExportedProgram.run_decompositions

    def where_needed(program: ExportedProgram, table: Mapping[Any, Any]) -> ExportedProgram:
        # The table has the operators without a translation.
        return decompose(program, table) if any(n.target in table for n in program.graph.nodes) else program

    ExportedProgram.run_decompositions = where_needed  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = decompose  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Any:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _tidy(model: Any, metadata: Mapping[str, str], keep: Collection[str]) -> None:
    """Give readable names, and drop the exporter's debugging metadata: it holds stack traces with local file names."""
    name_everything(model, keep)
    graph = model.graph
    values = (value for node in graph for value in node.outputs)
    for item in (model, graph, *graph, *values, *graph.inputs, *graph.initializers.values()):
        item.metadata_props.clear()
    model.metadata_props.update(metadata)
    graph.name = "network"


def check_deployable(proto: Any, where: Path) -> None:
    """Hold a file to what TensorRT and ONNX Runtime need: operators they know, signed codes, zero points written out and 0.

    A file whose metadata says that its activations are uint8 has a zero point of 128 there, and is for ONNX Runtime alone.
    Codes in blocks, and the scales of blocks, have no zero point.

    Raises:
        InputError: it has something else; this is a defect of the export, said before anybody deploys the file.
    """
    from onnx import TensorProto, numpy_helper

    constants = {t.name: t for t in proto.graph.initializer}
    scales = {n.input[1] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    uint8 = any(p.key == ACTIVATION_LAYOUT and p.value == "uint8" for p in proto.metadata_props)
    signed = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN)
    allowed = dict.fromkeys(signed, 0) | ({TensorProto.UINT8: UINT8_ZERO} if uint8 else {})
    problem = None
    for node in proto.graph.node:
        if node.domain not in _STANDARD_DOMAINS and node.op_type != DYNAMIC_QUANTIZE:
            problem = f"operator {node.domain}::{node.op_type}"
        # Four-bit floats in blocks, and the scales of blocks, are symmetric by nature and have two inputs.
        in_blocks = any(a.name == "block_size" for a in node.attribute) or node.output[0] in scales
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or (in_blocks and len(node.input) == 2):
            continue
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        wanted = None if zero_point is None else allowed.get(zero_point.data_type)
        if zero_point is None or wanted is None or (numpy_helper.to_array(zero_point) != wanted).any():
            problem = f"{node.name} without a signed zero_point of 0"
    if problem is not None:
        raise InputError(
            f"the exported file cannot be deployed: {problem}", where=where, fix="report this model"
        )
