"""Where two executions part: integer codes at each quantizer, and signal-to-quantization-noise ratios slice by slice.

Each quantizer is compared twice. *Free-running*: both networks compute from the images, and differences accumulate.
*Equal inputs*: the reference computes in float64, and after each comparison goes on from what the deployed network has there,
so a difference belongs to the stretch of graph right before it. That one decides: codes may differ at rounding edges only.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from ospq_export.graph.outputs import output_names, output_nodes
from ospq_export.graph.quantizers import ActivationQuantizer
from ospq_export.graph.rewrite import OnValue, Tap
from ospq_export.graph.slicing import Slice
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.codes.records import (
    CodeDifferences,
    Location,
    Power,
    QuantizerComparison,
    SliceComparison,
)
from ospq_export.validate.executions.probes import BLOCK_SCALES, CODES, OUTPUT, Probed

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_BATCH = 8
# Limits in float32 and in FP16; ours. With equal inputs ONNX Runtime stayed within 4e-5 steps of a rounding edge and above 120 dB
# in float32; a scale that is 2 % off moves a 4-bit code by 0.1 steps and a residual sum to below 60 dB.
# Those of FP16 follow from its 13 bits less.
MAX_EXCESS = {False: 0.01, True: 1.5}
MIN_SQNR = {False: 90.0, True: 30.0}


def _tap(
    module: fx.GraphModule,
    ends: Mapping[str, str],
    on_codes: Callable[[ActivationQuantizer, Tensor], Tensor | None],
    on_end: Callable[[str, Tensor], Tensor | None],
) -> Tap:
    """Hands over each activation quantizer's input and each named node's value; either may be replaced."""
    modules = dict(module.named_modules())

    def codes(tap: Tap, n: fx.Node, _value: Tensor) -> Tensor | None:
        return on_codes(modules[str(n.target)], tap.env[n.all_input_nodes[0]])

    def end(_tap: Tap, n: fx.Node, value: Tensor) -> Tensor | None:
        return on_end(ends[n.name], value)

    watched: dict[fx.Node, OnValue] = {n: end for n in module.graph.nodes if n.name in ends}
    for n in module.graph.nodes:
        if n.op == "call_module" and isinstance(modules[str(n.target)], ActivationQuantizer):
            watched[n] = codes
    return Tap(module, watched)


@dataclass(frozen=True)
class Place:
    """Where tensors are compared: the end of a slice, or one of the network's outputs.

    Attributes:
        name: of the slice, or "output NAME".
        node: in the graph.
        tensor: in a deployed file.
    """

    name: str
    node: str
    tensor: str


def places_of(module: fx.GraphModule, slices: Sequence[Slice]) -> list[Place]:
    """The end of every slice, and the network's outputs where no slice ends."""
    graph = module.graph
    outputs = dict(zip((n.name for n in output_nodes(graph)), output_names(graph), strict=True))
    ends = {s.end: s.name for s in slices}
    order = [n.name for n in graph.nodes if n.name in ends or n.name in outputs]
    return [
        Place(ends.get(n, f"output {outputs.get(n)}"), n, outputs.get(n, f"{ends.get(n)}{OUTPUT}"))
        for n in order
    ]


@dataclass(frozen=True)
class Reference:
    """The torch side of the comparison.

    Attributes:
        network: fake-quantized, float32.
        exact: the same in float64.
        original: the float network; its nodes have the same names.
        places: where tensors are compared, in the graph's order.
        slice_of: quantizer name -> slice name.
    """

    network: fx.GraphModule
    exact: fx.GraphModule
    original: fx.GraphModule
    places: list[Place]
    slice_of: Mapping[str, str]

    @classmethod
    def of(cls, run: Run) -> Reference:
        """The torch side of a run."""
        network, slices = run.quantized_graph().module, run.manifest.slices
        return cls(
            network=network,
            exact=copy.deepcopy(network).double(),
            original=run.captured(),
            places=places_of(network, run.slices()),
            slice_of={q.name: slices[q.slice].name for q in run.manifest.quantizers},
        )

    @property
    def wanted(self) -> frozenset[str]:
        """Names of the inner tensors that a deployed file should have."""
        quantizers = [m for m in self.network.modules() if isinstance(m, ActivationQuantizer)]
        names = [f"{q.name}{kind}" for q in quantizers for kind in (CODES, BLOCK_SCALES)]
        return frozenset([*names, *(place.tensor for place in self.places)])


class Locator:
    """Compares one deployed file with the reference, batch by batch."""

    def __init__(self, reference: Reference, probed: Probed, deployed: str) -> None:
        self.reference, self.probed, self.deployed = reference, probed, deployed
        self.ends = {place.node: place.name for place in reference.places}
        self.tensors = {place.name: place.tensor for place in reference.places}
        self.images = 0
        self.free: dict[str, CodeDifferences] = defaultdict(CodeDifferences)
        self.equal: dict[str, CodeDifferences] = defaultdict(CodeDifferences)
        self.quality: dict[str, Power] = defaultdict(Power)
        self.power: dict[tuple[str, str], Power] = defaultdict(Power)

    def add(self, images: FloatArray) -> None:
        """Compare on a batch (B, C, H, W) float32."""
        tensors = {name: torch.from_numpy(value) for name, value in self.probed.run(images).items()}
        x = torch.from_numpy(images)
        self.images += len(images)
        with torch.inference_mode():
            outputs = self._free_running(x, tensors)
            for name, value in self._plain(self.reference.original, x).items():
                self.power["quantization", name].add(value, outputs[name])
            for name, value in self._plain(self.reference.exact, x.double()).items():
                self.power["floor", name].add(outputs[name], value)
            self._equal_inputs(x, tensors)

    def add_all(self, images: FloatArray) -> None:
        """Compare on images (N, C, H, W) float32, N >= 1, in batches that the file takes."""
        size = self.probed.batch_size or _BATCH
        for start in range(0, max(len(images) - size + 1, 1), size):
            part = images[start : start + size]
            if len(part) < size and self.probed.batch_size:
                part = part[np.arange(size) % len(part)]
            self.add(part)

    def _plain(self, module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        _tap(module, self.ends, lambda _q, _x: None, outputs.__setitem__).run(x)
        return outputs

    def _free_running(self, x: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}

        def on_codes(quantizer: ActivationQuantizer, value: Tensor) -> None:
            self.quality[quantizer.name].add(value, quantizer(value))
            codes = tensors.get(f"{quantizer.name}{CODES}")
            if codes is not None:
                self.free[quantizer.name].add(quantizer, value, codes.reshape(value.shape))

        def on_end(name: str, value: Tensor) -> None:
            outputs[name] = value
            given = tensors.get(self.tensors[name])
            if given is not None:
                self.power["deployed", name].add(value, given)

        _tap(self.reference.network, self.ends, on_codes, on_end).run(x)
        return outputs

    def _equal_inputs(self, x: Tensor, tensors: Mapping[str, Tensor]) -> None:
        def on_codes(quantizer: ActivationQuantizer, value: Tensor) -> Tensor | None:
            codes = tensors.get(f"{quantizer.name}{CODES}")
            if codes is None:
                return None
            # A file may have fewer dimensions where it quantizes.
            codes = codes.reshape(value.shape)
            stored = tensors.get(f"{quantizer.name}{BLOCK_SCALES}")
            self.equal[quantizer.name].add(quantizer, value, codes, stored)
            format_ = quantizer.format
            scales = format_.activation_scales(value, quantizer.scale, stored)
            return format_.dequantize(format_.decode(codes).double(), scales, quantizer.used_offset)

        def on_end(name: str, value: Tensor) -> Tensor | None:
            given = tensors.get(self.tensors[name])
            if given is None:
                return None
            self.power["equal_input", name].add(value, given)
            return given.double()

        _tap(self.reference.exact, self.ends, on_codes, on_end).run(x.double())

    def result(self) -> Location:
        """What was found on all batches so far."""
        half = self.probed.half
        quantizers = [self._quantizer(name) for name in self.equal]
        slices = [self._slice(place.name) for place in self.reference.places]
        found = list(self._faults(quantizers, slices))
        return Location(
            deployed=self.deployed,
            images=self.images,
            max_excess=MAX_EXCESS[half],
            min_sqnr=MIN_SQNR[half],
            first_diverging=found[0][0] if found else None,
            faults=[text for _, text in found],
            unknown=sorted(
                n for n in self.reference.wanted - self.probed.names if not n.endswith(BLOCK_SCALES)
            ),
            quantizers=quantizers,
            slices=slices,
        )

    def _quantizer(self, name: str) -> QuantizerComparison:
        free, equal = self.free[name], self.equal[name]
        return QuantizerComparison(
            name=name,
            slice=self.reference.slice_of[name],
            free_share=free.share,
            free_max_step=free.max_step,
            share=equal.share,
            max_step=equal.max_step,
            excess=max(equal.excess, 0.0),
            sqnr=self.quality[name].decibel,
            histogram=[] if equal.histogram is None else equal.histogram.tolist(),
        )

    def _slice(self, name: str) -> SliceComparison:
        def decibel(kind: str) -> float | None:
            power = self.power.get((kind, name))
            return None if power is None else power.decibel

        return SliceComparison(
            name=name,
            quantization=decibel("quantization") or 0.0,
            floor=decibel("floor") or 0.0,
            deployed=decibel("deployed"),
            equal_input=decibel("equal_input"),
        )

    def _faults(
        self, quantizers: list[QuantizerComparison], slices: list[SliceComparison]
    ) -> Iterator[tuple[str, str]]:
        """(slice, description) of every difference that rounding does not explain, slice by slice."""
        half = self.probed.half
        for piece in slices:
            where = piece.name if piece.name.startswith("output ") else f"slice {piece.name}"
            for q in quantizers:
                if q.slice == piece.name and not q.excess <= MAX_EXCESS[half]:
                    other = f"{q.share:.3g} % other codes, up to {q.max_step} steps"
                    yield piece.name, f"{where}: {q.name} has {other} ({q.excess:.2g} beyond a rounding edge)"
            if piece.equal_input is not None and not piece.equal_input >= MIN_SQNR[half]:
                yield (
                    piece.name,
                    f"{where}: its output is only {piece.equal_input:.0f} dB above the difference",
                )
