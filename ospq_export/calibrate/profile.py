"""Outlier profile: how much of a tensor its largest elements and worst channels hold, streamed over batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.formats.choice import integers
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.slicing import cut_points
from ospq_export.graph.tap import Tap
from ospq_export.runs.manifest import OutlierRecord

_LARGEST, _WORST = 0.001, 0.01


class _Moments:
    """Sums over batches, float64."""

    def __init__(self) -> None:
        self.count, self.largest = 0, 0.0
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.top = 0.0
        self.channels: Tensor | None = None

    def add(self, x: Tensor, axis: int) -> None:
        values = x.detach().double().flatten()
        self.count += values.numel()
        self.largest = max(self.largest, float(values.abs().max()))
        self.sums += torch.stack([values.pow(k).sum() for k in (1, 2, 3, 4)]).cpu()
        # The largest elements are taken batch by batch: exact needs every value at once, and batches are alike.
        share = max(1, round(_LARGEST * values.numel()))
        self.top += float(values.square().topk(share).values.sum())
        squares = x.detach().double().movedim(axis, -1).flatten(0, -2).square().sum(0).cpu()
        self.channels = squares if self.channels is None else self.channels + squares

    def record(self, name: str, kind: Any) -> OutlierRecord:
        assert self.channels is not None
        m1, m2, m3, m4 = (self.sums / self.count).tolist()
        variance = max(m2 - m1 * m1, 1e-24)
        fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
        total = max(float(self.sums[1]), 1e-24)
        worst = max(1, round(_WORST * len(self.channels)))
        return OutlierRecord(
            name=name,
            kind=kind,
            max_over_std=self.largest / variance**0.5,
            kurtosis=fourth / variance**2,
            largest_share=self.top / total,
            channel_share=float(self.channels.topk(worst).values.sum()) / total,
        )


def _profiler(module: fx.GraphModule, watched: dict[fx.Node, _Moments]) -> Tap:
    """A float forward pass that looks at chosen tensors."""

    def add(_tap: Tap, n: fx.Node, value: Tensor) -> None:
        # Channels lie second in what a convolution works on, last elsewhere.
        watched[n].add(value, 1 if value.dim() == 4 and _is_image(n) else -1)

    return Tap(module, dict.fromkeys(watched, add))


def _is_image(node: fx.Node) -> bool:
    near = [node, *node.users, *node.all_input_nodes]
    return any(n.target is torch.ops.aten.conv2d.default for n in near)


def outlier_profile(
    captured: fx.GraphModule,
    images: Tensor,
    *,
    batch_size: int = 32,
    advance: Callable[[], None] = lambda: None,
) -> list[OutlierRecord]:
    """Outlier statistics at every cut point and at the tensor of every activation quantizer, in graph order.

    Args:
        captured: from `capture`, equalized or not.
        images: float32 (N, C, H, W), normalised.
        batch_size: images per forward pass.
        advance: called after each batch.
    """
    network = insert_quantizers(captured, integers(8, 8))
    points = {n.name for n in cut_points(captured.graph)}
    names = {f"quantizers.{name.replace('.', '__')}": name for name in network.activations}
    labels: dict[fx.Node, tuple[str, str]] = {}
    for node in network.module.graph.nodes:
        if node.name in points and node.op != "placeholder":
            labels[node] = (node.name, "cut")
        elif node.op == "call_module" and str(node.target) in names:
            labels[node] = (names[str(node.target)], "quantizer")
    watched = {node: _Moments() for node in labels}
    device = next(network.module.buffers()).device
    with torch.no_grad():
        for batch in images.split(batch_size):
            _profiler(network.module, watched).run(batch.to(device))
            advance()
    return [watched[node].record(name, kind) for node, (name, kind) in labels.items()]
