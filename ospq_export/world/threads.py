"""How many threads compute: as many as the process may really run at once, and threads that wait without spinning.

A thread pool that is larger than the share of the processor that a container gives is slower than a small one: every parallel
region ends only when its last thread has had its turn.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ospq_export.errors import InputError

log = logging.getLogger(__name__)
_WAITING = "OMP_WAIT_POLICY"
# Settings that say how OpenMP's threads wait: whoever gave one of them has chosen.
_WAITING_SETTINGS = (_WAITING, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@dataclass(frozen=True)
class Threads:
    """A number of threads, and what decided on it."""

    count: int
    source: str


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep, not spin, at the end of a parallel region; has to come before torch is imported.

    A spinning thread uses up the time slice that the thread it waits for needs, wherever more is running than there are cores.

    Args:
        environment: changed in place, unless it already says how threads wait.
    """
    if not any(name in environment for name in _WAITING_SETTINGS):
        environment[_WAITING] = "PASSIVE"


def use_threads(given: int | None, environment: Mapping[str, str] = os.environ) -> Threads:
    """Set the number of threads that torch computes with; ONNX Runtime's sessions take it over.

    Args:
        given: on the command line; None chooses: what OMP_NUM_THREADS says (torchrun sets it), else one thread per core, but no
            more than the process's affinity mask and the CPU quota of its control group allow.
        environment: of the process.

    Raises:
        InputError: `given` is below 1, or far above the number of processors.
    """
    import torch

    chosen = choose_threads(given, torch.get_num_threads(), environment)
    if chosen.count != torch.get_num_threads():
        torch.set_num_threads(chosen.count)
    log.info("%d threads, by %s", chosen.count, chosen.source)
    return chosen


def choose_threads(
    given: int | None, default: int, environment: Mapping[str, str], proc: Path = Path("/proc")
) -> Threads:
    """The number of threads, and why; see `use_threads`.

    Args:
        given: on the command line, or None.
        default: what the library takes by itself.
        environment: of the process.
        proc: where the kernel describes processes.

    Raises:
        InputError: `given` is below 1, or more than 4 for each processor.
    """
    if given is not None:
        most = 4 * (os.cpu_count() or 1)
        if not 1 <= given <= most:
            fix = f"give 1 to {most} on this machine, or leave it out"
            raise InputError(f"{given} threads", where="`threads`", fix=fix)
        return Threads(given, "threads")
    told = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if told.isdecimal() and int(told) > 0:
        return Threads(default, "OMP_NUM_THREADS")
    cores, quota, allowed = usable_cores(), cgroup_quota(proc), allowed_cores(proc)
    if allowed >= default:
        return Threads(default, "the number of cores")
    if quota is not None and quota < cores:
        return Threads(allowed, f"the control group's quota of {quota:g} processors")
    return Threads(allowed, "the affinity mask")


def usable_cores() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def allowed_cores(proc: Path = Path("/proc")) -> int:
    """Logical processors that affinity and the CPU quota let this process use at once."""
    cores, quota = usable_cores(), cgroup_quota(proc)
    return cores if quota is None else min(cores, max(1, int(quota)))


def cgroup_quota(proc: Path = Path("/proc")) -> float | None:
    """Processors' worth of time that this process's control groups allow it, the least of all levels; None without a limit.

    Both versions of control groups are read: cpu.max of version 2, cpu.cfs_quota_us and cpu.cfs_period_us of version 1
    (Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst of the Linux kernel).

    Args:
        proc: where the kernel describes processes.
    """
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    found = (quota(folder) for folder in _group_folders(groups, mounts) for quota in (_quota_v2, _quota_v1))
    return min((limit for limit in found if limit is not None), default=None)


def _group_folders(groups: list[str], mounts: list[str]) -> Iterator[Path]:
    """Folders of the process's groups that limit processors, and of all groups above them."""
    places = {}
    for line in groups:
        number, controllers, name = line.split(":", 2)
        if number == "0" or "cpu" in controllers.split(","):
            places["cgroup2" if number == "0" else "cgroup"] = PurePosixPath(name)
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields, mounted = left.split(), right.split() or [""]
        kind, options = mounted[0], mounted[-1].split(",")
        if kind not in places or (kind == "cgroup" and "cpu" not in options):
            continue
        mount, root, path = Path(fields[4]), PurePosixPath(fields[3]), places[kind]
        # Inside a container, the path may be the host's, which is not mounted here: then the mount is the group itself.
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        folder = mount / inside
        yield from (level for level in (folder, *folder.parents) if level.is_relative_to(mount))


def _quota_v2(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdecimal() else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = (_words(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    # No limit is written as -1.
    if len(quota) != 1 or len(period) != 1 or not quota[0].isdecimal():
        return None
    return int(quota[0]) / int(period[0])


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
