"""Where a file and its images come from: a file or an image that belongs to another run is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospq_export.errors import InputError
from ospq_export.runs.files import QUANTIZED_ONNX, QUANTIZED_TENSORS
from ospq_export.validate.executions.probes import read_proto

if TYPE_CHECKING:
    from ospq_export.data import DataConfig
    from ospq_export.runs.run import Run


def check_origin(run: Run, file: str = QUANTIZED_ONNX) -> None:
    """Hold a quantized file to the run it lies in: the same integers, the same preprocessing.

    Raises:
        InputError: it was exported from another run, or the run's preprocessing was changed since.
    """
    path, other = run.file(file), None
    metadata = {p.key: p.value for p in read_proto(path).metadata_props}
    if metadata.get("quantized_sha256") != run.manifest.files[QUANTIZED_TENSORS]:
        other = "from another run"
    elif _preprocessing(metadata) != json.loads(run.manifest.data.model_dump_json()):
        other = "for another preprocessing than the manifest's"
    if other is not None:
        raise InputError(f"the file was exported {other}", where=path, fix="export this run again")


def _preprocessing(metadata: Mapping[str, str]) -> Any:
    """What a file says of it; None where it says nothing that can be read."""
    try:
        return json.loads(metadata.get("preprocessing", ""))
    except (ValueError, RecursionError):
        return None


def file_preprocessing(path: Path) -> dict[str, Any]:
    """What an ONNX file says of its preprocessing; nothing where it says nothing.

    Raises:
        InputError: it is no ONNX file.
    """
    found = _preprocessing({p.key: p.value for p in read_proto(path).metadata_props})
    return found if isinstance(found, dict) else {}


def changed_preprocessing(ours: DataConfig, theirs: DataConfig) -> tuple[str, Any, Any] | None:
    """The first setting in which two preprocessings differ, with both values; None where they are the same."""
    pairs = (
        (key, getattr(ours, key), getattr(theirs, key)) for key in type(ours).model_fields if key != "assumed"
    )
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def check_preprocessing(run: Run, config: DataConfig) -> None:
    """Hold the images to the run's preprocessing; whether files are turned as EXIF says is up to those files.

    Raises:
        InputError: they are prepared differently.
    """
    mine = run.data
    changed = changed_preprocessing(mine, config.model_copy(update={"exif": mine.exif}))
    if changed is not None:
        key, ours, theirs = changed
        raise InputError(
            f"the images are prepared with another {key} ({theirs}) than the run was calibrated with ({ours})",
            where="`data`",
            fix="use the preprocessing in the manifest",
        )
