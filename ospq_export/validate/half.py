"""The fake-quantized network with FP16 float parts, so that a file deployed in FP16 is compared with its like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ospq_export.graph.quantizers import ActivationQuantizer, WeightQuantizer

aten = torch.ops.aten
# What deployed files keep in FP32 as well: sums over many values, exponentials.
KEEPS_FLOAT32 = frozenset(
    {aten.layer_norm.default, aten.softmax.int, aten._softmax.default, aten.group_norm.default, aten.mean.dim}
)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return fx.node.map_aggregate(value, convert)


class _Half(fx.Interpreter):
    """Every value between two nodes is FP16; quantizers and sums compute in float32."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return result if n.op == "output" else _cast(result, torch.float16)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        quantizer = isinstance(self.fetch_attr(str(target)), ActivationQuantizer | WeightQuantizer)
        return super().call_module(target, _cast(args, torch.float32) if quantizer else args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        wide = target in KEEPS_FLOAT32
        return super().call_function(target, _cast(args, torch.float32) if wide else args, kwargs)


class HalfNetwork(nn.Module):
    """A fake-quantized network whose float parts compute in FP16; scales and codes stay what they are."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) float32 of images (B, C, H, W) float32."""
        logits: Tensor = _Half(self.network).run(images)
        return logits.float()
