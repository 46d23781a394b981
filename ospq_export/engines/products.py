"""NVIDIA's two products behind one import: TensorRT and TensorRT-RTX have the same Python API, and Polygraphy serves both."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
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
    """The product's Python module, with Polygraphy set to it.

    One process takes one product: Polygraphy's switch holds for the whole process.

    Raises:
        InputError: it is not installed, its libraries cannot be loaded, or this process has loaded the other product.
    """
    try:
        module = importlib.import_module(product.module)
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"{product} cannot be used: {reason_of(error)}", fix=f"pip install 'ospq-export[{product}]'"
        ) from error
    _switch_polygraphy(product)
    return module


def _switch_polygraphy(product: Product) -> None:
    from polygraphy import config

    if _loaded and product not in _loaded:
        raise InputError(
            f"this process has loaded {_loaded[0]}, and Polygraphy serves one product per process",
            where=str(product),
            fix="run the command once for each product",
        )
    config.USE_TENSORRT_RTX = product is Product.TENSORRT_RTX
    _loaded.append(product)


_loaded: list[Product] = []


def known_capabilities(product: Product) -> list[str]:
    """The compute capabilities that the product builds for by name; none where it builds for this machine's GPU only.

    Raises:
        InputError: the product cannot be loaded.
    """
    return [name for name in dir(getattr(load(product), "ComputeCapability", None)) if name.startswith("SM")]


@functools.cache
def recorder(product: Product) -> Any:
    """The one logger of this process, Polygraphy's too; its `messages` are the log since they were last cleared."""
    module = load(product)
    from polygraphy.backend.trt import util

    class Recorder(module.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[Message] = []

        def log(self, severity: Any, text: str) -> None:
            self.messages.append(Message(severity.name, text))

    util.TRT_LOGGER = Recorder()
    return util.TRT_LOGGER


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Polygraphy prints what it does; here its errors are raised and the builder's log is kept instead."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


def load_engine(product: Product, source: Path | bytes) -> Any:
    """An `ICudaEngine` of a file or of its bytes, on this machine's GPU.

    Raises:
        InputError: the product cannot load it.
    """
    trt = load(product)
    recorder(product)
    from polygraphy.backend.trt import EngineFromBytes, EngineFromPath
    from polygraphy.exception import PolygraphyException

    with quiet_polygraphy():
        try:
            return EngineFromBytes(source)() if isinstance(source, bytes) else EngineFromPath(str(source))()
        except PolygraphyException as error:
            raise InputError(
                f"{product.module} {trt.__version__} cannot load the engine",
                where=None if isinstance(source, bytes) else source,
                fix="build it again on this machine: engines are tied to a GPU and a version",
            ) from error
