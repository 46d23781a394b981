"""An optimisation step recorded once as a CUDA graph, and replayed: one launch instead of one for every kernel."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ospq_export.calibrate.reconstruct.activations import SliceData

log = logging.getLogger(__name__)
Step = Callable[[SliceData], Tensor]


class Graphed:
    """A step whose kernels are recorded, and from then on replayed on whatever lies in the memory of the first batch.

    All that changes from one call to the next has to lie in tensors on the device, which the caller fills before the call.
    The first calls run as they are, on a stream of their own as recording needs it: libraries start up, Adam makes its state.
    Where recording fails, the step goes on being run as it is.
    """

    WARM_UP = 3

    def __init__(self, step: Step) -> None:
        """Wrap a step.

        Args:
            step: takes a batch on a CUDA device, which has the same shapes every time, and returns a scalar.
        """
        self.step = step
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: SliceData | None = None
        self.result: Tensor | None = None

    def __call__(self, batch: SliceData) -> Tensor:
        """Do one step; the scalar is overwritten by the next call."""
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self._aside(batch)
        if self.calls == self.WARM_UP + 1:
            self._record(batch)
        if self.graph is None or self.held is None or self.result is None:
            return self.step(batch)
        self.held.copy_(batch)
        self.graph.replay()
        return self.result

    def release(self) -> None:
        """Forget the recording and its memory; from here on the step is run as it is."""
        self.graph = self.held = self.result = None

    def _aside(self, batch: SliceData) -> Tensor:
        stream = torch.cuda.Stream(batch.target.device)
        stream.wait_stream(torch.cuda.current_stream(batch.target.device))
        with torch.cuda.stream(stream):
            result = self.step(batch)
        torch.cuda.current_stream(batch.target.device).wait_stream(stream)
        return result

    def _record(self, batch: SliceData) -> None:
        """Record without executing: nothing that the step changes has changed afterwards."""
        graph, held = torch.cuda.CUDAGraph(), batch.map(Tensor.clone)
        try:
            # Of this thread only: another one pins the memory of the next batch meanwhile, which no recording permits.
            with _uncollected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = self.step(held)
        except RuntimeError as error:
            log.warning("a step cannot be recorded as a CUDA graph: %s", str(error).splitlines()[0])
            _stop_recording(batch.target.device)
            return
        self.graph, self.held, self.result = graph, held, result


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: the recording of an earlier slice among the garbage would be freed, which no recording permits."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _stop_recording(device: torch.device) -> None:
    """The random generator believes in a recording that failed, and gives no numbers outside one: a copy of its state does."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
