"""Networks that a user's own function builds. Its code runs: whoever names it trusts it."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ospq_export.errors import InputError, reason_of
from ospq_export.models.preprocessing import Preprocessing
from ospq_export.models.record import ModelSpec

logger = logging.getLogger(__name__)


def build(spec: ModelSpec, *, pretrained: bool) -> nn.Module:
    """What the function returns for the arguments, in eval mode; its weights are as it leaves them.

    Args:
        spec: its name is "package.module:function"; modules of the working folder are found too.
        pretrained: without effect: the function alone knows its weights.

    Raises:
        InputError: there is no such function, it raises, or it returns something else.
    """
    function = _function(spec.name)
    logger.warning("%s: this runs your own code", spec.name)
    try:
        model = function(**spec.kwargs)
    except Exception as error:
        raise InputError(
            f"the function raises {type(error).__name__}: {reason_of(error)}",
            where=spec.name,
            fix="check it, and `model_kwargs`",
        ) from error
    if not isinstance(model, nn.Module):
        what = f"the function returns {type(model).__name__}, not a torch.nn.Module"
        raise InputError(what, where=spec.name, fix="return the network")
    if any(part.training for part in model.modules()):
        logger.warning("%s: the network is in training mode; eval() is called", spec.name)
    return model.eval()


def _function(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        fix = "name it like module:package.module:function"
        raise InputError("this names no function", where=name, fix=fix)
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(path), attribute)
    except Exception as error:
        what = f"the function cannot be imported: {reason_of(error)}"
        fix = "install its package, or run this where it lies"
        raise InputError(what, where=name, fix=fix) from error
    if not callable(function):
        raise InputError("this is no function", where=name, fix="name one that returns the network")
    found: Callable[..., Any] = function
    return found


def preprocessing(model: nn.Module, spec: ModelSpec) -> Preprocessing:
    """Nothing: a module does not say how images become its input."""
    return Preprocessing()
