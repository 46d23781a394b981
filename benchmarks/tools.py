"""Every exported ONNX file under other people's tools: does the tool take it, and does the file still compute the same?

    python benchmarks/tools.py RUN             # a run directory after `export` with its extra files; all tools
    python benchmarks/tools.py RUN onnxslim    # some tools
    python benchmarks/tools.py RUN --table     # the table of docs/tools.md, from the rows of a run of this name

Each tool gets each file, and ONNX Runtime executes the file before and after with its graph optimizations off, so that what is
compared is the files. Writes benchmarks/tools/NAME.json, NAME being the run directory's.

`SAME` tools promise unchanged outputs; `PRECISION` tools lower the precision: what is asked of these is a file that runs, and how
far its outputs move is written down; `EXECUTES` tools run the file themselves, `READS` tools only look at it. `NOT_MEANT` says
which files a tool is not meant for, and why; the row has what happens there.

FP16 files before and after a tool are compared by onnx.reference: ONNX Runtime has no FP16 kernels for processors, computes in
float32, and leaves out the rounding between two neighbours, so that a Pad less is another result.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
ROWS = HERE / "tools"
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
BATCH = 2
SAME, PRECISION, EXECUTES, READS = "same outputs", "lower precision", "executes", "reads"
# Of float32's rounding, as a share of the largest logit; one code of a quantizer that flips makes more than this.
TOLERANCE = 1e-5


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


def _reference(source: Path, _: Path, feed: dict[str, Any]) -> list[Any]:
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

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches = iter([feed])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantize_static(str(source), str(target), Reader())


def _openvino(source: Path, _: Path, feed: dict[str, Any]) -> list[Any]:
    import openvino

    # In bfloat16, its choice on some processors, float parts would not be the same function.
    compiled = openvino.Core().compile_model(str(source), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(feed)
    return [results[output] for output in compiled.outputs]


TOOLS = {
    "onnx.checker (full)": Tool("onnx", READS, _checker, "onnx"),
    "onnx.helper, onnx.printer": Tool("onnx", READS, _printer, "onnx"),
    "onnx.reference": Tool("onnx", EXECUTES, _reference, "onnx"),
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


def make_feed(path: Path) -> dict[str, Any]:
    """Random images for a file's input, of its batch or of `BATCH`."""
    import numpy as np
    import onnx

    images = onnx.load(str(path), load_external_data=False).graph.input[0]
    kind = images.type.tensor_type
    shape = [d.dim_value or BATCH for d in kind.shape.dim]
    rng = np.random.default_rng(0)
    if kind.elem_type == onnx.TensorProto.UINT8:
        return {images.name: rng.integers(0, 256, shape, dtype=np.uint8)}
    return {images.name: rng.standard_normal(shape, dtype=np.float32)}


def execute(path: Path, feed: dict[str, Any]) -> list[Any]:
    """ONNX Runtime's outputs of a file, without its graph optimizations, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return list(
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)
    )


def difference(before: list[Any], after: list[Any], outputs: int = 1) -> float:
    """The largest difference of the first outputs, each as a share of its largest value.

    Raises:
        ValueError: one has another shape or type.
    """
    import numpy as np

    moved = 0.0
    for left, right in list(zip(before, after, strict=False))[:outputs]:
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            raise ValueError(f"{left.dtype} {left.shape} became {right.dtype} {right.shape}")
        reference = np.asarray(left, np.float64)
        largest = max(np.abs(reference).max(), np.finfo(np.float32).tiny)
        moved = max(moved, float(np.abs(np.asarray(right, np.float64) - reference).max() / largest))
    return moved


def try_tool(name: str, source: Path, folder: Path) -> dict[str, Any]:
    """Give a file to a tool: how far its outputs move, or the error in one line.

    Returns:
        `outcome` "ok" or "error"; `detail` of an error; else `difference`, a share of the largest logit, of all but `READS`.
    """
    tool, target = TOOLS[name], folder / source.name
    feed = make_feed(source)
    start = time.perf_counter()
    row: dict[str, Any] = {"outcome": "ok"}
    try:
        with quiet():
            outputs = tool.apply(source, target, feed)
        row["seconds"] = round(time.perf_counter() - start, 1)
        if tool.promise != READS:
            row["difference"] = _moved(tool, source, target, feed, outputs)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = f"{type(error).__name__}: {(lines or [''])[0]}".replace(str(folder), "FOLDER")
        return {"outcome": "error", "detail": detail[:300]}
    return row


def _moved(tool: Tool, source: Path, target: Path, feed: dict[str, Any], outputs: list[Any] | None) -> float:
    if outputs is not None:
        return difference(execute(source, feed), outputs)
    # The changed file has to run in ONNX Runtime in any case.
    before, after = execute(source, feed), execute(target, feed)
    if source.name in HALVES:
        before, after = _reference(source, target, feed), _reference(target, target, feed)
    return difference(before, after, len(before) if tool.promise == SAME else 1)


@contextlib.contextmanager
def quiet() -> Any:
    """Keep what tools print and log to themselves."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def measure(run: Path, chosen: list[str]) -> dict[str, Any]:
    """Every chosen tool that is installed on every file of a run directory that exists."""
    rows: dict[str, Any] = {}
    for name in chosen:
        tool = TOOLS[name]
        if importlib.util.find_spec(tool.module) is None:
            continue
        files = {}
        with tempfile.TemporaryDirectory() as folder:
            for file in FILES:
                if (run / file).is_file():
                    files[file] = try_tool(name, run / file, Path(folder))
                    print(name, file, files[file], flush=True)
        rows[name] = {"package": tool.package, "version": _version(tool.package), "files": files}
    return rows


def _version(package: str) -> str:
    for candidate in (package, f"{package}-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(candidate)
    raise importlib.metadata.PackageNotFoundError(package)


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown: one tool a line, one file a column, and the reasons below."""
    reasons: dict[str, int] = {}
    lines = [
        "| tool | " + " | ".join(file.removesuffix(".onnx").removeprefix("model_") for file in FILES) + " |",
        "| --- |" + " --- |" * len(FILES),
    ]
    for name, row in rows.items():
        cells = [
            _cell(name, file, row["files"][file], reasons) if file in row["files"] else "" for file in FILES
        ]
        lines.append(f"| {name} ({row['package']} {row['version']}) | " + " | ".join(cells) + " |")
    notes = [f"{number}. Not meant for it: {reason}." for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


def _cell(name: str, file: str, row: dict[str, Any], reasons: dict[str, int]) -> str:
    reason = NOT_MEANT.get(name, {}).get(file)
    if reason is not None:
        return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
    if row["outcome"] == "error":
        return f"**{row['detail'].split(':')[0]}**"
    if "difference" not in row:
        return "ok"
    moved = row["difference"]
    if moved <= TOLERANCE:
        return "same"
    runs = f"runs, {100 * moved:.2g} %"
    return f"**{runs}**" if TOOLS[name].promise == SAME else runs


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory; with --table, its rows are read")
    parser.add_argument("tool", nargs="*", help="a part of a tool's name; none: all")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    path = ROWS / f"{args.run.name}.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if args.table:
        print(table(rows))
        return
    chosen = [name for name in TOOLS if not args.tool or any(part in name for part in args.tool)]
    rows |= measure(args.run, chosen)
    ROWS.mkdir(exist_ok=True)
    path.write_text(json.dumps({name: rows[name] for name in TOOLS if name in rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
