"""Reading ONNX files of any size: external data and what can be wrong with it, shapes without the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ospq_export.errors import InputError
from ospq_export.onnx import read
from ospq_export.onnx.lint import lint
from ospq_export.onnx.read import read_model, values
from ospq_export.onnx.shapes import hollow, infer_shapes
from ospq_export.onnx.view import OnnxGraph
from ospq_export.validate.executions.probes import read_proto

WIDE = 300


def weights() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "codes": rng.integers(-128, 128, (WIDE, WIDE), dtype=np.int8).repeat(4, 1),
        "weight_scale": np.full(4 * WIDE, 0.5, np.float32),
        "weight_zero": np.zeros(4 * WIDE, np.int8),
        "bias": rng.normal(size=(4 * WIDE)).astype(np.float32),
    }


def product(in_constant: str = "", in_branch: bool = False) -> onnx.ModelProto:
    """An int8 linear layer of 360 kB; its bias may be a Constant node, and added in both branches of an If."""
    constants = weights()
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="Q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"], name="DQ"),
        helper.make_node(
            "DequantizeLinear", ["codes", "weight_scale", "weight_zero"], ["w"], name="W", axis=1
        ),
        helper.make_node("MatMul", ["a", "w"], ["p"], name="MatMul"),
    ]
    if in_constant:
        tensor = numpy_helper.from_array(constants.pop(in_constant), in_constant)
        nodes.insert(0, helper.make_node("Constant", [], [in_constant], value=tensor))
    if in_branch:
        large = numpy_helper.from_array(np.ones((1, 80 * WIDE, 4), np.float32), "inner")
        shape = numpy_helper.from_array(np.array([-1, 4 * WIDE]), "shape")
        branch = helper.make_graph(
            [
                helper.make_node("ReduceSum", ["inner"], ["sum"], keepdims=0),
                helper.make_node("Add", ["p", "sum"], ["b"]),
                helper.make_node("Reshape", ["b", "shape"], ["r"]),
            ],
            "branch",
            [],
            [helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n", 4 * WIDE])],
            [large, shape],
        )
        constants["yes"] = np.array(True)
        nodes.append(helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch))
    else:
        nodes.append(helper.make_node("Add", ["p", "bias"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4 * WIDE])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def external(path: Path, model: onnx.ModelProto, **options: Any) -> Path:
    onnx.save_model(
        model, str(path), save_as_external_data=True, location="w.bin", size_threshold=0, **options
    )
    return path


def test_large_constants_stay_in_their_file_and_small_ones_are_read(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", product())
    model = read_model(path)
    there = {t.name: t for t in model.graph.initializer}
    assert [name for name, t in there.items() if read.is_external(t)] == ["codes"]
    for name, expected in weights().items():
        assert np.array_equal(values(there[name], tmp_path), expected), name
    assert read.is_external(there["codes"]), "asking for values does not put them into the model"
    graph = OnnxGraph(model, path)
    assert graph.shapes["w"] == [WIDE, 4 * WIDE] and graph.shapes["y"][1] == 4 * WIDE
    assert np.array_equal(graph.array("codes"), weights()["codes"])


@pytest.mark.parametrize("options", [{"in_constant": "codes"}, {"in_branch": True}, {}])
def test_the_same_findings_and_shapes_wherever_the_weights_lie(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = product(**options)
    whole = tmp_path / "whole.onnx"
    onnx.save_model(model, str(whole))
    beside = external(tmp_path / "beside.onnx", model, convert_attribute=True)
    assert beside.stat().st_size < 10_000
    assert lint(whole) == lint(beside)
    expected = {v.name: v.type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    assert expected
    for path in (whole, beside):
        inferred = infer_shapes(read_model(path))
        assert {v.name: v.type for v in inferred.graph.value_info} == expected
        assert inferred.ByteSize() < 20_000, "no large value is copied"


def test_a_hollow_copy_leaves_the_model_alone() -> None:
    model = product(in_branch=True)
    before = model.SerializeToString()
    emptied = hollow(model)
    assert model.SerializeToString() == before
    small = [t.name for t in emptied.graph.initializer if not read.is_external(t)]
    assert set(small) == set(weights()) - {"codes"} | {"yes"}
    inner = emptied.graph.node[-1].attribute[0].g.initializer
    assert [read.is_external(t) for t in inner] == [True, False]
    assert [n.op_type for n in emptied.graph.node] == [n.op_type for n in model.graph.node]
    assert emptied.opset_import == model.opset_import and emptied.ir_version == model.ir_version


def test_four_bit_codes_outside(tmp_path: Path) -> None:
    model = product()
    codes = (weights()["codes"] // 16).astype(ml_dtypes.int4)
    for tensor in model.graph.initializer:
        if tensor.name in ("codes", "weight_zero"):
            array = codes if tensor.name == "codes" else np.zeros(4 * WIDE, ml_dtypes.int4)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    model.opset_import[0].version = 21
    path = external(tmp_path / "m.onnx", model)
    read = OnnxGraph(read_model(path), path)
    assert np.array_equal(read.array("codes").astype(np.int8), codes.astype(np.int8))


def shortened(path: Path) -> None:
    data = path.parent / "w.bin"
    data.write_bytes(data.read_bytes()[:-5])


def missing(path: Path) -> None:
    (path.parent / "w.bin").unlink()


def entry(key: str, value: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        model = onnx.load(str(path), load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == "codes")
        next(e for e in tensor.external_data if e.key == key).value = value
        onnx.save_model(model, str(path))

    return change


def another(path: Path) -> None:
    model = onnx.load(str(path), load_external_data=False)
    model.metadata_props.add(key=read.DATA_SHA256, value="0" * 64)
    onnx.save_model(model, str(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, r"the external data w\.bin cannot be read: No such file"),
        (shortened, r"the external data w\.bin has [\d,]+ bytes, bias ends at"),
        (another, r"the external data w\.bin is not the one"),
        (entry("location", "/etc/passwd"), "outside of the file's folder"),
        (entry("location", "../w.bin"), "outside of the file's folder"),
        (entry("offset", "99999999"), "codes ends at"),
        (entry("offset", "-1"), "external data is 360,000 at -1"),
        (entry("length", "7"), "codes has 360,000 bytes, its external data is 7"),
        (entry("length", "x"), "external data cannot be read: invalid literal"),
    ],
)
def test_bad_external_data(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = external(tmp_path / "m.onnx", product())
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        lint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_is_no_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    for content in (b"", b"not a model", product().SerializeToString()[:-9]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a valid ONNX file"):
            read_model(path)
    with pytest.raises(InputError, match="a directory, not an ONNX file"):
        read_model(tmp_path)
    onnx.save_model(product(), str(path))
    monkeypatch.setattr(read, "PROTOBUF_BYTES", 100_000)
    with pytest.raises(InputError, match="one protobuf message holds 2"):
        read_model(path)


@pytest.mark.parametrize("change", ["producer_name", "graph.name", "node", "initializer", "location"])
def test_text_that_is_not_utf8(tmp_path: Path, change: str) -> None:
    model, path = product(), tmp_path / "model.onnx"
    place = "@@@@@@"
    if change == "location":
        external(path, model)
        place = "w.bin"
    else:
        held = {
            "graph.name": model.graph,
            "node": model.graph.node[0],
            "initializer": model.graph.initializer[0],
        }
        setattr(held.get(change, model), "producer_name" if change == "producer_name" else "name", place)
        onnx.save(model, str(path))
    path.write_bytes(path.read_bytes().replace(place.encode(), b"\x9a" * len(place)))
    for read_file in (read_model, read_proto):
        with pytest.raises(InputError, match=r"not a valid ONNX file|not readable"):
            read_file(path)


def test_text_forms(tmp_path: Path) -> None:
    path = tmp_path / "m.onnxtxt"
    onnx.save_model(product(), str(path))
    assert len(read_model(path).graph.node) == 5
