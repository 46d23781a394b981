"""Networks for what does not ask for accuracy: random weights and images, or few of them, quantized to nearest and exported."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from ospq_export.calibrate.observe import observe
from ospq_export.data import Batch, DataConfig, resolve_data_config
from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
from ospq_export.export.expand import needs_expansion, write_expanded
from ospq_export.export.lower import finishers
from ospq_export.export.lower.graph import highest_opset, lower, probe_names
from ospq_export.export.variants import shift_activations
from ospq_export.formats.choice import Choice
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.models.timm import ModelSpec, create_model, parse_model_kwargs
from ospq_export.onnx.half import to_half
from ospq_export.onnx.write import ACTIVATION_LAYOUT, write_onnx
from ospq_export.runs.files import check_file

_VALUES_PER_TENSOR = 1 << 14


@dataclass(frozen=True)
class Quantized:
    """A network in float and fake-quantized, round to nearest.

    Attributes:
        captured: the float graph.
        network: with quantizers, in Mode.QUANTIZE.
        input_size: (channels, height, width) in pixels.
    """

    captured: fx.GraphModule
    network: QuantizedGraph
    input_size: tuple[int, int, int]

    def write(self, path: Path, *, half: bool, batch_size: int | None = 1, activations: str = "int8") -> None:
        """The deployable file: FP32 or FP16 around the quantized operators; every quantizer's codes have its name.

        Args:
            path: the file.
            half: FP16.
            batch_size: fixed, or None for a dynamic one.
            activations: "int8", or "uint8" for the same codes, 128 higher.
        """
        shifted = activations == "uint8"
        probes = probe_names(self.network, [])
        changes = (*([to_half] if half else []), *([shift_activations] if shifted else []))
        write_onnx(
            lower(self.network, probes),
            path,
            input_size=self.input_size,
            batch_size=batch_size,
            metadata={ACTIVATION_LAYOUT: "uint8"} if shifted else {},
            probes=list(probes.values()),
            opset=highest_opset(self.network),
            passes=(*finishers(self.network), *changes),
        )

    def write_runnable(self, path: Path) -> Path:
        """The FP32 file with a dynamic batch, or that for checking which ONNX Runtime runs in its place; returns which."""
        self.write(path, half=False, batch_size=None)
        if not needs_expansion(onnx_ir.load(path)):
            return path
        write_expanded(path, path.with_name(check_file(path.name)))
        return path.with_name(check_file(path.name))

    def write_float(self, path: Path, *, batch_size: int | None = 1) -> None:
        """The float network in FP32."""
        write_onnx(self.captured, path, input_size=self.input_size, batch_size=batch_size, metadata={})

    def double(self) -> fx.GraphModule:
        """The fake-quantized network in float64: one of its equally legitimate executions."""
        module = copy.deepcopy(self.network.module).double()

        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        for node in module.graph.nodes:
            node.args = tree_map(widened, node.args)
            node.kwargs = tree_map(widened, node.kwargs)
        module.recompile()
        return module


def quantize(spec: ModelSpec, input_size: tuple[int, int, int], bits: Choice, images: Tensor) -> Quantized:
    """Capture a network and set every range from a few images; weights to nearest.

    Args:
        spec: without a checkpoint the weights are random, from seed 0.
        input_size: (channels, height, width) in pixels.
        bits: of weights and activations.
        images: float32 (N, C, H, W).
    """
    torch.manual_seed(0)
    captured = capture(create_model(spec), input_size)
    network = insert_quantizers(captured, bits)
    observe(network, images, batch_size=len(images), seed=0, values_per_tensor=_VALUES_PER_TENSOR)
    network.set_mode(Mode.QUANTIZE)
    return Quantized(captured, network, input_size)


def random_images(count: int, input_size: tuple[int, int, int]) -> Tensor:
    """Normally distributed pixels, float32 (N, C, H, W), from seed 0."""
    return torch.randn(count, *input_size, generator=torch.Generator().manual_seed(0))


def random_batch(count: int, input_size: tuple[int, int, int]) -> Batch:
    """The same as a calibration takes them, all of class 0."""
    return Batch(
        random_images(count, input_size),
        torch.zeros(count, dtype=torch.long),
        [str(index) for index in range(count)],
    )


def random_network(name: str, model_kwargs: str) -> tuple[ModelSpec, torch.nn.Module, DataConfig]:
    """A timm model with random weights, from seed 0, and its preprocessing.

    Args:
        name: timm's.
        model_kwargs: "key=value" pairs, as the command line takes them.
    """
    spec = ModelSpec(name=name, kwargs=parse_model_kwargs(model_kwargs))
    torch.manual_seed(0)
    model = create_model(spec)
    return spec, model, resolve_data_config(model, spec, {})


def demo_sample(name: str, count: int = 32) -> tuple[ModelSpec, tuple[int, int, int], Tensor]:
    """A packaged network, its input size, and calibration images, float32 (N, C, H, W)."""
    spec = demo_spec(name)
    config = resolve_data_config(create_model(spec), spec, demo_data_overrides())
    return spec, config.input_size, demo_images("calibration", config).sample(count, seed=0).images
