"""A convolution over patches that do not overlap, as the linear that it is: some formats have no kernel for the convolution."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ospq_export.export.lower import Builder
from ospq_export.graph.rewrite import argument, is_padded
from ospq_export.graph.sizes import follows

aten = torch.ops.aten
_HEIGHT = 2


def cuts_patches(conv: fx.Node) -> bool:
    """Whether a conv2d node reads each pixel exactly once; of images of free sizes, but for what is left over at their ends."""
    image, kernel = conv.args[0].meta["val"].shape[2:], conv.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in image) or is_padded(conv) or argument(conv, 6, 1) != 1:
        return False
    stride, dilation = _pair(argument(conv, 3, 1)), _pair(argument(conv, 5, 1))
    fits = all(size % step == 0 for size, step in zip(image, stride, strict=True))
    return stride == tuple(kernel) and dilation == (1, 1) and fits


def _count(build: Builder, x: fx.Node, axis: int, size: int) -> fx.Node:
    """How many patches lie along an axis of images of a free size."""
    return build.call(operator.floordiv, build.call(aten.sym_size.int, x, axis), size)


def _whole(build: Builder, x: fx.Node, counts: Sequence[fx.Node], kernel: Sequence[int]) -> fx.Node:
    """Images without the rows and columns that fill no patch: the convolution passes them over."""
    for axis, (count, size) in enumerate(zip(counts, kernel, strict=True), _HEIGHT):
        x = build.call(aten.slice.Tensor, x, axis, 0, build.call(operator.mul, count, size))
    return x


def _pair(value: object) -> tuple[int, ...]:
    return tuple(value) * (2 // len(value)) if isinstance(value, list | tuple) else (value, value)


def as_linear(build: Builder, conv: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """The convolution of x (N, C, H, W) with a weight (O, C, h, w) by way of (N, patches, C h w); (N, O, H / h, W / w)."""
    images = conv.all_input_nodes[0]
    channels, height, width = images.meta["val"].shape[1:]
    outputs, _, *kernel = conv.args[1].meta["val"].shape  # type: ignore[union-attr]
    rows: Any = height // kernel[0]
    columns: Any = width // kernel[1]
    if follows(images):
        rows, columns = (_count(build, x, axis, k) for axis, k in enumerate(kernel, _HEIGHT))
        x = _whole(build, x, (rows, columns), kernel)
    inner = channels * kernel[0] * kernel[1]
    pieces = build.call(aten.reshape.default, x, [-1, channels, rows, kernel[0], columns, kernel[1]])
    patches = build.call(aten.permute.default, pieces, [0, 2, 4, 1, 3, 5])
    count = build.call(operator.mul, rows, columns) if isinstance(rows, fx.Node) else rows * columns
    patches = build.call(aten.reshape.default, patches, [-1, count, inner])
    matrix = build.call(aten.reshape.default, weight, [outputs, inner])
    out = build.call(aten.matmul.default, patches, build.call(aten.permute.default, matrix, [1, 0]))
    if bias is not None:
        out = build.call(aten.add.Tensor, out, bias)
    moved = build.call(aten.permute.default, out, [0, 2, 1])
    return build.call(aten.reshape.default, moved, [-1, outputs, rows, columns])
