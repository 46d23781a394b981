"""An export is added to: what is there stays to the byte, what contradicts it is refused."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
from helpers import tiny

from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.export.jobs import Extras
from ospq_export.runs.files import MANIFEST
from ospq_export.runs.manifest import read_manifest, record_files
from ospq_export.runs.run import Run

BASE = ["model_fp32.onnx", "model.onnx", "scales.json"]
HALVES = ["model_fp16.onnx", "model_qdq_fp16.onnx"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    tiny(folder, "reconstruction.iterations=0", "reconstruction.refinement_images=0", "slicing=model")
    return folder


@pytest.fixture(scope="module")
def first(calibrated, tmp_path_factory):
    """The same with a plain export; do not change it."""
    folder = Path(shutil.copytree(calibrated, tmp_path_factory.mktemp("first") / "run"))
    assert export(folder).written == BASE
    return folder


@pytest.fixture
def exported(first, tmp_path):
    return Path(shutil.copytree(first, tmp_path / "run"))


def state(folder):
    """Bytes and times of all files but the manifest."""
    files = (p for p in folder.iterdir() if p.name != MANIFEST)
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_what_is_there_stays_and_what_is_added_is_the_same(calibrated, exported, tmp_path):
    before = state(exported)
    assert export(exported, extras=Extras(fp16=True)).written == HALVES
    after = state(exported)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == set(HALVES)
    assert {*BASE, *HALVES} <= Run.open(exported).manifest.files.keys()
    at_once = Path(shutil.copytree(calibrated, tmp_path / "at_once"))
    export(at_once, extras=Extras(fp16=True))
    assert {n: data for n, (data, _) in state(at_once).items()} == {n: data for n, (data, _) in after.items()}
    assert read_manifest(at_once).files == read_manifest(exported).files
    with pytest.raises(InputError, match=r"model\.onnx of an earlier export are there.*`overwrite`"):
        export(exported, extras=Extras(fp16=True))


def edited(folder, change):
    """Change a file as another export would have written it."""
    model = onnx.load(str(folder / "model.onnx"))
    change(model)
    onnx.save(model, str(folder / "model.onnx"))
    record_files(folder, read_manifest(folder), "model.onnx")


def older_opset(model):
    model.opset_import[0].version = 19


def other_recipe(model):
    next(p for p in model.metadata_props if p.key == "recipe").value = "w8a8"


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (None, {"batch_size": 2}, r"a dynamic batch, this one would have a batch of 2 .*model_fp32\.onnx"),
        (older_opset, {"opset": 20}, r"opset 19, this one would have opset 20 .*model\.onnx"),
        (other_recipe, {}, r"another recipe, this one would have the run's .*model\.onnx"),
    ],
)
def test_an_addition_that_contradicts_what_is_there(exported, change, settings, said):
    if change is not None:
        edited(exported, change)
    manifest, before = (exported / MANIFEST).read_bytes(), state(exported)
    with pytest.raises(InputError, match=said):
        export(exported, extras=Extras(fp16=True), **settings)
    assert (exported / MANIFEST).read_bytes() == manifest and state(exported) == before


def test_an_engine_needs_the_batch_that_its_file_has(exported):
    def never(_folder):
        raise AssertionError

    export(exported, extras=Extras(fp16=True), deploy_batch_size=4)
    with pytest.raises(
        InputError, match=r"a batch of 4, this one would have a batch of 1 .*: give `batch_size` 4"
    ):
        export(exported, extras=Extras(fp16=True), finish=never)
    assert export(exported, extras=Extras(fp16=True), deploy_batch_size=4, finish=lambda _: []).written == []


@pytest.mark.parametrize("place", ["take", "record_files"])
def test_an_addition_that_is_killed_leaves_the_run_as_it_was(exported, monkeypatch, place):
    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    manifest, before = (exported / MANIFEST).read_bytes(), state(exported)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"ospq_export.export.stage.{place}", killed)
        export(exported, extras=Extras(fp16=True))
    assert (exported / MANIFEST).read_bytes() == manifest
    assert {name: found for name, found in state(exported).items() if name in before} == before
    if place == "take":
        return
    # The files lie there, listed by nobody.
    assert export(exported, extras=Extras(fp16=True)).written == HALVES
    assert set(HALVES) <= set(json.loads((exported / MANIFEST).read_text())["files"])
