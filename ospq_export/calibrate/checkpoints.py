"""A checkpoint per finished slice: what its quantizers and biases have become, and its record; a resumed run starts from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from torch import fx

from ospq_export.calibrate.reconstruct.bias import corrected_biases
from ospq_export.errors import InputError
from ospq_export.graph.quantizers import own_quantizers
from ospq_export.runs.files import CHECKPOINTS
from ospq_export.runs.manifest import QuantizerRecord, SliceRecord
from ospq_export.runs.run import load_bias, load_quantizer, quantizer_tensors
from ospq_export.runs.tensors import read_tensors, write_tensors
from ospq_export.world.processes import World

_R = TypeVar("_R", bound=BaseModel)


def checkpoint(out: Path, index: int) -> Path:
    """Path of a slice's checkpoint in a run directory."""
    return out / CHECKPOINTS / f"{index:03d}.safetensors"


def save(path: Path, piece: fx.GraphModule, record: SliceRecord) -> None:
    """Write the checkpoint of a slice that was learned."""
    tensors = quantizer_tensors(own_quantizers(piece))
    tensors |= {bias.name: bias.value for bias in corrected_biases(piece).values()}
    write_tensors(path, tensors, {"record": record.model_dump_json()})


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
    tensors = list(quantizer_tensors(own_quantizers(piece)).values())
    world.share([*tensors, *(bias.value for bias in corrected_biases(piece).values())])


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
