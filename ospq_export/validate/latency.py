"""Latency and throughput of executions: warm-up, then medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ospq_export.errors import InputError
from ospq_export.tasks.statistics import FloatArray, Record
from ospq_export.validate.executions.backends import Backend

_WARM_UP, _FEWEST, _MOST, _SECONDS = 2, 3, 50, 1.0
# Less of a gain is within what medians of one machine move by (ours).
_FASTER = 0.95
_SHOWN = 3


class Latency(Record):
    """One execution at one batch size.

    Attributes:
        pieces: in how many pieces the execution takes the batch, where its file has a fixed batch size.
        median_ms: of the whole batch, host to host, milliseconds.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; None where a device did not tell.
        graph_ms: median of the batch on the GPU alone, replayed as a CUDA graph; None where that is not to be had.
        images_per_second: batch size over the median.
        calls: how many were timed, after the warm-up.
    """

    name: str
    batch_size: int
    pieces: int = 1
    median_ms: float
    p90_ms: float
    p99_ms: float | None = None
    graph_ms: float | None = None
    images_per_second: float
    calls: int


def _timed(call: Callable[[], object]) -> list[float]:
    """Seconds of each call, after a warm-up."""
    for _ in range(_WARM_UP):
        call()
    seconds: list[float] = []
    while len(seconds) < _FEWEST or (len(seconds) < _MOST and sum(seconds) < _SECONDS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def not_faster(
    latencies: Sequence[Latency], baselines: Mapping[str, str], costs: Callable[[str], str]
) -> list[str]:
    """Deployed executions that are not faster than the float network, with what costs the time.

    Args:
        latencies: of all executions.
        baselines: deployed execution -> the float one that it has to beat.
        costs: of a deployed execution: what in it costs time, in words.
    """
    found = {(x.name, x.batch_size): x for x in latencies}
    slow: dict[tuple[str, str], list[str]] = {}
    for x in latencies:
        other = found.get((baselines.get(x.name, ""), x.batch_size))
        if other is not None and x.median_ms > _FASTER * other.median_ms:
            said = f"batch {x.batch_size} ({x.median_ms:.3g} ms against {other.median_ms:.3g} ms)"
            slow.setdefault((x.name, other.name), []).append(said)
    lines = []
    for (name, baseline), at in slow.items():
        why = f": {cost}" if (cost := costs(name)) else ""
        lines.append(f"{name} is not faster than {baseline} at {', '.join(at)}{why}")
    return lines


def listed(reasons: Mapping[str, str]) -> str:
    """Operators with their reasons; of many the first few."""
    said = ", ".join(f"{name} ({why})" for name, why in list(reasons.items())[:_SHOWN])
    return f"{said} and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else said


def check_batches(executions: Sequence[Backend], sizes: Sequence[int]) -> None:
    """Refuse batch sizes that a file with a fixed batch would have to fill up with images that nobody asked for.

    Raises:
        InputError: a size is not a multiple of an execution's fixed batch.
    """
    for execution in executions:
        fixed = execution.fixed_batch
        padded = [size for size in sizes if fixed is not None and size % fixed]
        if padded:
            raise InputError(
                f"{execution.name} takes batches of {fixed} only: a batch of {padded[0]} would be padded, its time wrong",
                where=f"`latency` {padded[0]}",
                fix=f"time a multiple of {fixed}, or export with another `batch_size`",
            )


def measure(execution: Backend, images: FloatArray, batch_size: int) -> Latency:
    """Time one execution: two calls to warm up, then at least 3 calls, at most 50, for about a second.

    Args:
        execution: what to time.
        images: float32 (N, C, H, W), N >= 1; repeated to fill the batch.
        batch_size: 1 or more.
    """
    batch = np.ascontiguousarray(images[np.arange(batch_size) % len(images)])
    seconds = _timed(lambda: execution(batch))
    graphed = getattr(execution, "graphed", None)
    replay = None if graphed is None else graphed(batch)
    median = float(np.median(seconds))
    return Latency(
        name=execution.name,
        batch_size=batch_size,
        pieces=batch_size // (execution.fixed_batch or batch_size),
        median_ms=median * 1e3,
        p90_ms=float(np.percentile(seconds, 90)) * 1e3,
        p99_ms=float(np.percentile(seconds, 99)) * 1e3,
        graph_ms=None if replay is None else float(np.median(_timed(replay))) * 1e3,
        images_per_second=batch_size / median,
        calls=len(seconds),
    )
