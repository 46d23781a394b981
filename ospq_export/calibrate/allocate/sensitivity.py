"""The loss in the network's output that each operand causes in each format, alone: estimated for all, measured for the largest.

No labels are needed: the loss is the task's divergence from the float network on the images. The estimate is of second order; it
is off where a format loses much. The largest are therefore measured, and the median of measured over estimated puts the others on
the same scale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, fx

from ospq_export.calibrate.allocate.effects import SENSITIVITY, Operand, Sensitivity
from ospq_export.calibrate.allocate.estimate import DRAWS, Estimator
from ospq_export.calibrate.checkpoints import Pieces, Scores
from ospq_export.calibrate.observe import observe
from ospq_export.errors import InputError
from ospq_export.formats.choice import FLOAT, Choice, named
from ospq_export.graph.capture import fingerprint, operator_names
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.outputs import as_tuple
from ospq_export.graph.quantizers import Mode, QuantizedGraph, quantizers_of
from ospq_export.runs.files import CHECKPOINTS, write_json
from ospq_export.runs.tensors import tensor_sha256, tensors_sha256
from ospq_export.tasks.base import Task

_BATCH = 8
# Passes of one image: what an estimate takes, a backward pass taken for two forward ones.
_ESTIMATE_PASSES = 1 + 2 * DRAWS
STAGE, MEASURED = "sensitivity", "measured.json"
Advances = Callable[[str, int], Callable[[], None]]


def check_formats_of(formats: Sequence[str]) -> None:
    """Refuse what is no format, for weights or for activations, and a network in float, which loses nothing.

    Raises:
        InputError: one of them.
    """
    if not formats or FLOAT in formats:
        raise InputError(
            "a network in float loses nothing", where="`formats`", fix="name formats such as int4"
        )
    for name in formats:
        for is_weight in (True, False):
            named(name, weight=is_weight)


def measure_sensitivity(
    captured: fx.GraphModule,
    images: Tensor,
    formats: Sequence[str],
    task: Task,
    *,
    out: Path | None = None,
    measured: int | None = None,
    seed: int = 0,
    advances: Advances = lambda _what, _steps: lambda: None,
    say: Callable[[str], None] = lambda _line: None,
) -> Sensitivity:
    """Estimate the loss of every operand in every format, and measure the largest.

    Args:
        captured: the float network, on its device.
        images: float32 (N, C, H, W), normalised.
        formats: names such as "int4".
        task: what the network's output is.
        out: folder that sensitivity.json is written to, and that keeps what is finished for a run that is interrupted; None
            writes nothing.
        measured: how many are measured; None is one in twenty.
        seed: of the observation and of the targets that are drawn.
        advances: given what is done and in how many steps, returns what advances a progress bar by one.
        say: told the cost beforehand.

    Raises:
        InputError: there is no such format, an activation is not finite, or what was kept is damaged.
    """
    check_formats_of(formats)
    networks = _inserted(captured, formats)
    operands = operands_of(networks, captured)
    count = min(len(operands), -(-len(operands) // 20) if measured is None else measured)
    passes = len(images) * (_ESTIMATE_PASSES + len(networks) + count)
    every = len(images) * len(operands)
    say(
        f"{len(operands)} operands and formats on {len(images)} images: {passes:,} passes of an image, "
        f"{100 * passes / max(every, 1):.0f} % of measuring all of them; {count} are measured"
    )
    _observe(networks, images, seed, advances)
    kept = _Kept(out, captured, images, formats, seed)
    found = _estimated(networks, images, task, operands, kept, seed, advances)
    result = Sensitivity(
        task=task.name,
        images=len(images),
        operators=list(operator_names(captured.graph).values()),
        operands=found,
        passes=passes,
        passes_of_measuring=every,
    )
    result = _with_measured(result, networks, images, task, count, kept, advances)
    if out is not None:
        write_json(out / SENSITIVITY, result.model_dump(mode="json"))
        kept.forget()
    return result


def _inserted(captured: fx.GraphModule, formats: Sequence[str]) -> dict[str, QuantizedGraph]:
    choices = {name: Choice(name, name, name, name) for name in dict.fromkeys(formats)}
    return {name: insert_quantizers(captured, choice) for name, choice in choices.items()}


def _observe(networks: Mapping[str, QuantizedGraph], images: Tensor, seed: int, advances: Advances) -> None:
    for name, network in networks.items():
        steps = -(-len(images) // _BATCH) + len(network.activations) + len(network.weights)
        observe(network, images, batch_size=_BATCH, seed=seed, advance=advances(f"observe {name}", steps))


def observed_networks(
    captured: fx.GraphModule, images: Tensor, formats: Sequence[str], seed: int = 0
) -> dict[str, QuantizedGraph]:
    """The network with everything in a format, its ranges searched on images (N, C, H, W) float32; by format."""
    networks = _inserted(captured, formats)
    _observe(networks, images, seed, lambda _what, _steps: lambda: None)
    return networks


def operands_of(networks: Mapping[str, QuantizedGraph], captured: fx.GraphModule) -> list[Operand]:
    """Every operand in every format, of which nothing is known yet."""
    known, found = set(operator_names(captured.graph).values()), []
    for wanted, network in networks.items():
        for kind, quantizers in (("activation", network.activations), ("weight", network.weights)):
            for name, quantizer in quantizers.items():
                operator = name.rpartition(".")[0]
                assert operator in known
                fields = {"wanted": wanted, "format": quantizer.format.name, "estimate": 0.0}
                found.append(Operand(name=name, operator=operator, kind=kind, **fields))
    return found


class _Kept:
    """What is finished, in the folder's checkpoints; what belongs to other images, weights or settings is not taken.

    Args:
        out: the folder; None keeps nothing.
        captured, images, formats, seed: what it belongs to.
    """

    def __init__(
        self, out: Path | None, captured: fx.GraphModule, images: Tensor, formats: Sequence[str], seed: int
    ) -> None:
        weights = tensors_sha256(dict(captured.named_buffers()))
        facts = [fingerprint(captured), weights, tensor_sha256(images), list(formats), seed]
        self.of = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        stage = f"{STAGE}-{self.of}"
        self.pieces = None if out is None else Pieces(out, stage)
        self.scores = Scores(None if out is None else out / CHECKPOINTS / f"{stage}-{MEASURED}")

    def read(self, index: int) -> Tensor | None:
        """The sums of a batch."""
        found = None if self.pieces is None else self.pieces.read(index)
        return None if found is None else found[0]["sums"]

    def forget(self) -> None:
        """Remove it all: the result lies elsewhere."""
        if self.pieces is not None and self.scores.path is not None:
            self.pieces.remove()
            self.scores.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.scores.path.parent.rmdir()

    def write(self, index: int, sums: Tensor) -> None:
        """Keep the sums of a batch."""
        if self.pieces is not None:
            self.pieces.write(index, {"sums": sums})


def _estimated(
    networks: dict[str, QuantizedGraph],
    images: Tensor,
    task: Task,
    operands: Sequence[Operand],
    kept: _Kept,
    seed: int,
    advances: Advances,
) -> list[Operand]:
    estimator, batches = Estimator(networks, task), images.split(_BATCH)
    total = torch.zeros(len(operands), dtype=torch.float64)
    advance = advances("estimate", len(batches))
    for place, batch in enumerate(batches):
        sums = kept.read(place)
        if sums is None:
            found = estimator.batch(batch, seed + 1_000_003 * place)
            sums = torch.tensor([found.get((o.name, o.wanted), 0.0) for o in operands], dtype=torch.float64)
            kept.write(place, sums)
        total += sums
        advance()
    halves = (total / (2 * len(images))).tolist()
    return [o.model_copy(update={"estimate": value}) for o, value in zip(operands, halves, strict=True)]


def _with_measured(
    result: Sensitivity,
    networks: dict[str, QuantizedGraph],
    images: Tensor,
    task: Task,
    count: int,
    kept: _Kept,
    advances: Advances,
) -> Sensitivity:
    largest = sorted(range(len(result.operands)), key=lambda i: -result.operands[i].estimate)[:count]
    advance, reference = advances("measure", count), None
    updated = list(result.operands)
    for index in largest:
        operand = updated[index]
        key = f"{operand.wanted}, {operand.name}"
        if key not in kept.scores.known:
            started = time.monotonic()
            network = networks[operand.wanted]
            if reference is None:
                reference = outputs_of(network, images)
            kept.scores.keep(
                key,
                divergence_of(network, [operand.name], images, task, reference),
                time.monotonic() - started,
            )
        updated[index] = operand.model_copy(update={"measured": kept.scores.known[key]})
        advance()
    ratios = [o.measured / o.estimate for o in updated if o.measured is not None and o.estimate > 0]
    return result.model_copy(update={"operands": updated, "scale": median(ratios) if ratios else 1.0})


def outputs_of(network: QuantizedGraph, images: Tensor) -> list[tuple[Tensor, ...]]:
    """The network's outputs for images (N, C, H, W) float32 in the mode that it is in, batch by batch of eight."""
    device = next(network.module.buffers()).device
    with torch.no_grad():
        return [as_tuple(network.module(batch.to(device))) for batch in images.split(_BATCH)]


def divergence_of(
    network: QuantizedGraph,
    names: Sequence[str],
    images: Tensor,
    task: Task,
    reference: Sequence[tuple[Tensor, ...]] | None = None,
) -> float:
    """The task's divergence from the float network with some quantizers alone at work, averaged over images.

    Args:
        network: observed; left in Mode.FLOAT.
        names: of quantizers.
        images: float32 (N, C, H, W).
        task: what the network's output is.
        reference: the float network's outputs for batches of eight; None computes them.
    """
    network.set_mode(Mode.FLOAT)
    reference = outputs_of(network, images) if reference is None else reference
    for quantizer in quantizers_of(network.module):
        quantizer.mode = Mode.QUANTIZE if quantizer.name in names else Mode.FLOAT
    found = outputs_of(network, images)
    network.set_mode(Mode.FLOAT)
    total = 0.0
    for ours, theirs in zip(found, reference, strict=True):
        pairs = zip(ours, theirs, strict=True)
        total += sum(float(task.divergence(a, b)) for a, b in pairs) * len(ours[0])
    return total / len(images)
