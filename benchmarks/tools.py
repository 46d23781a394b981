"""Every exported ONNX file under other people's tools: does the tool take it, and does the file still compute the same?

    python benchmarks/tools.py RUN             # a run directory after `export` with its extra files; all tools
    python benchmarks/tools.py RUN onnxslim    # some tools
    python benchmarks/tools.py RUN --table     # the table of docs/tools.md, from the rows of a run of this name

Each tool gets each file, and ONNX Runtime executes the file before and after with its graph optimizations off, so that what is
compared is the files. Writes a row per tool to benchmarks/rows/tools.jsonl; `run` in it is the run directory's name.

`SAME` tools promise unchanged outputs; `PRECISION` tools lower the precision: what is asked of these is a file that runs, and how
far its outputs move is written down; `EXECUTES` tools run the file themselves, `READS` tools only look at it. `NOT_MEANT` says
which files a tool is not meant for, and why; the row has what happens there.

FP16 files before and after a tool are compared by onnx.reference: ONNX Runtime has no FP16 kernels for processors, computes in
float32, and leaves out the rounding between two neighbours, so that a Pad less is another result.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from lib.onnx_tools import FILES, HALVES, NOT_MEANT, READS, SAME, TOOLS, Tool, reference
from lib.rows import TOOLS as ROWS
from lib.rows import Row, make_parser, origin
from lib.rows import table as markdown

BATCH = 2
# Of float32's rounding, as a share of the largest logit; one code of a quantizer that flips makes more than this.
TOLERANCE = 1e-5


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
        before, after = reference(source, target, feed), reference(target, target, feed)
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


def measure(run: Path, name: str) -> Row | None:
    """One tool on every file of a run directory that exists; None where the tool is not installed."""
    tool = TOOLS[name]
    if importlib.util.find_spec(tool.module) is None:
        return None
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            if (run / file).is_file():
                files[file] = try_tool(name, run / file, Path(folder))
                print(name, file, files[file], flush=True)
    found = origin()
    found["versions"][tool.package] = _version(tool.package)
    return {"run": run.name, "tool": name, "package": tool.package, "files": files, **found}


def _version(package: str) -> str:
    for candidate in (package, f"{package}-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(candidate)
    raise importlib.metadata.PackageNotFoundError(package)


def table(rows: list[Row]) -> str:
    """The rows as Markdown: one tool a line, one file a column, and the reasons below."""
    known = {row["tool"]: row for row in rows}
    reasons: dict[str, int] = {}
    lines = []
    for name in (name for name in TOOLS if name in known):
        row = known[name]
        files = row["files"]
        cells = [_cell(name, file, files[file], reasons) if file in files else "" for file in FILES]
        lines.append([f"{name} ({row['package']} {row['versions'][row['package']]})", *cells])
    header = ["tool", *(file.removesuffix(".onnx").removeprefix("model_") for file in FILES)]
    notes = [f"{number}. Not meant for it: {reason}." for reason, number in reasons.items()]
    return "\n".join([markdown(header, lines), *notes])


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
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="run directory; with --table, its rows are read")
    parser.add_argument("tool", nargs="*", help="a part of a tool's name; none: all")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(ROWS.rows(run=args.run.name)))
        return
    for name in TOOLS:
        if not args.tool or any(part in name for part in args.tool):
            row = measure(args.run, name)
            if row is not None:
                ROWS.put(row)


if __name__ == "__main__":
    main()
