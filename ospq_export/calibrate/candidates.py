"""Changes of a site's channels that are tried, and the stretch of the graph that tells how well each does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.formats.search import compress
from ospq_export.graph.equalization import Site, bias_of, column_values, scaled_weight, weight_of
from ospq_export.graph.quantizers import ActivationQuantizer, Mode, QuantizedGraph, WeightQuantizer

_LIMIT = 1e3  # of a factor: float32 keeps the function to 1e-4 well beyond it, half precision does not
_STRENGTHS = (0.3, 0.5, 0.7, 0.9)
_POWERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Change:
    """A candidate: what it is called, and its factors and shifts, (channels,)."""

    name: str
    scale: Tensor
    shift: Tensor


class Region:
    """The stretch of the quantized graph from a site's producer to its consumers, which can be run under candidates."""

    def __init__(self, network: QuantizedGraph, site: Site) -> None:
        self.network, self.site = network, site
        named = {n.name: n for n in network.module.graph.nodes}
        self.producer = named[site.producer.name]
        self.consumers = {named[c.node.name]: c for c in site.consumers}
        core = {named[n.name] for n in site.path} | set(self.consumers)
        # Quantizers of whatever the core reads belong to it: of the channels, of other operands, of the weights.
        added = {n for c in core for n in c.all_input_nodes if n.op == "call_module"}
        inside = core | added
        self.nodes = [n for n in network.module.graph.nodes if n in inside]
        read = {n for node in self.nodes for n in node.all_input_nodes}
        self.inputs = {n for n in read if n not in inside} | {self.producer}
        self.values: dict[fx.Node, Any] = {}

    def prepare(self, wanted: int, generator: torch.Generator) -> None:
        """Run the stretch in float for its targets; quantize once what no candidate changes."""
        self.wanted, self.generator = wanted, generator
        carried = {self.producer}
        for node in self.nodes:
            if any(n in carried for n in node.all_input_nodes):
                carried.add(node)
        env = dict(self.values)
        for node in self.nodes:
            env[node] = env[node.all_input_nodes[0]] if node.op == "call_module" else self._call(node, env)
        self.targets: dict[fx.Node, Tensor] = {node: env[node] for node in self.consumers}
        self.fixed = dict(self.values)
        for node in self.nodes:
            if node not in carried and node.op == "call_module":
                self._quantize(node, self.fixed)

    def error(self, change: Change) -> float:
        """Squared error of the consumers' outputs over their variance, summed over the consumers, quantizers on."""
        env = dict(self.fixed)
        x = self.values[self.producer]
        shape = [1] * x.dim()
        shape[self.site.axis] = -1
        env[self.producer] = (x - change.shift.view(shape)) / change.scale.view(shape)
        total = 0.0
        for node in self.nodes:
            if node in env:
                continue
            if node in self.consumers:
                output = self._consumer(node, env, change)
                target = self.targets[node]
                total += float((output - target).square().mean() / target.var().clamp_min(1e-12))
            elif node.op == "call_module":
                self._quantize(node, env)
            else:
                env[node] = self._call(node, env)
        return total

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _consumer(self, node: fx.Node, env: dict[fx.Node, Any], change: Change) -> Tensor:
        """The operator with its weight rescaled and rounded to nearest, and its bias corrected for the shift."""
        module, consumer = self.network.module, self.consumers[node]
        weight_node = node.args[1]
        assert isinstance(weight_node, fx.Node) and isinstance(node.args[0], fx.Node)
        weight, bias = weight_of(module, consumer.node), bias_of(module, consumer.node)
        moved = scaled_weight(weight, column_values(change.shift, consumer, 0.0)).flatten(1).sum(1)
        new = scaled_weight(weight, column_values(change.scale, consumer, 1.0)).float()
        rounded = self._rounded(weight_node, new)
        corrected = None if bias is None else (bias.double() + moved).float()
        rest = node.args[3:]
        return node.target(env[node.args[0]], rounded, corrected, *rest)  # type: ignore[operator]

    def _rounded(self, node: fx.Node, weight: Tensor) -> Tensor:
        """The weight on a scale searched anew; as it is where it stays float."""
        if node.op != "call_module":
            return weight
        quantizer = self.network.module.get_submodule(str(node.target))
        assert isinstance(quantizer, WeightQuantizer)
        quantizer.round_to_nearest(weight)
        quantizer.mode = Mode.QUANTIZE
        rounded: Tensor = quantizer(weight)
        quantizer.mode = Mode.FLOAT
        return rounded

    def _quantize(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """Run an activation quantizer on a range searched anew; a weight's is left to its consumer."""
        quantizer = self.network.module.get_submodule(str(node.target))
        if not isinstance(quantizer, ActivationQuantizer):
            return
        x: Tensor = env[node.all_input_nodes[0]]
        flat = x.flatten()
        if flat.numel() > self.wanted:
            picks = torch.randint(flat.numel(), (self.wanted,), generator=self.generator).to(flat.device)
            tails = [flat.topk(16).values, flat.topk(16, largest=False).values]
            flat = torch.cat([flat[picks], *tails])
        sample = compress(flat, groups=1024, tail=64)
        quantizer.set_range(quantizer.format.search_range(sample, may_shift=quantizer.may_shift))
        quantizer.mode = Mode.QUANTIZE
        env[node] = quantizer(x)
        quantizer.mode = Mode.FLOAT


@dataclass(frozen=True)
class Channels:
    """Statistics of a site's channels on the sample, (channels,) each, and the candidates made of them."""

    site: Site
    low: Tensor
    high: Tensor
    mean: Tensor
    deviation: Tensor
    weight: Tensor

    @classmethod
    def of(cls, region: Region) -> Channels:
        """Measure the producer's output and the consumers' weights."""
        rows = region.values[region.producer].movedim(region.site.axis, -1).flatten(0, -2)
        largest = torch.zeros_like(rows[0])
        for consumer in region.site.consumers:
            weight = weight_of(region.network.module, consumer.node)
            per_column = weight.abs().transpose(0, 1).flatten(1).amax(1)
            columns = consumer.columns.to(weight.device)
            used = columns >= 0
            largest.scatter_reduce_(0, columns[used], per_column[used], "amax")
        deviation = rows.std(0, unbiased=False)
        return cls(region.site, rows.amin(0), rows.amax(0), rows.mean(0), deviation, largest)

    def _change(self, name: str, raw: Tensor, shift: Tensor) -> Change:
        """Factors brought to a geometric mean of one over the free channels, and kept within limits."""
        free, shiftable = self.site.free.to(raw.device), self.site.shiftable.to(raw.device)
        logarithm = raw.clamp_min(1e-12).log()
        scale = (logarithm - logarithm[free].mean()).exp().clamp(1.0 / _LIMIT, _LIMIT)
        return Change(name, torch.where(free, scale, 1.0), torch.where(shiftable, shift, 0.0))

    def none(self) -> Change:
        """No change."""
        return Change("none", torch.ones_like(self.mean), torch.zeros_like(self.mean))

    def shifts(self) -> list[Change]:
        """Centred on the mean, and on the middle of the range."""
        ones = torch.ones_like(self.mean)
        if not bool(self.site.shiftable.any()):
            return []
        middle = (self.low + self.high) / 2
        return [self._change("mean", ones, self.mean), self._change("middle", ones, middle)]

    def factors(self, shift: Tensor) -> list[Change]:
        """SmoothQuant's at several strengths, and powers of the channels' root mean square, around a given shift."""
        prefix = "shift " if bool((shift != 0).any()) else ""
        largest = torch.maximum(self.high - shift, shift - self.low).clamp_min(1e-6)
        rms = (self.deviation.square() + (self.mean - shift).square()).sqrt().clamp_min(1e-6)
        weight = self.weight.clamp_min(1e-6)
        factors = {f"smooth {a}": largest.pow(a) / weight.pow(1.0 - a) for a in _STRENGTHS}
        factors |= {f"rms {p}": rms.pow(p) for p in _POWERS}
        return [self._change(prefix + name, raw, shift) for name, raw in factors.items()]

    def repq(self) -> Change:
        """RepQ-ViT's: every channel gets one range, around zero where a shift is possible."""
        middle = torch.where(self.site.shiftable.to(self.low.device), (self.low + self.high) / 2, 0.0)
        largest = torch.maximum(self.high - middle, middle - self.low).clamp_min(1e-6)
        return self._change("repq", largest, middle)
