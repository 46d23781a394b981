"""Formats by name, and which operands of a network get which."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from ospq_export import formats
from ospq_export.errors import InputError
from ospq_export.formats.base import Format, Role

FLOAT = "float"
"""Name of what is no format: the operand is left as it is."""


@dataclass(frozen=True)
class Operands:
    """The formats of an operator's operands; None where one stays float.

    Attributes:
        weight: of its weight; a product of two activations has none.
        activation: of what it reads besides.
        reason: why these are not the formats that its role has; empty where they are.
    """

    weight: Format | None
    activation: Format | None
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """Names of formats by role, and by the names of operators.

    Attributes:
        weight, activation: of linears and convolutions.
        attention: of the operands of products of two activations.
        end: of weight and activation of the first and the last quantizable operator.
        overrides: (pattern of operator names, format) with the wildcards of file names; the last that fits counts.
    """

    weight: str
    activation: str
    attention: str
    end: str
    overrides: tuple[tuple[str, str], ...] = ()

    def operands(self, name: str, role: Role, inner: int, *, is_end: bool) -> Operands:
        """The formats of one operator.

        Args:
            name: of the operator, such as "blocks.0.mlp.fc1".
            role: what it is.
            inner: elements that its products sum over.
            is_end: whether it is the network's first or last quantizable operator.

        Raises:
            InputError: an override asks for a format that the operator cannot have.
        """
        forced = [kind for pattern, kind in self.overrides if fnmatchcase(name, pattern)]
        weight, activation = (self.end, self.end) if is_end else (self.weight, self.activation)
        if forced:
            weight = activation = forced[-1]
        elif role is Role.ATTENTION and not is_end:
            activation = self.attention
        if role is Role.ATTENTION:
            weight = FLOAT
        found: list[Format | None] = []
        reason = ""
        for kind, is_weight in ((weight, True), (activation, False)):
            format_ = None if kind == FLOAT else named(kind, weight=is_weight)
            refused = "" if format_ is None else format_.refuses(role, inner)
            if refused and forced:
                raise InputError(
                    f"{name} cannot have {kind}: {refused}",
                    where="the recipe's overrides",
                    fix="leave it out of the pattern, or give it another format",
                )
            if format_ is not None and refused:
                assert format_.fallback is not None
                format_, reason = named(format_.fallback, weight=is_weight), refused
            found.append(format_)
        return Operands(found[0], found[1], reason)

    def names(self, operator: str) -> bool:
        """Whether an override is about an operator."""
        return any(fnmatchcase(operator, pattern) for pattern, _ in self.overrides)

    def check_patterns(self, operators: Sequence[str]) -> None:
        """Hold the overrides to the operators of a network.

        Args:
            operators: their names.

        Raises:
            InputError: a pattern fits none of them.
        """
        for pattern, _ in self.overrides:
            if not any(fnmatchcase(name, pattern) for name in operators):
                near = difflib.get_close_matches(pattern, operators, cutoff=0.0)
                raise InputError(
                    f"{pattern!r} fits no operator of this network",
                    where="the recipe's overrides",
                    fix=f"the closest are {', '.join(near)}",
                )

    def formats(self) -> list[Format]:
        """All formats that operands of some network can have, with those that take over where one refuses.

        Raises:
            InputError: there is no format of a name.
        """
        both = (self.end, *(kind for _, kind in self.overrides))
        weights, activations = (self.weight, *both), (self.activation, self.attention, *both)
        found = []
        for names, is_weight in ((weights, True), (activations, False)):
            for name in dict.fromkeys(names):
                kind: str | None = None if name == FLOAT else name
                while kind is not None:
                    found.append(named(kind, weight=is_weight))
                    kind = found[-1].fallback
        return found

    def check(self) -> None:
        """Hold every name to the formats that there are, and weights to activations that hardware multiplies with them.

        Raises:
            InputError: there is no such format, or two do not go together.
        """
        for name in (self.attention, self.end, *(kind for _, kind in self.overrides)):
            if name != FLOAT:
                named(name, weight=False)
        pair = ((self.weight, True), (self.activation, False))
        weight, activation = (None if n == FLOAT else named(n, weight=is_weight) for n, is_weight in pair)
        if weight and activation and weight.engine_type != activation.engine_type:
            raise InputError(
                f"no hardware multiplies {weight.name} weights with {activation.name} activations",
                where="`weights`, `activations`",
                fix="give both formats of one kind, or float activations",
            )


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    """The modules of this package that have formats: those with a function `find`, and the `NAMES` that it knows."""
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
    known = (n for module in _modules() for n in module.NAMES if module.find(n, weight=weight))
    raise InputError(
        f"there is no format {name!r} for {'weights' if weight else 'activations'}",
        fix=f"use {', '.join(known)} or {FLOAT}",
    )


def read(record: dict[str, Any], *, weight: bool) -> Format:
    """The format that `Format.record` described.

    Raises:
        InputError: it describes none.
    """
    try:
        return named(str(record.get("format")), weight=weight).read(record)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"it has no such format: {error}") from error


def integers(weight_bits: int, activation_bits: int, first_last_bits: int = 8) -> Choice:
    """Integer formats by their bits, 2 to 8."""
    activation = f"int{activation_bits}"
    return Choice(f"int{weight_bits}", activation, activation, f"int{first_last_bits}")


def engine_types() -> frozenset[str]:
    """What TensorRT calls the operands of quantized products."""
    kinds = (value for module in _modules() for value in vars(module).values())
    return frozenset(k.engine_type for k in kinds if isinstance(k, type) and hasattr(k, "engine_type"))
