"""Parts of a validation's images: those that are looked at more closely, and each process's share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ospq_export.errors import InputError
from ospq_export.runs.tensors import image_digests
from ospq_export.tasks.measure import Collector, Outputs, Variation
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.codes.locate import Locator, Reference
from ospq_export.validate.codes.records import Location
from ospq_export.validate.executions.backends import TorchBackend
from ospq_export.validate.executions.chosen import Executions
from ospq_export.validate.executions.probes import Probed, open_probed
from ospq_export.validate.executions.table import FAKE_QUANT, TABLE, Role, provider_of
from ospq_export.validate.floor import FloorMeter, Meter, NoiseFloor
from ospq_export.validate.saved import SavedOutputs
from ospq_export.world.processes import World

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_LATENCY_IMAGES = 8


class Samples:
    """What a validation looks at more closely: the noise floor at once, images for the codes and for timing kept.

    Attributes:
        kept: images for the comparison of codes, (n, C, H, W) each.
        first: the first images, for timing.
        meters: of the noise floor; none where it is not measured.
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
        vary: Callable[[Outputs, Outputs], Variation],
        calibrated_on: frozenset[str] = frozenset(),
        saved: SavedOutputs | None = None,
    ) -> None:
        self.saved = saved
        self.calibrated_on, self.seen = calibrated_on, 0
        self.planned = batches = max(1, -(-count // batch_size))
        self.per_batch = -(-floor_images // batches)
        self.wanted = code_images
        self.every = max(1, batches // max(1, code_images))
        self.codes_per_batch = max(1, -(-code_images // batches))
        self.kept: list[FloatArray] = []
        self.first: FloatArray | None = None
        self.batches = 0
        self.meters: list[Meter] = []
        for backend in executions.backends:
            if backend.name == FAKE_QUANT and floor_images:
                assert isinstance(backend, TorchBackend)
                self.meters.append(FloorMeter(backend.module, device, backend.outputs, vary))

    def floor(self) -> NoiseFloor | None:
        """What was measured of the noise floor; None where nothing was."""
        found = [variation for meter in self.meters for variation in meter.result()]
        return NoiseFloor(variations=found) if found else None

    def add(self, images: FloatArray, outputs: Mapping[str, Outputs]) -> None:
        """Take what is needed of a batch (B, C, H, W) and of every execution's outputs."""
        if self.first is None:
            self.first = images[:_LATENCY_IMAGES].copy()
        # A stream goes on after the images that it was expected to have.
        for meter in self.meters if self.batches < self.planned else ():
            held = outputs[meter.reference]
            reference = {name: values[: self.per_batch] for name, values in held.items()}
            meter.add(images[: self.per_batch], reference)
        if self.saved is not None:
            self.saved.add(images, outputs)
        if self.calibrated_on:
            self.seen += sum(digest in self.calibrated_on for digest in image_digests(images))
        room = self.wanted - sum(map(len, self.kept))
        if self.batches % self.every == 0 and room > 0:
            self.kept.append(images[: min(room, self.codes_per_batch)].copy())
        self.batches += 1


def locate(
    run: Run,
    references: Mapping[str, str],
    kept: Sequence[FloatArray],
    device: str,
    inside: Mapping[str, Probed] | None = None,
    reference: Reference | None = None,
) -> list[Location]:
    """Codes of every quantized file on the kept images; once, because graph optimisations do not change what a file says.

    Args:
        run: exported.
        references: deployed execution -> what it is compared with.
        kept: images, (n, C, H, W) each; none leaves the comparison out.
        device: torch device.
        inside: engines that return their inner tensors, by name.
        reference: the torch side, where it is at hand.
    """
    shown = [TABLE[name] for name in references if TABLE[name].shows_codes]
    held = [e for e in shown if TABLE[references[e.name]].role is Role.SIMULATED]
    files = dict.fromkeys(str(execution.file) for execution in held)
    if not (files or inside) or not kept:
        return []
    reference, provider = reference or Reference.of(run), provider_of(device)
    paths = [run.runnable(name) for name in files]
    opened = {p.name: open_probed(p, reference.wanted, optimize=False, provider=provider) for p in paths}
    locators = [Locator(reference, probed, name) for name, probed in {**opened, **(inside or {})}.items()]
    for locator in locators:
        locator.add_all(np.concatenate(kept))
    return [locator.result() for locator in locators]


def share_of(world: World, count: int, batch_size: int) -> range:
    """This process's images out of `count`: whole batches, so that every image meets the companions that it meets in one process.

    Raises:
        InputError: there are fewer batches than processes.
    """
    batches = -(-count // batch_size)
    if batches < world.size:
        raise InputError(
            f"{batches} batches for {world.size} processes",
            where="`batch_size`",
            fix="lower it, or start fewer processes",
        )
    first, last = (batches * place // world.size for place in (world.rank, world.rank + 1))
    return range(first * batch_size, min(count, last * batch_size))


def part_of(total: int, share: int, count: int) -> int:
    """The part of `total` sampled images that falls to `share` of `count` images, rounded up."""
    return -(-total * share // count)


def pool(
    world: World,
    collector: Collector,
    seconds: dict[str, float],
    unreadable: Sequence[str],
    samples: Samples,
    notes: Mapping[str, int],
) -> tuple[Collector, dict[str, float], list[str], dict[str, int]]:
    """Exchange what the processes found in their shares.

    Args:
        world: who shares the validation.
        collector: this process's columns, labels and ids.
        seconds: spent in each execution.
        unreadable: images that could not be read.
        samples: afterwards those of all processes.
        notes: on the images of this share, and for how many of them.

    Returns:
        The collector of all images in order; seconds summed over the processes; all unreadable images; notes, summed.
    """
    if world.size == 1:
        return collector, seconds, list(unreadable), dict(notes)
    kept = np.concatenate(samples.kept) if samples.kept else np.empty((0, 0, 0, 0), np.float32)
    columns = {name: collector.column(name) for name in collector.names}
    mine = {
        "columns": {name: list(c.shape) for name, c in columns.items()},
        "labels": collector.labels().tolist(),
        "ids": collector.ids,
        "seconds": seconds,
        "unreadable": list(unreadable),
        "notes": dict(notes),
        "kept": kept.shape,
        "seen": samples.seen,
        "floor": [meter.counts() for meter in samples.meters],
    }
    told = [json.loads(text) for text in world.tell(json.dumps(mine))]
    tensors = [*columns.values(), kept]
    flat_tensors = [torch.from_numpy(np.ascontiguousarray(t)).flatten() for t in tensors]
    parts = world.gather({world.rank: flat_tensors}, world.size)
    whole = Collector(sum(len(facts["ids"]) for facts in told))
    samples.kept, samples.seen = [], sum(facts["seen"] for facts in told)
    for place, (facts, flat) in enumerate(zip(told, parts, strict=True)):
        shapes = facts["columns"].items()
        rows = {n: t.view(shape).numpy() for (n, shape), t in zip(shapes, flat[:-1], strict=True)}
        whole.add(rows, np.array(facts["labels"], dtype=np.int64), facts["ids"])
        if facts["kept"][0]:
            samples.kept.append(flat[-1].view(facts["kept"]).numpy())
        for meter, counted in zip(samples.meters, facts["floor"], strict=True):
            if place != world.rank:
                meter.absorb(counted)
    total = {name: sum(facts["seconds"][name] for facts in told) for name in seconds}
    skipped = list(dict.fromkeys(n for facts in told for n in facts["unreadable"]))
    return whole, total, skipped, dict(sum((Counter(facts["notes"]) for facts in told), Counter()))
