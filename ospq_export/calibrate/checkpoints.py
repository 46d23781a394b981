"""What a calibration leaves while it runs: checkpoints of what is finished, from which a resumed run goes on, and its events.

What is kept is chosen by what it costs to compute again. A site of the equalization, a batch of the observation, a trial of a
slicing and a slice take seconds to minutes each: each has a checkpoint. So has the whole observation, once it is over. The search
for ranges between its last batch and its end takes seconds, and is repeated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, RootModel
from torch import Tensor, fx

from ospq_export.calibrate.reconstruct.bias import corrected_biases, learned_tensors
from ospq_export.errors import InputError
from ospq_export.graph.quantizers import own_quantizers
from ospq_export.runs.files import CHECKPOINTS, json_line, write_json
from ospq_export.runs.manifest import QuantizerRecord, SliceRecord
from ospq_export.runs.quantizers import load_bias, load_quantizer
from ospq_export.runs.tensors import read_tensors, write_tensors
from ospq_export.world.processes import World

_R = TypeVar("_R", bound=BaseModel)


@dataclass(frozen=True)
class Pieces:
    """Checkpoints of the finished pieces of a stage, by their index.

    Attributes:
        out: the run directory.
        stage: what their names begin with.
        writes: whether new ones are kept; they are read in any case.
    """

    out: Path
    stage: str
    writes: bool = True

    def path(self, index: int) -> Path:
        """Of a piece."""
        return self.out / CHECKPOINTS / f"{self.stage}-{index:04d}.safetensors"

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and header of a piece; None where it is not kept.

        Raises:
            InputError: the checkpoint is damaged.
        """
        path = self.path(index)
        return read_tensors(path) if path.is_file() else None

    def write(
        self, index: int, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
    ) -> None:
        """Keep a piece.

        Raises:
            InputError: there is no room.
        """
        if self.writes:
            write_tensors(self.path(index), tensors, header)

    def remove(self) -> None:
        """Remove them all: the stage is over, and its result lies elsewhere."""
        for path in (self.out / CHECKPOINTS).glob(f"{self.stage}-*.safetensors"):
            path.unlink(missing_ok=True)


def checkpoint(out: Path, index: int) -> Path:
    """Path of a slice's checkpoint in a run directory."""
    return out / CHECKPOINTS / f"{index:03d}.safetensors"


def save(path: Path, piece: fx.GraphModule, record: SliceRecord) -> None:
    """Write the checkpoint of a slice that was learned."""
    write_tensors(path, learned_tensors(piece), {"record": record.model_dump_json()})


def restore(path: Path, piece: fx.GraphModule, records: Sequence[QuantizerRecord]) -> SliceRecord:
    """Put a slice back into the state of its checkpoint.

    Args:
        path: the checkpoint.
        piece: the slice, observed.
        records: of the network's quantizers; their levels are those of the observation.

    Raises:
        InputError: the checkpoint is damaged.
    """
    tensors, header = read_tensors(path)
    found = parsed(SliceRecord, header.get("record", ""), path)
    by_name = {record.name: record for record in records}
    for quantizer in own_quantizers(piece):
        load_quantizer(quantizer, by_name[quantizer.name], tensors, path)
    for bias in corrected_biases(piece).values():
        load_bias(bias, tensors.get(bias.name), path)
    return found


def share(world: World, piece: fx.GraphModule) -> None:
    """Make what a slice has learned the first process's, to the last bit."""
    world.share(list(learned_tensors(piece).values()))


def parsed(kind: type[_R], text: str | bytes, path: Path) -> _R:
    """A record of a checkpoint.

    Raises:
        InputError: it is damaged.
    """
    try:
        return kind.model_validate_json(text)
    except ValueError as error:
        raise InputError(
            "the checkpoint is damaged", where=path, fix="delete this file and run again"
        ) from error


Events = Callable[[str, dict[str, Any]], None]
"""Called with what happened, "equalize", "observe", "trial", "cost", "slice" or "done", and its facts."""


def no_events(_event: str, _facts: dict[str, Any]) -> None:
    """For calibrations that nobody listens to."""


def json_lines(target: str) -> Events:
    """Appends a line per event, {"event": ..., "time": seconds since 1970, ...}, to a file, or to standard error for "-".

    Each line is written as a whole and at once, so that a reader never sees a part of one.

    Raises:
        InputError: the file cannot be written.
    """

    def write(event: str, facts: dict[str, Any]) -> None:
        line = json_line({"event": event, "time": round(time.time(), 3), **facts})
        if target == "-":
            sys.stderr.write(line)
            return
        try:
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise InputError(
                f"cannot be written: {error.strerror or error}", where=target, fix="choose another `log_json`"
            ) from error

    return write


class _Scores(RootModel[dict[str, float]]):
    """As they stand in the file."""


class Scores:
    """What trials have scored, by name.

    Args:
        path: where they are kept; None keeps them for this process only.
        events: told of every trial.

    Raises:
        InputError: the file is damaged.
    """

    def __init__(self, path: Path | None = None, events: Events = no_events) -> None:
        self.path, self.events = path, events
        self.known: dict[str, float] = {}
        if path is not None and path.is_file():
            self.known = parsed(_Scores, path.read_bytes(), path).root

    def keep(self, name: str, score: float, seconds: float) -> None:
        """Remember what a trial has scored, and how long it took."""
        self.known[name] = score
        if self.path is not None:
            write_json(self.path, self.known)
        self.events("trial", {"trial": name, "divergence": score, "seconds": round(seconds, 3)})
