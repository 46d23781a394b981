"""The fake-quantized network with FP16 float parts, so that a file deployed in FP16 is compared with its like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ospq_export.graph.quantizers import ActivationQuantizer, WeightQuantizer
from ospq_export.onnx.half import fits_fp16

aten = torch.ops.aten
# What deployed files keep in FP32 as well: sums over many values, exponentials.
KEEPS_FLOAT32 = frozenset(
    {
        *(aten.layer_norm.default, aten.softmax.int, aten._softmax.default, aten.group_norm.default),
        *(aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.pow.Tensor_Scalar),
        *(aten.sqrt.default, aten.rsqrt.default, aten.exp.default, aten.log.default, aten.reciprocal.default),
        aten._native_batch_norm_legit_no_training.default,
    }
)
_MOVES = frozenset(
    {
        *(aten.expand.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim),
        *(aten.transpose.int, aten.permute.default, aten.clone.default),
    }
)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return fx.node.map_aggregate(value, convert)


class _Half(fx.Interpreter):
    """Every value between two nodes is FP16; quantizers, sums, and what needs FP32's range compute in float32.

    As in deployed files, a constant that FP16 cannot hold keeps its operator and the first arithmetic behind it in float32.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.wide: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        if n.op == "get_attr":
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point() and not _fits(value):
                self.wide.add(n)
                return value
            return _cast(value, torch.float16)
        if n.op == "call_function" and self._needs_range(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = super().call_function(n.target, _cast(args, torch.float32), kwargs)
            return result if n in self.wide else _cast(result, torch.float16)
        return _cast(super().run_node(n), torch.float16)

    def _needs_range(self, n: fx.Node) -> bool:
        numbers = [a for a in (*n.args, *n.kwargs.values()) if isinstance(a, float)]
        constants = [a for a in n.all_input_nodes if a.op == "get_attr"]
        loses = not all(map(fits_fp16, numbers)) or any(a in self.wide for a in constants)
        widened = any(a in self.wide for a in n.all_input_nodes)
        if loses or (widened and n.target in _MOVES):
            self.wide.add(n)
        return loses or widened

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        quantizer = isinstance(self.fetch_attr(str(target)), ActivationQuantizer | WeightQuantizer)
        return super().call_module(target, _cast(args, torch.float32) if quantizer else args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        wide = target in KEEPS_FLOAT32
        return super().call_function(target, _cast(args, torch.float32) if wide else args, kwargs)


def _fits(value: Tensor) -> bool:
    return fits_fp16(value.detach().cpu().numpy())


class HalfNetwork(nn.Module):
    """A fake-quantized network whose float parts compute in FP16; scales and codes stay what they are."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) float32 of images (B, C, H, W) float32."""
        logits: Tensor = _Half(self.network).run(images)
        return logits.float()
