"""NVFP4: E2M1 in blocks of 16 along the inner dimension, an E4M3 scale for each block, a float32 scale for the tensor.

A value is level * block_scale * tensor_scale. Weights have searched block scales; those of activations are computed from the
values as they come, from a tensor scale that is fixed: block_scale = e4m3(clip(amax / (6 * tensor_scale), 2^-9, 448)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospq_export.formats.base import Format, Granularity, Range, Role, Sample, Scales
from ospq_export.formats.kernels import blocks, lerp_mask, steps_between
from ospq_export.formats.minifloat import E2M1, E4M3, Minifloat
from ospq_export.formats.search import positive

NAMES = ("nvfp4",)
BLOCK_SIZE = 16
_TOP = E2M1.largest * E4M3.largest
# Ranks of E4M3 around that of amax / 6: three below it clip the largest value by a quarter or more, six above it bring that
# to 4 instead of 6, where the levels are closer for the others ("Four Over Six", Cook et al. 2025).
_TRIED = range(-3, 7)
# Relative; float32 sums in another order differ by less.
_EDGE = 1e-5


def block_scales(x: Tensor, tensor_scale: Tensor) -> Tensor:
    """Scales of blocks that are computed from their largest magnitude, as dynamic quantization does.

    Args:
        x: float32 (..., 16).
        tensor_scale: float32 scalar.

    Returns:
        float32 (..., 1): E4M3 times the tensor scale.
    """
    largest = x.abs().amax(-1, keepdim=True).div_(E2M1.largest * tensor_scale)
    # An all-zero block has the smallest scale, not 0: 0 / 0 would be NaN.
    return E4M3.round_(largest.clamp_(E4M3.smallest, E4M3.largest)).mul_(tensor_scale)


@dataclass(frozen=True)
class _Nvfp4(Format):
    family = "nvfp4"
    # Twice the level: -12 .. 12. The four bits are packed when the file is written.
    storage = torch.int8
    engine_type = "FP4E2M1"
    scale_bits = 8
    opset = 23
    fallback = "fp8"

    granularity: Granularity
    bits: int = 4
    levels: Minifloat = E2M1
    name: str = "nvfp4"

    def refuses(self, role: Role, inner: int) -> str:
        """Only linears whose inner dimension is made of whole blocks have FP4 kernels."""
        if role is not Role.LINEAR:
            return f"{role.value} has no FP4 kernel"
        return f"its inner dimension {inner} is no multiple of {BLOCK_SIZE}" if inner % BLOCK_SIZE else ""

    def encode(self, levels: Tensor) -> Tensor:
        """Twice the levels, int8."""
        return (levels * 2.0).to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """Half the codes, float32; levels, which a file for checking holds, are what they are."""
        return codes if codes.is_floating_point() else codes.float().mul_(0.5)

    def holds(self, codes: Tensor) -> bool:
        """Whether all codes are levels, doubled."""
        levels = self.decode(codes)
        return bool((self.levels.rounded(levels) == levels).all())

    def record(self) -> dict[str, Any]:
        """Name, axis and size of the blocks."""
        axis, size = self.granularity.axis, self.granularity.block_size
        return {"format": self.name, "bits": self.bits, "axis": axis, "block_size": size}

    def read(self, record: dict[str, Any]) -> Format:
        """The format of a record."""
        if record != self.record():
            raise ValueError(f"nvfp4 with {record}")
        return self


@dataclass(frozen=True)
class Nvfp4Weight(_Nvfp4):
    """Blocks along a weight's inputs, with searched scales."""

    has_tensor_scale = True

    def search_scale(self, weight: Tensor) -> Scales:
        """For each block the E4M3 scale with the least squared error, out of ten around amax / 6.

        Args:
            weight: float32 (out_features, in_features).
        """
        tensor_scale = positive(weight.abs().amax() / _TOP)
        x = weight.detach().unflatten(1, (-1, BLOCK_SIZE))
        start = E4M3.ranks(E4M3.rounded(x.abs().amax(-1) / (E2M1.largest * tensor_scale)))
        stored = torch.tensor(E4M3.all, device=weight.device)
        candidates = [
            stored[((start + step).clamp_(1, E4M3.top) + E4M3.top).long()] * tensor_scale for step in _TRIED
        ]
        # Where no error is finite, that of amax / 6 serves.
        best_scale, best_error = candidates[_TRIED.index(0)].clone(), torch.full_like(start, torch.inf)
        for scale in candidates:
            error = E2M1.round_(x / scale.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(x).square_().sum(-1)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
        return Scales(best_scale, tensor_scale)

    def stores(self, scales: Scales) -> bool:
        """Whether every block's scale is a number of E4M3 times the tensor scale."""
        scale, tensor_scale = scales
        if tensor_scale is None or not bool(tensor_scale > 0):
            return False
        return bool((E4M3.rounded(scale / tensor_scale) * tensor_scale == scale).all())

    def scale_histogram(self, scales: Scales) -> dict[int, int]:
        """By the exponents of E4M3, -9 to 8."""
        scale, tensor_scale = scales
        assert tensor_scale is not None
        exponents = torch.frexp(E4M3.rounded(scale / tensor_scale)).exponent - 1
        found, counts = exponents.unique(return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))


@dataclass(frozen=True)
class Nvfp4Activation(_Nvfp4):
    """Blocks along an activation's last dimension, whose scales are computed from the values."""

    learns_scale = False

    def search_range(self, sample: Sample, *, may_shift: bool) -> Range:
        """The tensor scale that gives the largest value the largest block scale; the sample has all extremes."""
        largest = sample.values.abs().max()
        return Range(self, float(positive(largest / _TOP)), 0.0, 0.0)

    def activation_scales(self, x: Tensor, scale: Tensor, stored: Tensor | None = None) -> Tensor:
        """The stored block scales times the tensor's, or what `block_scales` returns; every element has its block's."""
        if stored is None:
            found = block_scales(x.unflatten(-1, (-1, BLOCK_SIZE)), scale)
        else:
            found = stored.to(x.dtype).view(*x.shape[:-1], -1, 1) * scale
        return found.expand(*found.shape[:-1], BLOCK_SIZE).flatten(-2)

    def steps_apart(
        self, x: Tensor, scale: Tensor, offset: Tensor | None, levels: Tensor, stored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As for other formats, with the block scales that were stored, which have to be right themselves.

        Where those are not known, and a last digit decides between two of them, with the one that fits better.
        """
        if stored is None:
            return self._at_edges(x, scale, levels)
        steps, excess = steps_between(x / self.activation_scales(x, scale, stored), levels, self.levels)
        largest = x.unflatten(-1, (-1, BLOCK_SIZE)).abs().amax(-1, keepdim=True) / (E2M1.largest * scale)
        wanted = E4M3.ranks(largest.clamp(E4M3.smallest, E4M3.largest))
        wrong = (wanted - E4M3.ranks(stored.view(wanted.shape))).abs() - 0.5
        return steps, torch.maximum(excess, wrong.expand(*wrong.shape[:-1], BLOCK_SIZE).flatten(-2))

    def _at_edges(self, x: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        steps, excess = steps_between(self.unrounded(x, scale * (1.0 - _EDGE)), levels, self.levels)
        others, other_excess = steps_between(self.unrounded(x, scale * (1.0 + _EDGE)), levels, self.levels)
        groups = [e.unflatten(-1, (-1, BLOCK_SIZE)).amax(-1, keepdim=True) for e in (excess, other_excess)]
        first = (groups[0] <= groups[1]).expand(*groups[0].shape[:-1], BLOCK_SIZE).flatten(-2)
        return torch.where(first, steps, others), torch.where(first, excess, other_excess)

    def fake_quantize(self, x: Tensor, scale: Tensor, offset: Tensor | None, kept: Tensor | None) -> Tensor:
        """The real values of the nearest levels; the gradient in x is passed straight through, the scale has none."""
        out: Tensor = _BlockFakeQuantize.apply(x, scale, kept)
        return out


class _BlockFakeQuantize(torch.autograd.Function):
    """Quantize and dequantize in blocks of 16, part by part so that the passes run in cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, kept: Tensor | None) -> Tensor:
        """Scale holds one element; kept is as in `Format.fake_quantize`."""
        flat = x.reshape(-1)
        out = torch.empty_like(flat)
        for block in blocks(flat):
            part, result = flat[block].view(-1, BLOCK_SIZE), out[block].view(-1, BLOCK_SIZE)
            scales = block_scales(part, scale)
            torch.div(part, scales, out=result)
            E2M1.round_(result).mul_(scales)
        return (out if kept is None else lerp_mask(flat, out, kept.reshape(-1))).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through."""
        return grad, None, None


def find(name: str, *, weight: bool) -> _Nvfp4 | None:
    """NVFP4 along the inner dimension, if that is the name: the last one of a weight (out, in) and of an activation."""
    if name != "nvfp4":
        return None
    return Nvfp4Weight(Granularity(1, BLOCK_SIZE)) if weight else Nvfp4Activation(Granularity(-1, BLOCK_SIZE))
