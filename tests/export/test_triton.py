"""A run as a model of Triton: config.pbtxt by Triton's own protobuf, the folder, and what is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from ospq_export.deploy import serve
from ospq_export.errors import InputError
from ospq_export.export.triton import model_name, served_file, write_model
from ospq_export.export.triton_config import Served, configuration
from ospq_export.onnx.signature import TensorType
from ospq_export.runs.files import QUANTIZED_TENSORS, sha256, write_json
from ospq_export.runs.manifest import read_manifest, record_files
from ospq_export.runs.run import Run


def recorded(folder, *files):
    record_files(folder, read_manifest(folder), *files)
    return Run.open(folder)


def config_of(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def written(run, repository, name="net", **settings):
    return config_of(serve(run, repository, name, **settings))


def test_configuration_says_what_the_file_is(finished_runs, tmp_path):
    run = Run.open(finished_runs["w8a8"])
    config = written(run, tmp_path / "repository")
    folder = tmp_path / "repository" / "net"
    assert sorted(p.name for p in folder.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["net"], "nothing temporary is left"
    session = onnxruntime.InferenceSession(folder / "1" / config.default_model_filename)
    (images,), (logits,) = config.input, config.output
    taken, returned = session.get_inputs()[0], session.get_outputs()[0]
    assert (images.name, list(images.dims)) == (taken.name, taken.shape[1:])
    assert (logits.name, list(logits.dims)) == (returned.name, returned.shape[1:])
    assert (config.backend, config.platform, config.max_batch_size) == ("onnxruntime", "onnxruntime_onnx", 32)
    assert config.HasField("dynamic_batching") and config.instance_group[0].count == 1
    names = (folder / logits.label_filename).read_text().splitlines()
    assert names == sorted(run.manifest.class_to_idx, key=run.manifest.class_to_idx.get)
    said = {key: value.string_value for key, value in config.parameters.items()}
    assert said["quantized_sha256"] == run.manifest.files[QUANTIZED_TENSORS]
    assert said["file_sha256"] == sha256(folder / "1" / "model.onnx")


def test_warm_up_is_what_the_model_takes(finished_runs, tmp_path):
    config = written(Run.open(finished_runs["w8a8"]), tmp_path)
    assert [w.batch_size for w in config.model_warmup] == [1, 32]
    for request in config.model_warmup:
        held = request.inputs[config.input[0].name]
        assert list(held.dims) == list(config.input[0].dims) and held.random_data
        assert held.data_type == config.input[0].data_type


def test_the_file_that_takes_pixels_is_preferred(every_file, tmp_path):
    config = written(Run.open(every_file), tmp_path)
    path = tmp_path / "net" / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert config.input[0].data_type == 2 and list(config.input[0].dims) == [28, 28, 1], "TYPE_UINT8"
    assert config.parameters["file"].string_value == "model_uint8.onnx"


@pytest.mark.parametrize(
    ("shape", "batches", "dims", "shown"),
    [
        ((-1, 3, -1, -1), (1, 32, 32), [3, -1, -1], [3, 24, 16]),
        ((4, 3, 24, 16), None, [4, 3, 24, 16], [4, 3, 24, 16]),
        ((-1, 24, -1, 3), (2, 4, 8), [24, -1, 3], [24, 24, 3]),
    ],
)
def test_free_and_fixed_sizes(finished_runs, tmp_path, shape, batches, dims, shown):
    """A fixed batch belongs to the shape, and nothing is batched; free sides are those of the calibration when warming up."""
    run = Run.open(finished_runs["w8a8"])
    outputs = (TensorType("a", "float32", (shape[0], 5)), TensorType("b", "float16", (shape[0],)))
    path = run.path / "model.onnx"
    kind = "tensorrt" if batches == (2, 4, 8) else "onnxruntime"
    served = Served(path, kind, TensorType("x", "float32", shape), outputs, batches, (24, 16))
    config = text_format.Parse(configuration(run, served, "net", labelled=False), ModelConfig())
    assert config.max_batch_size == (batches[-1] if batches else 0)
    assert list(config.input[0].dims) == dims
    assert next(list(w.inputs["x"].dims) for w in config.model_warmup) == shown
    assert [w.batch_size for w in config.model_warmup] == (sorted(set(batches[:2])) if batches else [1])
    assert config.HasField("dynamic_batching") is bool(batches)
    # A number for each image: Triton adds a dimension, which the model does not have.
    last = config.output[1]
    assert (list(last.dims), last.HasField("reshape")) == (([1], True) if batches else ([4], False))
    if kind == "tensorrt":
        assert config.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
        assert list(config.dynamic_batching.preferred_batch_size) == [4]
        assert config.default_model_filename == "model.plan"


def engine_of(folder, product, name="model.engine"):
    """A stand-in for an engine: the plan is not looked into, its sidecar is."""
    (folder / name).write_bytes(b"plan")
    tensors = [
        {"name": n, "dtype": "float32", "shape": s}
        for n, s in (("images", [-1, 1, 28, 28]), ("logits", [-1, 10]))
    ]
    record = {"product": product, "version": "10.3", "profile": [1, 8, 16], "input": tensors[0]}
    write_json(folder / f"{name}.json", {**record, "outputs": tensors[1:]})
    return recorded(folder, name, f"{name}.json")


def test_an_engine_is_served_if_triton_loads_it(run_copy, tmp_path, caplog):
    config = written(engine_of(run_copy, "tensorrt"), tmp_path)
    assert (tmp_path / "net" / "1" / "model.plan").read_bytes() == b"plan"
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 16)
    assert (tmp_path / "net" / "labels.txt").is_file()
    config = written(engine_of(run_copy, "tensorrt-rtx"), tmp_path, "other")
    assert config.platform == "onnxruntime_onnx" and "Triton does not load" in caplog.text


def test_damaged_sidecar(run_copy, tmp_path):
    run = engine_of(run_copy, "tensorrt")
    (run_copy / "model.engine.json").write_text(json.dumps({"product": "tensorrt"}))
    with pytest.raises(InputError, match="sidecar cannot be read"):
        serve(run, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_weights_beside_the_file_go_along(run_copy, tmp_path):
    """The file says what its data is called."""
    model = onnx.load(run_copy / "model.onnx")
    onnx.save(
        model,
        run_copy / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    run = recorded(run_copy, "model.onnx", "model.onnx.data")
    write_model(run, tmp_path, "net")
    session = onnxruntime.InferenceSession(tmp_path / "net" / "1" / "model.onnx")
    assert session.run(None, {"images": np.zeros((1, 1, 28, 28), np.float32)})[0].shape == (1, 10)


def test_operators_that_onnx_runtime_lacks(run_copy):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph), run_copy / "model_check.onnx")
    run = recorded(run_copy, "model_check.onnx")
    with pytest.raises(InputError, match="does not have this file's operators"):
        served_file(run)


def test_an_existing_model_stays(finished_runs, tmp_path):
    run = Run.open(finished_runs["w8a8"])
    folder = serve(run, tmp_path, "net")
    (folder / "mark").touch()
    with pytest.raises(InputError, match=r"the repository has a model net.*`overwrite`"):
        serve(run, tmp_path, "net")
    assert (folder / "mark").is_file()
    serve(run, tmp_path, "net", overwrite=True)
    assert not (folder / "mark").exists() and [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_failure_leaves_the_model_that_was_there(finished_runs, tmp_path, monkeypatch):
    run = Run.open(finished_runs["w8a8"])
    before = config_of(serve(run, tmp_path, "net"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match="No space left"):
        serve(run, tmp_path, "net", overwrite=True)
    assert config_of(tmp_path / "net") == before and [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b"])
def test_names_of_models(tmp_path, name):
    run = SimpleNamespace(path=tmp_path / "a folder with spaces")
    with pytest.raises(InputError, match="`triton_model`"):
        model_name(run, name)
    assert model_name(run, "net-1.0_a") == "net-1.0_a"
    assert model_name(SimpleNamespace(path=tmp_path), None) == tmp_path.name


def test_a_run_that_is_not_exported(run_copy, tmp_path):
    run = Run.open(run_copy)
    files = {k: v for k, v in run.manifest.files.items() if not k.endswith(".onnx")}
    run.manifest = run.manifest.model_copy(update={"files": files})
    with pytest.raises(InputError, match=r"no model\.onnx"):
        serve(run, tmp_path / "repository", "net")
    assert not (tmp_path / "repository").exists()
