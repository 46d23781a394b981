"""The fake-quantized network with FP16 float parts, so that a file deployed in FP16 is compared with its like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ospq_export.graph.outputs import as_tuple
from ospq_export.graph.quantizers import ActivationQuantizer, WeightQuantizer
from ospq_export.onnx.half import KEEPS_FLOAT32, MOVES, fits_fp16

aten = torch.ops.aten
# What an operator becomes in a file, where that decides on its precision: what stays FP32 is up to onnx/half.py alone.
_IN_FILE: dict[Any, str] = {
    **{aten.layer_norm.default: "LayerNormalization", aten.group_norm.default: "GroupNormalization"},
    **{aten._native_batch_norm_legit_no_training.default: "BatchNormalization", aten.log.default: "Log"},
    **{aten.softmax.int: "Softmax", aten._softmax.default: "Softmax", aten.exp.default: "Exp"},
    **{aten.mean.dim: "ReduceMean", aten.sum.dim_IntList: "ReduceSum", aten.sqrt.default: "Sqrt"},
    **{aten.linalg_vector_norm.default: "ReduceL2", aten.pow.Tensor_Scalar: "Pow"},
    **{aten.rsqrt.default: "Reciprocal", aten.reciprocal.default: "Reciprocal"},
    **{aten.expand.default: "Expand", aten.reshape.default: "Reshape"},
    **{aten.unsqueeze.default: "Unsqueeze", aten.squeeze.dim: "Squeeze", aten.clone.default: "Identity"},
    **{aten.transpose.int: "Transpose", aten.permute.default: "Transpose"},
}


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
            real = isinstance(value, Tensor) and value.is_floating_point()
            if real and not fits_fp16(value.detach().cpu().numpy()):
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
        if loses or (widened and _IN_FILE.get(n.target) in MOVES):
            self.wide.add(n)
        return loses or widened

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        quantizer = isinstance(self.fetch_attr(str(target)), ActivationQuantizer | WeightQuantizer)
        return super().call_module(target, _cast(args, torch.float32) if quantizer else args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        wide = _IN_FILE.get(target) in KEEPS_FLOAT32
        return super().call_function(target, _cast(args, torch.float32) if wide else args, kwargs)


class HalfNetwork(nn.Module):
    """A fake-quantized network whose float parts compute in FP16; scales and codes stay what they are."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs, float32, of images (B, C, H, W) float32; one is returned as it is."""
        outputs = tuple(output.float() for output in as_tuple(_Half(self.network).run(images)))
        return outputs if len(outputs) > 1 else outputs[0]
