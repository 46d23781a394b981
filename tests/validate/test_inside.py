"""An engine's own inner tensors: what is built to return them, and what is found in them."""

import onnx
import pytest
import torch
from onnx import helper
from test_faults import SLICE, plant, scale_off_by_two_percent, weight_off_by_one

from ospq_export.demo import demo_images
from ospq_export.engines.build import BuildSettings, build
from ospq_export.engines.products import Product
from ospq_export.errors import InputError
from ospq_export.runs.run import Run
from ospq_export.validate import validate
from ospq_export.validate.codes.locate import Locator, Reference
from ospq_export.validate.codes.records import Location
from ospq_export.validate.executions.inside import open_inside, probed_by
from ospq_export.validate.executions.probes import OPENED, inner_tensors, read_proto
from ospq_export.validate.findings import engine_findings
from ospq_export.validate.verdict import Criterion


def located(folder, tmp_path):
    """What is found in a file that runs in the place of an engine, behind the same interface of Polygraphy's."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    run, file = Run.open(folder), folder / "model.onnx"
    reference, proto = Reference.of(run), read_proto(file)
    inner = inner_tensors(proto, file, reference.wanted)
    for name, kind in inner.present.items():
        proto.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    onnx.save(proto, tmp_path / "opened.onnx")
    with OnnxrtRunner(SessionFromOnnx(str(tmp_path / "opened.onnx"))) as runner:
        locator = Locator(reference, probed_by(runner, inner), f"tensorrt{OPENED}")
        for batch in demo_images("test", run.manifest.data).batches(4, range(4), 0):
            locator.add_all(batch.images.numpy())
    return locator.result()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_a_planted_fault_is_placed(finished_runs, tmp_path, recipe):
    import shutil

    folder = shutil.copytree(finished_runs[recipe], tmp_path / "run")
    found = located(folder, tmp_path)
    assert found.faults == [] and found.unknown == [] and len(found.quantizers) > 30
    fault = scale_off_by_two_percent if recipe == "w8a8" else weight_off_by_one
    plant(folder, fault)
    assert located(folder, tmp_path).first_diverging == SLICE


@pytest.mark.slow
def test_a_second_engine_returns_what_is_inside(finished_runs):
    """The builder takes codes and ends of slices as outputs, and keeps them in the plan."""
    run = Run.open(finished_runs["w8a8"])
    file = run.path / "model.onnx"
    inner = inner_tensors(read_proto(file), file, Reference.of(run).wanted)
    settings = BuildSettings(Product.TENSORRT_RTX, (1, 8, 8), ("SM89",), tf32=False)
    names = [*inner.returned, *inner.present]
    built = build(file, settings, outputs=names)
    assert all(name.encode() in built.plan for name in names)
    plain = build(file, settings)
    assert sum(name.encode() in plain.plan for name in inner.present) < len(inner.present)


def test_without_an_engine_it_is_refused(finished_runs):
    run = Run.open(finished_runs["w8a8"])
    with pytest.raises(InputError, match="no engine is executed"):
        open_inside(run, [], frozenset())
    images = demo_images("test", run.manifest.data)
    with pytest.raises(InputError, match="no engine is executed"):
        validate(run, images, backends=["onnxruntime"], limit=8, engine_debug=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused(finished_runs):
    run = Run.open(finished_runs["w8a8"])
    with pytest.raises(InputError, match="there is no GPU"):
        validate(run, demo_images("test", run.manifest.data), limit=8, engine_debug=True)


def test_what_only_fusions_do_is_said():
    empty = {"images": 4, "max_excess": 0.01, "min_sqnr": 90, "unknown": [], "quantizers": [], "slices": []}
    right = Location(deployed=f"tensorrt{OPENED}", first_diverging=None, faults=[], **empty)
    wrong = Location(deployed=f"tensorrt{OPENED}", first_diverging="a", faults=["a"], **empty)
    missed = Criterion(deployed="tensorrt", name="agreement", outcome="missed", by="x", text="y")
    (line,) = engine_findings([missed], [right])
    assert line.startswith("tensorrt differs from its reference and tensorrt, opened does not")
    assert engine_findings([missed], [wrong]) == []
    assert engine_findings([missed.model_copy(update={"outcome": "met"})], [right]) == []
