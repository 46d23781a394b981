"""Whether a file and a set of images belong to the run that they are used with."""

from __future__ import annotations

import json
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
    path: Path = run.file(file)
    metadata = {p.key: p.value for p in read_proto(path).metadata_props}
    if metadata.get("quantized_sha256") != run.manifest.files[QUANTIZED_TENSORS]:
        raise InputError("the file was exported from another run", where=path, fix="export this run again")
    if json.loads(metadata.get("preprocessing", "{}")) != json.loads(run.manifest.data.model_dump_json()):
        raise InputError(
            "the file was exported for another preprocessing than the manifest's",
            where=path,
            fix="export this run again",
        )


def changed_preprocessing(ours: DataConfig, theirs: DataConfig) -> tuple[str, Any, Any] | None:
    """The first setting in which two preprocessings differ, with both values; None where they are the same."""
    pairs = ((key, getattr(ours, key), getattr(theirs, key)) for key in type(ours).model_fields)
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def check_preprocessing(run: Run, config: DataConfig) -> None:
    """Hold the images to the run's preprocessing; whether files are turned as EXIF says is up to those files.

    Raises:
        InputError: they are prepared differently.
    """
    changed = changed_preprocessing(
        run.manifest.data, config.model_copy(update={"exif": run.manifest.data.exif})
    )
    if changed is not None:
        key, ours, theirs = changed
        raise InputError(
            f"the images are prepared with another {key} ({theirs}) than the run was calibrated with ({ours})",
            where="`data`",
            fix="use the preprocessing in the manifest",
        )
