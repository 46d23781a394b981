"""Files too large for one protobuf message: written as two, run, linted, compiled, replaced, and refused where one is wrong."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from helpers import RTX, SETTINGS
from onnx import TensorProto

from ospq_export.calibrate import calibrate
from ospq_export.cli.app import app
from ospq_export.data import Batch, resolve_data_config
from ospq_export.engines.record import build_engine
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.export.jobs import Extras
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.onnx import serialize
from ospq_export.onnx.lint import lint
from ospq_export.onnx.read import read_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.run import Run
from ospq_export.validate.executions.backends import OnnxRuntimeBackend
from ospq_export.validate.executions.probes import open_probed

LIMIT = 120_000
EXTRAS = Extras(fp16=True, int4=True, uint8_activations=True)
SPEC = ModelSpec(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 32, "depth": 1, "embed_dim": 128, "num_heads": 2, "num_classes": 5},
)
SHORT = [
    *("reconstruction.iterations=0", "reconstruction.batch_size=8", "reconstruction.refinement_images=0"),
    *("calibration_images=8", "observation_images=8", "equalization=none", "slicing=block"),
]
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(file: Path, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    # Its fusion of Q/DQ writes nodes from opset 21 on, that of INT4, which it then refuses.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    size = session.get_inputs()[0].shape[0]
    return session.run(["logits"], {"images": x[:size] if isinstance(size, int) else x})[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of many kinds, put together by onnx, and the run with the weights beside them; do not change them."""
    folder = tmp_path_factory.mktemp("external")
    whole, beside = folder / "whole", folder / "beside"
    torch.manual_seed(0)
    model = create_model(SPEC)
    batch = Batch(IMAGES, torch.zeros(8, dtype=torch.int64), [str(i) for i in range(8)])
    config = resolve_data_config(model, SPEC, {})
    calibrate(model, SPEC, batch, config, load_recipe("w4a8", SHORT), beside)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serialize, "MAX_BYTES", LIMIT)
        export(beside, extras=EXTRAS)
    whole.mkdir()
    for path in beside.glob("*.onnx"):
        onnx.save_model(onnx.load(str(path)), str(whole / path.name))
    return whole, beside


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "run"))


@pytest.mark.slow
def test_every_file_runs_to_the_same_bits_and_is_listed(pair: tuple[Path, Path]) -> None:
    whole, beside = pair
    files = [path.name for path in whole.glob("*.onnx")]
    assert len(files) == 6
    listed = Run.open(beside).manifest.files
    x = IMAGES.numpy()
    for name in files:
        assert f"{name}.data" in listed and not (whole / f"{name}.data").exists()
        assert (beside / name).stat().st_size <= LIMIT
        np.testing.assert_array_equal(logits(whole / name, x), logits(beside / name, x), err_msg=name)
        onnx.checker.check_model(str(beside / name), full_check=True)


@pytest.mark.slow
def test_where_the_weights_lie(pair: tuple[Path, Path]) -> None:
    model = onnx.load(str(pair[1] / "model.onnx"), load_external_data=False)
    places = []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {e.key: e.value for e in tensor.external_data}
            assert entries["location"] == "model.onnx.data"
            places.append((int(entries["offset"]), int(entries["length"])))
    places.sort()
    assert len(places) > 8 and all(offset % 4096 == 0 for offset, _ in places)
    assert all(
        offset + length <= following for (offset, length), (following, _) in itertools.pairwise(places)
    )
    assert sum(places[-1]) == (pair[1] / "model.onnx.data").stat().st_size


@pytest.mark.slow
def test_lint_validation_and_probes_read_them(pair: tuple[Path, Path]) -> None:
    whole, beside = pair
    x = IMAGES.numpy()
    for name in ("model.onnx", "model_qdq_fp16.onnx", "model_uint8_activations.onnx"):
        assert lint(beside / name) == lint(whole / name)
    sizes = [int(OnnxRuntimeBackend("x", run / "model.onnx", optimize=True).detail["bytes"]) for run in pair]
    assert sizes[0] <= sizes[1] < 2 * sizes[0]
    wanted = frozenset(
        f"{r.name}.codes" for r in Run.open(beside).manifest.quantizers if r.kind == "activation"
    )
    seen = [open_probed(run / "model.onnx", wanted, optimize=False, provider="cpu").run(x) for run in pair]
    assert len(seen[0]) > 8 and seen[0].keys() == seen[1].keys()
    for name, values in seen[0].items():
        np.testing.assert_array_equal(values, seen[1][name])


@pytest.mark.slow
def test_an_export_that_needs_them_no_more_removes_them(copy: Path) -> None:
    beside = logits(copy / "model.onnx", IMAGES.numpy())
    done = export(copy, overwrite=True).run
    np.testing.assert_array_equal(logits(copy / "model.onnx", IMAGES.numpy()), beside)
    for name in ("model.onnx", "model_fp32.onnx"):
        assert not (copy / f"{name}.data").exists() and f"{name}.data" not in done.manifest.files
    assert "model_int4.onnx.data" in Run.open(copy).manifest.files, "another file's weights stay"
    assert not [p for p in copy.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.slow
def test_replaced_and_never_appended_to(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(limit: int) -> dict[str, bytes]:
        monkeypatch.setattr(serialize, "MAX_BYTES", limit)
        serialize.save(*serialize.split(onnx_ir.load(str(pair[0] / "model.onnx"))), tmp_path / "m.onnx")
        return {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    first = save(LIMIT)
    assert sorted(first) == ["m.onnx", "m.onnx.data"] and save(LIMIT) == first
    assert list(save(1 << 30)) == ["m.onnx"]
    assert save(LIMIT) == first


@pytest.mark.slow
def test_wrong_weights_are_refused_by_name(copy: Path, runner_error: Any) -> None:
    data = copy / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx\.data was changed or truncated"):
        Run.open(copy)
    assert "model.onnx.data is not the one" in runner_error("lint", str(copy / "model.onnx"))
    shutil.copy(copy / "model_int4.onnx.data", data)
    assert "the external data model.onnx.data has" in runner_error("lint", str(copy / "model.onnx"))
    data.unlink()
    with pytest.raises(InputError, match=r"lacks model\.onnx\.data"):
        Run.open(copy)
    assert "model.onnx.data cannot be read: No such file" in runner_error("lint", str(copy / "model.onnx"))
    with pytest.raises(InputError):
        OnnxRuntimeBackend("x", copy / "model.onnx", optimize=True)


@pytest.fixture
def runner_error() -> Any:
    """The one line that a command ends with."""
    from typer.testing import CliRunner

    def run(*words: str) -> str:
        error = CliRunner().invoke(app, list(words)).exception
        assert isinstance(error, InputError)
        return str(error)

    return run


@pytest.mark.slow
def test_no_space_for_the_weights_leaves_what_was_there(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensors: Any, path: Path) -> list[int]:
        path.write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    run_copy = Path(shutil.copytree(pair[1], tmp_path / "run"))
    monkeypatch.setattr(serialize, "MAX_BYTES", LIMIT)
    monkeypatch.setattr(serialize, "_write", full)
    before = {p.name: p.read_bytes() for p in run_copy.iterdir()}
    with pytest.raises(InputError, match=r"cannot be written: No space left.*model_fp32\.onnx\.data"):
        export(run_copy, overwrite=True)
    assert {p.name: p.read_bytes() for p in run_copy.iterdir()} == before


def test_too_large_without_its_weights(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serialize, "MAX_BYTES", 10_000)
    proto, tensors = serialize.split(onnx_ir.load(str(pair[0] / "model.onnx")))
    with pytest.raises(InputError, match="one ONNX file holds"):
        serialize.save(proto, tensors, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_size_is_known_beforehand(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for streamed in (100, 10_000, 1 << 40):
        monkeypatch.setattr(serialize, "STREAMED_BYTES", streamed)
        proto, tensors = serialize.split(onnx_ir.load(str(pair[0] / "model.onnx")))
        expected = serialize.file_bytes(proto, tensors)
        serialize.write(proto, tensors, tmp_path / "m.onnx", tmp_path)
        assert 0 <= expected - (tmp_path / "m.onnx").stat().st_size < 16


@pytest.mark.slow
@RTX
def test_an_engine_is_built_from_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole, beside = (
        build_engine(run / "model_qdq_fp16.onnx", tmp_path / f"{run.name}.engine", SETTINGS) for run in pair
    )
    assert whole.fusion == beside.fusion and beside.fusion.quantized_gemms > 0
    assert [layer.kind for layer in whole.layers] == [layer.kind for layer in beside.layers]


def test_lint_reads_what_we_wrote(pair: tuple[Path, Path]) -> None:
    model = read_model(pair[1] / "model.onnx")
    assert not any(
        t.data_location == TensorProto.EXTERNAL and len(t.dims) < 2 for t in model.graph.initializer
    )
