"""Building a timm network from a description that fits into a manifest."""

import ast
import difflib
import logging
import re
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn

from ospq_export.errors import InputError, reason_of
from ospq_export.models.preprocessing import Preprocessing
from ospq_export.models.record import ModelSpec, plain
from ospq_export.models.sources import create_model, network_bytes
from ospq_export.world.processes import local_rank

__all__ = ["ModelSpec", "create_model", "network_bytes", "parse_model_kwargs", "torch_device"]
logger = logging.getLogger(__name__)

# Arguments of timm.create_model that would read weights, or place them, behind the specification's back.
_RESERVED = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "device",
        "dtype",
        "model_name",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)
_PREFIXES = ("hf-hub:", "local-dir:", "torchvision:", "transformers:", "module:")
_ELSEWHERE = _PREFIXES[:2]  # as timm itself reads them
_STATED = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_NOT_PYTHON = {"true": "True", "false": "False", "none": "None", "null": "None"}


def parse_model_kwargs(text: str) -> dict[str, Any]:
    """Reads model arguments as timm's own scripts do, from one string.

    Args:
        text: For example `img_size=112 depths=(2, 4, 2) act_layer=relu`: values are Python literals, and a
            bare word is a string.

    Returns:
        The arguments by name, lists as tuples.

    Raises:
        InputError: A part is not `name=value`, its value is no literal, or a name comes twice.
    """
    kwargs: dict[str, Any] = {}
    for part in re.split(r"\s+(?=[^\W\d]\w*=)", text.strip()) if text.strip() else []:
        match = re.fullmatch(r"([^\W\d]\w*)=(.*)", part, re.DOTALL)
        if match is None:
            fix = "write them like 'img_size=112 num_classes=10'"
            raise InputError("a model argument is not name=value", where=part, fix=fix)
        if match[1] in kwargs:
            raise InputError("a model argument is given twice", where=match[1], fix="give it once")
        kwargs[match[1]] = _literal(match[2], part)
    return kwargs


def _literal(text: str, part: str) -> Any:
    """The Python literal, or the bare word, that `text` is."""
    if text in _NOT_PYTHON:
        fix = f"write {_NOT_PYTHON[text]}"
        raise InputError("a model argument's value is not Python", where=part, fix=fix)
    try:
        # '112,' is a tuple to Python, but a slip of the one who separates arguments with commas.
        if not text.endswith(","):
            return plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if re.fullmatch(r"[\w.\-/]+", text):
            return text
    raise InputError(
        "a model argument's value is no Python literal",
        where=part,
        fix="separate arguments by spaces, and put text in quotes",
    )


def build(spec: ModelSpec, *, pretrained: bool) -> nn.Module:
    """The network, with attention as explicit matrix products.

    Raises:
        InputError: unknown model, arguments it does not take, or pretrained weights that cannot be had.
    """
    _check_name(spec.name)
    model = _build_pretrained(spec) if pretrained else _build(spec)
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def preprocessing(model: nn.Module, spec: ModelSpec) -> Preprocessing:
    """Timm's own answer; where its means do not fit the channels, their average.

    Raises:
        InputError: an argument of the network has an impossible value.
    """
    from timm.data import resolve_input_data_config

    found = resolve_input_data_config(model, {"model_kwargs": spec.kwargs})
    return Preprocessing("timm", {key: found[key] for key in _STATED})


def for_size(spec: ModelSpec, input_size: tuple[int, ...] | None) -> ModelSpec:
    """The specification with `img_size` where a network that is built for one size is asked for another.

    Args:
        spec: of any source; other sources' networks, and those that take images of any size, stay as they are.
        input_size: (channels, height, width) in pixels; None where none is asked for.
    """
    if spec.source != "timm" or input_size is None or len(input_size) != 3 or "img_size" in spec.kwargs:
        return spec
    size = input_size[1] if input_size[1] == input_size[2] else tuple(input_size[1:])
    sized = spec.model_copy(update={"kwargs": {**spec.kwargs, "img_size": size}})
    if not _is_fixed(spec, tuple(input_size[1:])):
        return spec
    logger.warning("%s: built with img_size=%s for the size of its input", spec.name, size)
    return sized


def _is_fixed(spec: ModelSpec, size: tuple[int, ...]) -> bool:
    """Whether the network takes `img_size`, and is built for another one than `size` without it."""
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(spec.name, pretrained=False, **spec.kwargs)
            if tuple(model.pretrained_cfg["input_size"][1:]) == size:
                return False
            timm.create_model(spec.name, pretrained=False, **spec.kwargs, img_size=size)
    except TypeError:
        return False
    except Exception:
        # It takes the argument, and not this value, or cannot be built at all: that is said when it is built in earnest.
        return True
    return True


def _check_name(name: str) -> None:
    if name.startswith(_ELSEWHERE):
        _check_folder(name)
        return
    if re.search(r"[:/\\]", name):
        fix = f"give local weights with `checkpoint`, or begin with {', '.join(_PREFIXES)}"
        raise InputError("a model is called by its name in timm", where=name, fix=fix)
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
    fix = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names"
    raise InputError("timm knows no such model", where=name, fix=fix)


def _check_folder(name: str) -> None:
    """A folder is named with its configuration in it, before timm looks for it."""
    schema, _, path = name.partition(":")
    if schema == "local-dir" and not (Path(path) / "config.json").is_file():
        raise InputError(
            "there is no config.json", where=path, fix="give a folder that timm saved for its hub"
        )


def _build(spec: ModelSpec) -> nn.Module:
    """The module with random weights; whatever its constructor raises is blamed on the arguments."""
    reserved = sorted(_RESERVED & spec.kwargs.keys())
    if reserved:
        where = ", ".join(reserved)
        raise InputError("not a keyword argument of the network", where=where, fix="leave it out")
    classes = spec.kwargs.get("num_classes", 0)
    if isinstance(classes, int) and classes < 0:
        raise InputError(
            "fewer than no classes", where=f"num_classes={classes}", fix="0 leaves the classifier out"
        )
    try:
        model: nn.Module = timm.create_model(spec.name, pretrained=False, **spec.kwargs)
    except Exception as error:
        given = " ".join(f"{key}={value!r}" for key, value in spec.kwargs.items())
        raise InputError(
            f"{spec.name} cannot be built with these arguments: {_said(error)}",
            where=given or "no `model_kwargs`",
            fix="check `model_kwargs` and the name's weight tag",
        ) from error
    return model


def _build_pretrained(spec: ModelSpec) -> nn.Module:
    """The module with timm's pretrained weights."""
    # Built without weights first: what fails then is the arguments' fault, not the network's.
    classes = getattr(_build(spec), "num_classes", 0)
    try:
        model: Any = timm.create_model(spec.name, pretrained=True, **spec.kwargs)
    except Exception as error:
        raise InputError(
            f"timm's pretrained weights cannot be loaded: {_said(error)}",
            where=spec.name,
            fix="check the connection, or give weights with `checkpoint`",
        ) from error
    if classes > 0 and classes != model.pretrained_cfg["num_classes"]:
        logger.warning("%s: the pretrained weights have another classifier; this one is random", spec.name)
    return cast(nn.Module, model)


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or reason_of(error)


def torch_device(name: str) -> torch.device:
    """A torch device by name, tried out; "cuda" is the process's own, as torchrun numbers them.

    Raises:
        InputError: there is no such device, or it does not work on this machine.
    """
    try:
        device = torch.device(name)
        if device == torch.device("cuda"):
            device = torch.device("cuda", local_rank())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        what = f"device {name!r} cannot be used: {reason_of(error)}"
        raise InputError(what, where="`device`", fix="use `device` cpu") from error
    return device
