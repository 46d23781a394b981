"""The noise floor: the fake-quantized network executed in other, equally legitimate ways, on a part of every batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from ospq_export.graph.outputs import as_tuple
from ospq_export.tasks.comparison import finite
from ospq_export.tasks.measure import Noise, Outputs, Variation
from ospq_export.tasks.statistics import FloatArray, Record

Execution = Callable[[FloatArray], Outputs]
_SPLIT = 7
_HEADROOM = 2.0


class FloorVariation(Record):
    """Another legitimate execution of the fake-quantized network, on a sample: its flips, or why it was not run.

    Attributes:
        reference: the execution that it varies.
        margin_change: the most by which it moved a margin between the predicted class and another, logits.
        errors: the relative errors of the images, by output; empty where a margin says more.
    """

    name: str
    reference: str = "fake_quant"
    images: int
    flips: int
    mean_logit_difference: float
    margin_change: float = 0.0
    errors: dict[str, Noise] = Field(default_factory=dict)
    skipped: str | None = None

    @property
    def agreement(self) -> float:
        """Percent of the sample with equal predictions."""
        return 100.0 * (1 - self.flips / self.images) if self.images else 100.0


class NoiseFloor(Record):
    """The fake-quantized network's disagreement with itself."""

    variations: list[FloorVariation]

    def worst(self, reference: str) -> FloorVariation | None:
        """The variation of an execution with the most flips; None where none was run."""
        run = self._run(reference)
        return max(run, key=lambda v: v.flips / v.images) if run else None

    def reach(self, reference: str) -> float:
        """The largest change of a margin in any variation of an execution, logits."""
        return max((v.margin_change for v in self._run(reference)), default=0.0)

    def difference(self, reference: str) -> float | None:
        """The mean difference of logits that is noise: twice that of any variation; None where none was run."""
        run = self._run(reference)
        return _HEADROOM * max(v.mean_logit_difference for v in run) if run else None

    def errors(self, reference: str) -> dict[str, Noise] | None:
        """Relative errors of each output that are noise: twice those of any variation; None where none was run.

        The largest of a sample is exceeded now and then by what is noise as well; twice that is not (ours).
        """
        run = self._run(reference)
        return {name: _worst([v.errors[name] for v in run]) for name in run[0].errors} if run else None

    def _run(self, reference: str) -> list[FloorVariation]:
        return [v for v in self.variations if v.images and v.reference == reference]


def _worst(errors: Sequence[Noise]) -> Noise:
    mean, largest = max(e.mean for e in errors), max(e.largest for e in errors)
    return Noise(mean=_HEADROOM * mean, largest=_HEADROOM * largest)


class Meter:
    """Measures how far each variation is from the execution that it varies.

    Args:
        reference: name of that execution.
        variations: the other ways of executing the same network, by name.
        vary: what tells how far apart two executions' outputs are.
        skipped: variations that cannot be run, and why.
    """

    def __init__(
        self,
        reference: str,
        variations: Mapping[str, Execution],
        vary: Callable[[Outputs, Outputs], Variation],
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.reference, self.vary = reference, vary
        self.variations, self.skipped = dict(variations), dict(skipped or {})
        self.images = dict.fromkeys(self.variations, 0)
        self.flips = dict.fromkeys(self.variations, 0)
        self.difference = dict.fromkeys(self.variations, 0.0)
        self.margins = dict.fromkeys(self.variations, 0.0)
        self.errors: dict[str, dict[str, Noise]] = {name: {} for name in self.variations}

    def add(self, images: FloatArray, reference: Outputs) -> None:
        """Run the variations on images (B, C, H, W) whose outputs the reference execution gave."""
        for name, execute in list(self.variations.items()):
            try:
                found = self.vary(reference, execute(images))
            except RuntimeError as error:
                # A network may insist on float32 inside; the other variations still count.
                self.skipped[name] = str(error).splitlines()[0]
                del self.variations[name]
                continue
            self._pool_errors(name, found.errors, len(images))
            self.images[name] += len(images)
            self.flips[name] += found.flips
            self.difference[name] += found.difference * len(images)
            self.margins[name] = max(self.margins[name], found.margin)

    def _pool_errors(self, name: str, errors: Mapping[str, Noise], images: int) -> None:
        """Join the errors of so many images to those of the images that were counted."""
        held, before = self.errors[name], self.images[name]
        for output, found in errors.items():
            old = held.get(output, Noise(mean=0.0, largest=0.0))
            mean = (old.mean * before + found.mean * images) / (before + images)
            held[output] = Noise(mean=finite(mean), largest=max(old.largest, found.largest))

    def counts(self) -> dict[str, Any]:
        """What was counted so far, as JSON has it, for another process to absorb."""
        counted = {k: getattr(self, k) for k in ("images", "flips", "difference", "margins", "skipped")}
        errors = {n: {o: e.model_dump() for o, e in held.items()} for n, held in self.errors.items()}
        return {**counted, "errors": errors}

    def absorb(self, counts: Mapping[str, Any]) -> None:
        """Add what the meter of another process counted on other images."""
        for name in self.images:
            errors = {o: Noise.model_validate(e) for o, e in counts["errors"][name].items()}
            if counts["images"][name]:
                self._pool_errors(name, errors, counts["images"][name])
            self.images[name] += counts["images"][name]
            self.flips[name] += counts["flips"][name]
            self.difference[name] += counts["difference"][name]
            self.margins[name] = max(self.margins[name], counts["margins"][name])
        for name, reason in counts["skipped"].items():
            self.skipped.setdefault(name, reason)
            self.variations.pop(name, None)

    def result(self) -> list[FloorVariation]:
        """What was counted so far."""
        counted = [
            FloorVariation(
                name=name,
                reference=self.reference,
                images=self.images[name],
                flips=self.flips[name],
                mean_logit_difference=finite(self.difference[name] / max(self.images[name], 1)),
                margin_change=self.margins[name],
                errors=self.errors[name],
            )
            for name in self.variations
        ]
        left = {"reference": self.reference, "images": 0, "flips": 0, "mean_logit_difference": 0.0}
        return counted + [FloorVariation(name=n, skipped=why, **left) for n, why in self.skipped.items()]


def in_parts(execute: Execution, images: FloatArray) -> Outputs:
    """What an execution gives for images in batches of seven."""
    parts = [execute(images[start : start + _SPLIT]) for start in range(0, len(images), _SPLIT)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class FloorMeter(Meter):
    """Varies the fake-quantized network in torch.

    Args:
        module: the network, float32, on `device`.
        device: torch device.
        outputs: names of what it returns.
        vary: what tells how far apart two executions' outputs are.
    """

    def __init__(
        self,
        module: nn.Module,
        device: str,
        outputs: Sequence[str],
        vary: Callable[[Outputs, Outputs], Variation],
    ) -> None:
        self.outputs = outputs
        self.module, self.device = module, torch.device(device)
        self.double = copy.deepcopy(module).double()
        variations: dict[str, Execution] = {"batch split": self._split, "float64": self._double}
        on_gpu = self.device.type != "cpu"
        if not on_gpu:
            variations["thread count"] = self._other_threads
        skipped = {"thread count": "the network runs on a GPU"} if on_gpu else {}
        super().__init__("fake_quant", variations, vary, skipped)

    def _run(self, module: nn.Module, x: torch.Tensor) -> Outputs:
        with torch.inference_mode():
            returned = as_tuple(module(x.to(self.device)))
        return {name: y.float().cpu().numpy() for name, y in zip(self.outputs, returned, strict=True)}

    def _split(self, images: FloatArray) -> Outputs:
        return in_parts(lambda part: self._run(self.module, torch.from_numpy(part)), images)

    def _double(self, images: FloatArray) -> Outputs:
        return self._run(self.double, torch.from_numpy(images).double())

    def _other_threads(self, images: FloatArray) -> Outputs:
        before = torch.get_num_threads()
        torch.set_num_threads(2 if before == 1 else 1)
        try:
            return self._run(self.module, torch.from_numpy(images))
        finally:
            torch.set_num_threads(before)
