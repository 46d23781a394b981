"""What a network is built from: model arguments, timm names, checkpoints."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import timm
import torch
from families import FAMILIES
from safetensors.torch import save_file
from timm.layers import set_fused_attn, use_fused_attn
from torch.overrides import TorchFunctionMode

from ospq_export.errors import InputError
from ospq_export.graph.serialize import describe, rebuild
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model, parse_model_kwargs

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SPEC = ModelSpec(name="vit_tiny_patch16_224", kwargs=SMALL)


def reference() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(SPEC.name, **SMALL).eval()


def with_checkpoint(path: Path, **kwargs: object) -> ModelSpec:
    return ModelSpec(name=SPEC.name, kwargs={**SMALL, **kwargs}, checkpoint=str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("   ", {}),
        ("img_size=112 num_classes=10", {"img_size": 112, "num_classes": 10}),
        ("depths=(2, 4, 2)  num_heads=[2,4,8]", {"depths": (2, 4, 2), "num_heads": (2, 4, 8)}),
        ("qkv_bias=False drop=0.5 norm=None", {"qkv_bias": False, "drop": 0.5, "norm": None}),
        ("act_layer=relu global_pool='avg max'", {"act_layer": "relu", "global_pool": "avg max"}),
        ("cfg={'a': [1, 2]} x=-1", {"cfg": {"a": (1, 2)}, "x": -1}),
        ("text='a=b'", {"text": "a=b"}),
    ],
)
def test_model_kwargs_are_python_literals(text: str, expected: dict[str, object]) -> None:
    assert parse_model_kwargs(text) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("img_size", "img_size"),
        ("img_size = 112", "img_size = 112"),
        ("=3", "=3"),
        ("1a=3", "1a=3"),
        ("depths=(2,4", "depths=(2,4"),
        ("img_size=112,", "img_size=112,"),
        ("img_size=112,num_classes=10", "img_size=112,num_classes=10"),
        ("a=1 a=2", "a"),
        ("qkv_bias=false", "write False"),
        ("codes={1,2}", "codes={1,2}"),
        ("f=open('x')", "f=open('x')"),
    ],
)
def test_bad_model_kwargs_are_named(text: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_model_kwargs(text)
    assert named in str(caught.value)


def test_spec_survives_json() -> None:
    spec = ModelSpec(name="swin_tiny_patch4_window7_224", kwargs={"depths": [2, 4], "img_size": (28, 28)})
    assert ModelSpec.model_validate(json.loads(spec.model_dump_json())) == spec
    assert spec.kwargs["depths"] == (2, 4)


def test_network_is_timms_own_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = create_model(SPEC)
    images = torch.randn(2, 3, 32, 32)
    assert not model.training
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(images), reference()(images))


class _Calls(TorchFunctionMode):
    """Names of the torch functions that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def calls(model: torch.nn.Module, images: torch.Tensor) -> set[str]:
    with _Calls() as seen:
        model(images)
    return seen.names


@pytest.fixture
def every_fused_attention() -> Iterator[None]:
    """Fused attention also where timm does not choose it by itself, as in Swin."""
    set_fused_attn(True, experimental=True)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ModelSpec(
            name="swin_tiny_patch4_window7_224",
            kwargs={"img_size": 28, "patch_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)},
        ),
    ],
    ids=["vit", "swin"],
)
def test_attention_is_explicit_and_timms_setting_is_left_alone(
    spec: ModelSpec, every_fused_attention: None
) -> None:
    images = torch.randn(1, 3, spec.kwargs["img_size"], spec.kwargs["img_size"])
    fused = timm.create_model(spec.name, **spec.kwargs).eval()
    assert "scaled_dot_product_attention" in calls(fused, images)
    explicit = calls(create_model(spec), images)
    assert "scaled_dot_product_attention" not in explicit
    assert "softmax" in explicit
    assert use_fused_attn(experimental=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("no-such-thing-at-all", "timm knows no such model"),
        ("", "timm knows no such model"),
        ("someone/model", "`checkpoint`, or begin with hf-hub:"),
        ("some/where/model.onnx", "`checkpoint`"),
        ("vit_tiny_patch16_224.nosuchtag", "nosuchtag"),
    ],
)
def test_unknown_model(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        create_model(ModelSpec(name=name))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"image_size": 32}, "image_size"),
        ({"embed_dim": 25}, "divisible"),
        ({"img_size": "32"}, "img_size='32'"),
        ({"num_classes": -3}, "fewer than no classes"),
        ({"checkpoint_path": "x.pth"}, "checkpoint_path"),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_wrong_kwargs(kwargs: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        create_model(ModelSpec(name=SPEC.name, kwargs={**SMALL, **kwargs}))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_networks_without_a_classifier() -> None:
    own = ModelSpec(name="vit_small_patch14_dinov2", kwargs={"depth": 1, "img_size": 28})
    asked = ModelSpec(name=SPEC.name, kwargs={**SMALL, "num_classes": 0})
    for spec in (own, asked):
        model = create_model(spec, load_weights=False)
        size = (3, *model.patch_embed.img_size)
        assert model(torch.randn(1, *size)).shape == (1, model.num_features)


def test_features_only() -> None:
    spec = ModelSpec(name="resnet10t", kwargs={"features_only": True, "out_indices": (1, 3)})
    features = create_model(spec)(torch.randn(1, 3, 64, 64))
    assert [tuple(f.shape[1:]) for f in features] == [(64, 16, 16), (256, 4, 4)]


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_checkpoints(tmp_path: Path, wrap: str, prefix: str) -> None:
    source = reference()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(state if wrap == "plain" else {wrap: state, "epoch": 3}, tmp_path / "w.pth")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(create_model(with_checkpoint(tmp_path / "w.pth"))(images), source(images))


def test_safetensors_checkpoint_in_half_precision(tmp_path: Path) -> None:
    source = reference()
    save_file({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = create_model(with_checkpoint(tmp_path / "w.safetensors")).state_dict()
    for key, value in source.state_dict().items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], value.half().float()), key


def test_checkpoint_of_another_resolution_is_resampled_by_timm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(reference().state_dict(), tmp_path / "w.pth")
    model = create_model(with_checkpoint(tmp_path / "w.pth", img_size=64))
    assert tuple(model.state_dict()["pos_embed"].shape) == (1, 1 + 8 * 8, 24)
    assert torch.equal(model.state_dict()["head.weight"], reference().state_dict()["head.weight"])
    assert "adapted" in caplog.text


def test_no_weights_are_read_when_none_are_asked_for(tmp_path: Path) -> None:
    model = create_model(with_checkpoint(tmp_path / "missing.safetensors"), load_weights=False)
    assert model.state_dict().keys() == reference().state_dict().keys()


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"depth": 3}, "12 missing: blocks.2"),
        ({"depth": 1}, "12 unknown: blocks.1"),
        ({"num_classes": 7}, "head.weight is (5, 24), the model's (7, 24)"),
    ],
)
def test_checkpoint_of_another_model(tmp_path: Path, kwargs: dict[str, object], expected: str) -> None:
    torch.save(reference().state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        create_model(with_checkpoint(tmp_path / "w.pth", **kwargs))
    assert expected in str(caught.value)
    assert "w.pth" in str(caught.value)


def test_integer_weights_are_not_taken_for_float(tmp_path: Path) -> None:
    state = reference().state_dict()
    torch.save({**state, "head.weight": state["head.weight"].to(torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"head\.weight is \(5, 24\) torch\.int8"):
        create_model(with_checkpoint(tmp_path / "w.pth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = reference().state_dict()
    state["blocks.1.mlp.fc1.weight"][3, 4] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"NaN or infinite: blocks\.1\.mlp\.fc1\.weight \("):
        create_model(with_checkpoint(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_checkpoints(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    state = reference().state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not weights at all", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read") as caught:
            create_model(with_checkpoint(path))
        assert "\n" not in str(caught.value)


class _Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (str(self.path),)


def test_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": _Trap(tmp_path / "sprung")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="tensors only"):
        create_model(with_checkpoint(tmp_path / "w.pth"))
    assert not (tmp_path / "sprung").exists()


def test_missing_checkpoint_and_a_folder_in_its_place(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "missing.pth", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=reason) as caught:
            create_model(with_checkpoint(path))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"epoch": 3, "net": {"a": 1}}, [1, 2], torch.zeros(3)])
def test_torch_file_without_a_state_dictionary(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth"):
        create_model(with_checkpoint(tmp_path / "w.pth"))


@pytest.mark.slow
def test_pretrained_weights_that_cannot_be_had(tmp_path: Path) -> None:
    program = (
        "from ospq_export.models.timm import ModelSpec, create_model\n"
        "create_model(ModelSpec(name='vit_tiny_patch16_224', pretrained=True))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ospq_export.errors.InputError: timm's pretrained weights cannot be loaded")
    assert "vit_tiny_patch16_224" in last


# One of each kind; benchmarks/models.py has them all.
NAMES = (*("DINOv2", "EVA-02", "Swin v2", "EfficientFormer", "FastViT", "Hiera", "ConvNeXt v2"),)


@pytest.mark.slow
@pytest.mark.parametrize("label", NAMES)
def test_family(label):
    family = FAMILIES[label]
    images = models.random_images(2, (3, family.side, family.side))
    quantized = models.quantized_family(family, models.BITS["W8A8"], images)
    described = json.loads(json.dumps(describe(quantized.captured)))
    rebuilt = rebuild(described, Path("graph.json"))
    for name, constant in quantized.captured.named_buffers():
        rebuilt.get_buffer(name).set_(constant)
    assert torch.equal(rebuilt(images), quantized.captured(images))
    seen = models.compare(quantized, images)
    # Given equal inputs, a code is the fake-quantizer's or, at a rounding edge, its neighbour.
    assert seen.max_step <= 1 and seen.excess < 5e-3 and seen.share < 0.5, seen
    # Free-running, random weights let differences grow up to quantization's own error, and no further.
    assert seen.deployed < 2 + 4 * seen.floor, seen
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    fusion = models.compiled(quantized)
    assert fusion.gemms >= len(quantized.network.weights) > 5
    # A product that is not on Int8 has a reason: nothing is lost in silence, and most are.
    assert fusion.quantized_gemms + len(fusion.not_quantized) == fusion.gemms and all(
        fusion.not_quantized.values()
    )
    assert fusion.quantized_gemms >= 0.5 * fusion.gemms, fusion.not_quantized
    assert fusion.fused_attentions + len(fusion.not_fused) == fusion.attentions
