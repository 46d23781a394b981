"""The search for formats that keep a budget: losses, an integer programme, calibrations, and the drop of each, measured."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ospq_export.calibrate.allocate.effects import Sensitivity
from ospq_export.calibrate.allocate.plan import POINTS, Choices, choices_of, recipe_of
from ospq_export.calibrate.allocate.sensitivity import Advances, measure_sensitivity
from ospq_export.calibrate.checkpoints import Pieces, parsed
from ospq_export.calibrate.equalize import equalize
from ospq_export.data import Batch
from ospq_export.errors import BudgetError, InputError
from ospq_export.formats.choice import FLOAT, Choice, named
from ospq_export.graph.capture import fingerprint
from ospq_export.graph.outputs import as_tuple, output_names
from ospq_export.recipes import Recipe
from ospq_export.recipes.keys import as_toml
from ospq_export.runs.allocation import Allocation, Attempt, Budget, write_allocation
from ospq_export.runs.files import ALLOCATION, RECIPE, SEARCH, replacing, write_json
from ospq_export.runs.manifest import record_files
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import tensor_sha256, tensors_sha256
from ospq_export.tasks.accuracy import AccuracyChange
from ospq_export.tasks.base import Task
from ospq_export.tasks.choice import TASKS
from ospq_export.tasks.measure import Collector

if TYPE_CHECKING:
    from torch import nn

_BATCH = 50
_FLOAT, _QUANTIZED = "float", "fake-quantized"
_EQUALIZED_IMAGES = 32
LOSS_IMAGES = 64
"""Calibration images on which losses are estimated."""


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        out: the run directory that it ends with; it works in a folder of it.
        budget: what is to be kept.
        recipe: everything but the formats.
        calibrate: makes a run of a recipe in a folder, or goes on with one that was interrupted.
        held_out: images that nothing is calibrated on, with labels where they are known; None where no drop is measured.
        device: of the networks.
        seed: of what is drawn.
        advances: given what is done and in how many steps, returns what advances a progress bar by one.
        say: told what is tried.
    """

    out: Path
    budget: Budget
    recipe: Recipe
    calibrate: Callable[[Recipe, Path], Run]
    held_out: Batch | None
    device: torch.device
    seed: int = 0
    advances: Advances = lambda _what, _steps: lambda: None
    say: Callable[[str], None] = lambda _line: None

    def run(self, captured: fx.GraphModule, images: Tensor, task: Task) -> Run:
        """Find the formats; interrupted, the same call goes on, and what was tried is not tried again.

        Args:
            captured: the float network, on the device; it is not changed.
            images: the calibration images, float32 (N, C, H, W), normalised.
            task: what its outputs are.

        Raises:
            BudgetError: no formats keep it.
            InputError: a setting is impossible, or what is kept is damaged.
        """
        choices = choices_of(captured, self._losses(captured, images, task), self.budget)
        attempts = choices.attempts(self.budget)
        allocation = Allocation(budget=self.budget, losses=dict(choices.losses), attempts=attempts)
        if self.budget.max_drop is None:
            return self._finish(allocation.model_copy(update={"taken": 0}), choices)
        looks = len(attempts).bit_length()
        self.say(
            f"{len(attempts)} allocations of {', '.join(choices.formats)}, of which {looks} at most are tried"
        )

        def holds(index: int) -> bool:
            attempts[index] = self._tried(attempts[index], choices, looks)
            return (attempts[index].high or 0.0) <= (self.budget.max_drop or 0.0)

        taken = cheapest(len(attempts), holds)
        found = allocation.model_copy(update={"attempts": attempts, "taken": taken})
        if taken is None:
            write_allocation(self._folder, found)
            raise BudgetError(self._missed(attempts[-1]))
        return self._finish(found, choices)

    @cached_property
    def _held_out_sha256(self) -> str:
        return "" if self.held_out is None else tensor_sha256(self.held_out.images)

    @property
    def _folder(self) -> Path:
        return self.out / SEARCH

    def _losses(self, captured: fx.GraphModule, images: Tensor, task: Task) -> Sensitivity:
        """What operators lose in the network as calibrations will equalize it: for the format of the fewest bits."""
        formats = [name for name in self.budget.formats if name != FLOAT]
        facts = [fingerprint(captured), tensors_sha256(dict(captured.named_buffers())), tensor_sha256(images)]
        key = _digest(json.dumps([*facts, formats, self.seed, self.recipe.equalization]))
        kept = self._folder / f"losses-{key}.json"
        if kept.is_file():
            return parsed(Sensitivity, kept.read_bytes(), kept)
        network = copy.deepcopy(captured)
        if self.recipe.equalization != "none":
            least = min(formats, key=lambda name: named(name, weight=False).bits)
            sample = images[: min(_EQUALIZED_IMAGES, self.recipe.observation_images)]
            choice, pieces = Choice(least, least, least, least), Pieces(self._folder, f"equalize-{key}")
            equalize(network, sample, choice, self.recipe.equalization, seed=self.seed, pieces=pieces)
        how: dict[str, Any] = {"seed": self.seed, "advances": self.advances, "say": self.say}
        found = measure_sensitivity(network, images[:LOSS_IMAGES], formats, task, out=self._folder, **how)
        write_json(kept, found.model_dump(mode="json"))
        return found

    def _recipe(self, attempt: Attempt, choices: Choices) -> Recipe:
        found = recipe_of(self.recipe, choices.operators, attempt.formats)
        return found.model_copy(update={"max_drop": self.budget.max_drop})

    def _calibrated(self, attempt: Attempt, choices: Choices) -> Run:
        recipe = self._recipe(attempt, choices)
        folder = self._folder / _digest(recipe.model_dump_json())
        latency = "" if attempt.latency is None else f", {attempt.latency:.2f} of FP16's time"
        self.say(f"trying {_counted(attempt)}: {attempt.bits:.2f} bits on average{latency}")
        try:
            return Run.open(folder)
        except InputError:
            return self.calibrate(recipe, folder)

    def _tried(self, attempt: Attempt, choices: Choices, looks: int) -> Attempt:
        """An attempt with its drop on the held-out images."""
        facts = [self._held_out_sha256, self._recipe(attempt, choices).model_dump_json(), looks]
        kept = self._folder / f"drop-{_digest(json.dumps([*facts, self.budget.confidence]))}.json"
        if kept.is_file():
            found = parsed(AccuracyChange, kept.read_bytes(), kept)
        else:
            found = self._drop(self._calibrated(attempt, choices), looks)
            write_json(kept, found.model_dump(mode="json"))
        measured = {
            "images": found.images,
            "differing": found.differing,
            "drop": found.drop,
            "high": found.high,
        }
        lost = f"{found.share:.2f} % differ" if found.drop is None else f"{found.drop:.2f} points lost"
        self.say(f"{attempt.bits:.2f} bits: {lost}, at most {found.high:.2f} {self._sure(looks)}")
        return attempt.model_copy(update=measured)

    def _drop(self, run: Run, looks: int) -> AccuracyChange:
        """What a run loses; each of several looks at the same images has its share of the doubt (Bonferroni)."""
        assert self.held_out is not None
        task, held_out = TASKS[run.manifest.task], self.held_out
        captured = run.captured()
        names = output_names(captured.graph)
        networks = {_FLOAT: captured.to(self.device), _QUANTIZED: run.fake_quant_network().to(self.device)}
        measure = task.measure([(_FLOAT, _QUANTIZED)], len(held_out))
        collector = Collector(len(held_out))
        advance = self.advances("measure the drop", -(-len(held_out) // _BATCH))
        for start in range(0, len(held_out), _BATCH):
            part = slice(start, start + _BATCH)
            outputs = {n: self._outputs(m, held_out.images[part], names) for n, m in networks.items()}
            labels, ids = held_out.labels[part].numpy(), held_out.ids[part]
            collector.add(measure.columns(outputs, labels, ids), measure.label_of(labels), ids)
            advance()
        confidence = self.budget.confidence
        confidence = 0.5 if confidence == 0.5 else 1 - (1 - confidence) / looks
        return measure.accuracy(collector, _FLOAT, _QUANTIZED, confidence)

    def _outputs(self, network: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Any]:
        with torch.no_grad():
            found = as_tuple(network(images.to(self.device)))
        return {name: value.float().cpu().numpy() for name, value in zip(names, found, strict=True)}

    def _sure(self, looks: int) -> str:
        share = self.budget.confidence
        return "" if share == 0.5 else f"({100 * share:g} % for {looks} looks together)"

    def _missed(self, safest: Attempt) -> str:
        asked = self.budget.max_drop or 0.0
        formats, high = ", ".join(self.budget.formats), safest.high or 0.0
        lost = f"{safest.drop:.2f} points" if safest.drop is not None else "an unknown part"
        return (
            f"of {formats} the best allocation loses {lost} on {safest.images} held-out images, {high:.2f} at most; "
            f"{asked:g} are allowed, {high - asked:.2f} fewer: add a format such as float or one of more bits, allow more, or "
            "give more images"
        )

    def _finish(self, allocation: Allocation, choices: Choices) -> Run:
        """Make the attempt that was taken the run; its manifest comes last, so that it is never half a run."""
        assert allocation.taken is not None
        run = self._calibrated(allocation.attempts[allocation.taken], choices)
        for name in run.manifest.files:
            with replacing(self.out / name) as temporary:
                shutil.copyfile(run.path / name, temporary)
        write_allocation(self.out, allocation)
        with replacing(self.out / RECIPE) as temporary:
            temporary.write_text(as_toml(run.manifest.recipe), encoding="utf-8")
        record_files(self.out, run.manifest, ALLOCATION, RECIPE)
        shutil.rmtree(self._folder, ignore_errors=True)
        return Run.open(self.out)


def check_held_out(budget: Budget, images: int) -> None:
    """Refuse a drop that so few images could not show to be kept, whatever they said.

    Raises:
        InputError: they are too few.
    """
    if budget.max_drop is None or budget.confidence == 0.5:
        return
    looks = POINTS.bit_length() if budget.bits is None and budget.latency is None else 1
    doubt = (1 - budget.confidence) / looks
    needed = math.ceil(math.log(doubt) / math.log1p(-max(budget.max_drop, 1e-6) / 100))
    if images < needed:
        raise InputError(
            f"{images} held-out images cannot show a drop of {budget.max_drop:g} points at {100 * budget.confidence:g} %, "
            f"were not one lost",
            where="`max_drop`",
            fix=f"give {needed} beside the calibration images, allow more, or lower `confidence`",
        )


def cheapest(count: int, holds: Callable[[int], bool]) -> int | None:
    """The first of a row that holds, by halving: what comes after one that holds is taken to hold as well."""
    low, high, found = 0, count - 1, None
    while low <= high:
        middle = (low + high) // 2
        if holds(middle):
            high, found = middle - 1, middle
        else:
            low = middle + 1
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _counted(attempt: Attempt) -> str:
    counts = Counter(attempt.formats.values())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
