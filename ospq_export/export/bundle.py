"""A bundle for the device: the file to deploy, images, what the reference makes of them, and a script that compares.

The script, made of export/device/, runs on the device's Python with numpy and TensorRT alone.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from ospq_export.errors import InputError
from ospq_export.export.metadata import identity
from ospq_export.onnx.signature import signature_of
from ospq_export.runs.files import (
    FLOAT_ONNX,
    HALF_ONNX,
    QUANTIZED_HALF_ONNX,
    QUANTIZED_ONNX,
    SCALES,
    data_file,
    json_text,
    replacing,
    stored_bytes,
)
from ospq_export.runs.run import Run
from ospq_export.world.room import CERTAIN, check_disk
from ospq_export.world.room import check_file as check_writable

BUNDLE_VERSION = 1
_SOURCES, _SCRIPT = Path(__file__).parent / "device", "check.pyz"
# No clock: the same bundle has the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Contents:
    """What a bundle holds beside the run's files.

    Attributes:
        images: preprocessed, float32 (N, C, H, W).
        labels: int64 (N,), or (N, H, W) of pixels; -1 where there is none.
        outputs: of each reference execution, by the execution's name and the output's, float32 (N, ...).
        facts: what else the script and the report need, as JSON has it.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    outputs: Mapping[str, Mapping[str, NDArray[np.float32]]]
    facts: Mapping[str, Any]


def device_files(run: Run) -> tuple[str, str, str]:
    """The file for the device, its float baseline, and the type of their float parts.

    Raises:
        InputError: the run is not exported.
    """
    if {QUANTIZED_HALF_ONNX, HALF_ONNX} <= set(run.manifest.files):
        return QUANTIZED_HALF_ONNX, HALF_ONNX, "fp16"
    run.file(QUANTIZED_ONNX), run.file(FLOAT_ONNX)
    return QUANTIZED_ONNX, FLOAT_ONNX, "fp32"


def check_bundle(run: Run, out: Path, images: int, *, overwrite: bool) -> None:
    """What can be known before any work.

    Args:
        run: what is packed; it need not be exported yet.
        out: the bundle.
        images: how many it will hold.
        overwrite: whether the file may be replaced.

    Raises:
        InputError: the file exists or cannot be written, or there is no room for it.
    """
    if images < 1:
        raise InputError(f"a bundle of {images} images", where="`bundle_images`", fix="give 1 or more")
    if out.exists() and not out.is_dir() and not overwrite:
        raise InputError("the bundle exists", where=out, fix="give `overwrite`, or another name")
    check_writable(out, "`bundle`")
    pixels = 4 * images * int(np.prod(run.data.input_size))
    files = sum(stored_bytes(run.path / f) for f in (QUANTIZED_ONNX, FLOAT_ONNX) if f in run.manifest.files)
    check_disk(out.parent, "the bundle's files", certain=int(CERTAIN * pixels), likely=pixels + files)


def write_bundle(run: Run, out: Path, contents: Contents, *, overwrite: bool = False) -> None:
    """Write a bundle, a zip archive, under a temporary name that is then renamed.

    Raises:
        InputError: as `check_bundle` and `device_files`.
    """
    check_bundle(run, out, len(contents.images), overwrite=overwrite)
    network, baseline, float_type = device_files(run)
    arrays: dict[str, NDArray[Any]] = {"images.npy": contents.images, "labels.npy": contents.labels}
    outputs: dict[str, dict[str, str]] = {}
    for execution, held in contents.outputs.items():
        for name, values in held.items():
            file = f"references/{len(arrays)}.npy"
            arrays[file], outputs[execution] = values, {**outputs.get(execution, {}), name: file}
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        files = {name: _add_array(archive, name, values) for name, values in arrays.items()}
        for name in (network, baseline, SCALES):
            for path in (run.file(name), data_file(run.path / name)):
                if path.is_file():
                    files[path.name] = _add_file(archive, path.name, path)
        facts = {
            "schema_version": BUNDLE_VERSION,
            **identity(run),
            "network": network,
            "baseline": baseline,
            "float_type": float_type,
            "opset": signature_of(run.file(network)).opset,
            "files": files,
            "images": "images.npy",
            "labels": "labels.npy",
            "outputs": outputs,
            **contents.facts,
        }
        _add(archive, "bundle.json", io.BytesIO(json_text(facts).encode()))
        _add(archive, _SCRIPT, io.BytesIO(_script()))


def _script() -> bytes:
    """Both modules as one file that Python runs (see Python's `zipapp`)."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in (("__main__.py", "check.py"), ("runtimes.py", "runtimes.py")):
            _add_file(archive, name, _SOURCES / source)
    return b"#!/usr/bin/env python3\n" + held.getvalue()


class _Hashed(io.RawIOBase):
    """A file that is written to, and the digest of what was."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self.file.write(data))


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _add(archive: zipfile.ZipFile, name: str, source: BinaryIO) -> str:
    """Copy into the archive; returns the digest."""
    with archive.open(_entry(name), "w", force_zip64=True) as place:
        hashed = _Hashed(place)
        shutil.copyfileobj(source, cast(BinaryIO, hashed))
        return hashed.digest.hexdigest()


def _add_file(archive: zipfile.ZipFile, name: str, path: Path) -> str:
    with path.open("rb") as source:
        return _add(archive, name, source)


def _add_array(archive: zipfile.ZipFile, name: str, values: NDArray[Any]) -> str:
    with archive.open(_entry(name), "w", force_zip64=True) as place:
        hashed = _Hashed(place)
        np.lib.format.write_array(cast(BinaryIO, hashed), np.ascontiguousarray(values), allow_pickle=False)
        return hashed.digest.hexdigest()
