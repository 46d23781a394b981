"""What TensorRT's parser knows: operators and element types of constants, from a table that it was asked for."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any


@functools.cache
def _table() -> dict[str, Any]:
    return dict(json.loads(resources.files("ospq_export.onnx.lint").joinpath("operators.json").read_text()))


def imported_operators() -> frozenset[str]:
    """Names of the operators that the parser has an importer for; it does not look at their domain."""
    return frozenset(_table()["operators"])


def constant_types() -> frozenset[str]:
    """Names of the element types that a constant may have."""
    return frozenset(_table()["constants"])
