"""Networks of torchvision, with the weights that it calls DEFAULT."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from ospq_export.errors import InputError, reason_of
from ospq_export.models.preprocessing import Preprocessing, crop_share
from ospq_export.models.record import ModelSpec

_DEFAULT = "DEFAULT"
# By the package that a network lies in.
_OTHER_INPUTS = {
    "detection": "a list of images, and chooses boxes by their content",
    "optical_flow": "pairs of images",
    "video": "clips, not images",
}
_WRAP = "give a network of single images, or a module of your own around its backbone"


def build(spec: ModelSpec, *, pretrained: bool) -> nn.Module:
    """The network; its weights are those named by `weights` in the arguments, else DEFAULT.

    Raises:
        InputError: torchvision has no such network, it does not take these arguments, or its weights cannot be had.
    """
    builder = _builder(spec.name)
    arguments = {key: value for key, value in spec.kwargs.items() if key != "weights"}
    if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
        # Some of them would read the weights of their backbone unasked.
        arguments["weights_backbone"] = None
    weights = _weights(spec) if pretrained else None
    if pretrained and weights is None:
        raise InputError(
            "torchvision has no pretrained weights of this network",
            where=spec.name,
            fix="give weights with `checkpoint`, or ask for `random_weights`",
        )
    try:
        model: nn.Module = builder(weights=weights, **arguments)
    except Exception as error:
        given = " ".join(f"{key}={value!r}" for key, value in spec.kwargs.items())
        raise InputError(
            f"torchvision's {spec.name} cannot be built: {reason_of(error)}",
            where=given or "no `model_kwargs`",
            fix="check `model_kwargs`, and the connection where pretrained weights are read",
        ) from error
    return model


def _builder(name: str) -> Any:
    from torchvision import models

    if name in models.list_models():
        builder = models.get_model_builder(name)
        kind = builder.__module__.split(".")[2]
        if kind in _OTHER_INPUTS:
            raise InputError(f"torchvision's {name} takes {_OTHER_INPUTS[kind]}", where=name, fix=_WRAP)
        return builder
    close = difflib.get_close_matches(name, models.list_models(), n=3)
    fix = f"did you mean {', '.join(close)}?" if close else "torchvision.models.list_models() lists all names"
    raise InputError("torchvision knows no such model", where=name, fix=fix)


def _weights(spec: ModelSpec) -> Any:
    """The member of torchvision's enumeration that the arguments name; None where there is none."""
    from torchvision import models

    kinds = models.get_model_weights(_builder(spec.name))
    name = str(spec.kwargs.get("weights", _DEFAULT)).rpartition(".")[2]
    found = getattr(kinds, name, None)
    if found is None and len(kinds):
        fix = f"choose from {', '.join(kinds.__members__)}"
        raise InputError(f"there are no weights {name}", where=spec.name, fix=fix)
    return found


def preprocessing(model: nn.Module, spec: ModelSpec) -> Preprocessing:
    """What the weights' `transforms()` do: resize, crop and normalise.

    Networks for segmentation are evaluated on whole images, whose shorter side is resized: here a square of that side is cut.
    """
    weights = _weights(spec)
    transform = None if weights is None else weights.transforms()
    resize, mean = getattr(transform, "resize_size", None), getattr(transform, "mean", None)
    if transform is None or not resize or mean is None:
        return Preprocessing()
    side = int(resize[0])
    crop = int(getattr(transform, "crop_size", [side])[0])
    values = {
        "input_size": (len(mean), crop, crop),
        "mean": tuple(mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "crop_pct": crop_share(crop, side),
        "crop_mode": "center",
    }
    return Preprocessing(f"torchvision's weights {weights}", values)
