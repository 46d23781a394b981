"""Where the activations at a cut lie: on the device, then in host memory, then in files, under a budget of bytes."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ospq_export.errors import InputError
from ospq_export.world.memory import available_memory

_SHARE = 0.5
# Pages of mapped files are given back after this many steps: they count as the process's memory while it looks at them.
_STEPS_PER_TRIM = 8


@dataclass
class Store:
    """Allocates the tensors that hold activations of all calibration images.

    A GPU takes what fits into half of its free memory; host memory, pinned where there is a GPU, takes what fits into the
    budget; the rest goes to files in `folder`, which are mapped into memory and have no name any more: whatever ends the
    process ends them.

    Attributes:
        budget: bytes of host memory.
        folder: where files go.
        device: where the slices run.
        used: bytes in use, by tier.
        peak: the most there ever were, by tier.
    """

    budget: int
    folder: Path
    device: torch.device
    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("device", "host", "disk"), 0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("device", "host", "disk"), 0))
    maps: list[weakref.ref[mmap.mmap]] = field(default_factory=list)

    @classmethod
    def with_default(cls, budget: int | None, folder: Path, device: torch.device) -> Store:
        """A store with the given budget, or with half of the host memory that is available."""
        return cls(int(_SHARE * available_memory()) if budget is None else budget, folder, device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in the fastest tier that has room for it.

        Raises:
            InputError: the disk has no room either.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        tier = self._tier(size)
        if tier == "device":
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        elif tier == "host":
            tensor = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        else:
            tensor = self._mapped(shape, dtype, size)
        self._count(tier, size)
        weakref.finalize(tensor, self._count, tier, -size)
        return tensor

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor that the caller brought along, the images, against the budget."""
        self._count("host", tensor.nbytes)

    def trim(self) -> None:
        """Give the pages of mapped files back to the system, which keeps their content."""
        for reference in self.maps:
            found = reference()
            if found is not None and hasattr(mmap, "MADV_DONTNEED"):
                found.madvise(mmap.MADV_DONTNEED)

    def trimming(self, advance: Callable[[], None]) -> Callable[[], None]:
        """What to call after each step instead of `advance`, so that mapped pages do not pile up."""
        steps = itertools.count(1)

        def stepped() -> None:
            if next(steps) % _STEPS_PER_TRIM == 0:
                self.trim()
            advance()

        return stepped

    def _tier(self, size: int) -> str:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if size <= _SHARE * free:
                return "device"
        return "host" if self.used["host"] + size <= self.budget else "disk"

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Reserved at once: on a mapped file without blocks behind it, a full disk is a crash.
                os.posix_fallocate(file.fileno(), 0, size)
                pages = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise InputError(
                f"the activations take {size / 1e9:.1f} GB of disk beyond the memory budget: {error.strerror or error}",
                where=self.folder,
                fix="free some space, give a larger `memory_budget`, or fewer images",
            ) from error
        self.maps = [r for r in self.maps if r() is not None] + [weakref.ref(pages)]
        return torch.frombuffer(pages, dtype=dtype).view(shape)

    def _count(self, tier: str, size: int) -> None:
        self.used[tier] += size
        self.peak[tier] = max(self.peak[tier], self.used[tier])


def parse_bytes(text: str, where: str = "`memory_budget`") -> int:
    """Bytes of "8GB", "512 MB", "1.5e9".

    Args:
        text: the amount.
        where: the setting to blame.

    Raises:
        InputError: it is no positive amount.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    stripped = text.strip().upper()
    number = stripped.rstrip("ABCDFGHIJKLMNOPQRSTUVWXYZ ")
    unit = stripped[len(number) :].strip()
    try:
        amount = float(number) * units[unit]
        if not 1 <= amount < 2**63:
            raise ValueError
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{text!r} is no amount of memory", where=where, fix="write it like 8GB or 512MB"
        ) from error
    return int(amount)
