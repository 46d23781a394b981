"""What an earlier export has left in a run, and whether what is asked for now goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ospq_export.errors import InputError, damaged
from ospq_export.export.jobs import Job
from ospq_export.export.metadata import float_metadata, quantized_metadata
from ospq_export.onnx.read import why_unreadable
from ospq_export.runs.run import Run


def check_goes_with(run: Run, job: Job, opset: int | None, *, any_batch: bool) -> None:
    """Hold a file of an earlier export to the one that would be written in its place.

    Args:
        run: holds the file.
        job: would write it.
        opset: that was asked for; None where the file may have any.
        any_batch: whether the file may have another batch size, because none was asked for.

    Raises:
        InputError: it has another batch size, another opset, or was made of another calibration.
    """
    path = run.path / job.file
    proto = _header(path)
    there = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None
    if not any_batch and there != job.batch_size:
        fix = f"give `batch_size` {there}, or `overwrite`" if there and job.batch_size else "give `overwrite`"
        raise _contradiction(
            path, _spoken(there), _spoken(job.batch_size), f"{fix}, or copy the run directory"
        )
    has = {o.domain: o.version for o in proto.opset_import}.get("")
    # Passes may raise the opset.
    if opset is not None and not job.passes and has != opset:
        raise _contradiction(path, f"opset {has}", f"opset {opset}", "give `overwrite`")
    metadata = {p.key: p.value for p in proto.metadata_props}
    expected = quantized_metadata(run) if job.quantized else float_metadata(run)
    for key, value in {**expected, **dict(job.metadata)}.items():
        if metadata.get(key) != value:
            raise _contradiction(path, f"another {key}", "the run's", "give `overwrite`")


def _contradiction(path: Path, there: str, asked: str, fix: str) -> InputError:
    return InputError(
        f"the file of an earlier export has {there}, this one would have {asked}", where=path, fix=fix
    )


def _spoken(batch_size: int | None) -> str:
    return "a dynamic batch" if batch_size is None else f"a batch of {batch_size}"


def _header(path: Path) -> Any:
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        # protobuf's errors have no public common base.
        raise damaged(f"not a valid ONNX file: {why_unreadable(error)}", path) from error
