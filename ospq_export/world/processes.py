"""The processes that share one calibration or one validation, as `torchrun --nproc-per-node N` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# The first process may search for a slicing, or resume, for long before the others are needed.
_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class World:
    """This process's place among those that share the work; a single process is a world of one.

    Attributes:
        rank: 0 for the process that writes the run directory.
        size: how many processes there are.
    """

    rank: int = 0
    size: int = 1

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        with torch.no_grad():
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def share(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite tensors with those of one process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, source)

    def agree(self, value: int) -> int:
        """The first process's value."""
        if self.size == 1:
            return value
        # On the host: both backends are there, and a GPU would have to be waited for.
        told = torch.tensor(value)
        dist.broadcast(told, 0)
        return int(told)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.agree(0)

    def tell(self, text: str) -> list[str]:
        """Every process's text, in the order of their ranks."""
        if self.size == 1:
            return [text]
        written = bytearray(text.encode())
        # No tensor can be made of an empty buffer.
        mine = torch.frombuffer(written or bytearray(1), dtype=torch.uint8)[: len(written)]
        texts = []
        for owner, length in enumerate(self._all(len(mine))):
            told = mine if owner == self.rank else torch.empty(length, dtype=torch.uint8)
            dist.broadcast(told, owner)
            texts.append(told.numpy().tobytes().decode())
        return texts

    def gather(self, parts: dict[int, list[Tensor]], count: int) -> list[list[Tensor]]:
        """Lists of flat host tensors of which each process holds some; afterwards all of them, in order.

        Args:
            parts: this process's, by place; place k belongs to process k modulo the size.
            count: how many there are in all.
        """
        if self.size == 1:
            return [parts[place] for place in range(count)]
        width = max(self._all(len(next(iter(parts.values()), []))))
        return [self._spread(parts.get(place, []), place % self.size, width) for place in range(count)]

    def _all(self, value: int) -> list[int]:
        found = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(value))
        return [int(t) for t in found]

    def _spread(self, tensors: list[Tensor], owner: int, width: int) -> list[Tensor]:
        mine = owner == self.rank
        sizes = torch.tensor([t.numel() for t in tensors]) if mine else torch.zeros(width, dtype=torch.int64)
        dist.broadcast(sizes, owner)
        flat = torch.cat(tensors) if mine else torch.empty(int(sizes.sum()))
        dist.broadcast(flat, owner)
        return list(flat.split(sizes.tolist()))


SOLO = World()


def local_rank() -> int:
    """This process's place among those of its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun's environment variables describe; of one where there are none.

    Host tensors go through gloo, GPU tensors through NCCL.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else SOLO
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        # More processes than GPUs may still share the CPU.
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
