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
    """Bytes of host memory that are free or can be freed, in the machine and in every control group of this process."""
    try:
        machine = _kib(Path("/proc/meminfo"))["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        machine = total_memory(torch.device("cpu"))
    return min(machine, *group_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))


def group_memory(root: Path, membership: Path) -> list[int]:
    """What the control groups of a process leave it, in bytes: a container's limit, say, less what is in use there.

    Args:
        root: where control groups are mounted, of version 1 or 2.
        membership: the file that names the process's groups, see cgroups(7).

    Returns:
        One figure for each group with a limit, from the innermost out, and an unlimited one, so that it is never empty.
    """
    found = [sys.maxsize]
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return found
    for words in lines:
        if len(words) != 3 or words[1] not in _GROUP_FILES:
            continue
        top = root / words[1]
        group = top / words[2].lstrip("/")
        while group == top or top in group.parents:
            left = _left(group, _GROUP_FILES[words[1]])
            found += [] if left is None else [left]
            group = group.parent
    return found


# Limit, use, and the page cache among it that can be dropped: version 2, version 1.
_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _left(group: Path, names: tuple[str, str, str]) -> int | None:
    """Limit less use of one group; None where it has no limit or does not exist."""
    limit, usage, cache = names
    try:
        most = int((group / limit).read_text())
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - used + int(stat.get(cache, 0)))
    except (OSError, ValueError):
        return None


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, whatever is in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kib(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1:] == ["kB"]}
