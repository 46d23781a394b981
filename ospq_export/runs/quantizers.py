"""What a run directory says of the quantizers of a network, and how they are set from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ospq_export.errors import InputError, damaged
from ospq_export.formats.base import Scales
from ospq_export.graph.quantizers import ActivationQuantizer, CorrectedBias, QuantizedGraph, WeightQuantizer
from ospq_export.runs.manifest import QuantizerRecord


def fitting(tensors: Mapping[str, Tensor], name: str, like: Tensor, path: Path) -> Tensor:
    """The tensor of a name, of the shape and type of another one.

    Raises:
        InputError: there is none.
    """
    found = tensors.get(name)
    if found is None or found.shape != like.shape or found.dtype != like.dtype:
        shown = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise damaged(f"{name}: expected {like.dtype} {tuple(like.shape)}, found {shown}", path)
    return found


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise damaged(f"{name} is not finite", path)


def quantizer_records(network: QuantizedGraph, slice_of: dict[str, int]) -> list[QuantizerRecord]:
    """What the manifest says of all quantizers of a calibrated network."""
    activations = [
        QuantizerRecord(name=a.name, kind="activation", slice=slice_of[a.name], format=a.format.record())
        for a in network.activations.values()
    ]
    weights = [
        QuantizerRecord(
            name=w.name, kind="weight", slice=slice_of[w.name], format=w.format.record(), constant=w.constant
        )
        for w in network.weights.values()
    ]
    return [*activations, *weights]


def quantizer_tensors(quantizers: Sequence[ActivationQuantizer | WeightQuantizer]) -> dict[str, Tensor]:
    """Scales, offsets and codes under the names that `load_quantizers` reads."""
    tensors: dict[str, Tensor] = {}
    for quantizer in quantizers:
        tensors[f"{quantizer.name}.scale"] = quantizer.scale
        if isinstance(quantizer, WeightQuantizer):
            tensors[f"{quantizer.name}.codes"] = quantizer.codes
            if quantizer.tensor_scale is not None:
                tensors[f"{quantizer.name}.tensor_scale"] = quantizer.tensor_scale
        else:
            tensors[f"{quantizer.name}.offset"] = quantizer.offset
    return tensors


def load_quantizers(
    network: QuantizedGraph, records: list[QuantizerRecord], tensors: dict[str, Tensor], path: Path
) -> None:
    """Set every quantizer of a network from records and tensors.

    Raises:
        InputError: a quantizer is missing, unknown, or its tensors have another shape, dtype or range.
    """
    quantizers: dict[str, ActivationQuantizer | WeightQuantizer] = {**network.activations, **network.weights}
    unknown = {r.name for r in records} ^ set(quantizers)
    if unknown:
        raise damaged(f"the quantizers do not fit the graph: {min(unknown)}", path)
    for record in records:
        load_quantizer(quantizers[record.name], record, tensors, path)


def load_bias(bias: CorrectedBias, value: Tensor | None, path: Path) -> None:
    """Set the quantized network's bias.

    Raises:
        InputError: it is missing, or has another shape or dtype, or is not finite.
    """
    if value is None or value.shape != bias.value.shape or value.dtype != bias.value.dtype:
        raise damaged(f"{bias.name} does not fit the graph", path)
    _check_finite(bias.name, value, path)
    bias.value.copy_(value)


def load_quantizer(
    quantizer: ActivationQuantizer | WeightQuantizer,
    record: QuantizerRecord,
    tensors: dict[str, Tensor],
    path: Path,
) -> None:
    """Set one quantizer; see `load_quantizers`."""
    try:
        format_ = record.read_format()
    except InputError as error:
        raise damaged(f"{record.name}: {error}", path) from error
    if type(format_) is not type(quantizer.format):
        chosen = quantizer.format.name
        raise damaged(f"{record.name} is recorded as {format_.name}, the recipe chose {chosen}", path)
    quantizer.format = format_
    for key, value in quantizer_tensors([quantizer]).items():
        found = fitting(tensors, key, value, path)
        if not key.endswith(".codes"):
            _check_finite(key, found, path)
        # Without a copy, where the network lies in host memory: what `found` reads from a file stays there until it is needed.
        value.set_(found.to(value.device))  # type: ignore[call-overload]
    if not bool((quantizer.scale > 0).all()):
        raise damaged(f"{record.name}.scale is not positive", path)
    if isinstance(quantizer, ActivationQuantizer):
        return
    if not format_.holds(quantizer.codes):
        raise damaged(f"{record.name}.codes are not all {format_.name}", path)
    if not format_.stores(Scales(quantizer.scale, quantizer.tensor_scale)):
        raise damaged(f"{record.name}.scale is not what {format_.name} can store", path)
