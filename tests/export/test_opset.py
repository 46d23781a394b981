"""Files in older opsets: the same codes and outputs, operators that TensorRT 8.6 knows, refusals before any work."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from helpers import tiny
from onnx import TensorProto, helper, numpy_helper

from ospq_export.calibrate.observe import observe
from ospq_export.cli import main
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.export.jobs import Extras
from ospq_export.export.lower.graph import lower, probe_names
from ospq_export.export.opset import check_opset
from ospq_export.formats.choice import integers, named
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.onnx.lint import Severity, lint
from ospq_export.onnx.opset import for_older_parsers, to_lowest
from ospq_export.onnx.write import OPSET, write_onnx
from ospq_export.runs.run import Run
from ospq_export.validate import validate


class Files:
    """A network at W8A8 in several opsets, with every quantizer's codes among its outputs."""

    def __init__(self, module, images, folder):
        self.network, self.images, self.folder = insert_quantizers(module, integers(8, 8)), images, folder
        observe(self.network, images, batch_size=16, seed=0)
        self.network.set_mode(Mode.QUANTIZE)
        self.probes = probe_names(self.network, [])

    def path(self, opset):
        path = self.folder / f"{opset}.onnx"
        if not path.exists():
            options = {"input_size": tuple(self.images.shape[1:]), "batch_size": None, "metadata": {}}
            probes = {"probes": list(self.probes.values()), "expose_probes": True}
            write_onnx(lower(self.network, self.probes), path, opset=opset, **options, **probes)
            onnx.checker.check_model(str(path), full_check=True)
        return path

    def outputs(self, opset):
        """What ONNX Runtime computes, by name."""
        session = onnxruntime.InferenceSession(str(self.path(opset)), providers=["CPUExecutionProvider"])
        outputs = session.run(None, {"images": self.images.numpy()})
        return {value.name: out for value, out in zip(session.get_outputs(), outputs, strict=True)}


@pytest.fixture(scope="module")
def transformer(small_vit, noise, tmp_path_factory):
    return Files(small_vit, noise, tmp_path_factory.mktemp("transformer"))


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1)]
    pooled = [torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5)]
    images = torch.randn(32, 3, 16, 16)
    module = capture(torch.nn.Sequential(*layers, *pooled).eval(), (3, 16, 16))
    return Files(module, images, tmp_path_factory.mktemp("convolutions"))


@pytest.mark.parametrize(("opset", "ir"), [(17, 8), (19, 9)])
def test_a_transformer_computes_the_same_codes(transformer, opset, ir):
    """Gelu is written out below 20: its last bits differ, and a code where that lies on a rounding edge."""
    expected, got = transformer.outputs(OPSET), transformer.outputs(opset)
    model = onnx.load(str(transformer.path(opset)))
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir)
    assert "Gelu" not in {node.op_type for node in model.graph.node}
    assert got.keys() == expected.keys() and len(got) > 15
    codes = [name for name in got if name.endswith(".codes")]
    apart = [np.abs(got[name].astype(int) - expected[name]) for name in codes]
    assert max(d.max() for d in apart) <= 1
    assert sum((d > 0).sum() for d in apart) <= 1e-4 * sum(d.size for d in apart)
    scale = np.abs(expected["logits"]).max()
    assert np.abs(got["logits"] - expected["logits"]).max() < 0.02 * scale
    # Up to the first Gelu the operators are the same.
    for name in codes[:5]:
        np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize("opset", [17, 18, 19])
def test_a_convolutional_network_is_the_same_to_the_last_bit(convolutions, opset):
    got = convolutions.outputs(opset)
    for name, values in convolutions.outputs(OPSET).items():
        np.testing.assert_array_equal(got[name], values)


@pytest.mark.parametrize(
    ("opset", "release"), [(17, "tensorrt-8.6"), (19, "tensorrt-10.3"), (20, "tensorrt-11")]
)
def test_our_files_fit_the_releases(transformer, convolutions, opset, release):
    for files in (transformer, convolutions):
        found = lint(files.path(opset), (), release)
        assert [f for f in found if f.severity is Severity.ERROR] == []


# Operators that 18 has in another form than 17, or 17 and TensorRT 8.6 not at all.
X = np.random.default_rng(0).normal(size=(2, 5, 6, 6)).astype(np.float32)


def graph_of(*nodes, constants=(), outputs=1, opset=18):
    values = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()]
    graph = helper.make_graph(list(nodes), "g", [x], values, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def node(op, inputs, outputs="y0", **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), name=op, **attributes)


SIZES = {"empty": np.zeros(0, np.float32), "sizes": np.array([2, 5, 12, 12])}
FORMS = {
    "axes": (graph_of(node("ReduceMean", "x axes"), constants={"axes": [1, -1]}), "ReduceMean"),
    "axes as a Constant": (
        graph_of(node("Constant", "", "axes", value_ints=[2]), node("ReduceMax", "x axes", keepdims=0)),
        "ReduceMax",
    ),
    "no axes": (graph_of(node("ReduceL2", "x")), "ReduceL2"),
    "equal parts": (graph_of(node("Split", "x", "y0 y1", axis=2, num_outputs=2), outputs=2), "Split"),
    "unequal parts": (graph_of(node("Split", "x", "y0 y1", axis=1, num_outputs=2), outputs=2), "Split"),
    "CastLike": (graph_of(node("CastLike", "one x"), constants={"one": np.int32(1)}), "Cast"),
    "a part of a Shape": (
        graph_of(node("Shape", "x", "some", start=1, end=-1), node("Cast", "some", to=1)),
        "Slice",
    ),
    "the end of a Shape": (
        graph_of(node("Shape", "x", "some", start=2), node("Cast", "some", to=1)),
        "Slice",
    ),
    "Mish": (graph_of(node("Mish", "x")), "Mul"),
    "Resize": (
        graph_of(
            node("Resize", "x empty empty sizes", mode="linear", keep_aspect_ratio_policy="stretch"),
            constants=SIZES,
        ),
        "Resize",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_operators_of_18_in_17(form):
    newer, operator = FORMS[form]
    model = onnx_ir.from_proto(newer)
    to_lowest(model)
    for_older_parsers(model)
    older = onnx_ir.to_proto(model)
    assert older.opset_import[0].version == 17 and operator in {n.op_type for n in older.graph.node}
    assert not any(n.attribute for n in older.graph.node if n.op_type == "Shape")
    onnx.checker.check_model(older, full_check=True)
    expected, got = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"x": X}
        )
        for m in (newer, older)
    )
    for before, after in zip(expected, got, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "constants", "problem"),
    [
        ([node("Resize", "x empty empty sizes", mode="linear", antialias=1)], SIZES, "Resize with antialias"),
        ([node("Pad", "x pads empty axes")], {"pads": [1, 1], "empty": np.float32(0), "axes": [3]}, "Pad"),
        ([node("Col2Im", "x size size")], {"size": [2, 2]}, "Col2Im"),
    ],
)
def test_what_17_lacks_is_refused(nodes, constants, problem):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(InputError, match=f"{problem}.*from opset 18 on"):
        to_lowest(onnx_ir.from_proto(model))


def with_formats(*names):
    formats = {f"layer.{name}": named(name, weight=True) for name in names}
    return SimpleNamespace(manifest=SimpleNamespace(formats=lambda: formats))


@pytest.mark.parametrize(
    ("formats", "extras", "opset", "problem"),
    [
        (["int8"], {}, 16, "no file of this run is written in it.*give 17 to 20"),
        (["int8"], {}, 21, "give 17 to 20"),
        (["int8", "fp8"], {}, 18, "layer.fp8 is fp8, .* from opset 19 on"),
        (["fp8", "nvfp4"], {}, 20, "layer.nvfp4 is nvfp4, .* from opset 23 on.*give 23 to 23"),
        (["int8"], {"fp16": True}, 18, "Q and DQ are float32 below opset 19"),
        (["int4"], {"int4": True}, 20, "INT4 came with opset 21"),
    ],
)
def test_opsets_that_are_refused(formats, extras, opset, problem):
    with pytest.raises(InputError, match=problem):
        check_opset(with_formats(*formats), Extras(**extras), opset)


@pytest.mark.parametrize(
    ("name", "opset"), [("int8", 17), ("int8", 20), ("fp8", 19), ("nvfp4", 23), ("int4", None)]
)
def test_opsets_that_are_taken(name, opset):
    check_opset(with_formats(name), Extras(fp16=opset != 17), opset)


def test_the_command_writes_one_and_refuses_before_any_work(tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["ospq-export", "export", str(run), *arguments, "--quiet"])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0

    run = tmp_path / "run"
    tiny(run, recipe="w8a8")
    before = sorted(path.name for path in run.iterdir())
    assert command("--opset", "18", "--fp16") == 2
    error = capsys.readouterr().err.strip()
    assert "leave --fp16 out" in error and len(error.splitlines()) == 1
    assert sorted(path.name for path in run.iterdir()) == before
    assert command("--opset", "17", "--uint8-input") == 0
    for name in ("model.onnx", "model_fp32.onnx", "model_uint8.onnx"):
        assert onnx.load(str(run / name)).opset_import[0].version == 17
        assert not [f for f in lint(run / name, (), "tensorrt-8.6") if f.severity is Severity.ERROR]


@pytest.mark.slow
def test_a_run_in_opset_17_validates(run_copy, tmp_path):
    from ospq_export.demo import demo_images

    run = tmp_path / "old"
    shutil.copytree(run_copy, run)
    export(run, opset=17, overwrite=True)
    opened = Run.open(run)
    images = demo_images("test", opened.manifest.data)
    report = validate(opened, images, backends=["onnxruntime"], limit=64, code_images=8, floor_images=64)
    (located,) = report.locations
    assert located.faults == [] and located.quantizers
    assert report.verdict.exit_status != 1, report.verdict.text
