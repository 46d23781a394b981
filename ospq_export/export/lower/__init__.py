"""Lowering of a quantized network to deployable operators: the graph, and a module for each family of formats."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from ospq_export.formats.base import Format
from ospq_export.graph.quantizers import ActivationQuantizer, QuantizedGraph, WeightQuantizer


class Builder(Protocol):
    """Adds operators and constants to the graph that is being made."""

    def call(self, target: object, *args: object) -> fx.Node:
        """An operator."""
        raise NotImplementedError

    def attribute(self, name: str, value: Tensor) -> fx.Node:
        """A constant."""
        raise NotImplementedError


class Lowering(Protocol):
    """How a format is written as ONNX: a module of this package that is called as the format's `family`."""

    def activation(
        self, build: Builder, x: fx.Node, quantizer: ActivationQuantizer
    ) -> tuple[fx.Node, fx.Node]:
        """The codes of x and their real values, these without an offset."""
        raise NotImplementedError

    def weight(self, build: Builder, quantizer: WeightQuantizer, *, transposed: bool) -> fx.Node:
        """The real values of a weight; transposed where the operator becomes a matmul."""
        raise NotImplementedError

    def convolves(self, shape: torch.Size) -> bool:
        """Whether hardware convolves with a weight of this shape; else a convolution over patches is written as a linear."""
        raise NotImplementedError

    def sums(self, quantizer: WeightQuantizer) -> Tensor:
        """Real values of a weight summed over an output channel's inputs, float64 (out_channels,)."""
        raise NotImplementedError


def lowering_of(format_: Format) -> Lowering:
    """The lowering of a format."""
    return cast(Lowering, importlib.import_module(f"{__package__}.{format_.family}"))


def finishers(network: QuantizedGraph) -> list[Callable[[Any], None]]:
    """What turns the translated graph of a network into that of its formats: the `finish` of the modules that have one."""
    activations = [a.format for a in network.activations.values()]
    families = {f.family: None for f in (*activations, *(w.format for w in network.weights.values()))}
    modules = (importlib.import_module(f"{__package__}.{family}") for family in families)
    return [module.finish for module in modules if hasattr(module, "finish")]
