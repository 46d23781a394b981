"""NVIDIA's two products behind one import: TensorRT and TensorRT-RTX have the same Python API."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ospq_export.errors import InputError, reason_of


class Product(StrEnum):
    """What builds the engine."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"

    @property
    def module(self) -> str:
        """The Python module."""
        return self.value.replace("-", "_")


@dataclass(frozen=True)
class Message:
    """One entry of the builder's log."""

    severity: str
    text: str


@functools.cache
def load(product: Product) -> Any:
    """The product's Python module.

    Raises:
        InputError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        return importlib.import_module(product.module)
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"{product} cannot be used: {reason_of(error)}", fix=f"pip install 'ospq-export[{product}]'"
        ) from error


def known_capabilities(product: Product) -> list[str]:
    """The compute capabilities that the product builds for by name; none where it builds for this machine's GPU only.

    Raises:
        InputError: the product cannot be loaded.
    """
    return [name for name in dir(getattr(load(product), "ComputeCapability", None)) if name.startswith("SM")]


@functools.cache
def recorder(product: Product) -> Any:
    """The one logger that the product wants per process; its `messages` are the log since they were last cleared."""
    module = load(product)

    class Recorder(module.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[Message] = []

        def log(self, severity: Any, text: str) -> None:
            self.messages.append(Message(severity.name, text))

    return Recorder()
