"""Memory: how much a calibration used, and how much it may use."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated tensors on a GPU, the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # getrusage would count what the process that started this one had in use at that moment.
        return process_bytes("VmHWM")
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB, macOS in bytes.
        return peak if sys.platform == "darwin" else peak * 1024


def process_bytes(field: str) -> int:
    """What Linux says of this process's memory: "VmRSS" is resident now, "VmHWM" the most that ever was.

    Raises:
        OSError: the system does not say.
        KeyError: it has no such field.
    """
    return _kib(Path("/proc/self/status"))[field] * 1024


def available_memory() -> int:
    """Bytes of host memory that are free or can be freed."""
    try:
        return _kib(Path("/proc/meminfo"))["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        return total_memory(torch.device("cpu"))


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, whatever is in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kib(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1:] == ["kB"]}
