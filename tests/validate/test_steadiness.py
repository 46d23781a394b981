"""One image has one result: in every row of a batch, beside every other image, at every call."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ospq_export.tasks.choice import TASKS
from ospq_export.validate.executions.backends import OnnxRuntimeBackend
from ospq_export.validate.floor import FloorVariation, NoiseFloor
from ospq_export.validate.steadiness import steadiness, steady_criteria

ROWS = 4


def ordered(rows):
    """Nodes that exchange rows of a batch."""
    index = numpy_helper.from_array(np.array(rows, np.int64), "rows")
    return [helper.make_node("Gather", ["y", "rows"], ["logits"], axis=0)], [index]


def companions():
    """Nodes by which each row depends on the whole batch."""
    nodes = [
        helper.make_node("ReduceMean", ["y", "axis"], ["m"], keepdims=1),
        helper.make_node("Add", ["y", "m"], ["logits"]),
    ]
    return nodes, [numpy_helper.from_array(np.array([0], np.int64), "axis")]


def last_row_off():
    """Nodes that change one row of a batch, whatever it holds."""
    factor = np.ones((ROWS, 1), np.float32)
    factor[-1] = 1.1
    return [helper.make_node("Mul", ["y", "factor"], ["logits"])], [numpy_helper.from_array(factor, "factor")]


def other_every_time():
    nodes = [
        helper.make_node("RandomNormalLike", ["y"], ["noise"], scale=0.5),
        helper.make_node("Add", ["y", "noise"], ["logits"]),
    ]
    return nodes, []


def plain():
    return [helper.make_node("Identity", ["y"], ["logits"])], []


def opened(path, nodes, constants):
    """A fixed batch of four through a projection, and what the given nodes make of it."""
    weight = np.random.default_rng(0).normal(size=(3 * 8 * 8, 5)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
            *nodes,
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [ROWS, 5])],
        [numpy_helper.from_array(weight, "w"), *constants],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return OnnxRuntimeBackend("deployed", path, optimize=True)


def judged(path, nodes, constants, task="classify", reach=0.01):
    measured = TASKS[task].measure([], None)
    images = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)
    found = steadiness(opened(path, nodes, constants), images, measured.vary)
    noise = {} if task == "classify" else {"logits": {"mean": 1e-4, "largest": 1e-3}}
    moved = {"flips": 0, "mean_logit_difference": reach / 2, "margin_change": reach, "errors": noise}
    floor = NoiseFloor(variations=[FloorVariation(name="v", reference="r", images=100, **moved)])
    criteria = steady_criteria([found], {"deployed": "r"}, floor)
    return found, {c.name: c for c in criteria}, steady_criteria([found], {"deployed": "r"}, None)


@pytest.mark.parametrize("task", ["classify", "tensors"])
@pytest.mark.parametrize(
    ("fault", "missed", "said"),
    [
        (ordered([1, 0, 2, 3]), "rows", "row 0 holds row 1's, row 1 holds row 0's"),
        (ordered([0, 1, 2, 2]), "rows", "row 3 holds row 2's"),
        (companions(), "rows", "gives an image outputs"),
        (last_row_off(), "rows", "row 3 of a batch of 4 gives an image outputs"),
        (other_every_time(), "repeats", "when the batch is run again"),
    ],
)
def test_faults_are_found_and_placed(tmp_path, task, fault, missed, said):
    _, criteria, unmeasured = judged(tmp_path / "m.onnx", *fault, task=task)
    assert criteria[missed].outcome == "missed" and said in criteria[missed].text
    assert missed not in {c.name for c in unmeasured}, "what noise allows is not known then"


def test_a_network_that_keeps_rows_apart_is_steady(tmp_path):
    found, criteria, unmeasured = judged(tmp_path / "m.onnx", *plain())
    assert found.rows.error == found.companions.error == found.repeats.error == 0 and not found.misplaced
    assert {name: c.outcome for name, c in criteria.items()} == {"rows": "met", "repeats": "met"}
    assert [c.outcome for c in unmeasured] == ["met", "met"]


def test_noise_is_allowed(tmp_path):
    found, criteria, _ = judged(tmp_path / "m.onnx", *last_row_off(), reach=1e3)
    assert found.rows.row == ROWS - 1 and found.rows.error == pytest.approx(0.1, rel=1e-3)
    assert criteria["rows"].outcome == "met" and "within the noise" in criteria["rows"].text
