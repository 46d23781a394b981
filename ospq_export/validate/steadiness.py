"""An execution against itself: one image in every row of a batch, other images beside it, the same batch twice.

Engines were reported to give rows of a batch other outputs than the same image alone, and other outputs at every call. Images
that are compared one by one do not show it. The noise of the reference is allowed: a kernel may add in another order when the
batch is another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ospq_export.tasks.distances import distances
from ospq_export.tasks.measure import Noise, Outputs, Variation
from ospq_export.tasks.statistics import FloatArray, Record
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.floor import NoiseFloor
from ospq_export.validate.verdict import Criterion

_ROWS = 4
# A row holds another's outputs where those are so many times closer than its own (ours).
_MISPLACED = 4.0
_HEADROOM, _TINY = 2.0, 1e-4

Vary = Callable[[Outputs, Outputs], Variation]


class Difference(Record):
    """How far two outputs for the same images are apart, at most.

    Attributes:
        error: relative, of the row that is furthest off.
        row: that row.
        margin: by which a margin between the predicted class and another moved, logits.
        errors: by output, where a margin says nothing.
    """

    error: float
    row: int
    margin: float
    errors: dict[str, Noise]


class Steadiness(Record):
    """What one execution makes of the same image.

    Attributes:
        name: of the execution.
        batch_size: rows.
        rows: one image in every row of a batch.
        companions: an image among others, against the same image in the same row of a batch of its own.
        repeats: the same batch twice.
        misplaced: row -> the row whose outputs it holds.
    """

    name: str
    batch_size: int
    rows: Difference
    companions: Difference
    repeats: Difference
    misplaced: dict[int, int]


def steadiness(execution: Backend, images: FloatArray, vary: Vary) -> Steadiness:
    """Run one execution on batches of a few images.

    Args:
        execution: what runs.
        images: float32 (N, C, H, W), N >= 1; the first four are used.
        vary: what tells how far apart two executions' outputs are.
    """
    few, size = images[:_ROWS], execution.fixed_batch or _ROWS
    place = np.arange(size) % len(few)
    mixed = execution(np.ascontiguousarray(few[place]))
    again = execution(np.ascontiguousarray(few[place]))
    alone = [execution(np.repeat(few[i : i + 1], size, axis=0)) for i in range(len(few))]
    first = [{name: np.repeat(v[:1], size, axis=0) for name, v in one.items()} for one in alone]
    own = {name: np.stack([alone[i][name][r] for r, i in enumerate(place)]) for name in mixed}
    companions = _difference(own, mixed, vary)
    return Steadiness(
        name=execution.name,
        batch_size=size,
        rows=max((_difference(a, b, vary) for a, b in zip(first, alone, strict=True)), key=lambda d: d.error),
        companions=companions,
        repeats=_difference(mixed, again, vary),
        misplaced=_misplaced(mixed, alone, place.tolist()) if companions.error else {},
    )


def steady_of(
    backends: Sequence[Backend], references: Mapping[str, str], images: FloatArray | None, vary: Vary
) -> list[Steadiness]:
    """`steadiness` of every execution that is compared with another; nothing where there was no image."""
    held = [backend for backend in backends if backend.name in references]
    return [] if images is None else [steadiness(backend, images, vary) for backend in held]


def _difference(reference: Outputs, other: Outputs, vary: Vary) -> Difference:
    found, errors = vary(reference, other), _errors(reference, other)
    row = int(errors.argmax())
    return Difference(
        error=float(min(errors[row], 1e30)), row=row, margin=found.margin, errors=dict(found.errors)
    )


def _errors(reference: Outputs, other: Outputs) -> FloatArray:
    """The relative error of each row, of the output that is furthest off."""
    return np.max([distances(reference[name], other[name])[:, 0] for name in reference], axis=0)


def _misplaced(mixed: Outputs, alone: Sequence[Outputs], place: Sequence[int]) -> dict[int, int]:
    """Rows that hold what another image's row should; of images that repeat, the first row is named."""
    errors = np.stack([_errors(one, mixed) for one in alone])
    nearest = errors.argmin(0)
    return {
        row: int(nearest[row])
        for row, own in enumerate(place)
        if errors[own, row] > _MISPLACED * errors[nearest[row], row]
    }


def steady_criteria(
    found: Sequence[Steadiness], references: Mapping[str, str], floor: NoiseFloor | None
) -> list[Criterion]:
    """Whether each execution gives an image the same outputs in every row and at every call.

    Args:
        found: of deployed executions.
        references: deployed execution -> what it is compared with, whose noise is allowed.
        floor: None where it was not measured: then only outputs that are equal to the last bit are judged.
    """
    criteria = []
    for one in found:
        batch, held = f"a batch of {one.batch_size}", references.get(one.name, "")
        worst = max(one.rows, one.companions, key=lambda d: d.error)
        moved = f"row {worst.row} of {batch} gives an image outputs {100 * worst.error:.3g} % off those it has elsewhere"
        if one.misplaced:
            pairs = ", ".join(f"row {row} holds row {other}'s" for row, other in one.misplaced.items())
            moved = f"rows of {batch} are exchanged: {pairs}"
        same = "gives an image the same outputs in every row"
        criteria += _criterion(one.name, "rows", [one.rows, one.companions], held, floor, same, moved)
        same = "gives the same outputs at every call"
        moved = f"gives outputs {100 * one.repeats.error:.3g} % off in row {one.repeats.row} when the batch is run again"
        criteria += _criterion(one.name, "repeats", [one.repeats], held, floor, same, moved)
    return criteria


def _criterion(
    deployed: str,
    name: str,
    differences: Sequence[Difference],
    reference: str,
    floor: NoiseFloor | None,
    same: str,
    moved: str,
) -> list[Criterion]:
    if not any(d.error for d in differences):
        return [Criterion(deployed=deployed, name=name, outcome="met", by="equal outputs", text=same)]
    noise = None if floor is None else floor.errors(reference)
    if floor is None or noise is None:
        return []
    beyond = any(_beyond(d, _HEADROOM * floor.reach(reference) + _TINY, noise) for d in differences)
    common = {"deployed": deployed, "name": name, "by": "noise floor"}
    if beyond:
        return [Criterion(**common, outcome="missed", text=f"{moved}, beyond the noise")]
    return [Criterion(**common, outcome="met", text=f"{same}, within the noise")]


def _beyond(found: Difference, margin: float, noise: Mapping[str, Noise]) -> bool:
    errors = (found.errors[name].largest > noise[name].largest + _TINY for name in found.errors)
    return found.margin > margin or any(errors)
