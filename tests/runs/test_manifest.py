"""The run directory: atomic writes, damage found, networks rebuilt from it alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import SHORT

from ospq_export.calibrate import calibrate
from ospq_export.data import Batch, ImageSet, resolve_data_config
from ospq_export.demo import demo_images
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import FLOAT_TENSORS, GRAPH, MANIFEST, QUANTIZED_TENSORS, replacing
from ospq_export.runs.manifest import read_manifest, record_files
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import read_tensors, write_tensors
from ospq_export.validate import validate


def test_replacing_leaves_nothing_behind_on_failure(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("interrupted")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


def test_full_disk_is_bad_input(tmp_path):
    with (
        pytest.raises(InputError, match="cannot be written: No space left"),
        replacing(tmp_path / "x"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_tensors_round_trip_and_truncation(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(6, dtype=torch.int8)}
    write_tensors(path, tensors, {"k": "v"})
    loaded, header = read_tensors(path)
    assert header == {"k": "v"} and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        read_tensors(path)


def edit(folder, change):
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema version 99"),
        (lambda m: m.pop("recipe"), "'recipe' is wrong"),
        (lambda m: m["recipe"].update(weight_bits="many"), r"recipe\.weight_bits"),
        (lambda m: m.update(extra=1), "'extra' is wrong"),
        (lambda m: m.update(status="calibrating"), "interrupted"),
        (lambda m: m["files"].update({"quantized.safetensors": "0" * 64}), "was changed or truncated"),
        (lambda m: m["files"].update({"../../outside": "0" * 64}), "outside the run directory"),
        (lambda m: m["files"].update({"nothing.bin": "0" * 64}), "lacks nothing.bin"),
    ],
)
def test_edited_manifest(run_copy, change, message):
    edit(run_copy, change)
    with pytest.raises(InputError, match=message) as info:
        Run.open(run_copy)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1}'])
def test_damaged_manifest(run_copy, text):
    (run_copy / MANIFEST).write_text(text)
    with pytest.raises(InputError):
        Run.open(run_copy)


@pytest.mark.parametrize("name", [FLOAT_TENSORS, QUANTIZED_TENSORS, "model.onnx"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_files(run_copy, name, damage):
    path = run_copy / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(InputError, match=name):
        Run.open(run_copy)


def with_tensors(folder, change):
    """Change tensors and write the matching hash, as a careful forger would."""
    tensors, _ = read_tensors(folder / QUANTIZED_TENSORS)
    change(tensors)
    write_tensors(folder / QUANTIZED_TENSORS, tensors)
    record_files(folder, read_manifest(folder), QUANTIZED_TENSORS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A calibrated ViT of one block at W4A4, which is quickly captured."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "depth": 1, "num_classes": 4, "embed_dim": 48, "num_heads": 3}
    spec = ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs)
    model = create_model(spec)
    images = Batch(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64), [str(i) for i in range(8)])
    recipe = load_recipe("w4a4", [*SHORT, "calibration_images=8", "reconstruction.batch_size=8"])
    folder = tmp_path_factory.mktemp("small") / "run"
    calibrate(model, spec, images, resolve_data_config(model, spec, {}), recipe, folder)
    return folder


@pytest.fixture
def small_copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"head.weight.scale": t["head.weight.scale"][:-1]}),
            r"head\.weight\.scale: expected",
        ),
        (lambda t: t.pop("head.weight.codes"), r"head\.weight\.codes: expected .* found nothing"),
        (lambda t: t["head.input.scale"].fill_(torch.nan), r"head\.input\.scale is not finite"),
        (lambda t: t["head.input.scale"].fill_(-1.0), r"head\.input\.scale is not positive"),
        (lambda t: t.update({"head.weight.codes": t["head.weight.codes"].int()}), "torch.int8"),
        (lambda t: t.pop("head.bias"), r"head\.bias"),
    ],
)
def test_forged_tensors(small_copy, change, message):
    with_tensors(small_copy, change)
    with pytest.raises(InputError, match=message):
        Run.open(small_copy).quantized_graph()


def test_codes_outside_their_bits(small_copy):
    with_tensors(small_copy, lambda t: t["blocks.0.mlp.fc1.weight.codes"].fill_(100))
    with pytest.raises(InputError, match=r"codes are not all int4"):
        Run.open(small_copy).quantized_graph()


def test_an_edited_graph_is_refused(small_copy):
    path = small_copy / GRAPH
    path.write_text(path.read_text().replace("aten.gelu.default", "aten.relu.default"))
    with pytest.raises(InputError, match=r"graph\.json was changed"):
        Run.open(small_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["nodes"][-2].update(target="aten.from_file.default"), "not in the list"),
        (lambda g: g["nodes"][-2].update(target="os.system"), "not in the list"),
        (lambda g: g["nodes"][-2].update(target="aten.__class__"), "not in the list"),
        (lambda g: g["nodes"][-2].update(op="call_method"), "kind 'call_method'"),
        (lambda g: g["nodes"][-2]["args"].insert(0, {"dtype": "load"}), "'load' is no dtype"),
        (lambda g: g["nodes"][-2]["args"].insert(0, {"node": "nothing"}), "nothing"),
        (lambda g: g["nodes"][3].update(name=g["nodes"][2]["name"]), "two nodes are called"),
        (lambda g: g.pop("constants"), "constants"),
        (lambda g: g.update(version=99), "version 99"),
        (lambda g: g["constants"][0][1].append(7), ""),
    ],
)
def test_a_foreign_graph_calls_nothing_else(small_copy, change, message):
    """With its hash in the manifest, as somebody else's run has it."""
    graph = json.loads((small_copy / GRAPH).read_text())
    change(graph)
    (small_copy / GRAPH).write_text(json.dumps(graph))
    record_files(small_copy, read_manifest(small_copy), GRAPH)
    with pytest.raises(InputError, match=rf"{message}.*graph\.json|{message}.*expected"):
        Run.open(small_copy).captured()


def test_a_run_needs_neither_timm_nor_the_models_code(small, tmp_path):
    """Exported where timm cannot be imported, to the same bytes as anywhere else."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(small, here)
    shutil.copytree(small, there)
    code = (
        "import sys; sys.modules['timm'] = None\nfrom pathlib import Path\nfrom ospq_export.export import export\n"
        "export(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(there)], check=True)
    export(here)
    for name in ("model.onnx", "model_fp32.onnx"):
        assert (here / name).read_bytes() == (there / name).read_bytes()


def test_validation_builds_no_network(small, tmp_path, monkeypatch):
    run_copy = Path(shutil.copytree(small, tmp_path / "run"))
    export(run_copy)

    def refuse(*_args, **_kwargs):
        raise AssertionError("timm.create_model was called")

    monkeypatch.setattr(timm, "create_model", refuse)
    run = Run.open(run_copy)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    images = ImageSet.from_arrays(
        pixels, np.arange(8) % 4, [str(i) for i in range(8)], run.manifest.data, ["a", "b", "c", "d"]
    )
    report = validate(run, images, batch_size=4)
    assert {"float", "fake_quant", "onnxruntime"} <= {b.name for b in report.backends}


def test_a_run_of_an_earlier_version_is_refused_with_the_command_that_remakes_it(small_copy):
    edit(small_copy, lambda m: m.update(schema_version=1))
    with pytest.raises(InputError, match=r"schema version 1.*calibrate vit_tiny_patch16_224 .* w4a4"):
        Run.open(small_copy)


@pytest.mark.slow
def test_both_networks_come_from_one_run(finished_runs):
    run = Run.open(finished_runs["w8a8"])
    # Images of the kind it was calibrated on: on noise, activations leave the calibrated ranges.
    x = next(demo_images("test", run.manifest.data).batches(64)).images
    with torch.no_grad():
        reference, quantized = run.float_network()(x), run.fake_quant_network()(x)
        original = create_model(run.manifest.model)(x)
    assert torch.allclose(reference, original, atol=1e-5), "the run holds the checkpoint's weights"
    assert 0 < float((quantized - reference).square().mean()) < 0.1 * float(reference.var())
