"""Where networks come from: one module per source, each with the functions `build` and `preprocessing`."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ospq_export.errors import InputError, reason_of
from ospq_export.models.preprocessing import Preprocessing
from ospq_export.models.record import ModelSpec
from ospq_export.models.weights import check_finite, load_checkpoint

SOURCES = ("timm", "torchvision", "transformers", "module")
_PREFIXED = SOURCES[1:]


class Source(Protocol):
    """A module of this package that is called as the source."""

    def build(self, spec: ModelSpec, *, pretrained: bool) -> nn.Module:
        """The network; with random weights, or with those that the source has for it."""
        raise NotImplementedError

    def preprocessing(self, model: nn.Module, spec: ModelSpec) -> Preprocessing:
        """What the source states of how images become inputs."""
        raise NotImplementedError


def source_of(spec: ModelSpec) -> Source:
    """The module of a source."""
    return cast(Source, importlib.import_module(f"ospq_export.models.{spec.source}"))


def split_name(name: str) -> tuple[str, str]:
    """A model's name as it is given: "torchvision:resnet50" is (torchvision, resnet50), what has no such prefix is timm's."""
    prefix, _, rest = name.partition(":")
    return (prefix, rest) if prefix in _PREFIXED and rest else ("timm", name)


def create_model(spec: ModelSpec, *, load_weights: bool = True) -> nn.Module:
    """Builds the network: float32, on the CPU, in eval mode.

    Args:
        spec: What to build.
        load_weights: False builds the same module with random weights and reads nothing.

    Returns:
        The network, of (B, C, H, W) float32. Weights that are neither read nor pretrained are random, from torch's global
        generator.

    Raises:
        InputError: Unknown model, arguments it does not take, a checkpoint that cannot be read or belongs to another model,
            weights that are not finite, or pretrained weights that cannot be had.
    """
    if spec.checkpoint_key is not None and spec.checkpoint is None:
        raise InputError(
            "there is no checkpoint to take it from",
            where=f"`checkpoint_key` {spec.checkpoint_key}",
            fix="give the file with `checkpoint`",
        )
    pretrained = load_weights and spec.pretrained and spec.checkpoint is None
    model = source_of(spec).build(spec, pretrained=pretrained)
    if load_weights and spec.checkpoint is not None:
        load_checkpoint(model, Path(spec.checkpoint), spec.checkpoint_key)
    if load_weights:
        check_finite(model, spec.checkpoint or spec.name)
    return model.float().eval()


def network_bytes(spec: ModelSpec) -> int | None:
    """float32 bytes of a network's parameters, from its structure alone, or None where that cannot be made without them."""
    if spec.source == "module":
        # The user's function is called once, for the network itself.
        return None
    try:
        with torch.device("meta"):
            model = source_of(spec).build(spec, pretrained=False)
    except Exception:
        # A constructor that reads values, or arguments that are wrong: who builds the network in earnest says which.
        return None
    return sum(4 * p.numel() for p in model.parameters())


def preprocessing_of(model: nn.Module, spec: ModelSpec) -> Preprocessing:
    """What the network's source states of its preprocessing."""
    return source_of(spec).preprocessing(model, spec)


def check_input(model: nn.Module, spec: ModelSpec, input_size: tuple[int, int, int]) -> int | None:
    """Run a network once, on one black image, before anything else is done with it.

    Args:
        model: the network, in eval mode.
        spec: what it was built from.
        input_size: (channels, height, width) in pixels.

    Returns:
        How many classes it has outputs for: K where the first output is (1, K); None where it has no classifier.

    Raises:
        InputError: it does not take one tensor of this size.
    """
    _check_signature(model, spec)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, *input_size, device=device))
    except Exception as error:
        size = ",".join(map(str, input_size))
        raise InputError(
            f"the network does not take images of {size}: {reason_of(error)}",
            where=spec.name,
            fix="give the size that it was built for with `input_size`, or build it for this one with `model_kwargs`",
        ) from error
    first = next((leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
    headless = getattr(model, "num_classes", None) == 0
    return first.shape[1] if first is not None and first.dim() == 2 and not headless else None


def _check_signature(model: nn.Module, spec: ModelSpec) -> None:
    """Refuse a network whose forward pass takes no input, or cannot do with one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind in (*kinds, p.KEYWORD_ONLY)]
    takes_one = any(p.kind in (*kinds, p.VAR_POSITIONAL) for p in parameters)
    if takes_one and len(required) <= 1:
        return
    what = f"several inputs ({', '.join(required)})" if required else "no input"
    raise InputError(
        f"the network takes {what}, not one tensor of images",
        where=spec.name,
        fix="wrap it in a module whose forward takes the images",
    )
