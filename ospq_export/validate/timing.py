"""Which executions are timed, which float one each has to beat, and what costs the time where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.engines import EngineBackend, float_engine
from ospq_export.validate.executions.table import TABLE, Role, Runtime, float_beside, provider_of, with_role
from ospq_export.validate.latency import Latency, listed, measure, not_faster

if TYPE_CHECKING:
    from ospq_export.runs.run import Run


def float_files(run: Run, executions: Sequence[Backend], device: str) -> list[Backend]:
    """Every float file of the run that is not among its executions; in OpenVINO, too, where that executes another file."""
    names = {e.name for e in executions}
    runtimes = {Runtime.ONNX_RUNTIME, *(TABLE[name].runtime for name in names & set(TABLE))}
    missing = [TABLE[name] for name in with_role(Role.FLOAT_FILE) if name not in names]
    return [e.open(run, device) for e in missing if e.file in run.manifest.files and e.runtime in runtimes]


def time_all(
    run: Run, executions: Sequence[Backend], images: FloatArray, sizes: Sequence[int], device: str
) -> tuple[list[Latency], list[str]]:
    """Time executions at every batch size; engines beside one of the float file, which is built for it.

    Args:
        run: exported.
        executions: what is timed, float files among them.
        images: float32 (N, C, H, W), N >= 1.
        sizes: of the batches.
        device: torch device.

    Returns:
        The latencies; and a line for each execution that is not faster than the float one that it has to beat.
    """
    engines = [e for e in executions if isinstance(e, EngineBackend)]
    built = [float_engine(run, engine) for engine in engines]
    timed = [measure(e, images, n) for e in (*executions, *filter(None, built)) for n in sizes]
    names = {x.name for x in timed}
    baselines = {name: held for name in names if (held := _baseline(name, names, device))}
    slow = {engine.name: engine.slow for engine in engines}
    return timed, not_faster(timed, baselines, lambda name: slow.get(name) or _in_float(run, name, device))


def _baseline(name: str, names: set[str], device: str) -> str | None:
    """The float execution of the same runtime: in FP16 on a GPU, where that was exported.

    None of what nobody deploys: without graph optimizations a file is only checked.
    """
    if name not in TABLE or TABLE[name].role is not Role.DEPLOYED or not TABLE[name].optimize:
        return None
    kinds = ("fp16", "fp32") if device.startswith("cuda") else ("fp32",)
    return next(float_beside(name, names, kinds), None)


def _in_float(run: Run, name: str, device: str) -> str:
    """Which products ONNX Runtime computes in float, on a CPU."""
    execution = TABLE[name]
    if execution.runtime is not Runtime.ONNX_RUNTIME or (execution.provider or provider_of(device)) != "cpu":
        return ""
    from ospq_export.onnx.kernels import integer_kernels

    left = integer_kernels(run.runnable(str(execution.file))).in_float
    return f"in float run {listed(left)}" if left else ""
