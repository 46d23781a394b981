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

from ospq_export.data.config import DataConfig
from ospq_export.errors import InputError, damaged, reason_of
from ospq_export.formats.integer import Integer
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.serialize import rebuild
from ospq_export.graph.sizes import shown
from ospq_export.graph.slicing import Slice
from ospq_export.runs.files import (
    CALIBRATION_IMAGES,
    FLOAT_TENSORS,
    GRAPH,
    MANIFEST,
    QUANTIZED_TENSORS,
    check_file,
)
from ospq_export.runs.manifest import Manifest, check_files, read_manifest
from ospq_export.runs.quantizers import fitting, load_bias, load_quantizers
from ospq_export.runs.tensors import read_tensors


@dataclass
class Run:
    """A run directory whose manifest and hashes have been checked.

    Attributes:
        path: the directory.
        manifest: what it says.
        size: height and width that its networks are given, of a run with a range; None is the calibration's.
    """

    path: Path
    manifest: Manifest
    size: tuple[int, int] | None = field(default=None, init=False, compare=False)
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

    @property
    def data(self) -> DataConfig:
        """The preprocessing of its images, at the size that they are to have."""
        data = self.manifest.data
        if self.size is None:
            return data
        return data.model_copy(update={"input_size": (data.input_size[0], *self.size)})

    def at(self, input_size: Sequence[int]) -> Self:
        """The same run, for images of another size of its range.

        Args:
            input_size: (channels, height, width) in pixels.

        Raises:
            InputError: the run has no range of sizes, or this one lies outside of it.
        """
        own, sizes, where = self.manifest.data.input_size, self.manifest.size_range, "`input_size`"
        if sizes is None:
            what = f"the run takes images of {shown(own[1:])} only"
            raise InputError(what, where=where, fix="leave it out, or calibrate with `size_range`")
        if len(input_size) != len(own) or input_size[0] != own[0]:
            given = ",".join(map(str, input_size))
            fix = f"write it like {','.join(map(str, own))}"
            raise InputError(f"{given} is no size of images with {own[0]} channels", where=where, fix=fix)
        sizes.check(input_size[1:], where)
        other = type(self)(self.path, self.manifest)
        if tuple(input_size) != tuple(own):
            other.size = (input_size[1], input_size[2])
        return other

    def report_file(self, name: str) -> Path:
        """Where a report of this size goes: report.json, or report.224x320.json at another than the calibration's."""
        stem, dot, kind = name.partition(".")
        infix = "" if self.size is None else f".{self.size[0]}x{self.size[1]}"
        return self.path / f"{stem}{infix}{dot}{kind}"

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
            raise damaged(f"cannot be read: {reason_of(error)}", path) from error

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
            self._structure = rebuild(self._json(GRAPH), self.path / GRAPH, self.size)
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
        buffer.set_(fitting(tensors, name, buffer, path))  # type: ignore[call-overload]


def _forget(weight: Tensor) -> None:
    """Free a constant's memory; whoever reads it all the same gets NaN, or 0 where it holds integers."""
    nothing = torch.full((), torch.nan if weight.is_floating_point() else 0, dtype=weight.dtype)
    weight.set_(nothing.expand(weight.shape))  # type: ignore[call-overload]
