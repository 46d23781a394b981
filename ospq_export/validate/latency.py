"""Latency and throughput of executions: warm-up, then medians."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from ospq_export.errors import InputError
from ospq_export.tasks.statistics import FloatArray, Record
from ospq_export.validate.executions.backends import Backend

_WARM_UP, _FEWEST, _MOST, _SECONDS = 2, 3, 50, 1.0


class Latency(Record):
    """One execution at one batch size.

    Attributes:
        pieces: in how many pieces the execution takes the batch, where its file has a fixed batch size.
        median_ms: of the whole batch, host to host, milliseconds.
        p90_ms: 90th percentile.
        images_per_second: batch size over the median.
        calls: how many were timed, after the warm-up.
    """

    name: str
    batch_size: int
    pieces: int = 1
    median_ms: float
    p90_ms: float
    images_per_second: float
    calls: int


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
                where=f"`latency_batches` {padded[0]}",
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
    for _ in range(_WARM_UP):
        execution(batch)
    seconds: list[float] = []
    while len(seconds) < _FEWEST or (len(seconds) < _MOST and sum(seconds) < _SECONDS):
        started = time.perf_counter()
        execution(batch)
        seconds.append(time.perf_counter() - started)
    median = float(np.median(seconds))
    return Latency(
        name=execution.name,
        batch_size=batch_size,
        pieces=batch_size // (execution.fixed_batch or batch_size),
        median_ms=median * 1e3,
        p90_ms=float(np.percentile(seconds, 90)) * 1e3,
        images_per_second=batch_size / median,
        calls=len(seconds),
    )
