"""The command line, as a user meets it: exit status, one line for bad input, nothing left behind."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file

from ospq_export import cli
from ospq_export.cli.app import app
from ospq_export.cli.files import as_options
from ospq_export.cli.options import with_options
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model, parse_model_kwargs
from ospq_export.runs.files import FLOAT_TENSORS, MANIFEST
from ospq_export.runs.manifest import read_manifest, record_files
from ospq_export.runs.tensors import read_tensors
from ospq_export.validate import Report
from ospq_export.validate.verdict import conclude

KWARGS = "img_size=32 depth=1 num_classes=4 embed_dim=48 num_heads=3 in_chans=1"
MODEL = "vit_tiny_patch16_224"
SHORT = [
    *(
        "--set",
        "reconstruction.iterations=2",
        "--set",
        "reconstruction.batch_size=4",
        "--set",
        "calibration_images=8",
        "--set",
        "observation_images=8",
    ),
    *("--workers", "0", "--quiet"),
]


def run(capsys, *arguments):
    """Exit status, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", *map(str, arguments)])
        cli.main()
    captured = capsys.readouterr()
    return info.value.code or 0, captured.out, captured.err


def calibrate(capsys, folder, out, *extra, model=MODEL, kwargs=KWARGS):
    fixed = [model, "--data", folder, "--out", out, "--model-kwargs", kwargs, "--random-weights", *SHORT]
    return run(capsys, "calibrate", *fixed, *extra)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four classes of six 40 x 36 px images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in "abcd":
        (folder / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A calibrated run, not exported."""
    out = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, "-m", "ospq_export.cli", "calibrate", MODEL, "--data", images, "--out", out]
    command += ["--model-kwargs", KWARGS, "--random-weights", *SHORT]
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return out


def assert_refused(result, message, out=None):
    status, stdout, stderr = result
    lines = stderr.strip().splitlines()
    assert status == 2, stderr
    assert lines[-1].startswith("error: ") and message in lines[-1], stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in stderr + stdout
    if out is not None:
        assert not out.exists()


def test_help_is_light():
    code = "import sys; from ospq_export import cli; assert not {'torch', 'timm', 'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "ospq_export.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in done.stdout for command in ("calibrate", "export", "validate", "demo"))


def test_version_and_short_help(capsys):
    from importlib.metadata import version

    assert run(capsys, "--version") == (0, f"{version('ospq-export')}\n", "")
    for words in ([], ["validate"], ["recipe"], ["recipe", "show"]):
        short, long = (run(capsys, *words, option) for option in ("-h", "--help"))
        assert short == long and short[0] == 0
    whole = " ".join(run(capsys, "-h")[1].split())
    for command in app.registered_commands:
        assert command.short_help and " ".join(command.short_help.split()) in whole


def test_recipes_are_listed_shown_and_explained(capsys):
    from ospq_export.recipes import load_recipe, packaged_recipes

    status, stdout, _ = run(capsys, "recipe", "list", "--json")
    assert status == 0 and [r["name"] for r in json.loads(stdout)] == packaged_recipes()
    for name in packaged_recipes():
        assert name in run(capsys, "recipe", "list")[1]
    status, stdout, _ = run(capsys, "recipe", "show", "w4a4", "--set", "slicing=block", "--json")
    assert json.loads(stdout) == load_recipe("w4a4", ["slicing=block"]).model_dump(mode="json")
    assert 'slicing = "block"' in run(capsys, "recipe", "show", "w4a4", "--set", "slicing=block")[1]
    status, stdout, _ = run(capsys, "recipe", "explain", "pilot", "--json")
    assert [k["name"] for k in json.loads(stdout)] == ["pilot.budget", "pilot.held_out"]
    assert "a number, above 0, at most 1" in run(capsys, "recipe", "explain", "pilot.budget")[1]
    assert_refused(run(capsys, "recipe", "explain", "budgets"), "write pilot.budget")
    assert_refused(run(capsys, "recipe", "show", "w5a5"), "there is no recipe 'w5a5'")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--recipe", "w5a5"], "there is no recipe 'w5a5'"),
        (["--set", "weight_bits=77"], "weight_bits"),
        (["--set", "nonsense"], "key=value"),
        (["--set", "iterations=9"], "write reconstruction.iterations"),
        (["--set", "slicing=blok"], "slicing 'blok' is unknown"),
        (["--mean", "a,b"], "not a list of numbers"),
        (["--mean", "0.5,0.5,0.5"], "mean"),
        (["--std", "0"], "std"),
        (["--interpolation", "psychic"], "interpolation"),
        (["--device", "warp"], "device 'warp' cannot be used"),
        (["--checkpoint", "none.safetensors"], "none.safetensors"),
    ],
)
def test_bad_options(capsys, images, tmp_path, extra, message):
    out = tmp_path / "run"
    assert_refused(calibrate(capsys, images, out, *extra), message, out)


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        ("vit_tinny_patch16_224", "", "vit_tiny_patch16_224"),
        (MODEL, "imgsize=32", "imgsize"),
        (MODEL, "img_size", "img_size"),
        (MODEL, "num_heads=7 num_classes=4", "num_heads"),
    ],
)
def test_bad_model(capsys, images, tmp_path, model, kwargs, message):
    out = tmp_path / "run"
    assert_refused(calibrate(capsys, images, out, model=model, kwargs=kwargs), message, out)


def test_bad_folders(capsys, images, tmp_path):
    out = tmp_path / "run"
    assert_refused(calibrate(capsys, tmp_path / "missing", out), "missing", out)
    (tmp_path / "empty").mkdir()
    assert_refused(calibrate(capsys, tmp_path / "empty", out), "empty", out)
    corrupt = tmp_path / "corrupt" / "a"
    corrupt.mkdir(parents=True)
    for i in range(8):
        (corrupt / f"{i}.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    assert_refused(calibrate(capsys, tmp_path / "corrupt", out), "none of 8 images can be read", out)


def test_one_corrupt_image_is_skipped_counted_and_named(capsys, images, tmp_path):
    folder = tmp_path / "images"
    subprocess.run(["cp", "-r", images, folder], check=True)
    data = (folder / "b" / "3.jpg").read_bytes()
    (folder / "b" / "3.jpg").write_bytes(data[: len(data) // 2])
    status, stdout, _ = calibrate(capsys, folder, tmp_path / "run", "--set", "calibration_images=24")
    assert status == 0 and "on 23 images (1 unreadable)" in " ".join(stdout.split())
    skipped = json.loads((tmp_path / "run" / "manifest.json").read_text())["calibration"]["skipped"]
    assert len(skipped) == 1 and skipped[0].endswith("b/3.jpg")


def state_dict(**kwargs):
    torch.manual_seed(0)
    options = {
        "img_size": 32,
        "depth": 1,
        "num_classes": 4,
        "embed_dim": 48,
        "num_heads": 3,
        "in_chans": 1,
        **kwargs,
    }
    return create_model(ModelSpec(name=MODEL, kwargs=options)).state_dict()


def test_bad_checkpoints(capsys, images, tmp_path):
    out, path = tmp_path / "run", tmp_path / "weights.safetensors"
    save_file(state_dict(depth=2), path)
    assert_refused(calibrate(capsys, images, out, "--checkpoint", path), "blocks.1", out)
    poisoned = state_dict()
    poisoned["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    save_file(poisoned, path)
    assert_refused(calibrate(capsys, images, out, "--checkpoint", path), "blocks.0.mlp.fc1.weight", out)
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(calibrate(capsys, images, out, "--checkpoint", path), "weights.safetensors", out)


def test_output_folder_in_use(capsys, images, finished, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(calibrate(capsys, images, tmp_path), "not empty")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert_refused(calibrate(capsys, images, tmp_path / "notes.txt"), "not a folder")
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    assert_refused(calibrate(capsys, images, finished), "already holds a finished run")
    assert before == {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}


@pytest.fixture
def copy(finished, tmp_path):
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


def test_damaged_runs(capsys, images, copy, tmp_path):
    assert_refused(run(capsys, "export", tmp_path), "not a run directory")
    assert_refused(run(capsys, "validate", copy, "--data", images), "export")
    path = copy / "quantized.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(run(capsys, "export", copy), "quantized.safetensors was changed or truncated")
    assert not (copy / "model.onnx").exists()
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"status"', '"stratus"'))
    assert_refused(run(capsys, "validate", copy, "--data", images), "manifest")


@pytest.mark.slow
def test_whole_chain_and_a_planted_fault(capsys, images, copy):
    assert run(capsys, "export", copy, "--quiet")[0] == 0
    loose = ["--min-agreement", 90, "--max-top1-difference", 10, "--max-drop", 40]
    options = ["validate", copy, "--data", images, "--workers", 0, "--quiet", *loose]
    status, stdout, _ = run(capsys, *options)
    assert status == 0 and stdout.startswith("the deployment is faithful: ") and "fake_quant" in stdout
    assert stdout.splitlines()[1].startswith("accuracy is kept: ")
    assert "".join(stdout.split()).endswith(f"report:{copy / 'report.html'}")
    page = (copy / "report.html").read_text()
    assert "Ready to deploy" in page and "The deployed file gives" in page and (copy / "report.md").is_file()
    report = json.loads((copy / "report.json").read_text())
    assert report["verdict"]["exit_status"] == 0 and report["images"] == 24
    assert report["calibration_images_seen"] == 8 and "8 of the 24 images are calibration images" in stdout
    assert report["not_executed"] == [] and "not judged" not in stdout, "a float file is not deployed"
    assert {b["name"] for b in report["backends"]} == {
        "float",
        "fake_quant",
        "onnxruntime",
        "onnxruntime-unoptimised",
    }

    model = onnx.load(str(copy / "model.onnx"))
    bias = next(t for t in model.graph.initializer if t.name == "head.weight.bias_folded")
    bias.CopyFrom(numpy_helper.from_array(np.float32([50, 0, 0, 0]), bias.name))
    onnx.save(model, str(copy / "model.onnx"))
    assert_refused(run(capsys, *options), "model.onnx was changed or truncated")
    record_files(copy, read_manifest(copy), "model.onnx")
    assert_refused(run(capsys, *options, "--baseline", images), "not a run directory")
    assert_refused(run(capsys, *options, "--significance", 1), "--significance 1")
    status, stdout, _ = run(capsys, *options)
    assert status == 1 and stdout.startswith("the deployment is not faithful: each of onnxruntime")
    assert json.loads((copy / "report.json").read_text())["comparisons"][0]["flips"]


@pytest.mark.slow
def test_backends_by_name(capsys, images, copy):
    assert run(capsys, "export", copy, "--quiet", "--batch-size", 4)[0] == 0
    # Logits of random weights lie close together: on some processors rounding flips their order.
    loose = ["--min-agreement", 50, "--max-top1-difference", 100]
    options = ["validate", copy, "--data", images, "--workers", 0, "--quiet", "--batch-size", 7, *loose]
    for name, reference in (("onnxruntime-fp32", "float"), ("onnxruntime", "fake_quant")):
        status, stdout, _ = run(
            capsys, *options, "--backend", name, *(["--json"] if reference == "float" else [])
        )
        report = json.loads((copy / "report.json").read_text())
        assert status == 3
        if reference == "float":
            assert json.loads(stdout)["comparisons"] == report["comparisons"]
        else:
            assert "too few images to tell whether accuracy is kept" in stdout
        assert {b["name"] for b in report["backends"]} == {"float", reference, name}, (
            "it brings its references"
        )
        assert [(c["reference"], c["deployed"]) for c in report["comparisons"]] == [(reference, name)]
        assert [(a["reference"], a["deployed"]) for a in report["accuracy"]] == [("float", name)]
    assert_refused(run(capsys, *options, "--backend", "abacus"), "no execution 'abacus'")
    assert_refused(
        run(capsys, *options, "--backend", "fake_quant"),
        "no verdict without a deployed execution: fake_quant is none",
    )
    assert_refused(run(capsys, *options, "--latency", 6), "a batch of 6 would be padded")
    assert_refused(run(capsys, *options, "--decision-threshold", 1), "the largest one decides")


@pytest.mark.slow
def test_labels_may_be_missing_but_must_fit(capsys, images, copy, tmp_path):
    assert run(capsys, "export", copy, "--quiet")[0] == 0
    options = ["validate", copy, "--data", images / "a", "--workers", 0, "--quiet", "--min-agreement", 50]
    status, stdout, _ = run(capsys, *options)
    report = json.loads((copy / "report.json").read_text())
    assert status == 3 and "images have no labels" in stdout and not report["labelled"]
    assert report["backends"][0]["scores"] == {} and report["accuracy"][0]["high"] > 30
    status, stdout, _ = run(capsys, *options, "--max-drop", 100)
    assert status == 0 and "accuracy is kept" in stdout
    stranger = tmp_path / "five"
    for name in "abcde":
        (stranger / name).mkdir(parents=True)
        Image.new("L", (32, 32)).save(stranger / name / "x.png")
    assert_refused(run(capsys, "validate", copy, "--data", stranger, "--workers", 0), "class")


@pytest.mark.slow
def test_the_checkpoints_entry_is_chosen_said_and_recorded(images, tmp_path, capsys, caplog):
    kwargs = parse_model_kwargs(KWARGS)
    model = create_model(ModelSpec(name=MODEL, kwargs=kwargs))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": other}, tmp_path / "w.pth")
    fixed = ["--data", images, "--model-kwargs", KWARGS, "--checkpoint", tmp_path / "w.pth"]
    chosen = ["--checkpoint-key", "state_dict"]
    status, _, said = run(capsys, "calibrate", MODEL, *fixed, "--out", tmp_path / "run", *SHORT, *chosen)
    assert status == 0, said
    assert "weights taken from 'state_dict'; prefix 'module.' stripped" in caplog.text
    record = read_manifest(tmp_path / "run").checkpoint
    assert (record.entry, record.prefix, record.chosen) == ("state_dict", "module.", "option")
    written, _ = read_tensors(tmp_path / "run" / FLOAT_TENSORS)
    assert torch.equal(written["cls_token"], state["module.cls_token"])
    path = tmp_path / "run" / MANIFEST
    values = json.loads(path.read_text())
    del values["checkpoint"], values["model"]["checkpoint_key"]
    path.write_text(json.dumps(values))
    assert read_manifest(tmp_path / "run").checkpoint is None, "older manifests have none"
    missing = [*fixed, "--checkpoint-key", "ema"]
    for command in (["calibrate", "--out", tmp_path / "none"], ["inspect"]):
        status, _, said = run(capsys, command[0], MODEL, *missing, *command[1:], "--workers", 0)
        assert status == 2 and "state_dict_ema" in " ".join(said.split()) and len(said.splitlines()) == 1
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspected")
    (root / "a").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(root / "a" / f"{i}.png")
    return root


def test_table_json_and_plot(capsys, folder, tmp_path):
    fixed = ["inspect", MODEL, "--data", folder, "--model-kwargs", KWARGS, "--random-weights", "--workers", 0]
    status, stdout, _ = run(capsys, *fixed, "--quiet", "--out", tmp_path / "p.json")
    assert status == 0 and "kurtosis" in stdout
    records = json.loads((tmp_path / "p.json").read_text())
    status, stdout, _ = run(capsys, *fixed, "--quiet", "--json")
    assert status == 0 and json.loads(stdout) == records
    assert {"blocks.0.mlp.fc1.input", "head.input"} <= {r["name"] for r in records}
    assert run(capsys, *fixed, "--quiet", "--out", tmp_path / "p.png")[0] == 0
    with Image.open(tmp_path / "p.png") as plot:
        assert plot.size[0] > 500
    assert_refused(run(capsys, *fixed, "--out", tmp_path / "p.pdf"), "JSON or PNG", tmp_path / "p.pdf")
    assert_refused(run(capsys, *fixed, "--device", "cuda:77"), "cannot be used", tmp_path / "none")
    assert_refused(run(capsys, *fixed, "--mean", "0.5,x"), "--mean", tmp_path / "none")


def test_preprocessing_is_the_users(capsys, folder, tmp_path):
    fixed = ["inspect", MODEL, "--data", folder, "--model-kwargs", KWARGS, "--random-weights", "--workers", 0]

    def profile(name, *options):
        assert run(capsys, *fixed, "--quiet", "--out", tmp_path / name, *options)[0] == 0
        return json.loads((tmp_path / name).read_text())

    plain, shifted = profile("a.json"), profile("b.json", "--mean", "0.9")
    assert plain == profile("c.json") and plain != shifted


def test_settings_are_called_as_their_options():
    text = "a `batch_size` of 0, `overrides` x=1, `backends`, and what `calibrate` wrote"
    assert with_options(text) == "a --batch-size of 0, --set x=1, --backend, and what `calibrate` wrote"
    report = Report.model_construct(
        verdict=conclude([], []),
        image_notes={"are turned; `exif` applies it": 3},
        executions_skipped={"x": "export it with `fp16`"},
    )
    shown = as_options(report)
    assert "add one, --backend float" in shown.verdict.text[1]
    assert shown.verdict.accuracy.text == shown.verdict.text[1]
    assert shown.image_notes == {"are turned; --exif applies it": 3}
    assert shown.executions_skipped == {"x": "export it with --fp16"}
