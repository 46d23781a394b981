"""Parts of every batch, spread over all images: the noise floor is measured on some, codes are compared on others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ospq_export.runs.tensors import image_digests
from ospq_export.validate.codes.locate import Locator, Reference
from ospq_export.validate.codes.records import Location
from ospq_export.validate.executions.backends import FloatArray
from ospq_export.validate.executions.chosen import Executions
from ospq_export.validate.executions.probes import open_probed
from ospq_export.validate.executions.table import FAKE_QUANT, TABLE, Role, provider_of
from ospq_export.validate.floor import FloorMeter

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_LOCATION_BATCH, _LATENCY_IMAGES = 8, 8


class Samples:
    """What a validation looks at more closely: the noise floor at once, images for the codes and for timing kept.

    Attributes:
        kept: images for the comparison of codes, (n, C, H, W) each.
        first: the first images, for timing.
        meter: None where the noise floor is not measured.
        seen: how many images are among those that the run was calibrated on, by their digests.
    """

    def __init__(
        self,
        executions: Executions,
        device: str,
        count: int,
        batch_size: int,
        floor_images: int,
        code_images: int,
        as_logits: Callable[[FloatArray], FloatArray],
        calibrated_on: frozenset[str] = frozenset(),
    ) -> None:
        self.calibrated_on, self.seen = calibrated_on, 0
        batches = max(1, -(-count // batch_size))
        self.per_batch = -(-floor_images // batches)
        self.wanted = code_images
        self.every = max(1, batches // max(1, code_images))
        self.codes_per_batch = max(1, -(-code_images // batches))
        self.kept: list[FloatArray] = []
        self.first: FloatArray | None = None
        self.batches = 0
        self.meter: FloorMeter | None = None
        if FAKE_QUANT in executions.names and floor_images:
            backend = next(e for e in executions.backends if e.name == FAKE_QUANT)
            self.meter = FloorMeter(backend.module, device, as_logits)  # type: ignore[attr-defined]

    def add(self, images: FloatArray, logits: dict[str, FloatArray]) -> None:
        """Take what is needed of a batch (B, C, H, W) and its logits by execution."""
        if self.first is None:
            self.first = images[:_LATENCY_IMAGES].copy()
        if self.meter is not None:
            self.meter.add(images[: self.per_batch], logits[FAKE_QUANT][: self.per_batch])
        if self.calibrated_on:
            self.seen += sum(digest in self.calibrated_on for digest in image_digests(images))
        room = self.wanted - sum(map(len, self.kept))
        if self.batches % self.every == 0 and room > 0:
            self.kept.append(images[: min(room, self.codes_per_batch)].copy())
        self.batches += 1


def locate(
    run: Run, references: Mapping[str, str], kept: Sequence[FloatArray], device: str
) -> list[Location]:
    """Codes of every quantized file on the kept images; once, because graph optimisations do not change what a file says.

    Args:
        run: exported.
        references: deployed execution -> what it is compared with.
        kept: images, (n, C, H, W) each; none leaves the comparison out.
        device: torch device.
    """
    shown = [TABLE[name] for name in references if TABLE[name].shows_codes]
    held = [e for e in shown if TABLE[references[e.name]].role is Role.SIMULATED]
    files = dict.fromkeys(str(execution.file) for execution in held)
    if not files or not kept:
        return []
    reference, sample = _reference(run), np.concatenate(list(kept))
    return [_locate(run.file(name), reference, sample, device) for name in files]


def _reference(run: Run) -> Reference:
    graph, slices = run.quantized_graph(), run.manifest.slices
    return Reference(
        network=graph.module,
        exact=copy.deepcopy(graph.module).double(),
        original=run.captured(),
        slices=[(s.name, s.end) for s in slices],
        slice_of={q.name: slices[q.slice].name for q in run.manifest.quantizers},
    )


def _locate(path: Path, reference: Reference, sample: FloatArray, device: str) -> Location:
    probed = open_probed(path, reference.wanted, optimize=False, provider=provider_of(device))
    locator, size = Locator(reference, probed, path.name), probed.batch_size or _LOCATION_BATCH
    for start in range(0, max(len(sample) - size + 1, 1), size):
        part = sample[start : start + size]
        if len(part) < size and probed.batch_size:
            part = part[np.arange(size) % len(part)]
        locator.add(part)
    return locator.result()
