"""Other people's tools that take an ONNX file, each as its documentation has it; and which of our files each is not meant for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from lib.rows import percent
from ospq_export.engines.build import BuildSettings
from ospq_export.engines.plan import Fusion
from ospq_export.engines.products import Product
from ospq_export.engines.record import EngineRecord, build_engine

TARGET = "SM89"


def compiled(file: Path, folder: Path, target: str = TARGET) -> EngineRecord:
    """The engine of a file, built in a folder for a compute capability.

    Raises:
        InputError: the parser or the builder refuses the file.
    """
    settings = BuildSettings(Product.TENSORRT_RTX, compute_capabilities=(target,))
    return build_engine(file, folder / "model.engine", settings, overwrite=True)


# Which compute capabilities a float recipe is compiled for; the first is the first that multiplies all its formats.
FLOAT_TARGETS = {"fp8": ("SM89", "SM120"), "nvfp4": ("SM120",)}


def fusion_cells(fusion: Fusion) -> tuple[str, str]:
    """How many products run quantized, and how many attentions in one kernel."""
    products = percent(fusion.quantized_gemms, fusion.gemms)
    return products, percent(fusion.fused_attentions, fusion.attentions)


def formats_cell(fusion: Fusion) -> str:
    """How many products multiply in each format."""
    return ", ".join(f"{count} {name}" for name, count in fusion.formats.items()) or "-"


def reasons(label: str, dropped: Mapping[str, str]) -> list[list[str]]:
    """What dropped out, counted by reason, with one example; `dropped` has the reason by the operator's name."""
    names: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        names.setdefault(reason, []).append(name)
    return [[label, str(len(found)), reason, f"`{found[0]}`"] for reason, found in names.items()]


FILES = (
    "model_fp32.onnx",
    "model.onnx",
    "model_fp16.onnx",
    "model_qdq_fp16.onnx",
    "model_debug.onnx",
    "model_int4.onnx",
    "model_uint8.onnx",
    "model_uint8_activations.onnx",
)
QUANTIZED = tuple(name for name in FILES if name not in ("model_fp32.onnx", "model_fp16.onnx"))
HALVES = ("model_fp16.onnx", "model_qdq_fp16.onnx")
SAME, PRECISION, EXECUTES, READS = "same outputs", "lower precision", "executes", "reads"
Apply = Callable[[Path, Path, dict[str, Any]], list[Any] | None]


@dataclass(frozen=True)
class Tool:
    """One tool: `apply(source, target, feed)` writes a changed file, returns the outputs of the source, or only reads it.

    Attributes:
        package: the distribution that it comes from.
        promise: `SAME`, `PRECISION`, `EXECUTES` or `READS`; the last two write no file.
        apply: the call, as the tool's documentation has it.
        module: what to import to know that it is here.
    """

    package: str
    promise: str
    apply: Apply
    module: str


def _shapes(source: Path, target: Path, _: dict[str, Any]) -> None:
    import onnx

    model = onnx.load(str(source))
    onnx.save(
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True),
        str(target),
    )


def _checker(source: Path, *_: Any) -> None:
    import onnx

    onnx.checker.check_model(str(source), full_check=True)


def _converter(version: int) -> Apply:
    def convert(source: Path, target: Path, _: dict[str, Any]) -> None:
        import onnx

        onnx.save(onnx.version_converter.convert_version(onnx.load(str(source)), version), str(target))

    return convert


def _extract(source: Path, target: Path, _: dict[str, Any]) -> None:
    import onnx
    import onnx.utils

    graph = onnx.load(str(source)).graph
    onnx.utils.extract_model(
        str(source), str(target), [v.name for v in graph.input], [v.name for v in graph.output]
    )


def _merge(source: Path, target: Path, _: dict[str, Any]) -> None:
    import onnx
    from onnx import helper

    model = onnx.load(str(source))
    logits = model.graph.output[0]
    before, after = (helper.make_tensor_value_info(n, 1, ["n", 10]) for n in ("x", "merged"))
    behind = helper.make_graph([helper.make_node("Identity", ["x"], ["merged"])], "behind", [before], [after])
    opsets = list(model.opset_import)
    second = helper.make_model(behind, opset_imports=opsets, ir_version=model.ir_version)
    onnx.save(onnx.compose.merge_models(model, second, [(logits.name, "x")], outputs=["merged"]), str(target))


def _printer(source: Path, *_: Any) -> None:
    import onnx

    model = onnx.load(str(source))
    printed = onnx.helper.printable_graph(model.graph)
    missing = [node.output[0] for node in model.graph.node if node.output[0] not in printed]
    if missing or not onnx.printer.to_text(model):
        raise ValueError(f"not printed: {missing[:3]}")


def reference(source: Path, _: Path, feed: dict[str, Any]) -> list[Any]:
    """The outputs that onnx.reference computes."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    return list(ReferenceEvaluator(onnx.load(str(source))).run(None, feed))


def _onnxsim(source: Path, target: Path, _: dict[str, Any]) -> None:
    import onnx
    import onnxsim

    simplified, equal = onnxsim.simplify(str(source))
    if not equal:
        raise ValueError("its own check failed")
    onnx.save(simplified, str(target))


def _onnxslim(source: Path, target: Path, _: dict[str, Any]) -> None:
    import onnxslim

    onnxslim.slim(str(source), str(target))


def _float16(source: Path, target: Path, _: dict[str, Any]) -> None:
    import onnx
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(target))


def _sanitize(source: Path, target: Path, _: dict[str, Any]) -> None:
    from polygraphy.tools import main

    command = ["polygraphy", "surgeon", "sanitize", "--fold-constants", str(source), "-o", str(target)]
    try:
        with mock.patch.object(sys, "argv", command):
            status = main()
    except SystemExit as done:
        status = done.code
    if status:
        raise RuntimeError(f"exit status {status}")


def _preprocess(source: Path, target: Path, _: dict[str, Any]) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target))


def _dynamic(source: Path, target: Path, _: dict[str, Any]) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(source), str(target))


def _static(source: Path, target: Path, feed: dict[str, Any]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter([feed])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantize_static(str(source), str(target), Reader())


def _openvino(source: Path, _: Path, feed: dict[str, Any]) -> list[Any]:
    from ospq_export.validate.executions.openvino import load_openvino

    # In bfloat16, its choice on some processors, float parts would not be the same function.
    compiled = load_openvino().Core().compile_model(str(source), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(feed)
    return [results[output] for output in compiled.outputs]


TOOLS = {
    "onnx.checker (full)": Tool("onnx", READS, _checker, "onnx"),
    "onnx.helper, onnx.printer": Tool("onnx", READS, _printer, "onnx"),
    "onnx.reference": Tool("onnx", EXECUTES, reference, "onnx"),
    "onnx.shape_inference (strict, data_prop)": Tool("onnx", SAME, _shapes, "onnx"),
    "onnx.utils.extract_model": Tool("onnx", SAME, _extract, "onnx"),
    "onnx.compose.merge_models": Tool("onnx", SAME, _merge, "onnx"),
    "onnx.version_converter to 19": Tool("onnx", SAME, _converter(19), "onnx"),
    "onnx.version_converter to 21": Tool("onnx", SAME, _converter(21), "onnx"),
    "onnx.version_converter to 23": Tool("onnx", SAME, _converter(23), "onnx"),
    "onnxsim": Tool("onnxsim", SAME, _onnxsim, "onnxsim"),
    "onnxslim": Tool("onnxslim", SAME, _onnxslim, "onnxslim"),
    "polygraphy surgeon sanitize --fold-constants": Tool("polygraphy", SAME, _sanitize, "onnx_graphsurgeon"),
    "onnxruntime quant_pre_process": Tool("onnxruntime", SAME, _preprocess, "onnxruntime"),
    "onnxruntime quantize_dynamic": Tool("onnxruntime", PRECISION, _dynamic, "onnxruntime"),
    "onnxruntime quantize_static": Tool("onnxruntime", PRECISION, _static, "onnxruntime"),
    "onnxconverter_common.float16": Tool("onnxconverter-common", PRECISION, _float16, "onnxconverter_common"),
    "openvino": Tool("openvino", EXECUTES, _openvino, "openvino"),
}

_DOWN = "Gelu is an operator since opset 20, 4-bit Q/DQ since 21: there is nothing to go down to"
_QUANTIZED = (
    "it quantizes float weights and refuses a Conv whose weights are dequantized; take model_fp32.onnx"
)
_FLOAT32 = "it measures ranges with DynamicQuantizeLinear, which takes float32 only; take model_fp32.onnx"
_CPU = "it optimizes for ONNX Runtime on processors, which compute FP16 in float32: roundings move; take model_fp32.onnx"
_HALF = "it refuses what has FP16 already"
_TAP = "it casts an output to float32 for those inside that read it, too; take model.onnx"
_CAST = "it leaves Cast(uint8 to float32) and calls its output FP16; give it `op_block_list` with Cast beside its defaults"
# By tool and file: why the tool is not meant for it.
NOT_MEANT: dict[str, dict[str, str]] = {
    "onnx.version_converter to 19": dict.fromkeys(FILES, _DOWN),
    "onnxruntime quant_pre_process": dict.fromkeys(HALVES, _CPU),
    "onnxruntime quantize_dynamic": {**dict.fromkeys(QUANTIZED, _QUANTIZED), "model_fp16.onnx": _FLOAT32},
    "onnxconverter_common.float16": {
        **dict.fromkeys(HALVES, _HALF),
        "model_debug.onnx": _TAP,
        "model_uint8.onnx": _CAST,
    },
}
