"""Networks of the transformers library, from a local folder or its hub. No code of theirs is run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ospq_export.errors import InputError, listed, reason_of
from ospq_export.models.preprocessing import Preprocessing, crop_share
from ospq_export.models.record import ModelSpec

logger = logging.getLogger(__name__)

_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers
_SQUASHED_FROM = 384  # ConvNeXT's processor resizes larger images without a crop
_BYTE = 1 / 255


def build(spec: ModelSpec, *, pretrained: bool) -> nn.Module:
    """The network that config.json names, with the weights beside it; the arguments override entries of config.json.

    Raises:
        InputError: transformers is not installed, there is no configuration, it takes other inputs than images or needs code
            of its own, or the weights cannot be read.
    """
    _library()
    with _quiet():
        config = _config(spec)
        kind = _class(spec, config)
        try:
            model, missing = _loaded(kind, spec, config) if pretrained else (kind(config), [])
        except Exception as error:
            raise InputError(
                f"{kind.__name__} cannot be built: {reason_of(error)}",
                where=spec.name,
                fix="check the folder's safetensors, the connection and `model_kwargs`",
            ) from error
    if missing:
        logger.warning("%s: the weights lack %s, which are random", spec.name, listed(missing))
    if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        raise InputError(
            f"{kind.__name__} takes {model.main_input_name}, not images",
            where=spec.name,
            fix="give a network of images alone, for example the vision tower",
        )
    result: nn.Module = model.eval()
    return result


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "transformers is not installed", fix="pip install 'ospq-export[transformers]'"
        ) from error
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and load reports: what matters of them is said by us."""
    from transformers.utils import logging as reports

    before, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(before)
        if bars:
            reports.enable_progress_bar()


def _config(spec: ModelSpec) -> Any:
    folder = Path(spec.name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            "the folder has no config.json", where=folder, fix="give one that save_pretrained wrote"
        )
    try:
        found = _library().AutoConfig.from_pretrained(
            spec.name, trust_remote_code=False, return_unused_kwargs=True, **spec.kwargs
        )
    except Exception as error:
        raise InputError(
            f"the configuration cannot be read: {reason_of(error)}",
            where=spec.name,
            fix="give a folder with config.json, or a name of the hub; code from there is never run",
        ) from error
    config, unused = found
    unused.pop("trust_remote_code", None)
    if unused:
        where = ", ".join(unused)
        raise InputError("no entry of the network's configuration", where=where, fix="leave it out")
    if getattr(config, "auto_map", None):
        logger.warning("%s: its configuration asks for code of its own, which is not run", spec.name)
    return config


def _class(spec: ModelSpec, config: Any) -> Any:
    """The class that the configuration names, of the library's own; AutoModel's where it names none."""
    library, names = _library(), getattr(config, "architectures", None) or []
    for name in names:
        if (kind := getattr(library, name, None)) is not None:
            return kind
    try:
        return library.AutoModel._model_mapping[type(config)]
    except KeyError as error:
        named = ", ".join(names) or config.model_type
        fix = "give a network that the library has"
        raise InputError(f"transformers has no {named}", where=spec.name, fix=fix) from error


def _loaded(kind: Any, spec: ModelSpec, config: Any) -> tuple[Any, list[str]]:
    """The network with its weights, and the names of those that are missing."""
    model, report = kind.from_pretrained(
        spec.name,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are named instead
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    other = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if other:
        raise ValueError(f"the weights have another shape: {listed(other)}")
    return model, sorted(report["missing_keys"])


def preprocessing(model: nn.Module, spec: ModelSpec) -> Preprocessing:
    """What preprocessor_config.json states.

    Raises:
        InputError: it does what no image is put through here: channels in another order, or another scale than 1/255.
    """
    _library()
    from transformers import AutoImageProcessor

    try:
        with _quiet():
            stated = AutoImageProcessor.from_pretrained(spec.name, trust_remote_code=False).to_dict()
    except Exception:
        return Preprocessing()
    _check(stated, spec)
    return Preprocessing(f"preprocessor_config.json of {spec.name}", _values(stated))


def _check(stated: dict[str, Any], spec: ModelSpec) -> None:
    what = None
    if stated.get("do_flip_channel_order"):
        what = "BGR images (do_flip_channel_order)"
    elif not stated.get("do_rescale", True) or abs((stated.get("rescale_factor") or _BYTE) - _BYTE) > 1e-6:
        what = f"pixels scaled otherwise than by 1/255 (rescale_factor {stated.get('rescale_factor')})"
    if what is not None:
        fix = "put that into a module of your own around the network"
        raise InputError(f"the network wants {what}", where=f"{spec.name}, preprocessor_config.json", fix=fix)


def _values(stated: dict[str, Any]) -> dict[str, Any]:
    normalise = stated.get("do_normalize", True)
    mean, std = (
        stated.get(key) if normalise else [value] * 3
        for key, value in (("image_mean", 0.0), ("image_std", 1.0))
    )
    values: dict[str, Any] = {} if mean is None else {"mean": tuple(mean)}
    values |= {} if std is None else {"std": tuple(std)}
    if stated.get("resample") is not None:
        values["interpolation"] = _FILTERS[int(stated["resample"])]
    return values | _sizes(stated, 3 if mean is None else len(mean))


def _sizes(stated: dict[str, Any], channels: int) -> dict[str, Any]:
    """Input size and crop; nothing where images keep their shape, as those of detectors do."""
    size, crop = _pair(stated.get("size")), _pair(stated.get("crop_size"))
    shortest = (
        (stated.get("size") or {}).get("shortest_edge") if isinstance(stated.get("size"), dict) else None
    )
    if stated.get("crop_pct") and shortest:
        squashed = shortest >= _SQUASHED_FROM
        share = 1.0 if squashed else float(stated["crop_pct"])
        return _fields(channels, (shortest, shortest), share, "squash" if squashed else "center")
    if stated.get("do_center_crop") and crop:
        resized = shortest or (size[0] if size else crop[0])
        return _fields(channels, crop, crop_share(crop[0], int(resized)), "center" if shortest else "squash")
    return _fields(channels, size, 1.0, "squash") if size else {}


def _pair(value: Any) -> tuple[int, int] | None:
    """(height, width) of what the file writes as a number or a mapping."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict) and value.get("height") and value.get("width"):
        return int(value["height"]), int(value["width"])
    return None


def _fields(channels: int, size: tuple[int, int], share: float, mode: str) -> dict[str, Any]:
    return {"input_size": (channels, *size), "crop_pct": share, "crop_mode": mode}
