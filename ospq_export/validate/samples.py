"""Parts of every batch, spread over all images: the noise floor is measured on some, codes are compared on others."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from ospq_export.validate.backends import FloatArray
from ospq_export.validate.executions import (
    DEPLOYED,
    FAKE_QUANT,
    FAKE_QUANT_FP16,
    QUANTIZED_ONNX,
    Executions,
)
from ospq_export.validate.floor import FloorMeter
from ospq_export.validate.locate import Location, Locator, Reference
from ospq_export.validate.probes import open_probed

if TYPE_CHECKING:
    from ospq_export.run import Run

_LOCATION_BATCH, _LATENCY_IMAGES = 8, 8


class Samples:
    """What a validation looks at more closely: the noise floor at once, images for the codes and for timing kept.

    Attributes:
        kept: images for the comparison of codes, (n, C, H, W) each.
        first: the first images, for timing.
        meter: None where the noise floor is not measured.
    """

    def __init__(
        self,
        executions: Executions,
        reference: str | None,
        device: str,
        count: int,
        batch_size: int,
        floor_images: int,
        code_images: int,
    ) -> None:
        batches = max(1, -(-count // batch_size))
        self.per_batch = -(-floor_images // batches)
        self.reference, self.wanted = reference, code_images
        self.every = max(1, batches // max(1, code_images))
        self.codes_per_batch = max(1, -(-code_images // batches))
        self.kept: list[FloatArray] = []
        self.first: FloatArray | None = None
        self.batches = 0
        self.meter: FloorMeter | None = None
        if reference == FAKE_QUANT and floor_images:
            backend = next(e for e in executions.backends if e.name == FAKE_QUANT)
            self.meter = FloorMeter(backend.module, device)  # type: ignore[attr-defined]

    def add(self, images: FloatArray, logits: dict[str, FloatArray]) -> None:
        """Take what is needed of a batch (B, C, H, W) and its logits by execution."""
        if self.first is None:
            self.first = images[:_LATENCY_IMAGES].copy()
        if self.meter is not None:
            self.meter.add(images[: self.per_batch], logits[FAKE_QUANT][: self.per_batch])
        room = self.wanted - sum(map(len, self.kept))
        if self.batches % self.every == 0 and room > 0:
            self.kept.append(images[: min(room, self.codes_per_batch)].copy())
        self.batches += 1


def locate(
    run: Run, executions: Executions, reference: str | None, kept: list[FloatArray], device: str
) -> list[Location]:
    """Codes of model.onnx on the kept images; once, because graph optimisations do not change what the file says."""
    names = [n for n in executions.names if n in DEPLOYED and n.startswith("onnxruntime")]
    if reference not in (FAKE_QUANT, FAKE_QUANT_FP16) or not names or not kept:
        return []
    graph, slices = run.quantized_graph(), run.manifest.slices
    torch_side = Reference(
        network=graph.module,
        exact=copy.deepcopy(graph.module).double(),
        original=run.captured(),
        slices=[(s.name, s.end) for s in slices],
        slice_of={q.name: slices[q.slice].name for q in run.manifest.quantizers},
    )
    provider = "cuda" if device.startswith("cuda") else "cpu"
    probed = open_probed(run.file(QUANTIZED_ONNX), torch_side.wanted, optimize=False, provider=provider)
    locator, sample = Locator(torch_side, probed, QUANTIZED_ONNX), np.concatenate(kept)
    size = probed.batch_size or _LOCATION_BATCH
    for start in range(0, max(len(sample) - size + 1, 1), size):
        part = sample[start : start + size]
        if len(part) < size and probed.batch_size:
            part = part[np.arange(size) % len(part)]
        locator.add(part)
    return [locator.result()]
