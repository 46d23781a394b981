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
from ospq_export.models.record import ModelSpec, plain
from ospq_export.models.weights import check_finite, load_checkpoint
from ospq_export.world.processes import local_rank

logger = logging.getLogger(__name__)

# Arguments of timm.create_model that would read weights, or place them, behind the specification's back.
_RESERVED = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "device",
        "dtype",
        "features_only",
        "model_name",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)
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


def network_bytes(spec: ModelSpec) -> int | None:
    """float32 bytes of a network's parameters, from its structure alone, or None where that cannot be made without them."""
    try:
        with torch.device("meta"):
            model = timm.create_model(spec.name, pretrained=False, **spec.kwargs)
    except Exception:
        # A constructor that reads values, or arguments that are wrong: who builds the network in earnest says which.
        return None
    return sum(4 * p.numel() for p in model.parameters())


def create_model(spec: ModelSpec, *, load_weights: bool = True) -> nn.Module:
    """Builds the network: float32, on the CPU, in eval mode, with attention as explicit matrix products.

    Args:
        spec: What to build.
        load_weights: False builds the same module with random weights and reads nothing.

    Returns:
        The network, (B, C, H, W) float32 to (B, K) float32 logits. Weights that are neither read nor
        pretrained are random, from torch's global generator.

    Raises:
        InputError: Unknown model, arguments it does not take, no classifier, a checkpoint that cannot be
            read or belongs to another model, weights that are not finite, or pretrained weights that
            cannot be had.
    """
    _check_name(spec.name)
    if spec.checkpoint_key is not None and spec.checkpoint is None:
        raise InputError(
            "there is no checkpoint to take it from",
            where=f"`checkpoint_key` {spec.checkpoint_key}",
            fix="give the file with `checkpoint`",
        )
    pretrained = load_weights and spec.pretrained and spec.checkpoint is None
    model = _build_pretrained(spec) if pretrained else _build(spec)
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    if load_weights and spec.checkpoint is not None:
        load_checkpoint(model, Path(spec.checkpoint), spec.checkpoint_key)
    if load_weights:
        check_finite(model, spec.checkpoint or spec.name)
    return model.float().eval()


def _check_name(name: str) -> None:
    if re.search(r"[:/\\]", name):
        fix = "give local weights with `checkpoint`"
        raise InputError("a model is called by its name in timm", where=name, fix=fix)
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
    fix = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names"
    raise InputError("timm knows no such model", where=name, fix=fix)


def _build(spec: ModelSpec) -> nn.Module:
    """The module with random weights; whatever its constructor raises is blamed on the arguments."""
    reserved = sorted(_RESERVED & spec.kwargs.keys())
    if reserved:
        where = ", ".join(reserved)
        raise InputError("not a keyword argument of the network", where=where, fix="leave it out")
    try:
        model: nn.Module = timm.create_model(spec.name, pretrained=False, **spec.kwargs)
    except Exception as error:
        given = " ".join(f"{key}={value!r}" for key, value in spec.kwargs.items())
        raise InputError(
            f"{spec.name} cannot be built with these arguments: {_said(error)}",
            where=given or "no `model_kwargs`",
            fix="check `model_kwargs` and the name's weight tag",
        ) from error
    # timm counts the outputs of a headless network as 0, and takes negative numbers for it too.
    if getattr(model, "num_classes", 0) < 1:
        raise InputError("the network has no classifier", where=spec.name, fix="give num_classes=N")
    return model


def _build_pretrained(spec: ModelSpec) -> nn.Module:
    """The module with timm's pretrained weights."""
    # Built without weights first: what fails then is the arguments' fault, not the network's.
    classes = _build(spec).num_classes
    try:
        model: Any = timm.create_model(spec.name, pretrained=True, **spec.kwargs)
    except Exception as error:
        raise InputError(
            f"timm's pretrained weights cannot be loaded: {_said(error)}",
            where=spec.name,
            fix="check the connection, or give weights with `checkpoint`",
        ) from error
    if classes != model.pretrained_cfg["num_classes"]:
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
