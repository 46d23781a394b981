"""What is known of each TensorRT that a file can be linted for: versions.json, and operators.json for TensorRT-RTX.

A rule counts for a version only with a source there: public documentation, a reported failure or a measurement.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from onnx import TensorProto

from ospq_export.errors import InputError

RTX = "rtx"


@dataclass(frozen=True)
class Version:
    """A TensorRT to lint for.

    Attributes:
        key: as it is asked for.
        name: for people.
        operators: those that its parser has an importer for, whatever their domain.
        constants: names of the element types that constants may have.
        formats: element types of codes that it has kernels for, `TensorProto` values.
        opset: the highest that it is documented to read; None where the parser itself was asked instead.
        strongly_typed: whether the file alone says what is computed in which type; else builder flags may, too.
        sources: by rule: where it is known from.
    """

    key: str
    name: str
    operators: frozenset[str]
    constants: frozenset[str]
    formats: frozenset[int]
    opset: int | None = None
    strongly_typed: bool = True
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)


@functools.cache
def _file(name: str) -> dict[str, Any]:
    return dict(json.loads(resources.files("ospq_export.onnx.lint").joinpath(name).read_text()))


def choices() -> tuple[str, ...]:
    """What a file can be linted for, TensorRT-RTX first."""
    return (RTX, *_file("versions.json")["versions"])


@functools.cache
def find_version(key: str) -> Version:
    """A version by its name.

    Raises:
        InputError: there is none of that name.
    """
    if key == RTX:
        table = _file("operators.json")
        kinds = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)
        operators, constants = frozenset(table["operators"]), frozenset(table["constants"])
        return Version(RTX, "TensorRT", operators, constants, frozenset(kinds))
    known = _file("versions.json")
    if key not in known["versions"]:
        raise InputError(
            f"'{key}' is no version that rules are known for", where="`version`", fix=", ".join(choices())
        )
    keys = list(known["versions"])
    own = known["versions"][key]
    before = [known["versions"][k] for k in keys[: keys.index(key) + 1]]
    return Version(
        key,
        own["name"],
        frozenset(name for entry in before for name in entry["adds"]),
        frozenset(name for entry in before for name in entry["constants"]),
        frozenset(TensorProto.DataType.Value(name) for name in own["formats"]),
        own["opset"],
        own["strongly_typed"],
        {
            rule: [known["sources"][name] for name in by_version[key]]
            for rule, by_version in known["rules"].items()
            if key in by_version
        },
    )
