"""The preprocessing a model gets: timm's, the model's own size and channels, overrides, and what is refused."""

from typing import Any

import pytest
import timm
import torch

from ospq_export.data import DataConfig, resolve_data_config
from ospq_export.errors import InputError
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def vit(**kwargs: Any) -> tuple[torch.nn.Module, ModelSpec]:
    spec = ModelSpec(name="vit_tiny_patch16_224", kwargs={**VIT, **kwargs})
    return create_model(spec), spec


def test_config_is_timms_where_nothing_else_is_said() -> None:
    model, spec = vit()
    config = resolve_data_config(model, spec, {"mean": None})
    assert config.model_dump() == timm.data.resolve_model_data_config(model)


def test_size_and_channels_of_the_model_win_over_timms() -> None:
    assert resolve_data_config(*vit(img_size=(32, 40)), {}).input_size == (3, 32, 40)
    config = resolve_data_config(*vit(img_size=28, patch_size=4, in_chans=1), {})
    assert config.input_size == (1, 28, 28)
    assert config.mean == (0.5,)
    assert config.image_mode == "L"


def test_three_default_means_are_averaged_for_one_channel() -> None:
    spec = ModelSpec(name="resnet18", kwargs={"in_chans": 1})
    config = resolve_data_config(create_model(spec), spec, {})
    assert config.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert config.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))


def test_overrides_win_over_everything() -> None:
    overrides = {"mean": [0.1, 0.2, 0.3], "std": [0.5], "crop_pct": 1.0, "interpolation": "lanczos"}
    config = resolve_data_config(*vit(img_size=32), {**overrides, "crop_mode": "squash"})
    assert config == DataConfig(
        input_size=(3, 32, 32),
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
        crop_pct=1.0,
        interpolation="lanczos",
        crop_mode="squash",
    )


def test_input_size_of_a_model_that_takes_any() -> None:
    spec = ModelSpec(name="resnet18")
    assert resolve_data_config(create_model(spec), spec, {"input_size": (3, 96, 64)}).input_size == (
        3,
        96,
        64,
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"mean": (0.1, 0.2)}, "mean"),
        ({"std": (0.1, 0.2)}, "std"),
        ({"std": (0.1, 0.2, 0.0)}, "positive"),
        ({"mean": (0.1, 0.2, float("nan"))}, "finite"),
        ({"std": (0.1, 0.2, -0.3)}, "positive"),
        ({"mean": (123.675, 116.28, 103.53)}, "in units of 0..255; over 255 it is `mean` 0.485,0.456,0.406"),
        ({"mean": (72.93,) * 3, "std": (90.02,) * 3}, "`mean` 0.286,0.286,0.286 `std` 0.353,0.353,0.353"),
        ({"std": (58.395, 57.12, 57.375)}, "over 255 it is `std` 0.229,0.224,0.225"),
        ({"mean": (-123.0,) * 3}, "in units of 0..255"),
        ({"mean": (400.0,) * 3}, "neither in 0..1 nor in 0..255"),
        ({"mean": ("a", "b", "c")}, "mean"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"crop_pct": -0.5}, "crop_pct"),
        ({"crop_pct": float("nan")}, "crop_pct"),
        ({"input_size": (3, 48, 48)}, "(32, 32)"),
        ({"input_size": (1, 32, 32)}, "accepts 3"),
        ({"input_size": (32, 32)}, "input_size"),
        ({"input_size": 32}, "preprocessing"),
        ({"size": 32}, "no such setting (size)"),
    ],
)
def test_impossible_preprocessing(overrides: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_data_config(*vit(img_size=32), overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_input_size_of_a_model_that_takes_one() -> None:
    with pytest.raises(InputError, match=r"requires \(224, 224\).*img_size in `model_kwargs`"):
        resolve_data_config(*vit(), {"input_size": (3, 48, 48)})


def test_more_channels_than_images_have() -> None:
    with pytest.raises(InputError, match="1 or 3 channels"):
        resolve_data_config(*vit(img_size=32, in_chans=4), {})


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.48145466, 0.26862954), (0.5, 0.5), (-1.0, 1.0)])
def test_usual_means_and_deviations_are_taken(values: tuple[float, float]) -> None:
    config = resolve_data_config(*vit(img_size=32), {"mean": (values[0],), "std": (values[1],)})
    assert (config.mean, config.std) == ((values[0],) * 3, (values[1],) * 3)


def test_orientation_is_kept_and_left_out_where_it_is_timms() -> None:
    turned = resolve_data_config(*vit(img_size=32), {"exif": True})
    plain = resolve_data_config(*vit(img_size=32), {})
    assert turned.exif and not plain.exif
    assert "exif" not in plain.model_dump()
    for config in (turned, plain):
        assert DataConfig.model_validate_json(config.model_dump_json()) == config
    turned.transform()
