"""The sizes of images that a network takes: one, or a range of heights and widths; and the shapes that follow from a size.

A graph of a range computes with the height and width of the images that it is given. What its nodes say of their shapes is for
one size, that of the calibration, with the batch as the only symbol: slices, costs and labels are made at that size.
`meta["following"]` has the dimensions of a node's tensor that follow the images' size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ospq_export.errors import InputError

_BATCH = 2  # stands for the free batch size while shapes are computed
_HEIGHT = 2  # the dimension of the images; the width is the next one
FOLLOWING = "following"
Pair = tuple[int, int]


class SizeRange(BaseModel):
    """Heights and widths of images, in pixels.

    Attributes:
        smallest: height and width at one end.
        largest: at the other.
        step: what heights and widths are multiples of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    smallest: Pair
    largest: Pair
    step: Pair = (1, 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        rises = all(1 <= low <= high for low, high in zip(self.smallest, self.largest, strict=True))
        if not rises or self.smallest == self.largest or min(self.step) < 1:
            raise ValueError(f"{shown(self.smallest)} to {shown(self.largest)} is no range of sizes")
        return self

    def __str__(self) -> str:
        """As sentences have it."""
        steps = "" if self.step == (1, 1) else f" in steps of {shown(self.step)}"
        return f"{shown(self.smallest)} to {shown(self.largest)}{steps}"

    @property
    def ends(self) -> tuple[Pair, Pair]:
        """The smallest size and the largest."""
        return self.smallest, self.largest

    def why_not(self, size: Sequence[int]) -> str:
        """Why images of a height and a width are none of the range; "" where they are."""
        triples = zip(size, self.smallest, self.largest, strict=True)
        if not all(low <= side <= high for side, low, high in triples):
            return f"{shown(size)} lies outside of {self}"
        fits = all(side % step == 0 for side, step in zip(size, self.step, strict=True))
        return "" if fits else f"{shown(size)} is no multiple of {shown(self.step)}"

    def check(self, size: Sequence[int], where: str) -> None:
        """Hold a height and a width to the range.

        Args:
            size: (height, width).
            where: what an error names.

        Raises:
            InputError: it is none of the range.
        """
        if why := self.why_not(size):
            raise InputError(f"images of {why}", where=where, fix="give a size of the range")

    def dimensions(self) -> dict[int, Any]:
        """The images' free dimensions besides the batch, by number, as torch.export has them."""
        found: dict[int, Any] = {}
        sides = zip(("height", "width"), self.smallest, self.largest, self.step, strict=True)
        for number, (name, low, high, step) in enumerate(sides, _HEIGHT):
            if low < high and step == 1:
                found[number] = torch.export.Dim(name, min=low, max=high)
            elif low < high:
                found[number] = step * torch.export.Dim(f"_{name}", min=low // step, max=high // step)
        return found


def shown(size: Sequence[int]) -> str:
    """A height and a width as people write them, "64x48"."""
    return "x".join(map(str, size))


def sizes_between(bounds: Sequence[Sequence[int]] | None, input_size: Sequence[int]) -> SizeRange | None:
    """The range that somebody asked for.

    Args:
        bounds: (height, width) at the smallest, at the largest, and, where it is known, what they are multiples of.
        input_size: (channels, height, width) of the calibration; it has to lie inside.

    Raises:
        InputError: it is no range, or the calibration's size or an end is none of its sizes.
    """
    if bounds is None:
        return None
    where, fix = "`size_range`", "give the smallest and the largest height and width"
    if not 2 <= len(bounds) <= 3 or any(len(pair) != 2 for pair in bounds):
        raise InputError("it is no range of sizes", where=where, fix=fix)
    pairs = [(int(height), int(width)) for height, width in bounds]
    try:
        made = SizeRange.model_validate(dict(zip(("smallest", "largest", "step"), pairs, strict=False)))
    except ValueError as error:
        what = f"{shown(pairs[0])} to {shown(pairs[1])} is no range of sizes"
        raise InputError(what, where=where, fix=fix) from error
    for size in (input_size[1:], *made.ends):
        made.check(size, where)
    return made


def is_size(node: fx.Node) -> bool:
    """Whether a node's value is a number made of the images' shape."""
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def follows(node: fx.Node) -> frozenset[int]:
    """The dimensions of a node's tensor that follow the height and the width of the images."""
    return frozenset(node.meta.get(FOLLOWING, ()))


def propagate(module: fx.GraphModule, size: Sequence[int], sizes: SizeRange | None = None) -> None:
    """Give every node its fake value for images of a size, whose batch stays free.

    Args:
        module: a captured graph; `meta["val"]` of its nodes changes, and `meta["following"]` where there is a range.
        size: (channels, height, width) in pixels.
        sizes: the range of a graph that has one.
    """
    found = _values(module, size, is_free=True)
    for node, value in found.items():
        node.meta["val"] = value
    if sizes is None:
        return
    heights, widths = zip(*sizes.ends, strict=True)
    corners = [_values(module, (size[0], *c), is_free=False) for c in itertools.product(heights, widths)]
    for node in found:
        shapes = [corner[node].shape for corner in corners if isinstance(corner[node], Tensor)]
        sides = enumerate(zip(*shapes, strict=True))
        node.meta[FOLLOWING] = tuple(number for number, held in sides if len(set(held)) > 1)


def _values(module: fx.GraphModule, size: Sequence[int], *, is_free: bool) -> dict[fx.Node, Any]:
    """Every node's value but the output's, without content; the batch is a symbol where it is free."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    batch = DimDynamic.DYNAMIC if is_free else DimDynamic.STATIC
    context: Any = StatelessSymbolicContext(dynamic_sizes=[batch, *[DimDynamic.STATIC] * len(size)])
    buffers = dict(module.named_buffers())
    device = next(iter(buffers.values())).device
    example = mode.from_tensor(torch.empty([_BATCH, *size], device=device), symbolic_context=context)
    with mode:
        fakes = {name: torch.empty(b.shape, dtype=b.dtype, device=b.device) for name, b in buffers.items()}
    env: dict[fx.Node, Any] = {}
    # C++ would take a free batch size for the number that stands for it.
    with mode, enable_python_dispatcher(), torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                env[node] = example
            elif node.op == "get_attr":
                env[node] = fakes[str(node.target)]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
    return env
