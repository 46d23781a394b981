"""Lint of any QDQ ONNX file: what TensorRT refuses, reinterprets or runs in float, and what ONNX Runtime does not fuse.

Every rule was seen in NVIDIA's parser and builder (TensorRT-RTX 1.7, plans for SM89) or in ONNX Runtime; the tests hold them to
both, by difference: graphs are drawn, the builder compiles them, and what it made of them is compared with `predict`.
For another release of TensorRT only those rules count that a source says of it, and some of its own: versions.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ospq_export.errors import InputError
from ospq_export.onnx.lint.attention import attention
from ospq_export.onnx.lint.findings import Finding, Severity, name_of
from ospq_export.onnx.lint.floats import block_scales, dynamic_quantization, subnormal_scales, versions
from ospq_export.onnx.lint.known import RTX, choices, find_version
from ospq_export.onnx.lint.network import Network
from ospq_export.onnx.lint.pairs import datatypes, reshaped_into_branch, scales, zero_points
from ospq_export.onnx.lint.parser import codes, constants, names, operators, outputs_computed_twice, types
from ospq_export.onnx.lint.precision import product_kinds
from ospq_export.onnx.lint.products import doubled, key_transpose, products
from ospq_export.onnx.lint.release_attention import attentions
from ospq_export.onnx.lint.releases import (
    bare_products,
    decomposed_norms,
    depthwise_sums,
    dynamic_fp4,
    formats,
    half_quantizers,
    ignored_attributes,
    opsets,
    reduction_axes,
    transposed_activations,
)
from ospq_export.onnx.read import read_model

__all__ = ["RULES", "Finding", "Prediction", "Severity", "choices", "lint", "predict"]

Rule = Callable[[Network], Iterator[Finding]]
RULES: tuple[Rule, ...] = (
    operators,
    constants,
    names,
    outputs_computed_twice,
    zero_points,
    datatypes,
    scales,
    types,
    codes,
    reshaped_into_branch,
    products,
    doubled,
    attention,
    key_transpose,
    versions,
    dynamic_quantization,
    block_scales,
    subnormal_scales,
)
RELEASE_RULES: tuple[Rule, ...] = (
    operators,
    constants,
    opsets,
    formats,
    zero_points,
    datatypes,
    scales,
    reduction_axes,
    ignored_attributes,
    half_quantizers,
    bare_products,
    attentions,
    decomposed_norms,
    depthwise_sums,
    transposed_activations,
    dynamic_fp4,
    versions,
    dynamic_quantization,
)


@dataclass(frozen=True)
class Prediction:
    """What TensorRT makes of a file.

    Attributes:
        refused: whether its parser or builder refuses it.
        products: "int8", "fp8", "fp4" or "float" by the product's node name (its output's, where it has none); those of a local
            function under the name that they have in it. Empty where the file is refused.
        findings: all of lint's.
    """

    refused: bool
    products: dict[str, str]
    findings: tuple[Finding, ...]


def lint(path: Path, targets: Sequence[str] = (), version: str = RTX) -> list[Finding]:
    """All findings in a file, in the file's order within each rule.

    Args:
        path: the file.
        targets: compute capabilities that engines are built for, such as "SM89"; none: those that have the file's formats.
        version: the TensorRT that reads it, of `choices`.

    Raises:
        InputError: the file cannot be read as ONNX, or contradicts itself; a target has no such form; no such version.
    """
    known = find_version(version)
    for target in targets:
        if not re.fullmatch(r"SM\d+", target):
            raise InputError(f"'{target}' is no target", where="`compute_capability`", fix="write SM89, say")
    return _findings(Network(read_model(path), path, targets, known))


def predict(model: Path | Any) -> Prediction:
    """What TensorRT makes of a file, by the same rules.

    Args:
        model: the file, or an `onnx.ModelProto`.

    Raises:
        InputError: the file cannot be read as ONNX, or contradicts itself.
    """
    path = model if isinstance(model, Path) else None
    proto: Any = read_model(path) if path is not None else model
    network = Network(proto, path)
    findings = tuple(_findings(network))
    refused = any(finding.refused for finding in findings)
    kinds: dict[str, str] = {}
    for product in product_kinds(network) if not refused else ():
        name = name_of(product.node)
        if len(proto.functions):
            name = re.sub(r"__\d+$", "", name)
        if kinds.setdefault(name, product.kind) != product.kind:
            kinds[name] = "float"
    return Prediction(refused, kinds, findings)


def _findings(network: Network) -> list[Finding]:
    if network.version.key == RTX:
        return [finding for rule in RULES for finding in rule(network)]
    known = network.version.sources
    found = (finding for rule in RELEASE_RULES for finding in rule(network))
    return [f.model_copy(update={"source": ", ".join(known[f.rule])}) for f in found if f.rule in known]
