"""What a calibration leaves while it runs: a checkpoint per finished slice, from which a resumed run goes on, and its events."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from torch import fx

from ospq_export.calibrate.reconstruct.bias import corrected_biases, learned_tensors
from ospq_export.errors import InputError
from ospq_export.graph.quantizers import own_quantizers
from ospq_export.runs.files import CHECKPOINTS, json_line
from ospq_export.runs.manifest import QuantizerRecord, SliceRecord
from ospq_export.runs.quantizers import load_bias, load_quantizer
from ospq_export.runs.tensors import read_tensors, write_tensors
from ospq_export.world.processes import World

_R = TypeVar("_R", bound=BaseModel)


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
"""Called with what happened, "cost", "slice", "done", and its facts."""


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
