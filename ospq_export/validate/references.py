"""What the references make of some images, for a comparison elsewhere, where neither torch nor this package is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ospq_export.errors import InputError
from ospq_export.progress import stepper
from ospq_export.runs.tensors import image_digests
from ospq_export.tasks.choice import TASKS
from ospq_export.tasks.distances import distances
from ospq_export.tasks.measure import Outputs
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.executions.backends import TorchBackend
from ospq_export.validate.executions.origin import check_preprocessing
from ospq_export.validate.executions.table import FAKE_QUANT, FAKE_QUANT_FP16, FLOAT, TABLE
from ospq_export.validate.floor import FloorMeter, NoiseFloor
from ospq_export.validate.preflight import check_batch_memory
from ospq_export.validate.stage import choose_images
from ospq_export.world.processes import SOLO

if TYPE_CHECKING:
    from ospq_export.data import ImageSet, StreamSet
    from ospq_export.data.tensors import TensorSet
    from ospq_export.runs.run import Run

_NAMES = (FLOAT, FAKE_QUANT, FAKE_QUANT_FP16)
_BATCH = 16


@dataclass
class References:
    """Images, and what the references returned for them.

    Attributes:
        images: preprocessed, float32 (N, C, H, W).
        labels: int64 (N,), or (N, H, W) of pixels; -1 where there is none.
        outputs: by execution and output, float32 (N, ...).
        facts: ids; noise and margins of the fake-quantized networks; what a report says of the images; all as JSON has it.
    """

    images: FloatArray
    labels: NDArray[np.int64]
    outputs: dict[str, dict[str, FloatArray]]
    facts: dict[str, Any] = field(default_factory=dict)


def gather(
    run: Run,
    images: ImageSet | StreamSet | TensorSet,
    count: int,
    *,
    device: str = "cpu",
    workers: int = 0,
    progress: Progress | None = None,
) -> References:
    """Run the references over some images, and measure their noise floor on all of them.

    Args:
        run: calibrated.
        images: with the run's preprocessing.
        count: how many at most: a seeded sample with each class's share, or the first tensors.
        device: torch device.
        workers: processes that decode.
        progress: where to show a progress bar.

    Raises:
        InputError: the images are prepared otherwise, there is none, or they do not fit into memory.
    """
    check_preprocessing(run, images.config)
    check_batch_memory(count, count, images.config.input_size)
    chosen = choose_images(images, count if isinstance(images, Sized) else None, SOLO, count)
    backends = {name: TABLE[name].open(run, device) for name in _NAMES}
    measured = TASKS[run.manifest.task].measure([], chosen.count)
    simulated = backends[FAKE_QUANT]
    assert isinstance(simulated, TorchBackend)
    meter = FloorMeter(simulated.module, device, simulated.outputs, measured.vary)
    noise = _Noise(meter.variations)
    meter.variations = noise.variations
    kept: list[tuple[FloatArray, NDArray[np.int64], list[str], dict[str, Outputs]]] = []
    advance = stepper(progress, "references", -(-count // _BATCH))
    for batch in chosen.images.batches(_BATCH, chosen.places, workers):
        tensors = np.ascontiguousarray(batch.images.numpy())
        found = {name: backend(tensors) for name, backend in backends.items()}
        meter.add(tensors, found[FAKE_QUANT])
        noise.add(found[FAKE_QUANT])
        kept.append((tensors, batch.labels.numpy(), list(batch.ids), found))
        advance()
        if sum(len(ids) for _, _, ids, _ in kept) >= count:
            break
    if not kept:
        raise InputError("there is no image", where="`data`", fix="give some")
    result = _joined(kept, count)
    both = [result.outputs[name] for name in (FAKE_QUANT_FP16, FAKE_QUANT)]
    floor, half = NoiseFloor(variations=meter.result()), measured.vary(*both)
    seen = run.calibration_digests()
    result.facts |= {
        "noise": {FAKE_QUANT: noise.found(), FAKE_QUANT_FP16: _errors(*both)},
        "margin": {FAKE_QUANT: floor.reach(FAKE_QUANT), FAKE_QUANT_FP16: half.margin},
        "report": {
            "floor": floor.model_dump(mode="json"),
            "seen": sum(digest in seen for digest in image_digests(result.images)),
            "unreadable": list(images.skipped),
            "class_to_idx": dict(images.class_to_idx),
            "images": images.record.model_copy(
                update={"notes": {**images.record.notes, **dict.fromkeys(chosen.remarks, len(result.images))}}
            ).model_dump(mode="json"),
        },
    }
    return result


def _joined(kept: Sequence[Any], count: int) -> References:
    images, labels, ids, found = zip(*kept, strict=True)
    outputs = {
        execution: {n: np.concatenate([f[execution][n] for f in found])[:count] for n in found[0][execution]}
        for execution in _NAMES
    }
    every = [name for part in ids for name in part][:count]
    return References(np.concatenate(images)[:count], np.concatenate(labels)[:count], outputs, {"ids": every})


def _relative(reference: Outputs, other: Outputs) -> dict[str, NDArray[np.float64]]:
    return {name: distances(values, other[name])[:, 0] for name, values in reference.items()}


def _summary(errors: NDArray[np.float64]) -> dict[str, float]:
    return {"mean": float(errors.mean()), "largest": float(errors.max())}


def _errors(reference: Outputs, other: Outputs) -> dict[str, dict[str, float]]:
    return {name: _summary(found) for name, found in _relative(reference, other).items()}


class _Noise:
    """The relative errors of every output in the variations of a network, whatever its task says of them."""

    def __init__(self, variations: Mapping[str, Callable[[FloatArray], Outputs]]) -> None:
        self.variations = {name: self._kept(name, execute) for name, execute in variations.items()}
        self._last: dict[str, Outputs] = {}
        self._errors: dict[tuple[str, str], list[NDArray[np.float64]]] = {}

    def _kept(self, name: str, execute: Callable[[FloatArray], Outputs]) -> Callable[[FloatArray], Outputs]:
        def run(images: FloatArray) -> Outputs:
            self._last[name] = execute(images)
            return self._last[name]

        return run

    def add(self, reference: Outputs) -> None:
        """Take what the variations returned last."""
        for variation, found in self._last.items():
            for name, errors in _relative(reference, found).items():
                self._errors.setdefault((name, variation), []).append(errors)
        self._last.clear()

    def found(self) -> dict[str, dict[str, float]]:
        """The worst of any variation, by output."""
        worst: dict[str, dict[str, float]] = {}
        for (name, _), parts in self._errors.items():
            one = _summary(np.concatenate(parts))
            held = worst.setdefault(name, one)
            worst[name] = {key: max(held[key], value) for key, value in one.items()}
        return worst
