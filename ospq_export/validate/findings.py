"""What a reader has to know before reading the figures: of the processor, for ONNX Runtime on the CPU, and of the input size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ospq_export.graph.sizes import shown
from ospq_export.runs.files import UINT8_ACTIVATIONS_ONNX, checked_file
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.table import TABLE, Runtime
from ospq_export.world.processor import PRECISE_KERNELS, examine_processor

if TYPE_CHECKING:
    from ospq_export.runs.run import Run


def processor_findings(run: Run, names: Sequence[str]) -> list[str]:
    """One line for each file whose integer products can saturate on this processor.

    Args:
        run: exported.
        names: of the executions.

    Returns:
        Nothing where the processor's kernels are exact, or where products are not all of integers: then no file is looked at.
    """
    processor = examine_processor()
    if not processor.saturates or not run.has_integers_only:
        return []
    from ospq_export.onnx.kernels import integer_kernels

    ours = (e for e in TABLE.values() if e.name in names and e.runtime is Runtime.ONNX_RUNTIME)
    files = [str(e.file) for e in ours if e.shows_codes and e.optimize and e.provider is None]
    files += [UINT8_ACTIVATIONS_ONNX] if UINT8_ACTIVATIONS_ONNX in run.manifest.files else []
    said = (integer_kernels(run.path / file).warning(file, processor) for file in files)
    how = f"executed with ONNX Runtime's {PRECISE_KERNELS}=1, to be deployed with it on such a processor"
    return [f"{line}; {how}" for line in said if line]


def stand_in_findings(executions: Sequence[Backend]) -> list[str]:
    """Files that were judged by others: their formats are none that the runtime has."""
    files = dict.fromkeys(e.detail.get("file", "") for e in executions)
    return [
        f"{checked_file(name)} was judged by {name}, which has the same bytes in operators that ONNX Runtime can run"
        for name in files
        if checked_file(name) != name
    ]


def size_findings(run: Run) -> list[str]:
    """At which size of its range a run is judged, and where it was not; nothing where it takes one size."""
    sizes = run.manifest.size_range
    if sizes is None:
        return []
    own = run.data.input_size[1:]
    others = " and ".join(shown(end) for end in sizes.ends if end != own)
    return [f"judged at {shown(own)} alone, and the run takes {sizes}: validate it at {others} too"]
