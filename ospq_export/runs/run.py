"""A finished run as an object: its networks rebuilt from the run directory alone, without the model's code and weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from ospq_export.errors import InputError, damaged
from ospq_export.formats.base import Scales
from ospq_export.formats.integer import Integer
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import (
    ActivationQuantizer,
    CorrectedBias,
    Mode,
    QuantizedGraph,
    WeightQuantizer,
)
from ospq_export.graph.serialize import rebuild
from ospq_export.graph.slicing import Slice
from ospq_export.runs.files import (
    CALIBRATION_IMAGES,
    FLOAT_TENSORS,
    GRAPH,
    MANIFEST,
    QUANTIZED_TENSORS,
    check_file,
)
from ospq_export.runs.manifest import Manifest, QuantizerRecord, check_files, read_manifest
from ospq_export.runs.tensors import read_tensors


@dataclass
class Run:
    """A run directory whose manifest and hashes have been checked.

    Attributes:
        path: the directory.
        manifest: what it says.
    """

    path: Path
    manifest: Manifest
    _structure: fx.GraphModule | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run directory.

        Raises:
            InputError: not a run directory, unfinished, damaged or edited.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.status != "calibrated":
            raise InputError(
                "the calibration was interrupted",
                where=path,
                fix="run the same `calibrate` command again to finish it",
            )
        check_files(path, manifest)
        _check_complete(path, manifest)
        return cls(path, manifest)

    def file(self, name: str) -> Path:
        """Path of a file of the run.

        Raises:
            InputError: the run has no such file.
        """
        if name not in self.manifest.files:
            raise InputError(
                f"the run has no {name}", where=self.path, fix=f"run `ospq-export export {self.path}` first"
            )
        return self.path / name

    def runnable(self, name: str) -> Path:
        """What ONNX Runtime runs for an exported file: the file itself, or the one that was made for checking it.

        Raises:
            InputError: the run has no such file.
        """
        path, check = self.file(name), check_file(name)
        return self.file(check) if check in self.manifest.files else path

    @property
    def has_integers_only(self) -> bool:
        """Whether every quantizer's format is one of the integers."""
        return all(isinstance(format_, Integer) for format_ in self.manifest.formats().values())

    def unoptimized(self) -> tuple[str, ...]:
        """Optimisations of ONNX Runtime's that make something invalid of the formats of this run."""
        formats = self.manifest.formats().values()
        return tuple(sorted({name for format_ in formats for name in format_.onnxruntime_without}))

    def calibration_digests(self) -> frozenset[str]:
        """Digests of the images that the run was calibrated on, see `image_digests`.

        Raises:
            InputError: the file is damaged.
        """
        return frozenset(map(str, self._json(CALIBRATION_IMAGES)))

    def _json(self, name: str) -> Any:
        path = self.file(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise damaged(f"cannot be read: {error}", path) from error

    def slices(self) -> list[Slice]:
        """The slices that were reconstructed, in order."""
        return [
            Slice(s.name, s.start, s.end, tuple(s.received), tuple(s.carried)) for s in self.manifest.slices
        ]

    def captured(self) -> fx.GraphModule:
        """The float network's graph with the run's float weights.

        Raises:
            InputError: the graph or the weights are damaged.
        """
        graph = self._rebuilt()
        tensors, _ = read_tensors(self.file(FLOAT_TENSORS))
        names = [name for name, _ in graph.named_buffers()]
        _load_constants(graph, names, tensors, self.path / FLOAT_TENSORS)
        return graph

    def _rebuilt(self) -> fx.GraphModule:
        """The network's graph, whose constants are to be loaded; rebuilt once, because that takes a second or more."""
        if self._structure is None:
            self._structure = rebuild(self._json(GRAPH), self.path / GRAPH)
        return copy.deepcopy(self._structure)

    def float_network(self) -> nn.Module:
        """`(B, C, H, W) float32 -> logits (B, K) float32`, in eval mode."""
        return self.captured()

    def quantized_graph(self, captured: fx.GraphModule | None = None) -> QuantizedGraph:
        """The fake-quantized network, from `quantized.safetensors` alone, in Mode.QUANTIZE.

        Args:
            captured: what `captured` gave, to save its making; it is used up: its constants become the quantized network's.

        Raises:
            InputError: the tensors do not fit the graph.
        """
        path = self.file(QUANTIZED_TENSORS)
        graph = self._rebuilt() if captured is None else captured
        tensors, _ = read_tensors(path)
        network = insert_quantizers(graph, self.manifest.recipe.formats())
        replaced = {w.constant for w in network.weights.values()}
        kept = [name for name, _ in graph.named_buffers() if name not in replaced]
        _load_constants(graph, kept, tensors, path)
        for name in replaced:
            _forget(graph.get_buffer(name))
        load_quantizers(network, self.manifest.quantizers, tensors, path)
        for bias in network.biases.values():
            load_bias(bias, tensors.get(bias.constant), path)
        network.set_mode(Mode.QUANTIZE)
        return network

    def fake_quant_network(self) -> nn.Module:
        """The network whose predictions the deployed file must give: `(B, C, H, W) float32 -> logits (B, K) float32`."""
        return self.quantized_graph().module


def _check_complete(path: Path, manifest: Manifest) -> None:
    """Hold a finished run's manifest to itself: tensors are among its files, every quantizer lies in one of its slices."""
    lost = [name for name in (FLOAT_TENSORS, QUANTIZED_TENSORS) if name not in manifest.files]
    places = range(len(manifest.slices))
    lost += [f"the slice of {q.name}" for q in manifest.quantizers if q.slice not in places]
    if lost:
        raise damaged(f"the manifest lacks {lost[0]}", path / MANIFEST)


def _load_constants(
    graph: fx.GraphModule, names: Iterable[str], tensors: Mapping[str, Tensor], path: Path
) -> None:
    for name in names:
        buffer = graph.get_buffer(name)
        buffer.set_(_fitting(tensors, name, buffer, path))  # type: ignore[call-overload]


def _fitting(tensors: Mapping[str, Tensor], name: str, like: Tensor, path: Path) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != like.shape or found.dtype != like.dtype:
        shown = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise damaged(f"{name}: expected {like.dtype} {tuple(like.shape)}, found {shown}", path)
    return found


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise damaged(f"{name} is not finite", path)


def _forget(weight: Tensor) -> None:
    """Free a constant's memory; whoever reads it all the same gets NaN, or 0 where it holds integers."""
    nothing = torch.full((), torch.nan if weight.is_floating_point() else 0, dtype=weight.dtype)
    weight.set_(nothing.expand(weight.shape))  # type: ignore[call-overload]


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
        found = _fitting(tensors, key, value, path)
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
