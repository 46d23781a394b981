"""`--data` from the command line: every source gives the same run and report, and bad ones one line."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ospq_export import cli
from ospq_export.export import export
from ospq_export.runs.manifest import read_manifest

MODEL = "vit_tiny_patch16_224"
SETS = ("reconstruction.iterations=0", "calibration_images=8", "observation_images=8", "slicing=model")
FIXED = [
    *("--model-kwargs", "img_size=32 depth=1 num_classes=4 embed_dim=48 num_heads=3 in_chans=1"),
    *(
        "--random-weights",
        "--workers",
        "0",
        "--quiet",
        *(part for value in SETS for part in ("--set", value)),
    ),
]
LOOSE = ["--workers", "0", "--quiet", "--min-agreement", "50", "--max-drop", "100", "--floor-images", "9"]
LOOSE += ["--backend", "onnxruntime", "--code-images", "2"]


def run(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", *map(str, arguments)])
        cli.main()
    captured = capsys.readouterr()
    return info.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 24 images as a folder, tar shards, a compressed tar file and Parquet."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    names = [f"{folder}/{n}.jpg" for folder in "abcd" for n in (1, 10, 9, 2, 100, 20)]
    for name in names:
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(root / "folder" / name)
    contents = {name: (root / "folder" / name).read_bytes() for name in names}
    for target, mode, chosen in (
        ("s-0.tar", "w", names[::2]),
        ("s-1.tar", "w", names[1::2]),
        ("x.tar.gz", "w:gz", names),
    ):
        with tarfile.open(root / target, mode) as archive:
            for name in chosen:
                info = tarfile.TarInfo(name)
                info.size = len(contents[name])
                archive.addfile(info, io.BytesIO(contents[name]))
    rows = [{"bytes": content, "path": name} for name, content in contents.items()]
    labels = [name[0] for name in names]
    pq.write_table(pa.table({"image": rows, "label": labels}), root / "x.parquet", row_group_size=5)
    return {
        "folder": root / "folder",
        "tar": root / "s-{0..1}.tar",
        "stream": root / "x.tar.gz",
        "parquet": root / "x.parquet",
    }


def calibrate(capsys: Any, data: Any, out: Path) -> None:
    status, _, stderr = run(capsys, "calibrate", MODEL, "--data", data, "--out", out, *FIXED)
    assert status == 0, stderr


@pytest.fixture(scope="module")
def finished(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    words = ["calibrate", MODEL, "--data", files["folder"], "--out", out, *FIXED]
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", *map(str, words)])
        cli.main()
    assert not info.value.code
    export(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tar", "parquet"])
def test_a_run_does_not_depend_on_the_source(
    capsys: Any, files: dict[str, Path], finished: Path, tmp_path: Path, source: str
) -> None:
    calibrate(capsys, files[source], tmp_path / "run")
    ours, reference = read_manifest(tmp_path / "run"), read_manifest(finished)
    assert ours.files["quantized.safetensors"] == reference.files["quantized.safetensors"]
    assert ours.calibration.images_sha256 == reference.calibration.images_sha256
    assert (ours.class_to_idx, ours.classes_source) == (reference.class_to_idx, reference.classes_source)


@pytest.mark.slow
def test_a_run_from_standard_input(
    capsys: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(files["stream"].read_bytes())))
    calibrate(capsys, "-", tmp_path / "run")
    manifest = read_manifest(tmp_path / "run")
    assert (manifest.calibration.images, manifest.calibration.distinct, manifest.class_to_idx) == (8, 8, {})


def report(capsys: Any, finished: Path, data: Any, *extra: Any) -> tuple[int, dict[str, Any]]:
    status, _, stderr = run(capsys, "validate", finished, "--data", data, *LOOSE, *extra)
    assert status in (0, 1, 3), stderr
    return status, json.loads((finished / "report.json").read_text())


@pytest.mark.slow
def test_a_report_does_not_depend_on_the_source(capsys: Any, files: dict[str, Path], finished: Path) -> None:
    status, reference = report(capsys, finished, files["folder"])
    again, ours = report(capsys, finished, files["stream"], "--batch-size", 7)
    assert (again, ours["images"], ours["labelled"]) == (status, 24, True)
    assert [b["scores"]["Top-1"] for b in ours["backends"]] == [
        b["scores"]["Top-1"] for b in reference["backends"]
    ]
    assert ours["classes_source"] == reference["classes_source"]
    assert 9 <= ours["floor"]["variations"][0]["images"] <= 14
    _, part = report(capsys, finished, files["stream"], "--limit", 10)
    assert part["images"] == 10 and part["image_notes"]["were drawn at random from a stream"] == 10


@pytest.fixture
def bad(tmp_path: Path, files: dict[str, Path]) -> dict[str, tuple[Path, str]]:
    whole = Path(str(files["tar"]).replace("{0..1}", "0")).read_bytes()
    contents: dict[str, bytes | Callable[[Path], Any]] = {
        "cut.tar": whole[: len(whole) // 2],
        "x.bin": b"x",
        "list.csv": b"a.png,cat\n",
        "float.npy": lambda path: np.save(path, np.zeros((2, 8, 8))),
        "empty.tar": b"\0" * 10240,
        "bad.parquet": b"nonsense",
        "cut.tar.gz": files["stream"].read_bytes()[:3000],
    }
    for name, content in contents.items():
        if callable(content):
            content(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    expected = {
        "cut.tar": "ends early",
        "x.bin": "cannot be read from such a file",
        "list.csv": "1 of 1 files are not there: a.png",
        "float.npy": "not float64 (2, 8, 8)",
        "empty.tar": "no images in this archive",
        "bad.parquet": "this Parquet file cannot be read",
        "cut.tar.gz": "this tar file cannot be used",
        "missing.tar": "no such file or folder",
        "s-{0..3}.tar": "no such file",
    }
    return {name: (tmp_path / name, message) for name, message in expected.items()}


def test_refused_in_one_line(capsys: Any, bad: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    for name, (path, message) in bad.items():
        status, _, stderr = run(capsys, "calibrate", MODEL, "--data", path, "--out", tmp_path / "run", *FIXED)
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and message in errors[0], (name, stderr)
        assert "Traceback" not in stderr and not (tmp_path / "run").exists()


def test_results_do_not_lie_among_the_images(capsys: Any, files: dict[str, Path]) -> None:
    out = files["folder"] / "run"
    status, _, stderr = run(capsys, "calibrate", MODEL, "--data", files["folder"], "--out", out, *FIXED)
    assert status == 2 and "would lie among the images" in stderr
