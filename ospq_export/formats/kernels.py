"""Fake quantization as one autograd function, computed block by block so that its passes run in cache.

A chain of autograd nodes reads and writes main memory once per elementwise step and keeps every intermediate result for the
backward pass. Here the whole chain runs over one block after the other, in place, and the backward pass computes it again
from the input. Measured on a CPU this is as fast as compiled kernels and needs no compiler. A GPU gets the compiled kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ospq_export.formats.base import Rounding

log = logging.getLogger(__name__)
BLOCK = 1 << 18
"""Elements per block: a few float32 blocks fit a processor's last cache, and one is worth waking other threads for.

torch splits an operation among threads from 32,768 elements on, so that every pass over a block is a parallel region, which ends
only when its last thread has run: smaller blocks are more regions.
"""
_KINDS = 64


def blocks(flat: Tensor) -> Iterator[slice]:
    """Slices that cover a flat tensor; on a GPU, whose kernels want everything at once, a single one."""
    size = BLOCK if flat.device.type == "cpu" else max(flat.numel(), 1)
    return (slice(start, start + size) for start in range(0, flat.numel(), size))


def _as_weights(kept: Tensor, block: slice, like: Tensor) -> Tensor:
    return kept[block].to(like.dtype)


def lerp_mask(start: Tensor, end: Tensor, kept: Tensor) -> Tensor:
    """`end` where kept is 1, `start` where it is 0: a `where` that is fast on a CPU; not differentiable."""
    out = torch.empty_like(start, memory_format=torch.contiguous_format)
    first, second, mask = (t.reshape(-1) for t in (start, end, kept))
    for block in blocks(first):
        # With weights of exactly 0 and 1, lerp returns its ends bit for bit.
        weights = _as_weights(mask, block, first)
        torch.lerp(first[block], second[block], weights, out=out.view(-1)[block])
    return out


def steps_between(unrounded: Tensor, deployed: Tensor, levels: Rounding) -> tuple[Tensor, Tensor]:
    """What `Format.steps_apart` returns, of values in units of the levels."""
    wanted, found = levels.ranks(unrounded), levels.ranks(deployed)
    nearest = levels.ranks(levels.round_(unrounded.clone()))
    return (nearest - found).abs(), (wanted - found).abs() - 0.5


def whole_forward(
    x: Tensor, scale: Tensor, offset: Tensor | None, mask: Tensor | None, levels: Rounding
) -> Tensor:
    """What `FakeQuantize` computes, in one expression for a compiler to fuse: on a GPU a single pass over memory."""
    shifted = x if offset is None else x - offset
    real = levels.round_(shifted / scale) * scale
    real = real if offset is None else real + offset
    return real if mask is None else torch.where(mask > 0, real, x)


def whole_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, mask: Tensor | None, levels: Rounding
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients in x, scale and offset."""
    scaled = (x if offset is None else x - offset) / scale
    codes = levels.round_(scaled.clone())
    inside = (scaled >= levels.lo - levels.edge) & (scaled <= levels.hi + levels.edge)
    taken = grad if mask is None else torch.where(mask > 0, grad, 0.0)
    outside = torch.where(inside, 0.0, taken)
    error = torch.where(inside, codes - scaled, codes)
    return grad - outside, (taken * error).sum(), outside.sum()


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, once for every kind of arguments; as it is where this machine cannot compile."""
    from torch._dynamo import config

    fused = torch.compile(function, dynamic=True)
    works = True

    def call(*args: Any) -> Any:
        nonlocal works
        if works:
            try:
                # Offset, mask, gradients, inference mode and dtype make more kinds than the eight that torch allows.
                with config.patch(recompile_limit=_KINDS):
                    return fused(*args)
            except Exception as error:
                if args[0].is_cuda and torch.cuda.is_current_stream_capturing():
                    raise
                works = False
                log.warning("fake quantization is not compiled: %s", str(error).splitlines()[0])
        return function(*args)

    return call


class FakeQuantize(torch.autograd.Function):
    """quantize + dequantize of a tensor with one scale; see `Format.fake_quantize` for the gradients.

    Arguments: x, scale (one element), offset (one element or None), kept (0 and 1, the shape of x, or None), levels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, kept: Tensor | None, levels: Rounding
    ) -> Tensor:
        """Fake-quantize; keeps x, the mask and the scale for the backward pass, nothing else."""
        flat, mask = x.reshape(-1), None if kept is None else kept.reshape(-1)
        ctx.save_for_backward(flat, scale, offset, mask)
        ctx.levels, ctx.shape = levels, x.shape
        if flat.device.type == "cuda":
            return compiled(whole_forward)(flat, scale, offset, mask, levels).view(x.shape)
        out = torch.empty_like(flat)
        for block in blocks(flat):
            part, result = flat[block], out[block]
            _scaled(part, scale, offset, result)
            levels.round_(result).mul_(scale)
            if offset is not None:
                result.add_(offset)
            if mask is not None:
                torch.lerp(part, result, _as_weights(mask, block, part), out=result)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in x, scale and offset, as far as they are asked for."""
        flat, scale, offset, mask = ctx.saved_tensors
        wants_x, wants_scale, wants_offset = ctx.needs_input_grad[:3]
        wants_offset = wants_offset and offset is not None
        grad = grad.reshape(-1)
        if flat.device.type == "cuda":
            found = compiled(whole_backward)(grad, flat, scale, offset, mask, ctx.levels)
            grad_offset = None if offset is None else found[2].view(offset.shape)
            every = (found[0].view(ctx.shape), found[1].view(scale.shape), grad_offset)
            return (
                *(g if wanted else None for g, wanted in zip(every, ctx.needs_input_grad, strict=False)),
                None,
                None,
            )
        grad_x = torch.empty_like(flat) if wants_x else None
        grad_scale = torch.zeros_like(scale) if wants_scale else None
        grad_offset = torch.zeros_like(offset) if wants_offset else None
        for block in blocks(flat):
            scaled, outside, codes = _parts(flat[block], scale, offset, ctx.levels)
            given = grad[block]
            taken = given if mask is None else given * _as_weights(mask, block, given)
            if grad_x is not None:
                torch.addcmul(given, taken, outside, value=-1.0, out=grad_x[block])
            if grad_offset is not None:
                grad_offset += torch.dot(taken, outside)
            if grad_scale is not None:
                # codes - scaled inside the range, codes outside.
                error = codes.addcmul_(scaled, outside.sub_(1.0))
                grad_scale += torch.dot(taken, error)
        return None if grad_x is None else grad_x.view(ctx.shape), grad_scale, grad_offset, None, None


def _scaled(x: Tensor, scale: Tensor, offset: Tensor | None, out: Tensor) -> Tensor:
    """(x - offset) / scale, into `out`."""
    if offset is None:
        return torch.div(x, scale, out=out)
    return torch.sub(x, offset, out=out).div_(scale)


def _parts(
    x: Tensor, scale: Tensor, offset: Tensor | None, levels: Rounding
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled values, 1 where they are clipped (else 0), and codes; all of x's dtype, none shared."""
    scaled = _scaled(x, scale, offset, torch.empty_like(x))
    codes = scaled.clamp(levels.lo - levels.edge, levels.hi + levels.edge)
    # Compared straight into floats: a boolean result would be converted in a pass that costs more than all others.
    outside = torch.ne(codes, scaled, out=torch.empty_like(x))
    return scaled, outside, levels.round_(codes)


# Stretch of the rectified sigmoid (AdaRound, Nagel et al. 2020, eq. 23): zeta = 1.1, gamma = -0.1.
STRETCH, SHIFT = 1.2, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) (AdaRound, eq. 23)."""
    return torch.clamp(torch.sigmoid(v) * STRETCH + SHIFT, 0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The V with h(V) = h, for h in [0, 1]."""
    return torch.logit((h - SHIFT) / STRETCH)


def random_kept(like: Tensor, drop_probability: float) -> Tensor | None:
    """A mask that leaves each element float with the given probability (QDrop, Wei et al. 2022, eq. 5).

    Random bytes decide, so the probability is rounded to a multiple of 1/256; the global generator gives them.

    Returns:
        uint8 of 0 (float) and 1 (quantized), the shape of `like`; None where nothing is dropped.
    """
    threshold = round(drop_probability * 256)
    if threshold <= 0:
        return None
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device)
    random_bytes = words.random_(-(2**63), None).view(torch.uint8)[: like.numel()]
    if threshold >= 256:
        return torch.zeros_like(like, dtype=torch.uint8)
    return torch.ge(random_bytes, threshold, out=random_bytes).view(like.shape)


def mix(quantized: Tensor, original: Tensor, drop_probability: float) -> Tensor:
    """Quantized activations with a random share of elements replaced by the float network's (QDrop's input)."""
    kept = random_kept(original, drop_probability)
    return quantized if kept is None else lerp_mask(original, quantized, kept)
