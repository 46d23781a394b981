"""Formats by name, and which operands of a network get which."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ospq_export import formats
from ospq_export.errors import InputError
from ospq_export.formats.base import Format


@dataclass(frozen=True)
class Choice:
    """The formats of weights and activations, and those of the first and the last quantizable operator."""

    weight: Format
    activation: Format
    end_weight: Format
    end_activation: Format


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    """The modules of this package that have formats: those with a function `find`."""
    names = (f"{formats.__name__}.{module.name}" for module in pkgutil.iter_modules(formats.__path__))
    found: Iterator[ModuleType] = map(importlib.import_module, (n for n in names if n != __name__))
    return tuple(module for module in found if hasattr(module, "find"))


def named(name: str, *, weight: bool) -> Format:
    """The format called `name`.

    Args:
        name: such as "int4".
        weight: whether it is for a weight or for an activation.

    Raises:
        InputError: there is none for such an operand.
    """
    for module in _modules():
        found: Format | None = module.find(name, weight=weight)
        if found is not None:
            return found
    raise InputError(f"there is no format {name!r} for {'weights' if weight else 'activations'}")


def read(record: dict[str, Any], *, weight: bool) -> Format:
    """The format that `Format.record` described.

    Raises:
        InputError: it describes none.
    """
    try:
        return named(str(record.get("format")), weight=weight).read(record)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"it has no such format: {error}") from error


def integers(weight_bits: int, activation_bits: int, first_last_bits: int = 8) -> Choice:
    """Integer formats by their bits, 2 to 8."""
    return choice(f"int{weight_bits}", f"int{activation_bits}", f"int{first_last_bits}")


def choice(weight: str, activation: str, first_last: str) -> Choice:
    """Formats by their names.

    Raises:
        InputError: there is no such format.
    """
    return Choice(
        named(weight, weight=True),
        named(activation, weight=False),
        named(first_last, weight=True),
        named(first_last, weight=False),
    )


def engine_types() -> frozenset[str]:
    """What TensorRT calls the operands of quantized products."""
    kinds = (value for module in _modules() for value in vars(module).values())
    return frozenset(k.engine_type for k in kinds if isinstance(k, type) and hasattr(k, "engine_type"))
