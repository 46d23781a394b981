"""Lint on graphs of the forms that nvidia-modelopt writes, held to the real builder where it is installed."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from helpers import RTX
from onnx import TensorProto, helper, numpy_helper

import lint_difference as difference
from ospq_export.onnx.lint import lint, predict

RNG = np.random.default_rng(0)
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
FP16, FP32 = TensorProto.FLOAT16, TensorProto.FLOAT
SCALE = np.float32(0.05)
node = helper.make_node


def save(path, nodes, constants, shape, *, stale=(), listed=(), kind=FP32):
    """A graph from x of a shape to y.

    `stale`: tensors that the file calls float32 whatever they are; `listed`: constants that are among its inputs too.
    """
    tensors = {name: numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()}
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    inputs += [
        helper.make_tensor_value_info(name, tensors[name].data_type, tensors[name].dims) for name in listed
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", FP32, None)], list(tensors.values())
    )
    graph.value_info.extend(helper.make_tensor_value_info(name, FP32, None) for name in stale)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), str(path))
    return path


def pair():
    """Its Q and DQ: a zero point of shape [1] beside a scale of shape [], and ONNX's names in TensorRT's domain."""
    return [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], "Q", domain="trt", saturate=1),
        node("DequantizeLinear", ["q", "s"], ["a"], "DQ", domain="trt"),
    ]


def linear(path):
    """A linear layer in FP8 on (2, 8, 32)."""
    constants = {"s": SCALE, "z": np.zeros(1, E4M3), "w": RNG.normal(size=(32, 16)).astype(E4M3), "ws": SCALE}
    product = [
        node("DequantizeLinear", ["w", "ws"], ["d"], "W", domain="trt"),
        node("MatMul", ["a", "d"], ["y"], "product"),
    ]
    return save(path, [*pair(), *product], constants, [2, 8, 32])


def convolution(path, kernel, channels=3):
    """A convolution in FP8 on (1, channels, 40, 40)."""
    weight = RNG.normal(size=(16, channels, *kernel)).astype(E4M3)
    constants = {"s": SCALE, "z": np.zeros(1, E4M3), "w": weight, "ws": SCALE}
    product = [
        node("DequantizeLinear", ["w", "ws"], ["d"], "W"),
        node("Conv", ["a", "d"], ["y"], "product", kernel_shape=kernel),
    ]
    return save(path, [*pair(), *product], constants, [1, channels, 40, 40])


def four_bits(path, *, add=False, scale=np.float32):
    """A linear layer in NVFP4 on (2, 8, 64) whose Casts to float16 came late: the file says float32 behind them.

    `add`: its bias was left in float32. `scale`: of the dynamic quantization; what it reads is float32 in any case.
    """
    constants = {
        "xs": scale(0.01),
        "ts": np.float32([0.002]),
        "ws": RNG.uniform(100, 400, (32, 4)).astype(E4M3),
        "w": RNG.choice([-6, -1, 0.5, 4], size=(32, 64)).astype(E2M1),
        "bias": np.ones(32, np.float32),
    }
    attributes = {"axis": -1, "block_size": 16, "scale_type": TensorProto.FLOAT8E4M3FN}
    nodes = [
        node("Sin", ["x"], ["sine"], "sine"),
        node("Cast", ["sine"], ["half"], "half", to=FP16),
        node("Cast", ["half"], ["wide"], "wide", to=FP32),
        node("TRT_FP4DynamicQuantize", ["wide", "xs"], ["q", "qs"], "dynamic", domain="trt", **attributes),
        node("DequantizeLinear", ["qs", "xs"], ["qd"], "DQs"),
        node("DequantizeLinear", ["q", "qd"], ["a"], "DQ", axis=-1, block_size=16),
        node("Cast", ["a"], ["ac"], "a.cast", to=FP16),
        node("DequantizeLinear", ["ws", "ts"], ["wd"], "Ws"),
        node("DequantizeLinear", ["w", "wd"], ["d"], "W", axis=-1, block_size=16),
        node("Transpose", ["d"], ["t"], "turned", perm=[1, 0]),
        node("Cast", ["t"], ["tc"], "t.cast", to=FP16),
        node("MatMul", ["ac", "tc"], ["p"], "product"),
        *([node("Add", ["bias", "p"], ["b"], "bias.add")] if add else []),
        node("Cast", ["b" if add else "p"], ["y"], "y", to=FP32),
    ]
    stale = ("half", "p", "b") if add else ("half", "p")
    return save(path, nodes, constants, [2, 8, 64], stale=stale, listed=("w", "ws", "ts"))


def agree(path, target="SM120"):
    """What lint predicts, after the builder made the same of it."""
    prediction, outcome = predict(path), difference.observe(path, target)
    assert difference.difference(prediction, outcome) == "", (outcome, prediction)
    return prediction


KERNELS = {(4, 8): "fp8", (1, 32): "fp8", (3, 11): "float", (6, 6): "float", (14, 14): "float"}


def test_fp8_pairs(tmp_path):
    prediction = predict(linear(tmp_path / "m.onnx"))
    assert prediction.findings == () and prediction.products == {"product": "fp8"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_kernels_are_not_for_fp8(tmp_path, kernel):
    prediction = predict(convolution(tmp_path / "m.onnx", kernel))
    assert prediction.products == {"product": KERNELS[kernel]}
    (fix,) = {finding.fix for finding in prediction.findings} or {""}
    assert ("leave both operands float" in fix) == (KERNELS[kernel] == "float")


def test_types_left_behind_by_a_later_cast(tmp_path):
    prediction = predict(four_bits(tmp_path / "m.onnx"))
    assert prediction.findings == () and prediction.products == {"product": "fp4"}


def test_a_bias_left_behind_by_a_later_cast(tmp_path):
    findings = lint(four_bits(tmp_path / "m.onnx", add=True))
    assert [(finding.rule, finding.node) for finding in findings] == [("types-differ", "bias.add")]


def test_a_scale_in_float16_of_values_in_float32(tmp_path):
    findings = lint(four_bits(tmp_path / "m.onnx", scale=np.float16))
    assert ("dynamic-quantize", "dynamic") in {(finding.rule, finding.node) for finding in findings}


@RTX
@pytest.mark.parametrize("changes", [{}, {"add": True}, {"scale": np.float16}])
def test_the_builder_agrees_on_four_bits(tmp_path, changes):
    assert agree(four_bits(tmp_path / "m.onnx", **changes)).refused == bool(changes)


@RTX
def test_the_builder_multiplies_fp8_pairs(tmp_path):
    agree(linear(tmp_path / "m.onnx"), "SM89")


@RTX
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_builder_leaves_large_kernels_in_float(tmp_path, kernel):
    agree(convolution(tmp_path / "m.onnx", kernel), "SM89")
