"""Another run on the same images: which of the two is better, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ospq_export.errors import InputError
from ospq_export.runs.files import QUANTIZED_ONNX
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.origin import changed_preprocessing, check_origin
from ospq_export.validate.executions.table import FAKE_QUANT, OPTIMIZED, TABLE

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

PREFIX = "baseline/"
_COMPARED = (FAKE_QUANT, OPTIMIZED)


def open_baseline(run: Run, other: Run, names: Sequence[str], device: str) -> list[Backend]:
    """The other run's fake-quantized network and its ONNX file, as far as this run's are executed, too.

    Args:
        run: what is validated.
        other: what it is compared with; another recipe, another calibration or another model for the same data.
        names: of this run's executions.
        device: torch device.

    Returns:
        Executions whose names begin with `PREFIX`.

    Raises:
        InputError: the other run is not exported, its images are prepared differently, its classes are others, or the two have
            no execution in common.
    """
    _check_comparable(run, other)
    chosen = [name for name in _COMPARED if name in names]
    if not chosen:
        raise InputError(
            f"neither {' nor '.join(_COMPARED)} is executed, so there is nothing to compare",
            where="`baseline`",
            fix=f"add `backends` {OPTIMIZED}",
        )
    other.file(QUANTIZED_ONNX)
    check_origin(other)
    backends = [TABLE[name].open(other, device) for name in chosen]
    for backend in backends:
        backend.name = f"{PREFIX}{backend.name}"
    return backends


def _check_comparable(run: Run, other: Run) -> None:
    ours, theirs = run.manifest, other.manifest
    changed = changed_preprocessing(ours.data, theirs.data)
    if changed is not None:
        key, mine, others = changed
        raise InputError(
            f"the other run prepares its images with another {key} ({others}, this one {mine})",
            where=f"`baseline` {other.path}",
            fix="compare runs with the same preprocessing",
        )
    if ours.class_to_idx != theirs.class_to_idx:
        raise InputError(
            f"the other run has other classes ({len(theirs.class_to_idx)} known, this one {len(ours.class_to_idx)})",
            where=f"`baseline` {other.path}",
            fix="compare runs that were calibrated on folders with the same classes",
        )
