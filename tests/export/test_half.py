"""FP16 around the quantized operators, and BF16 where the calibration saw values that FP16 lacks."""

import logging
import shutil

import helpers as q
import numpy as np
import onnx
import onnx_ir
import pytest
from helpers import RTX, SETTINGS
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ospq_export.engines.record import build_engine
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.export.jobs import Extras
from ospq_export.onnx.half import to_brain, to_half
from ospq_export.runs.files import BRAIN_ONNX, HALF_ONNX, QUANTIZED_BRAIN_ONNX, QUANTIZED_HALF_ONNX
from ospq_export.runs.manifest import read_manifest, write_manifest
from ospq_export.validate.executions.chosen import open_executions
from ospq_export.validate.executions.table import QDQ_FP16

WIDE = 5e4


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A short run; do not change it."""
    return q.tiny(tmp_path_factory.mktemp("half") / "run", recipe="w8a8").path


@pytest.fixture(scope="module")
def wide(calibrated, tmp_path_factory):
    """The run as if a tensor had reached a value that leaves FP16 no headroom, exported, and what was said of it."""
    folder = shutil.copytree(calibrated, tmp_path_factory.mktemp("wide") / "run")
    manifest = read_manifest(folder)
    first, *rest = manifest.profile
    profile = [first.model_copy(update={"largest": WIDE}), *rest]
    write_manifest(folder, manifest.model_copy(update={"profile": profile}))
    said, handler, logger = [], logging.Handler(), logging.getLogger("ospq_export")
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    run = export(folder, extras=Extras(fp16=True)).run
    logger.removeHandler(handler)
    return run, " ".join(said)


def kinds(path):
    return {t.data_type for t in onnx.load(path).graph.initializer}


def test_the_largest_values_are_recorded(calibrated):
    assert all(0 < record.largest < 1e3 for record in read_manifest(calibrated).profile)


def test_values_that_fp16_holds_stay_fp16(calibrated, tmp_path):
    folder = shutil.copytree(calibrated, tmp_path / "run")
    written = export(folder, extras=Extras(fp16=True)).run.manifest.files
    assert {HALF_ONNX, QUANTIZED_HALF_ONNX} <= written.keys() and BRAIN_ONNX not in written
    assert TensorProto.FLOAT16 in kinds(folder / HALF_ONNX)


def test_values_that_fp16_lacks_get_bf16(wide):
    run, said = wide
    assert {BRAIN_ONNX, QUANTIZED_BRAIN_ONNX} <= run.manifest.files.keys()
    assert not {HALF_ONNX, QUANTIZED_HALF_ONNX} & run.manifest.files.keys()
    assert "values reach 5e+04" in said and "FP16 ends at 65504" in said
    for name in (BRAIN_ONNX, QUANTIZED_BRAIN_ONNX):
        assert TensorProto.BFLOAT16 in kinds(run.path / name) and TensorProto.FLOAT16 not in kinds(
            run.path / name
        )
        assert {p.key: p.value for p in onnx.load(run.path / name).metadata_props}["precision"] == "bfloat16"
    single, brain = onnx.load(run.path / "model.onnx"), onnx.load(run.path / QUANTIZED_BRAIN_ONNX)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in brain.graph.initializer}
    codes = [t for t in single.graph.initializer if t.name.endswith(".codes")]
    assert codes
    for tensor in codes:
        np.testing.assert_array_equal(held[tensor.name], onnx.numpy_helper.to_array(tensor))
    with pytest.raises(InputError, match=r"has model_qdq_bf16.onnx instead.*overflow FP16"):
        open_executions(run, [QDQ_FP16], "cpu", "fp32")


@RTX
@pytest.mark.slow
def test_an_engine_of_bf16(wide, tmp_path):
    fusion = build_engine(wide[0].path / QUANTIZED_BRAIN_ONNX, tmp_path / "m.engine", SETTINGS).fusion
    assert fusion.gemms == fusion.quantized_gemms and fusion.fused_attentions == fusion.attentions > 0


@pytest.mark.parametrize("change", [to_half, to_brain])
@pytest.mark.parametrize(
    "source",
    [
        helper.make_node("ConstantOfShape", ["shape"], ["made"]),
        helper.make_node(
            "ConstantOfShape", ["shape"], ["made"], value=numpy_helper.from_array(np.float32([0.5]))
        ),
        helper.make_node("EyeLike", ["like"], ["made"], dtype=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["made"], value_floats=[0.5, 0.25]),
    ],
    ids=["zeros", "halves", "eye", "floats"],
)
def test_real_numbers_that_an_operator_makes(source, change):
    """Their type is the operator's own, and the file has to say the same."""
    graph = helper.make_graph(
        [source, helper.make_node("Add", ["x", "made"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        [
            numpy_helper.from_array(np.int64([2, 2]), "shape"),
            numpy_helper.from_array(np.zeros((2, 2), np.int32), "like"),
        ],
    )
    plain = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )
    model = onnx_ir.from_proto(plain)
    change(model)
    changed = onnx_ir.to_proto(model)
    onnx.checker.check_model(changed, full_check=True)
    x = np.float32([[1, 2], [3, 4]])
    run = [ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (plain, changed)]
    np.testing.assert_array_equal(*run)
