"""Folders of the packaged images through network and command line: the right Top-1, or one line that says why not."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from ospq_export import cli
from ospq_export.cli.options import class_choice
from ospq_export.data import ClassChoice, DataConfig, ImageSet, resolve_data_config
from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.models.timm import create_model
from ospq_export.runs.manifest import read_manifest
from ospq_export.validate.preflight import images_of

PLAIN = sorted(str(number) for number in range(1, 11))
TINY = "img_size=28 patch_size=14 embed_dim=24 depth=1 num_heads=3 in_chans=1 num_classes="


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, DataConfig]:
    spec = demo_spec("vit")
    model = create_model(spec)
    return model, resolve_data_config(model, spec, demo_data_overrides())


@pytest.fixture(scope="module")
def pictures(network) -> list[tuple[int, np.ndarray]]:
    """The first 40 test images of each class, on which the float network's Top-1 is 90.75 %."""
    images = demo_images("test", network[1])
    labels, pixels = images._source.labels, images._source.images
    places = np.concatenate([np.flatnonzero(labels == label)[:40] for label in range(10)])
    return [(int(labels[place]), pixels[place]) for place in places]


def top1(network, images: ImageSet) -> float:
    hits = []
    with torch.no_grad():
        for batch in images.batches(100):
            hits += (network[0](batch.images).argmax(1) == batch.labels).tolist()
    return 100 * sum(hits) / len(hits)


def lay_out(root: Path, pictures, name: str, save) -> Path:
    for place, (label, pixels) in enumerate(pictures):
        path = root / name.format(label=label, plain=PLAIN[label], place=place)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(pixels, path)
    return root


def save(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path)


def deep(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels.astype(np.uint16) * 257).save(path)


def real(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels.astype(np.float32) / 255).save(path)


def turned(pixels: np.ndarray, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels).copy()).save(path, exif=exif)


@pytest.mark.parametrize(
    ("name", "write", "choice", "exif"),
    [
        ("c{label}/{place}.png", save, ClassChoice(), False),
        ("c{label}/{place}.bmp", save, ClassChoice(), False),
        ("c{label}/images/{place}.png", save, ClassChoice(), False),
        ("c{label}/{place}.png", deep, ClassChoice(), False),
        ("c{label}/{place}.tiff", real, ClassChoice(), False),
        ("{plain}/{place}.png", save, ClassChoice(order="plain"), False),
        ("c{label}/{place}.png", turned, ClassChoice(), True),
    ],
)
def test_top1_is_that_of_the_pictures(tmp_path, network, pictures, name, write, choice, exif) -> None:
    root = lay_out(tmp_path, pictures, name, write)
    config = network[1].model_copy(update={"exif": exif})
    images = ImageSet.from_folder(root, config, choice=choice, outputs=10)
    assert top1(network, images) == 90.75


def test_one_class_of_another_format(tmp_path, network, pictures) -> None:
    def mixed(pixels, path):
        label = path.parent.name
        Image.fromarray(pixels).save(path.with_suffix(".webp" if label == "c3" else ".png"), lossless=True)

    root = lay_out(tmp_path, pictures, "c{label}/{place}.x", mixed)
    images = ImageSet.from_folder(root, network[1], outputs=10)
    assert (top1(network, images), images.record.passed_over) == (90.75, {})
    for path in (root / "c3").iterdir():
        path.rename(path.with_suffix(".heic"))
    images = ImageSet.from_folder(root, network[1], outputs=10)
    rest = [(label, pixels) for label, pixels in pictures if label != 3]
    others = ImageSet.from_folder(lay_out(tmp_path / "rest", rest, "c{label}/{place}.png", save), network[1])
    shifted = [name for name in others.class_to_idx if name != f"c{others.class_to_idx[name]}"]
    assert shifted  # numbered by the folders alone, the classes behind the gap move
    assert top1(network, images) == pytest.approx(90.28, abs=0.005)
    assert images.record.passed_over == {".heic": 40}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", *map(str, arguments)])
        cli.main()
    captured = capsys.readouterr()
    return info.value.code or 0, captured.out, captured.err


def calibrate(capsys, data, out, classes, *extra):
    sets = ("reconstruction.iterations=0", "calibration_images=8", "observation_images=8", "slicing=model")
    settings = [part for value in sets for part in ("--set", value)]
    fixed = [
        "--out",
        out,
        "--model-kwargs",
        f"{TINY}{classes}",
        "--random-weights",
        "--workers",
        0,
        "--quiet",
    ]
    return run(capsys, "calibrate", "vit_tiny_patch16_224", "--data", data, *fixed, *settings, *extra)


def folder(root: Path, *classes: str) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for place in range(4):
            save(rng.integers(0, 255, (28, 28), np.uint8), root / name / f"{place}.png")
    return root


@pytest.mark.parametrize(
    ("names", "extra", "message"),
    [
        (("9", "10"), [], "--class-order"),
        (("9", "10"), ["--class-map", "none.txt"], "none.txt"),
        (("9", "10"), ["--class-map", "map.txt", "--class-order", "plain"], "both given"),
        (("train/a", "Val/a"), [], "say which"),
        (("a/x/outdoor", "b/x/outdoor"), [], "--class-from"),
        (("a", "b"), ["--mean", "72.93", "--std", "90.02"], "--mean 0.286 --std 0.353"),
        (("a", "b"), ["--std", "0"], "std"),
        (("a", "b"), ["--std", "-0.5"], "std"),
        (("a", "b"), ["--mean", "nan"], "finite"),
        (("a", "b"), ["--mean", "0.1,0.2"], "mean"),
        (("a", "b"), ["--mean", ""], "--mean"),
    ],
)
def test_refused_in_one_line(capsys, tmp_path, monkeypatch, names, extra, message) -> None:
    (tmp_path / "map.txt").write_text("10\n9\n")
    monkeypatch.chdir(tmp_path)
    status, _, stderr = calibrate(capsys, folder(tmp_path / "data", *names), tmp_path / "run", 2, *extra)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and message in errors[0], stderr
    assert "Traceback" not in stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_was_chosen_is_in_manifest_and_file(capsys, tmp_path) -> None:
    data, out = folder(tmp_path / "data", "9", "10"), tmp_path / "run"
    (data / "labels.txt").touch()
    (data / ".ipynb_checkpoints").mkdir()
    turned(np.zeros((28, 28), np.uint8), data / "9" / "turned.png")
    status, _, stderr = calibrate(
        capsys, data, out, 2, "--class-order", "plain", "--exif", "--set", "calibration_images=9"
    )
    assert status == 0, stderr
    manifest = read_manifest(out)
    assert manifest.class_to_idx == {"10": 0, "9": 1}
    assert (manifest.classes_source, manifest.class_from, manifest.outputs) == (
        "class_order=plain",
        "first",
        2,
    )
    assert manifest.data.exif
    assert manifest.calibration.passed_over == {".ipynb_checkpoints/": 1, ".txt": 1}
    assert manifest.calibration.notes == {"have an EXIF orientation, which was applied": 1}
    export(out)
    metadata = {p.key: p.value for p in onnx.load(out / "model.onnx").metadata_props}
    assert json.loads(metadata["classes"]) == ["10", "9"]
    assert metadata["classes_source"] == "class_order=plain"
    status, _, stderr = run(capsys, "validate", out, "--data", data, "--class-order", "natural")
    assert status == 2 and "the run has other classes than class_order=natural" in stderr
    # The verdict is another matter: two classes by random weights.
    run(capsys, "validate", out, "--data", data, "--limit", 5, "--workers", 0, "--quiet", "--floor-images", 0)
    report = json.loads((out / "report.json").read_text())
    assert (report["images"], report["class_names"]) == (5, ["10", "9"])
    assert report["classes_source"] == "class_order=plain"
    assert report["passed_over"] == {".ipynb_checkpoints/": 1, ".txt": 1}
    assert report["image_notes"]["of 9 were drawn at random, with each class's share"] == 5
    for name in ("report.md", "report.html"):
        assert "classes: class_order=plain" in (out / name).read_text()


def manifest(**changes):
    fields = {"class_to_idx": {}, "classes_source": None, "class_from": None}
    config = DataConfig(
        input_size=(1, 8, 8), mean=(0,), std=(1,), interpolation="nearest", crop_pct=1, crop_mode="center"
    )
    return SimpleNamespace(
        manifest=SimpleNamespace(**{**fields, **changes}, data=config, outputs=1000), data=config
    )


def test_validation_images_of_a_run_without_classes(tmp_path, caplog) -> None:
    data = folder(tmp_path, "n01443537", "n02123045", "n03445777")
    images = images_of(manifest(), data, class_choice(None, None, None), exif=True)
    assert sorted({label for batch in images.batches(4) for label in batch.labels.tolist()}) == [1, 281, 574]
    assert images.config.exif and "timm's table imagenet-1k" in caplog.text


def test_validation_images_of_a_run_with_path_classes(tmp_path) -> None:
    data = folder(tmp_path, "a/x", "b/x")
    run = manifest(class_to_idx={"b/x": 0, "a/x": 1}, classes_source="--class-map m", class_from="path")
    images = images_of(run, data, class_choice(None, None, None), exif=False)
    assert {
        name[0]: label
        for b in images.batches(8)
        for name, label in zip(b.ids, b.labels.tolist(), strict=True)
    } == {
        "a": 1,
        "b": 0,
    }


def test_a_run_of_class_folders_refuses_a_folder_of_splits(tmp_path) -> None:
    run = manifest(class_to_idx={"a": 0, "b": 1}, classes_source="x", class_from="first")
    with pytest.raises(InputError, match="say which"):
        images_of(run, folder(tmp_path, "train/a", "val/a"), class_choice(None, None, None), exif=False)


def test_flat_folder_has_no_labels(tmp_path, caplog) -> None:
    save(np.zeros((8, 8), np.uint8), tmp_path / "1.png")
    for run in (manifest(), manifest(class_to_idx={"a": 0, "b": 1}, classes_source="x")):
        images = images_of(run, tmp_path, class_choice(None, None, None), exif=False)
        assert [batch.labels.tolist() for batch in images.batches(1)] == [[-1]]
    assert caplog.text.count("no labels") == 2
