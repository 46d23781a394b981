"""The noise floor: the fake-quantized network executed in other, equally legitimate ways, on a part of every batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ospq_export.tasks.comparison import finite, margin_change, predictions
from ospq_export.tasks.statistics import FloatArray, Record

Execution = Callable[[FloatArray], FloatArray]
_SPLIT = 7


class FloorVariation(Record):
    """Another legitimate execution of the fake-quantized network, on a sample: its flips, or why it was not run.

    Attributes:
        reference: the execution that it varies.
        margin_change: the most by which it moved a margin between the predicted class and another, logits.
    """

    name: str
    reference: str = "fake_quant"
    images: int
    flips: int
    mean_logit_difference: float
    margin_change: float = 0.0
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

    def _run(self, reference: str) -> list[FloorVariation]:
        return [v for v in self.variations if v.images and v.reference == reference]


class FloorMeter:
    """Counts the images on which each variation predicts another class than the reference execution did.

    Args:
        module: the fake-quantized network, float32, on `device`.
        device: torch device.
        as_logits: from what the network returns to a logit for each class.
    """

    def __init__(self, module: nn.Module, device: str, as_logits: Execution = lambda output: output) -> None:
        self.as_logits = as_logits
        self.module, self.device = module, torch.device(device)
        self.double = copy.deepcopy(module).double()
        self.variations: dict[str, Execution] = {"batch split": self._split, "float64": self._double}
        self.skipped: dict[str, str] = {}
        if self.device.type == "cpu":
            self.variations["thread count"] = self._other_threads
        else:
            self.skipped["thread count"] = "the network runs on a GPU"
        self.images = dict.fromkeys(self.variations, 0)
        self.flips = dict.fromkeys(self.variations, 0)
        self.difference = dict.fromkeys(self.variations, 0.0)
        self.margins = dict.fromkeys(self.variations, 0.0)

    def add(self, images: FloatArray, reference: FloatArray) -> None:
        """Run the variations on images (B, C, H, W) whose logits (B, K) the reference execution gave."""
        for name, execute in list(self.variations.items()):
            try:
                logits = execute(images)
            except RuntimeError as error:
                # A network may insist on float32 inside; the other variations still count.
                self.skipped[name] = str(error).splitlines()[0]
                del self.variations[name]
                continue
            self.images[name] += len(images)
            self.flips[name] += int((predictions(logits) != predictions(reference)).sum())
            self.difference[name] += float(np.abs(logits.astype(np.float64) - reference).mean()) * len(images)
            self.margins[name] = max(self.margins[name], finite(margin_change(reference, logits)))

    def counts(self) -> dict[str, Any]:
        """What was counted so far, as JSON has it, for another process to absorb."""
        return {key: getattr(self, key) for key in ("images", "flips", "difference", "margins", "skipped")}

    def absorb(self, counts: Mapping[str, Any]) -> None:
        """Add what the meter of another process counted on other images."""
        for name in self.images:
            self.images[name] += counts["images"][name]
            self.flips[name] += counts["flips"][name]
            self.difference[name] += counts["difference"][name]
            self.margins[name] = max(self.margins[name], counts["margins"][name])
        for name, reason in counts["skipped"].items():
            self.skipped.setdefault(name, reason)
            self.variations.pop(name, None)

    def _run(self, module: nn.Module, x: torch.Tensor) -> FloatArray:
        with torch.inference_mode():
            return self.as_logits(module(x.to(self.device)).float().cpu().numpy())

    def _split(self, images: FloatArray) -> FloatArray:
        parts = torch.from_numpy(images).split(_SPLIT)
        return np.concatenate([self._run(self.module, part) for part in parts])

    def _double(self, images: FloatArray) -> FloatArray:
        return self._run(self.double, torch.from_numpy(images).double())

    def _other_threads(self, images: FloatArray) -> FloatArray:
        before = torch.get_num_threads()
        torch.set_num_threads(2 if before == 1 else 1)
        try:
            return self._run(self.module, torch.from_numpy(images))
        finally:
            torch.set_num_threads(before)

    def result(self) -> NoiseFloor:
        """What was counted so far."""
        counted = [
            FloorVariation(
                name=name,
                images=self.images[name],
                flips=self.flips[name],
                mean_logit_difference=finite(self.difference[name] / max(self.images[name], 1)),
                margin_change=self.margins[name],
            )
            for name in self.variations
        ]
        skipped = [
            FloorVariation(name=name, images=0, flips=0, mean_logit_difference=0.0, skipped=reason)
            for name, reason in self.skipped.items()
        ]
        return NoiseFloor(variations=[*counted, *skipped])
