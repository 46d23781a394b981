"""Operators of a captured program written as simpler ones: attention as products, and what the allow-list has no name for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ospq_export.graph.canonical import REWRITTEN
from ospq_export.graph.serialize import ATEN

aten = torch.ops.aten
# Unrolled over their steps they would be graphs that nobody deploys.
_RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn_")
_ROUNDS = 4  # what an operator is made of may have to be made of something simpler itself


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention as two matmuls, the scale applied to the query.

    Args:
        query: (..., heads, L, E).
        key: (..., key heads, S, E).
        value: (..., key heads, S, E_v).
        attn_mask: bool, True where a key is seen, or float, added; broadcasts to (..., heads, L, S).
        dropout_p: without effect in inference.
        is_causal: whether query i sees the keys 0 to i only.
        scale: of the products; None is 1 / sqrt(E).
        enable_gqa: whether several heads share one key head (grouped queries).
    """
    if enable_gqa and (shared := query.shape[-3] // key.shape[-3]) > 1:
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        size = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        bias = torch.where(attn_mask, 0.0, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask
        logits = logits + bias
    return torch.matmul(torch.softmax(logits, -1), value)


def _sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> list[Tensor]:
    """Torch's only order among equals is the stable one, and ONNX's is too."""
    values, indices = aten.sort.default(x, dim, descending)
    return [values, indices]


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Write attention as products, and every operator that the allow-list lacks as those that torch makes it of.

    An operator for which torch has no simpler ones stays, and is refused by who needs it.
    """
    table: dict[Any, Callable[..., Any]] = {
        aten.scaled_dot_product_attention.default: explicit_attention,
        aten.sort.stable: _sort,
    }
    table = _simpler(program.graph) | table
    program = program.run_decompositions(table)
    for _ in range(_ROUNDS):
        further = _simpler(program.graph)
        if not further.keys() - table.keys():
            break
        table |= further
        program = program.run_decompositions(table)
    return program


def _simpler(graph: fx.Graph) -> dict[Any, Callable[..., Any]]:
    """What torch makes of the operators in a graph that are not in the allow-list."""
    unknown = {n.target for n in graph.nodes if n.op == "call_function" and not _is_known(n.target)}
    if not unknown:
        return {}
    known = {**torch._decomp.decomposition_table, **dict(torch.export.default_decompositions().items())}
    return {target: known[target] for target in unknown if target in known}


def _is_known(target: Any) -> bool:
    name = str(target)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return True
    if target._schema.is_mutable or target is aten.scaled_dot_product_attention.default:
        # What changes a tensor in place is written otherwise by every decomposition.
        return True
    return name in ATEN or target in REWRITTEN or name.startswith(_RECURRENT)
