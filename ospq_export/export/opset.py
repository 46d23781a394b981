"""Which opset a run's files can be written in."""

from __future__ import annotations

from ospq_export.errors import InputError
from ospq_export.export.jobs import Extras
from ospq_export.export.variants import INT4_OPSET
from ospq_export.onnx.opset import HALF_QUANTIZERS, LOWEST
from ospq_export.onnx.write import OPSET
from ospq_export.runs.run import Run


def check_opset(run: Run, extras: Extras, opset: int | None) -> None:
    """Hold an opset that is asked for to what the run's formats and the files need.

    Args:
        run: calibrated.
        extras: the files that are asked for.
        opset: None where the export chooses.

    Raises:
        InputError: it is too low for a format or a file, or higher than any of them needs.
    """
    if opset is None:
        return
    since = {name: (format_.opset, format_.name) for name, format_ in run.manifest.formats().items()}
    name = max(since, key=since.__getitem__)
    needed, format_name = since[name]
    if opset < max(LOWEST, needed) or opset > max(OPSET, needed):
        what = f"{name} is {format_name}, whose operators ONNX has from opset {needed} on"
        raise InputError(
            what if LOWEST <= opset < needed else "no file of this run is written in it",
            where=f"`opset` {opset}",
            fix=f"give {max(LOWEST, needed)} to {max(OPSET, needed)}, or leave it out",
        )
    if extras.fp16 and opset < HALF_QUANTIZERS:
        raise InputError(
            f"Q and DQ are float32 below opset {HALF_QUANTIZERS}, and so is what lies around them",
            where=f"`fp16` with `opset` {opset}",
            fix="leave `fp16` out: TensorRT 8.6 takes model.onnx, and FP16 and INT8 as flags of its builder",
        )
    if extras.int4 and opset < INT4_OPSET:
        raise InputError(
            f"INT4 came with opset {INT4_OPSET}",
            where=f"`int4` with `opset` {opset}",
            fix="leave one of them out",
        )
