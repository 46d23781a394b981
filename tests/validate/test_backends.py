"""Executions: ONNX Runtime on small hand-made files, torch, and what is refused."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ospq_export.errors import InputError
from ospq_export.validate.executions.backends import OnnxRuntimeBackend, TorchBackend

WEIGHT = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


def save(path, batch):
    """A linear classifier on (batch, 3, 2, 2)."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def images(count, channels=3):
    return np.random.default_rng(1).normal(size=(count, channels, 2, 2)).astype(np.float32)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("batch", ["n", 4])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_onnx_runtime_against_numpy(tmp_path, optimize, batch, count):
    backend = OnnxRuntimeBackend("x", save(tmp_path / "m.onnx", batch), optimize=optimize, threads=1)
    x = images(count)
    np.testing.assert_allclose(backend(x), x.reshape(count, 12) @ WEIGHT, rtol=1e-5, atol=1e-6)
    assert backend.detail["provider"] == "CPUExecutionProvider"
    assert backend.detail["optimisations"] == ("all" if optimize else "off")


def test_images_of_another_shape(tmp_path):
    backend = OnnxRuntimeBackend("x", save(tmp_path / "m.onnx", "n"), optimize=True)
    with pytest.raises(InputError, match=r"\[3, 2, 2\].*\[1, 2, 2\]"):
        backend(images(2, channels=1))


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_truncated_file(tmp_path, keep):
    path = save(tmp_path / "m.onnx", "n")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot load the file") as info:
        OnnxRuntimeBackend("x", path, optimize=True)
    assert "\n" not in str(info.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot load the file"):
        OnnxRuntimeBackend("x", tmp_path / "none.onnx", optimize=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_missing_or_falls_back(tmp_path, provider):
    assert "CPUExecutionProvider" in onnxruntime.get_available_providers()
    with pytest.raises(InputError, match=f"provider '{provider}'"):
        OnnxRuntimeBackend("x", save(tmp_path / "m.onnx", "n"), optimize=True, provider=provider)


def test_torch():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5, bias=False))
    module[1].weight.data = torch.from_numpy(WEIGHT.T.copy())
    x = images(3)
    np.testing.assert_allclose(TorchBackend("t", module)(x), x.reshape(3, 12) @ WEIGHT, rtol=1e-5, atol=1e-6)
