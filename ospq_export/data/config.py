"""The preprocessing a network expects: timm's answer, the user's overrides, and the transform they define."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ospq_export.errors import InputError, refusal_of
from ospq_export.models.record import ModelSpec
from ospq_export.models.sources import preprocessing_of

if TYPE_CHECKING:
    from torch import Tensor, nn

ClassLevel = Literal["first", "path"]
_OVERRIDES = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_WHITE = 255
# What most networks for photographs were trained with.
ASSUMED: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
log = logging.getLogger(__name__)


class ImagesRecord(BaseModel):
    """Where a set of images came from.

    Attributes:
        classes_source: What the classes' numbers rest on, in words; None where the images have no classes or it is not known.
        class_from: Which folders are the classes: the first level below the root, or the whole path; None without class folders.
        passed_over: Files and folders that are no images, by file name ending or, hidden ones, by name, and how many there are.
        notes: What was ignored, assumed or applied in reading images, and for how many of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes_source: str | None = None
    class_from: ClassLevel | None = None
    passed_over: dict[str, int] = {}
    notes: dict[str, int] = {}


class DataConfig(BaseModel):
    """How an image file becomes the network's input.

    Attributes:
        input_size: (channels, height, width) of the network's input, pixels; 1 or 3 channels.
        mean: Per channel, in units of a pixel value scaled to [0, 1]; subtracted.
        std: Per channel, in the same units; divided by.
        interpolation: The filter that resizes.
        crop_pct: Share of the resized image's side that the centre crop keeps.
        crop_mode: `center` keeps the aspect ratio and crops, `squash` does not keep it, `border` pads.
        exif: Whether an image's EXIF orientation is applied; timm ignores it.
        known: Whether all this is known; of tensors that came without it only the input size is.
        assumed: Fields that neither the network's source nor the user stated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    # Without `exif` it is timm's own data configuration, and that of files written before there was such a field.
    exif: bool = Field(default=False, exclude_if=lambda applied: not applied)
    assumed: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    known: bool = Field(default=True, exclude_if=lambda known: known)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.known:
            return self
        channels = self.input_size[0]
        if channels not in (1, 3) or min(self.input_size) < 1:
            raise ValueError(f"input size {self.input_size}: images have 1 or 3 channels and some pixels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} {values}: {channels} finite values are needed, one per channel")
        _check_units(mean=self.mean, std=self.std)
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std}: it divides, so it must be positive")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct {self.crop_pct}: a share above 0 and at most 1 is needed")
        return self

    @property
    def image_mode(self) -> Literal["L", "RGB"]:
        """The mode, in PIL's sense, that images are converted to before the transform."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """What timm evaluates with: image of mode `image_mode` to a float32 tensor of `input_size`."""
        from timm.data import create_transform

        return create_transform(is_training=False, **self.model_dump(exclude={"exif", "assumed", "known"}))


def unknown_preprocessing(input_size: Sequence[int]) -> DataConfig:
    """Of tensors (C, H, W) of which nothing else is known."""
    channels, height, width = input_size
    return DataConfig(
        input_size=(channels, height, width),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        interpolation="bilinear",
        crop_pct=1.0,
        crop_mode="center",
        known=False,
    )


def _check_units(**settings: tuple[float, ...]) -> None:
    """Raises ValueError where a setting is in units of 0..255 instead of [0, 1]."""
    large = {name: values for name, values in settings.items() if max(map(abs, values)) > 1}
    if not large:
        return
    given = " and ".join(f"{name} {_listed(values)}" for name, values in large.items())
    if max(abs(value) for values in large.values() for value in values) > _WHITE:
        raise ValueError(f"{given}: neither in 0..1 nor in 0..255")
    scaled = " ".join(f"`{n}` {_listed([v / _WHITE for v in values])}" for n, values in large.items())
    raise ValueError(f"{given}: above 1, so in units of 0..255; over 255 it is {scaled}")


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def resolve_data_config(model: nn.Module, spec: ModelSpec, overrides: Mapping[str, Any]) -> DataConfig:
    """Finds the preprocessing: overrides first, then what the network was built for, then timm's defaults.

    Args:
        model: The network, as built from `spec`.
        spec: Its `img_size` and `in_chans` win over timm's configuration of the pretrained weights. Other sources state what
            they state; the rest is assumed, and said.
        overrides: Any of DataConfig's fields; None means not given, and one mean or std serves all channels.
            `exif` is False unless given.

    Returns:
        The configuration, with as many means and stds as channels: where timm's do not fit, their average.

    Raises:
        InputError: A value is impossible, or nobody states a size.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    exif = given.pop("exif", False)
    unknown = sorted(given.keys() - set(_OVERRIDES))
    if unknown:
        raise InputError(
            "no such setting", where=", ".join(unknown), fix=f"choose from {', '.join(_OVERRIDES)}"
        )
    try:
        resolved = (
            _from_timm(model, spec, given) if spec.source == "timm" else _from_source(model, spec, given)
        )
        return DataConfig.model_validate({**resolved, "exif": exif})
    except ValidationError as error:
        where, what = error.errors()[0]["loc"], refusal_of(error.errors()[0])
        message = ": ".join([*map(str, where[:1]), what])
    except (ValueError, TypeError, AssertionError) as error:
        message = str(error) or "a setting has an impossible value"
    raise InputError(
        f"the preprocessing does not fit: {message}",
        where=spec.name,
        fix="check `input_size`, `mean`, `std`, `crop_pct`, `interpolation`, and img_size in `model_kwargs`",
    )


def _from_timm(model: nn.Module, spec: ModelSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    from timm.data import resolve_input_data_config

    resolved = resolve_input_data_config(model, {**given, "model_kwargs": spec.kwargs})
    return {key: resolved[key] for key in _OVERRIDES}


def _from_source(model: nn.Module, spec: ModelSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the user gives, then what the source states; what is left is assumed, logged and recorded."""
    found = preprocessing_of(model, spec)
    known = {**found.values, **given}
    if "input_size" not in known:
        fix = "give `input_size`, for example 3,224,224"
        raise InputError("nothing states the size of the network's images", where=spec.name, fix=fix)
    assumed = {key: value for key, value in ASSUMED.items() if key not in known}
    channels = len(known["input_size"]) and known["input_size"][0]
    values = {key: _per_channel(value, channels) for key, value in {**assumed, **known}.items()}
    if assumed:
        said = ", ".join(f"{key} {values[key]}" for key in assumed)
        stated_by = found.stated_by or "the network"
        log.warning("%s: %s does not state all of its preprocessing; assumed: %s", spec.name, stated_by, said)
    return {**values, "assumed": tuple(assumed)}


def _per_channel(value: Any, channels: int) -> Any:
    """One mean or std serves all channels; several that do not fit, by their average, as timm has it."""
    if not isinstance(value, tuple | list) or not value or not isinstance(value[0], float):
        return value
    return tuple(value) if len(value) == channels else (sum(value) / len(value),) * channels
