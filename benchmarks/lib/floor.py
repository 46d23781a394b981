"""The least that one optimisation step of a slice has to do, and how fast this machine can do it.

*Arithmetic*: the multiply-adds of its linear, convolution and matmul operators, forward and backward (counted by torch from
one real step), at the machine's best measured rate for a float32 matrix product. Elementwise work is left out: the floor is what
remains when all of it is hidden.

*Memory*: every operand and result of a matrix product crosses memory once in the forward pass and once in each of the two
products of the backward pass, and V, its gradient and Adam's two moments are read and written once; at the machine's best
measured rate for a copy. Everything elementwise is thought to be fused into the products.

The floor of a step is the larger of the two times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from ospq_export.calibrate.reconstruct.activations import SliceData
from ospq_export.calibrate.reconstruct.graphed import Graphed
from ospq_export.graph.capture import QUANTIZABLE


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Clock = Callable[[], float]


def best_seconds(
    function: Callable[[], object],
    device: torch.device,
    clock: Clock = time.perf_counter,
    seconds: float = 2.0,
) -> float:
    """Shortest time of one call within some seconds of calls."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        best = min(best, clock() - start)
    return best


@dataclass(frozen=True)
class Machine:
    """Best measured rates: float32 products in operations per second, copies in bytes per second (read plus written)."""

    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, device: torch.device, clock: Clock = time.perf_counter) -> Machine:
        """Time products of three sizes, and copies of a tensor too large for most caches."""
        rates = []
        for size in (512, 1024, 2048):
            a = torch.randn(size, size, device=device)
            b, c = torch.randn_like(a), torch.empty_like(a)
            product = partial(torch.mm, a, b, out=c)
            rates.append(2.0 * size**3 / best_seconds(product, device, clock))
        source = torch.randn(1 << 24, device=device)
        target = source.clone()
        copy = best_seconds(lambda: target.copy_(source), device, clock)
        return cls(max(rates), 2.0 * source.numel() * source.element_size() / copy)


@dataclass(frozen=True)
class Work:
    """What one step has to do: floating-point operations, and bytes that cross memory."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """The floor."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


def unrecorded(step: Callable[[SliceData], Tensor]) -> Callable[[SliceData], Tensor]:
    """The step behind a recorded one: in the replay of a CUDA graph there is nothing to be counted."""
    return step.step if isinstance(step, Graphed) else step


def work_of(
    piece: fx.GraphModule, inputs: tuple[Tensor, ...], step: Callable[[], object], weights: int
) -> Work:
    """Count one step.

    Args:
        piece: the slice.
        inputs: a batch of its input, and how many images it has.
        step: does one whole step with such a batch.
        weights: elements of V.
    """
    traffic = _Traffic(piece)
    with torch.no_grad():
        traffic.run(*inputs)
    with FlopCounterMode(display=False) as counter:
        step()
    adam = 4.0 * 7 * weights  # V, its gradient and both moments are read; V and both moments are written
    return Work(float(counter.get_total_flops()), 3.0 * traffic.bytes + adam)


class _Traffic(fx.Interpreter):
    """Adds up the bytes of the operands and results of the quantizable operators."""

    bytes = 0.0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in QUANTIZABLE:
            operands: Any = self.map_nodes_to_values(n.args[:2], n)
            tensors = [t for t in (*operands, result) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result
