"""What quantizing one operand alone does to the network's output, to second order, for all operands and formats at once.

The Fisher information is the curvature of the KL divergence: with g the gradient of -log p(t), of a target t drawn from the
network's own output, and d what quantizing adds to an operand, the divergence is E[(g . d)^2] / 2 but for terms of third order.
Its diagonal is what BRECQ weighs errors by (Li et al. 2021, eq. 10); here the whole of it is taken, since d is known. One forward
pass and a few backward passes of an image serve every operand and every format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from ospq_export.graph.outputs import as_tuple
from ospq_export.graph.quantizers import (
    ActivationQuantizer,
    Mode,
    QuantizedGraph,
    WeightQuantizer,
    quantizers_of,
)
from ospq_export.graph.rewrite import OnValue, Tap
from ospq_export.tasks.base import Task

DRAWS = 2
"""Targets that are drawn for an image: each costs a backward pass."""


Edge = tuple[str, str]
"""A tensor and one operator that reads it, by the names of their nodes; ("", operator) is what the operator gives."""


class Estimator:
    """Sums of (g . d)^2 over images, by operand and format.

    Formats differ in which readers of a tensor share a quantizer. So every reader has a gradient of its own; that of a quantizer
    is the sum of its readers'.

    Args:
        networks: the same network with quantizers, observed, by format; left in Mode.FLOAT.
        task: what the network's output is.
    """

    def __init__(self, networks: Mapping[str, QuantizedGraph], task: Task) -> None:
        self.networks, self.task = networks, task
        self.edges: dict[tuple[str, str], list[Edge]] = {}
        for kind, network in networks.items():
            network.set_mode(Mode.FLOAT)
            self.edges |= {(name, kind): found for name, found in _edges(network).items()}
        base = next(iter(networks.values()))
        self.device = next(base.module.buffers()).device
        self.seen: dict[Edge, Tensor] = {}
        self.inputs: dict[str, tuple[fx.Node, Tensor]] = {}
        self.tap = self._tap(base.module, {edge for found in self.edges.values() for edge in found})

    def _tap(self, quantized: fx.GraphModule, edges: set[Edge]) -> Tap:
        """The float network with every edge a node of its own."""
        module = _without_quantizers(quantized)
        nodes = {node.name: node for node in module.graph.nodes}
        watched: dict[fx.Node, OnValue] = {}
        for edge in sorted(edges):
            source, reader = edge
            if not source:
                watched[nodes[reader]] = self._keep_product(edge)
                continue
            with module.graph.inserting_before(nodes[reader]):
                own = module.graph.call_function(torch.ops.aten.alias.default, (nodes[source],))
            nodes[reader].replace_input_with(nodes[source], own)
            watched[own] = self._keep(edge)
        module.recompile()
        return Tap(module, watched)

    def _keep(self, edge: Edge) -> OnValue:
        def keep(_tap: Tap, _node: fx.Node, value: Tensor) -> Tensor:
            # A tensor of its own: other readers of the value must not count.
            own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            self.seen[edge] = own
            return own

        return keep

    def _keep_product(self, edge: Edge) -> OnValue:
        keep = self._keep(edge)

        def keep_both(tap: Tap, node: fx.Node, value: Tensor) -> Tensor | None:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            self.inputs[edge[1]] = node, tap.env[source].detach()
            return keep(tap, node, value)

        return keep_both

    def batch(self, images: Tensor, seed: int) -> dict[tuple[str, str], float]:
        """The sums over a batch (B, C, H, W) float32, by operand and format; targets are drawn by `seed`."""
        outputs = as_tuple(self.tap.run(images.to(self.device).requires_grad_(True)))
        generator = torch.Generator().manual_seed(seed)
        names = list(self.seen)
        drawn = []
        for draw in range(DRAWS):
            loss = self.task.sampled_loss(outputs, generator, 1.0)
            kept = [self.seen[name] for name in names]
            found = torch.autograd.grad(loss, kept, retain_graph=draw < DRAWS - 1, allow_unused=True)
            drawn.append(dict(zip(names, found, strict=True)))
        with torch.no_grad():
            sums = {
                (quantizer.name, kind): self._sum(drawn, self._added(network, quantizer, kind), len(images))
                for kind, network in self.networks.items()
                for quantizer in quantizers_of(network.module)
            }
        self.seen, self.inputs = {}, {}
        return sums

    def _added(
        self, network: QuantizedGraph, quantizer: ActivationQuantizer | WeightQuantizer, kind: str
    ) -> dict[Edge, Tensor]:
        """What quantizing adds to an activation, or to what the operators that read a weight give: they are linear in it."""
        edges = self.edges[quantizer.name, kind]
        if isinstance(quantizer, ActivationQuantizer):
            return dict.fromkeys(edges, _rounding(quantizer, self.seen[edges[0]]))
        added = _rounding(quantizer, network.module.get_buffer(quantizer.constant))
        return {edge: _apply(*self.inputs[edge[1]], added) for edge in edges}

    def _sum(
        self, drawn: Sequence[Mapping[Edge, Tensor | None]], added: Mapping[Edge, Tensor], images: int
    ) -> float:
        total = 0.0
        for gradients in drawn:
            products = [(gradients[name], delta) for name, delta in added.items()]
            dots = [_per_image(g * delta, images) for g, delta in products if g is not None]
            if len({len(d) for d in dots}) > 1:
                dots = [d.sum(0, keepdim=True) for d in dots]
            total += float(torch.stack(dots).sum(0).square().sum()) if dots else 0.0
        return total / len(drawn)


def _edges(network: QuantizedGraph) -> dict[str, list[Edge]]:
    """By quantizer: the tensor's readers behind it, or the operators that multiply with the weight."""
    modules, found = dict(network.module.named_modules()), dict[str, list[Edge]]()
    for node in network.module.graph.find_nodes(op="call_module"):
        quantizer, source = modules[str(node.target)], node.args[0]
        assert isinstance(source, fx.Node)
        if isinstance(quantizer, ActivationQuantizer | WeightQuantizer):
            name = source.name if isinstance(quantizer, ActivationQuantizer) else ""
            found[quantizer.name] = [(name, reader.name) for reader in node.users]
    return found


def _without_quantizers(quantized: fx.GraphModule) -> fx.GraphModule:
    """A copy of a network's graph that reads what its quantizers read; the constants are shared."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(quantized.graph, copies))
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return fx.GraphModule(quantized, graph)


def _rounding(quantizer: ActivationQuantizer | WeightQuantizer, value: Tensor) -> Tensor:
    quantizer.mode = Mode.QUANTIZE
    added: Tensor = quantizer(value) - value
    quantizer.mode = Mode.FLOAT
    return added


def _apply(node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    target = node.target
    assert callable(target)
    found: Tensor = target(x, weight, None, *node.args[3:])
    return found


def _per_image(product: Tensor, images: int) -> Tensor:
    """Sums by image, where images are what the first dimension counts; else one sum, whose square is as large on average."""
    rows = images if product.dim() and product.shape[0] % images == 0 else 1
    return product.reshape(rows, -1).double().sum(1)
