"""Lint's prediction on what other tools write, held to the real builder: ONNX Runtime's quantizers and torch's exporter."""

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import lint_difference as difference
from ospq_export.onnx.lint import predict

pytestmark = pytest.mark.slow


class Small(torch.nn.Module):
    """A convolution, a pool and two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.one, self.two = (
            torch.nn.Conv2d(4, 8, 3),
            torch.nn.Linear(72, 16),
            torch.nn.Linear(16, 8),
        )

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.two(torch.relu(self.one(x.flatten(1))))


class FakeQuantized(torch.nn.Module):
    """A linear layer with fake-quantized input and weight."""

    def __init__(self, per_channel):
        super().__init__()
        torch.manual_seed(0)
        self.per_channel, self.weight = per_channel, torch.nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        x = torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)
        if self.per_channel:
            scale, zero = torch.full((8,), 0.02), torch.zeros(8, dtype=torch.int32)
            weight = torch.fake_quantize_per_channel_affine(self.weight, scale, zero, 0, -128, 127)
        else:
            weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.02, 0, -128, 127)
        return torch.nn.functional.linear(x, weight)


class Reader(CalibrationDataReader):
    """Four random images."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.batches = iter([{"x": rng.normal(size=(2, 4, 8, 8)).astype(np.float32)} for _ in range(4)])

    def get_next(self):
        return next(self.batches, None)


def exported(path, module, shape):
    torch.onnx.export(
        module.eval(), (torch.randn(*shape),), str(path), input_names=["x"], dynamo=False, opset_version=17
    )
    model = onnx.load(str(path))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node{index}"
    onnx.save(model, str(path))
    return path


def agree(path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    prediction, outcome = predict(path), difference.observe(path)
    shown = [finding.rule for finding in prediction.findings], outcome, prediction.products
    assert difference.difference(prediction, outcome) == "", shown
    return prediction


SETTINGS = {
    "symmetric": (
        {"activation_type": QuantType.QInt8, "extra_options": {"ActivationSymmetric": True}},
        False,
    ),
    "per_channel": (
        {
            "activation_type": QuantType.QInt8,
            "per_channel": True,
            "extra_options": {"ActivationSymmetric": True},
        },
        False,
    ),
    "float_bias": (
        {
            "activation_type": QuantType.QInt8,
            "extra_options": {"ActivationSymmetric": True, "QuantizeBias": False},
        },
        False,
    ),
    "asymmetric": ({"activation_type": QuantType.QInt8}, True),
    "uint8": ({"activation_type": QuantType.QUInt8}, True),
    "int16": ({"activation_type": QuantType.QInt16, "extra_options": {"UseQDQContribOps": True}}, True),
    "operators": ({"quant_format": QuantFormat.QOperator}, True),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_quantize_static(tmp_path, setting):
    options, refused = SETTINGS[setting]
    source = exported(tmp_path / "float.onnx", Small(), (2, 4, 8, 8))
    target = tmp_path / "static.onnx"
    quantize_static(str(source), str(target), Reader(), **{"weight_type": QuantType.QInt8, **options})
    prediction = agree(target)
    assert prediction.refused or not refused


def test_quantize_dynamic(tmp_path):
    source = exported(tmp_path / "float.onnx", Small(), (2, 4, 8, 8))
    quantize_dynamic(str(source), str(tmp_path / "dynamic.onnx"))
    assert agree(tmp_path / "dynamic.onnx").refused


@pytest.mark.parametrize("per_channel", [False, True])
def test_torch_exporter(tmp_path, per_channel):
    path = exported(tmp_path / "m.onnx", FakeQuantized(per_channel), (4, 16))
    assert set(agree(path).products.values()) == {"int8"}
