"""Centring of attention's keys: a constant that the softmax cancels anyway costs floating-point formats their precision.

Ours. DINOv2's keys have biases many times larger than what tells one key from another, and the step of a floating-point format
grows with the magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx

from ospq_export.formats.base import Role
from ospq_export.formats.choice import Choice
from ospq_export.formats.search import compress
from ospq_export.graph.capture import operator_names
from ospq_export.graph.keys import Keys, find_keys, move_keys
from ospq_export.graph.labels import channel_axis
from ospq_export.graph.rewrite import Tap
from ospq_export.runs.manifest import EqualizedSite

CHOICE = "center"
_ROWS = 4096


def center_keys(
    captured: fx.GraphModule, images: Tensor, formats: Choice, settled: Callable[[EqualizedSite], None]
) -> list[EqualizedSite]:
    """Take its mean off every channel of the keys, where that lowers their error; in place, the float function stays.

    Args:
        captured: from `capture`; biases change.
        images: float32 (N, C, H, W), normalised, on the network's device.
        formats: of the quantizers that will be inserted.
        settled: called after each producer of keys.

    Returns:
        One record per producer. Its errors are those of the quantized keys, over their variance within channels.
    """
    names, records = operator_names(captured.graph), []

    def settle(keys: Keys, _tap: Tap, _node: fx.Node, value: Tensor) -> None:
        rows = value.movedim(channel_axis(keys.producer), -1).flatten(0, -2)
        records.append(_center(captured, keys, rows, formats, names))
        settled(records[-1])

    watched = {keys.producer: partial(settle, keys) for keys in find_keys(captured.graph)}
    with torch.no_grad():
        Tap(captured, watched).run(images)
    return records


def _center(
    captured: fx.GraphModule, keys: Keys, rows: Tensor, formats: Choice, names: dict[fx.Node, str]
) -> EqualizedSite:
    mean, keys_only = rows.mean(0), keys.channels.to(rows.device)
    variance = float(rows.var(0, unbiased=False)[keys_only].mean())
    product = keys.products[0]
    inner = product.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    format_ = formats.operands(names[product], Role.ATTENTION, inner, is_end=False).activation
    before = after = 0.0
    if format_ is not None:
        kept = rows[:: max(1, len(rows) // _ROWS), keys_only]
        before, after = (
            format_.search_range(compress(x), may_shift=False).mse / max(variance, 1e-12)
            for x in (kept, kept - mean[keys_only])
        )
    moves = after < before
    if moves:
        move_keys(captured, keys, mean)
    return EqualizedSite(
        producer=keys.producer.meta["module_path"],
        consumers=[names[p] for p in keys.products],
        choice=CHOICE if moves else "none",
        error_before=before,
        error_after=after if moves else before,
        largest_factor=1.0,
    )
