"""What a reader has to know before reading the figures: of the processor, for ONNX Runtime on the CPU, and of the input size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ospq_export.graph.sizes import shown
from ospq_export.runs.files import UINT8_ACTIVATIONS_ONNX, checked_file
from ospq_export.tasks.distances import distances
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.codes.records import Location
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.probes import OPENED
from ospq_export.validate.executions.table import FLOAT, TABLE, Role, Runtime
from ospq_export.validate.verdict import Criterion
from ospq_export.world.processor import PRECISE_KERNELS, examine_processor

# A float network in FP16 or TF32 is a thousandth off; one that is so far off is broken (ours).
_BROKEN = 0.05

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


def baseline_findings(executions: Sequence[Backend], images: FloatArray | None) -> list[str]:
    """Float files that are broken: what is lost against them, or gained in speed, says nothing of quantization.

    Args:
        executions: the float network in torch among them, or nothing is judged.
        images: float32 (N, C, H, W), a few.
    """
    known = {e.name: e for e in executions}
    files = [e for e in executions if e.name in TABLE and TABLE[e.name].role is Role.FLOAT_FILE]
    if images is None or FLOAT not in known or not files:
        return []
    expected, found = known[FLOAT](images), []
    for e in files:
        given = e(images)
        off = max(float(distances(expected[n], given[n])[:, 0].mean()) for n in expected)
        if not off <= _BROKEN:
            how = f"{100 * off:.3g} % off the float network" if np.isfinite(off) else "not finite"
            found.append(f"{e.name} is no baseline: {e.detail['file']} gives outputs that are {how}")
    return found


def engine_findings(criteria: Sequence[Criterion], locations: Sequence[Location]) -> list[str]:
    """Engines that differ while their opened copies do not: the tensors that are returned undo the fusion that is at fault."""
    missed = {c.deployed for c in criteria if c.outcome == "missed"}
    opened = [
        x.deployed.removesuffix(OPENED) for x in locations if x.deployed.endswith(OPENED) and not x.faults
    ]
    return [
        f"{name} differs from its reference and {name}{OPENED} does not: the fault lies in what the engine fuses, "
        "which returning inner tensors undoes"
        for name in opened
        if name in missed
    ]
