"""Random batches of a slice's data, on the device where the slice runs; fetched ahead where fetching takes time."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ospq_export.calibrate.reconstruct.activations import SliceData
from ospq_export.world.processes import SOLO, World


class Batches:
    """An endless sequence of random batches, without replacement within a batch.

    Where the data lie in host memory or in files and the slice runs on a GPU, a thread fetches the next batch into pinned
    memory and starts its copy while the present one is worked on. Which images a batch has depends on the seed alone; of
    several processes with one seed, each has its share of the batch.
    """

    def __init__(
        self, data: SliceData, batch_size: int, device: torch.device, seed: int, world: World = SOLO
    ) -> None:
        self.data, self.device, self.world = data, device, world
        self.count = min(batch_size, data.images)
        self.generator = torch.Generator().manual_seed(seed)
        ahead = device.type != "cpu" and data.target.device.type == "cpu"
        self.pool = ThreadPoolExecutor(1, "batches") if ahead else None
        self.pending: Future[SliceData] | None = None

    def next(self) -> SliceData:
        """The next batch."""
        if self.pool is None:
            return self._gather().to(self.device)
        ready = self.pending or self.pool.submit(self._pinned)
        self.pending = self.pool.submit(self._pinned)
        return ready.result().to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stop fetching."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _gather(self) -> SliceData:
        picks = torch.randperm(self.data.images, generator=self.generator)[: self.count]
        return self.data.select(picks[self.world.rank :: self.world.size])

    def _pinned(self) -> SliceData:
        return self._gather().pinned()
