"""What a reader has to know before reading the figures: float files that are no baseline."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ospq_export.validate.executions.backends import OnnxRuntimeBackend, TorchBackend
from ospq_export.validate.executions.table import FLOAT
from ospq_export.validate.findings import baseline_findings


def opened(path, name, weight):
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return OnnxRuntimeBackend(name, path, optimize=True)


@pytest.mark.parametrize(
    ("off", "said"), [(1.2, "20 % off the float network"), (np.nan, "not finite"), (1.001, "")]
)
def test_a_broken_float_file_is_no_baseline(tmp_path, off, said):
    rng = np.random.default_rng(0)
    weight, images = (rng.normal(size=size).astype(np.float32) for size in ((192, 5), (4, 3, 8, 8)))
    linear = torch.nn.Linear(192, 5, bias=False)
    linear.weight.data = torch.from_numpy(weight.T.copy())
    original = TorchBackend(FLOAT, torch.nn.Sequential(torch.nn.Flatten(), linear))
    right = opened(tmp_path / "model_fp32.onnx", "onnxruntime-fp32", weight)
    other = opened(tmp_path / "model_fp16.onnx", "onnxruntime-fp16", weight * np.float32(off))
    deployed = opened(tmp_path / "model.onnx", "onnxruntime", weight * 3)
    found = baseline_findings([original, right, other, deployed], images)
    assert [
        said in line and "onnxruntime-fp16 is no baseline: model_fp16.onnx" in line for line in found
    ] == [True] * bool(said)
    assert baseline_findings([right, other], images) == [] == baseline_findings([original, other], None)
