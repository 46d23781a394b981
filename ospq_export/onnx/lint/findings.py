"""What a rule reports."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class Severity(StrEnum):
    """What a finding costs."""

    ERROR = "error"
    WARNING = "warning"


class Finding(BaseModel):
    """One place where a rule is broken.

    Attributes:
        rule: its name.
        severity: `error`: TensorRT refuses the file or computes something else; `warning`: it runs in float or is not fused.
        node: the node's name, or its output's where it has none.
        what: what is wrong there.
        fix: what to do about it.
        source: where it is known from; empty for TensorRT-RTX, whose rules were all seen.
        refused: whether TensorRT's parser or builder refuses the file; an error that is not refused is computed differently.
    """

    model_config = ConfigDict(frozen=True)

    rule: str
    severity: Severity
    node: str
    what: str
    fix: str
    refused: bool = False
    source: str = ""


def name_of(node: Any) -> str:
    """A node's name, or its first output's where it has none; a name is its own."""
    return node if isinstance(node, str) else str(node.name or node.output[0])


def refusal(rule: str, node: Any, what: str, fix: str) -> Finding:
    """TensorRT refuses the file here."""
    return Finding(rule=rule, severity=Severity.ERROR, node=name_of(node), what=what, fix=fix, refused=True)


def different(rule: str, node: Any, what: str, fix: str) -> Finding:
    """TensorRT takes the file and computes something else."""
    return Finding(rule=rule, severity=Severity.ERROR, node=name_of(node), what=what, fix=fix)


def warning(rule: str, node: Any, what: str, fix: str) -> Finding:
    """TensorRT takes the file, but not as it seems to be meant."""
    return Finding(rule=rule, severity=Severity.WARNING, node=name_of(node), what=what, fix=fix)
