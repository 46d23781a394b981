"""Before work: sizes, folders, devices, targets; refused before a network is built, an image decoded or a file written."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RTX
from typer.testing import CliRunner

from ospq_export.cli.app import app
from ospq_export.demo import demo_images
from ospq_export.engines.build import BuildSettings, check_settings
from ospq_export.engines.products import Product
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model, network_bytes
from ospq_export.onnx.serialize import ONNX_BYTES, files_summary
from ospq_export.runs.run import Run
from ospq_export.validate import validate
from ospq_export.world import room
from ospq_export.world.memory import available_memory, group_memory

GB = 10**9


def command(*words: str) -> str:
    """The one line that a command ends with."""
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, InputError), result.output
    assert result.exit_code != 0
    return str(result.exception)


@pytest.mark.parametrize(
    ("free", "refused", "warned"), [(9, True, False), (15, False, True), (25, False, False)]
)
def test_room_on_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, free: int, refused: bool, warned: bool
) -> None:
    caplog.set_level(logging.WARNING)
    try:
        room.check_disk(tmp_path, "the files", certain=10 * GB, likely=20 * GB, free=free * GB)
    except InputError as error:
        assert refused and "the files take at least 10.0 GB of disk, 9.0 GB are free" in str(error)
        assert "free some space" in str(error)
    else:
        assert not refused
    assert [r.message for r in caplog.records] == (
        [
            f"the files take about 20.0 GB of disk, 15.0 GB are free in {tmp_path}: "
            "free some space, or choose another folder"
        ]
        if warned
        else []
    )


def test_room_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"weights take at least 3\.0 GB of memory, 2\.0 GB are available"):
        room.check_memory("weights", certain=3 * GB, likely=4 * GB, fix="less", available=2 * GB)
    room.check_memory("weights", certain=1 * GB, likely=3 * GB, fix="less", available=2 * GB)
    assert "weights take about 3.0 GB of memory, 2.0 GB are available: less" in caplog.text


def test_free_disk_of_a_folder_to_come(tmp_path: Path) -> None:
    assert room.free_disk(tmp_path / "a" / "b") == pytest.approx(room.free_disk(tmp_path), rel=0.2)
    assert room.nearest_folder(tmp_path / "a" / "b") == tmp_path


def test_images_and_budget() -> None:
    size = (3, 224, 224)
    image = 4 * 3 * 224 * 224
    room.check_images(1000, size, None, 32, available=1000 * image)
    with pytest.raises(
        InputError, match=r"1,000 calibration images of 3x224x224.*`data`.*calibration_images"
    ):
        room.check_images(1000, size, None, 32, available=1000 * image - 1)
    room.check_images(1000, size, 64 * image, 32, available=GB)
    with pytest.raises(InputError, match=r"one batch of 32 images takes .*`memory_budget`"):
        room.check_images(1000, size, 64 * image - 1, 32, available=GB)


def test_what_the_files_weigh() -> None:
    line = files_summary(2_300_000_000, 570_000_000, ONNX_BYTES)
    assert line == (
        "files: float.safetensors 2.3 GB, quantized.safetensors 0.6 GB; of an export: model.onnx 0.6 GB, "
        "model_fp32.onnx 2.3 GB (its weights in a file beside it)"
    )
    assert room.gigabytes(4_200_000) == "0.0042 GB"


def test_network_bytes_without_the_network() -> None:
    kwargs = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5, "img_size": 32}
    spec = ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs)
    state = torch.random.get_rng_state()
    found = network_bytes(spec)
    assert torch.equal(torch.random.get_rng_state(), state), "the seeded weights stay what they are"
    assert found == sum(4 * p.numel() for p in create_model(spec).parameters())
    assert network_bytes(ModelSpec(name="no_such_model")) is None


@pytest.mark.parametrize(
    ("files", "line", "left"),
    [
        (
            {"job": {"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 100"}},
            "0::/job",
            400,
        ),
        # The limit of the group above counts as well, and "max" is none.
        (
            {
                "": {"memory.max": "500", "memory.current": "450", "memory.stat": "anon 3"},
                "job": {"memory.max": "max", "memory.current": "1", "memory.stat": ""},
            },
            "0::/job",
            50,
        ),
        # Version 1, where a container sees its own group as the root and is named by the host's path.
        (
            {
                "memory": {
                    "memory.limit_in_bytes": "900",
                    "memory.usage_in_bytes": "950",
                    "memory.stat": "total_inactive_file 20",
                }
            },
            "5:memory:/docker/abc",
            0,
        ),
        ({}, "0::/job", None),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, files: dict[str, dict[str, str]], line: str, left: int | None
) -> None:
    for folder, entries in files.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, text in entries.items():
            (tmp_path / folder / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(f"{line}\n1:cpu:/x\n")
    found = min(group_memory(tmp_path, tmp_path / "membership"))
    assert found == left if left is not None else found > 10**15
    assert min(group_memory(tmp_path, tmp_path / "nothing")) > 10**15
    assert 0 < available_memory() < 10**14


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever builds a network fails."""

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a network is built")

    monkeypatch.setattr("ospq_export.models.sources.create_model", built)


def calibrate_words(tmp_path: Path, *words: str) -> list[str]:
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True, exist_ok=True)
    return [
        *("calibrate", "vit_tiny_patch16_224", "--random-weights", "--data", str(data)),
        *("--out", str(tmp_path / "run"), *words),
    ]


@pytest.mark.usefixtures("no_network")
def test_calibrate_refuses_before_the_network_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = calibrate_words(tmp_path)
    (tmp_path / "file").write_text("")
    cases = {
        ("--device", "cuda:77"): "`device`",
        ("--device", "nonsense"): "`device`",
        ("--out", str(tmp_path / "file" / "run")): "is not a folder",
        ("--out", str(tmp_path / "data" / "run")): "among the images",
        ("--out", str(tmp_path / "data" / ".." / "data")): "among the images",
        ("--log-json", str(tmp_path)): "it is a folder",
        ("--log-json", str(tmp_path / "none" / "log")): "there is no folder",
        ("--memory-budget", "many"): "no amount of memory",
    }
    for given, message in cases.items():
        assert message in command(*words, *given), given
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "cannot be shared evenly by 3 processes" in command(*words)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(room, "free_disk", lambda _: 1000)
    assert "take at least 0.0" in (line := command(*words)) and "GB of disk" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_network")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_calibrate_refuses_a_closed_folder(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "cannot be written to" in command(*calibrate_words(tmp_path), "--out", str(closed / "run"))


def test_access_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="cannot be written to"):
        room.check_folder(tmp_path / "run", "--out")
    with pytest.raises(InputError, match="permission denied"):
        room.check_file(tmp_path / "log", "--log-json")


def test_images_are_not_decoded_for_what_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    def decoded(*_: Any, **__: Any) -> None:
        raise AssertionError("an image is decoded")

    monkeypatch.setattr("ospq_export.data.ImageSet.sample", decoded)
    words = calibrate_words(
        tmp_path, "--model-kwargs", "img_size=32 depth=1 embed_dim=48 num_heads=3 num_classes=5"
    )
    for index in range(40):
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / "a" / f"{index}.png")
    recipe = tmp_path / "cuts.toml"
    cases = {
        ("--set", "reconstruction.batch_size=64"): "40 calibration images are fewer than a batch of 64",
        ("--memory-budget", "100kB"): "`memory_budget`",
        ("--set", "slicing=['no_such_cut']"): "slicing",
        (
            "--set",
            'overrides={"blocks.11.mlp.*"="float"}',
        ): "'blocks.11.mlp.*' fits no operator of this network (the recipe's overrides): the closest are blocks.0.mlp.fc",
        ("--set", 'overrides={"*matmul*"="nvfp4"}'): "cannot have nvfp4",
    }
    for given, message in cases.items():
        assert message in command(*words, *given), given
    assert not recipe.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--profile", "1,2,3"),
        ("--compute-capability", "SM89"),
        ("--workspace", "5"),
        ("--timing-cache", "x"),
        ("--version-compatible",),
        ("--hardware-compatibility", "ampere_plus"),
    ],
)
def test_engine_options_without_an_engine(tmp_path: Path, option: tuple[str, ...]) -> None:
    assert f"only an engine has these ({option[0]}): give --engine" in command(
        "export", str(tmp_path), *option
    )


@RTX
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": (4, 2, 8)}, "min, opt and max have to ascend"),
        ({"profile": (0, 1, 1)}, "min, opt and max have to ascend"),
        ({"compute_capabilities": ("SM999",)}, "SM89"),
        ({"compute_capabilities": ("NONE",)}, "use one of SM"),
        ({"version_compatible": True}, "`version_compatible`"),
        ({"hardware_compatibility": "ampere_plus"}, "`hardware_compatibility`"),
        ({"timing_cache": Path("x")}, "`timing_cache`"),
        ({"workspace_mib": 0}, "`workspace`"),
    ],
)
def test_targets(settings: dict[str, Any], message: str) -> None:
    given = {"compute_capabilities": ("SM89",), **settings}
    with pytest.raises(InputError, match=message):
        check_settings(BuildSettings(Product.TENSORRT_RTX, **given))


@RTX
@pytest.mark.slow
def test_what_only_the_builder_refuses_leaves_the_run_as_it_was(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in run_copy.iterdir()}
    words = ("export", str(run_copy), "--engine", "tensorrt-rtx", "--compute-capability", "SM89", "-q")
    # Less scratch memory than any kernel takes: known to the builder alone.
    assert "refuses to build" in command(*words, "--overwrite", "--batch-size", "3", "--workspace", "1")
    assert {p.name: p.read_bytes() for p in run_copy.iterdir()} == before
    assert "not three batch sizes" in command(*words, "--overwrite", "--profile", "1,2,four")
    assert {p.name: p.read_bytes() for p in run_copy.iterdir()} == before


@pytest.mark.slow
def test_export_and_validate_refuse_before_work(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(run_copy)
    images = demo_images("test", run.manifest.data)

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("ospq_export.runs.run.rebuild", worked)
    monkeypatch.setattr("ospq_export.data.ImageSet.batches", worked)
    for options, message in (
        ({"backends": ["nothing"]}, "there is no execution 'nothing'"),
        ({"backends": ["float", "tensorrt"]}, "tensorrt"),
        ({"backends": ["float", "onnxruntime-fp16"]}, r"no model_fp16\.onnx"),
        ({"device": "nonsense"}, "`device`"),
        ({"device": "cuda:77"}, "`device`"),
    ):
        with pytest.raises(InputError, match=message):
            validate(run, images, **options)
    with monkeypatch.context() as patch:
        patch.setattr("ospq_export.world.memory.available_memory", lambda: 1000)
        with pytest.raises(InputError, match=r"100 images of 1x28x28 take at least .*`batch_size`"):
            validate(run, images)
    with monkeypatch.context() as patch:
        patch.setattr(room, "free_disk", lambda _: 1000)
        with pytest.raises(InputError, match="the exported files take at least"):
            export(run_copy, overwrite=True)
    assert Run.open(run_copy).manifest == run.manifest
