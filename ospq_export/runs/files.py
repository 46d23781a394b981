"""Names and hashes of files in a run directory; written under temporary names, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ospq_export.errors import InputError

MANIFEST = "manifest.json"
GRAPH = "graph.json"
FLOAT_TENSORS = "float.safetensors"
QUANTIZED_TENSORS = "quantized.safetensors"
CALIBRATION_IMAGES = "calibration_images.json"
CHECKPOINTS = "slices"
# Of a search for formats: what it found, and the folder that it works in.
ALLOCATION, SEARCH, RECIPE = "allocation.json", "search", "recipe.toml"
# What an export writes: always, and when it is asked for.
QUANTIZED_ONNX, FLOAT_ONNX, SCALES = "model.onnx", "model_fp32.onnx", "scales.json"
QUANTIZED_HALF_ONNX, HALF_ONNX = "model_qdq_fp16.onnx", "model_fp16.onnx"
QUANTIZED_BRAIN_ONNX, BRAIN_ONNX = "model_qdq_bf16.onnx", "model_bf16.onnx"
DEBUG_ONNX, INT4_ONNX, UINT8_ONNX = "model_debug.onnx", "model_int4.onnx", "model_uint8.onnx"
UINT8_ACTIVATIONS_ONNX = "model_uint8_activations.onnx"
# Engines lie side by side, one per target; runs of before they were named so have this one.
ENGINES, UNNAMED_ENGINE = "*.engine", "model.engine"
# An engine's name in a model repository of Triton.
PLAN = "model.plan"
REPORT, REPORT_MD, REPORT_HTML = "report.json", "report.md", "report.html"
# What each file is, in the order in which the stages write them; the documents' page on run directories is made from it.
CONTENTS: dict[str, str] = {
    MANIFEST: "model, preprocessing, recipe, slices with their errors, quantizers, versions, and a hash of every other file",
    GRAPH: "the network: operators, arguments, shapes and module paths; only operators of an allow-list are called",
    FLOAT_TENSORS: "the weights of the float network: later stages need neither the checkpoint nor a download",
    QUANTIZED_TENSORS: "integer, FP8 or FP4 codes, scales and offsets",
    CALIBRATION_IMAGES: "a digest of every calibration image: `validate` counts those that it meets again",
    CHECKPOINTS: "folder: finished slices of a calibration that is not finished; an interrupted one continues from it",
    ALLOCATION: "with a budget: formats that were tried, what they cost and lost, and what each operator loses in each format",
    SEARCH: "folder: the calibrations that a search for formats tries; it goes when the search is finished",
    RECIPE: "with a budget: the recipe that was found; it makes the same run without a search",
    QUANTIZED_ONNX: "the quantized network as QDQ ONNX",
    FLOAT_ONNX: "the float network: the baseline for speed and accuracy",
    SCALES: "per slice and quantizer: bits, grid, levels, scale, offset, axis; which products ONNX Runtime computes in integers",
    QUANTIZED_HALF_ONNX: "with `fp16` or `engine`: FP16 around the quantized operators; engines are built from it",
    HALF_ONNX: "with `fp16` or `engine`: the float network in FP16",
    QUANTIZED_BRAIN_ONNX: "the same with BF16, where the calibration saw values that FP16 cannot hold",
    BRAIN_ONNX: "the float network in BF16, beside it",
    DEBUG_ONNX: "with `debug`: every quantizer's codes and every slice's output as further outputs",
    INT4_ONNX: "with `int4`: 4-bit weights stored as INT4",
    UINT8_ONNX: "with `uint8_input`: takes uint8 images (B, H, W, C) and normalises them itself",
    UINT8_ACTIVATIONS_ONNX: "with `activation_layout` uint8: the same codes as uint8, for ONNX Runtime on x86",
    "model.PRODUCT.smNN.engine": "with `engine`: an engine, named after what built it and for which GPUs",
    "model.PRODUCT.smNN.engine.json": "what it was built from, by and for, and its layers; the log is beside it, as `.log`",
    REPORT_HTML: "the last validation as one page that needs nothing else; `report.HxW.html` at another size of its range",
    REPORT_MD: "the same as Markdown",
    REPORT: "the same for programs",
}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success it replaces `path`, otherwise it is removed.

    Raises:
        InputError: the file cannot be written (no space, no permission).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}",
            where=path,
            fix="free some space or choose another folder",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_file(name: str) -> str:
    """What stands in for an ONNX file that ONNX Runtime cannot run, where one is needed."""
    return f"{name.removesuffix('.onnx')}_check.onnx"


def checked_file(name: str) -> str:
    """What a file is or stands in for: the inverse of `check_file`."""
    stem = name.removesuffix("_check.onnx")
    return name if stem == name else f"{stem}.onnx"


def data_file(path: Path) -> Path:
    """Where the weights of an ONNX file lie that is too large to hold them; one file, which only that one uses."""
    return path.with_name(f"{path.name}.data")


def engine_name(product: str, targets: Sequence[str], level: str | None = None) -> str:
    """Name of an engine, such as "model.tensorrt-rtx.sm89.engine".

    Args:
        product: what builds it.
        targets: compute capabilities that it is for, "SM89".
        level: of hardware compatibility, where it runs on further ones.
    """
    parts = [
        Path(UNNAMED_ENGINE).stem,
        product,
        "-".join(t.lower() for t in targets),
        *([level] if level else []),
    ]
    return f"{'.'.join(parts)}.engine"


def sidecar_file(engine: Path) -> Path:
    """What is known of an engine: built from what, by what, for what."""
    return engine.with_name(f"{engine.name}.json")


def stored_bytes(path: Path) -> int:
    """What a file takes on the disk, with the weights beside it."""
    return sum(file.stat().st_size for file in (path, data_file(path)) if file.is_file())


def is_temporary(path: Path) -> bool:
    """Whether a file is what `replacing` leaves behind when the process is killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder of which nobody else writes."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def json_text(value: object, indent: int | None = 2) -> str:
    """JSON as every file of a run directory has it; what is not finite as a string, "NaN" or "Infinity".

    JSON has no such numbers (RFC 8259, section 6): a bare NaN makes the whole file unreadable for everything but Python.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"


def json_line(value: object) -> str:
    """The same on one line."""
    return json_text(value, indent=None)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: object, indent: int | None = 2) -> None:
    """Write JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(value, indent), encoding="utf-8")


_PREFIX, _SUFFIX = ".export.", ".tmp"


@contextlib.contextmanager
def staging(run: Path) -> Iterator[Path]:
    """An empty folder inside a run directory, which is removed at the end; what a killed process left is removed first.

    Raises:
        InputError: the run directory cannot be written to.
    """
    for left in run.glob(f"{_PREFIX}*{_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        made = tempfile.TemporaryDirectory(
            prefix=_PREFIX, suffix=_SUFFIX, dir=run, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}",
            where=run,
            fix="free some space, or copy the run",
        ) from error
    with made as folder:
        yield Path(folder)


def take(folder: Path, run: Path, *, stale: Sequence[str]) -> None:
    """Move finished files to their places.

    Args:
        folder: where they are.
        run: where they go.
        stale: names of files that go where `folder` has no new one.
    """
    for name in stale:
        if not (folder / name).exists():
            (run / name).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        path.replace(run / path.name)
