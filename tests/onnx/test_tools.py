"""Our files under other people's tools, as docs/tools.md has it; and what the files say of their tensors."""

import importlib.util
from collections import Counter

import numpy as np
import onnx
import pytest
import tools
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference

from ospq_export.onnx.names import describe_inner_only, hide_outputs
from ospq_export.onnx.write import write_onnx


@pytest.mark.slow
@pytest.mark.parametrize("file", tools.FILES)
@pytest.mark.parametrize("name", tools.TOOLS)
def test_tool_takes_file(name, file, every_file, tmp_path):
    tool = tools.TOOLS[name]
    if importlib.util.find_spec(tool.module) is None:
        pytest.skip(f"{tool.module} is not installed")
    row = tools.try_tool(name, every_file / file, tmp_path)
    moved = row.get("difference", 0.0)
    if file in tools.NOT_MEANT.get(name, {}):
        assert row["outcome"] == "error" or moved > tools.TOLERANCE, "the table says that this does not work"
        return
    assert row["outcome"] == "ok", row.get("detail")
    exact = tool.promise == tools.SAME or (name == "onnx.reference" and file not in tools.HALVES)
    assert moved <= (tools.TOLERANCE if exact else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("file", tools.FILES)
def test_inner_tensors_are_described_once_and_nothing_else(file, every_file):
    model = onnx.load(str(every_file / file))
    graph = model.graph
    computed = {name for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    described = {value.name: value.type.tensor_type for value in graph.value_info}
    assert set(described) == computed - outputs
    assert len(graph.value_info) == len(described)
    constants = {tensor.name for tensor in graph.initializer}
    read = {name for node in graph.node for name in node.input}
    assert constants <= read and not constants & {value.name for value in graph.input}
    assert all(node.name for node in graph.node)
    assert max(Counter(node.name for node in graph.node).values()) == 1
    # By inference without the descriptions: no stale type, no stale rank.
    del graph.value_info[:]
    for value in shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph.value_info:
        found, told = value.type.tensor_type, described[value.name]
        assert told.elem_type == found.elem_type, value.name
        assert told.HasField("shape"), value.name
        dims = [(a.dim_value, b.dim_value) for a, b in zip(told.shape.dim, found.shape.dim, strict=True)]
        assert all(a == b or 0 in (a, b) for a, b in dims), value.name


def test_only_inner_tensors_stay_described():
    infos = {
        n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("x", "w", "h", "y", "gone")
    }
    nodes = [helper.make_node("Add", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    twice = helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n"])
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [infos["x"]],
            [infos["y"]],
            [numpy_helper.from_array(np.zeros(2, np.float32), "w")],
            value_info=[infos["gone"], infos["w"], infos["h"], twice, infos["x"], infos["y"]],
        )
    )
    describe_inner_only(model)
    assert list(model.graph.value_info) == [infos["h"]]


def test_hidden_outputs_are_inner_tensors(tmp_path):
    """onnx_ir's `del outputs[1:]` leaves values that take themselves for outputs, and are described nowhere."""

    class Two(torch.nn.Module):
        def forward(self, x):
            probe = torch.relu(x)
            return probe.mean(dim=(2, 3)), probe

    path = tmp_path / "m.onnx"
    graph = torch.fx.symbolic_trace(Two())
    write_onnx(graph, path, input_size=(3, 4, 4), batch_size=None, metadata={}, probes=["probe"])
    model = onnx.load(str(path))
    assert [value.name for value in model.graph.output] == ["logits"]
    assert "probe" in {value.name for value in model.graph.value_info}


def test_hide_outputs_keeps_the_first():
    import onnx_ir as ir

    values = [ir.Value(name=str(index)) for index in range(4)]
    model = ir.Model(ir.Graph([], values, nodes=[], opset_imports={"": 20}), ir_version=10)
    hide_outputs(model, 2)
    assert [value.name for value in model.graph.outputs] == ["0", "1"]
    assert [value.is_graph_output() for value in values] == [True, True, False, False]


@pytest.mark.slow
def test_input_of_another_size(every_file, tmp_path):
    """What users do first with others' files: a fixed batch, and shapes inferred again."""
    model = onnx.load(str(every_file / "model.onnx"))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    del model.graph.value_info[:]
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.save(inferred, str(tmp_path / "three.onnx"))
    feed = {"images": np.random.default_rng(0).standard_normal((3, 1, 28, 28), dtype=np.float32)}
    changed = tools.execute(tmp_path / "three.onnx", feed)
    assert tools.difference(tools.execute(every_file / "model.onnx", feed), changed) == 0
