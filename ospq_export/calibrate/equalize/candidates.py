"""Candidates of a site: factors and shifts that its channels' statistics suggest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ospq_export.calibrate.equalize.region import Change, Region
from ospq_export.graph.equalization.rescale import weight_of
from ospq_export.graph.equalization.sites import Site

_LIMIT = 1e3  # of a factor: float32 keeps the function to 1e-4 well beyond it, half precision does not
_STRENGTHS = (0.3, 0.5, 0.7, 0.9)
_POWERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Channels:
    """Statistics of a site's channels on the sample, (channels,) each, and the candidates made of them."""

    site: Site
    low: Tensor
    high: Tensor
    mean: Tensor
    deviation: Tensor
    weight: Tensor

    @classmethod
    def of(cls, region: Region) -> Channels:
        """Measure the producer's output and the consumers' weights."""
        rows = region.values[region.producer].movedim(region.site.axis, -1).flatten(0, -2)
        largest = torch.zeros_like(rows[0])
        for consumer in region.site.consumers:
            weight = weight_of(region.network.module, consumer.node)
            per_column = weight.abs().transpose(0, 1).flatten(1).amax(1)
            columns = consumer.columns.to(weight.device)
            used = columns >= 0
            largest.scatter_reduce_(0, columns[used], per_column[used], "amax")
        return cls(
            region.site, rows.amin(0), rows.amax(0), rows.mean(0), rows.std(0, unbiased=False), largest
        )

    def _change(self, name: str, raw: Tensor, shift: Tensor) -> Change:
        """Factors brought to a geometric mean of one over the free channels, and kept within limits."""
        free, shiftable = self.site.free.to(raw.device), self.site.shiftable.to(raw.device)
        logarithm = raw.clamp_min(1e-12).log()
        logarithm = logarithm - logarithm[free].mean()
        scale = logarithm.exp().clamp(1.0 / _LIMIT, _LIMIT)
        ones, zeros = torch.ones_like(scale), torch.zeros_like(scale)
        return Change(name, torch.where(free, scale, ones), torch.where(shiftable, shift, zeros))

    def none(self) -> Change:
        """No change."""
        return Change("none", torch.ones_like(self.mean), torch.zeros_like(self.mean))

    def shifts(self) -> list[Change]:
        """Centred on the mean, and on the middle of the range."""
        ones = torch.ones_like(self.mean)
        if not bool(self.site.shiftable.any()):
            return []
        middle = (self.low + self.high) / 2
        return [self._change("mean", ones, self.mean), self._change("middle", ones, middle)]

    def factors(self, shift: Tensor) -> list[Change]:
        """SmoothQuant's at several strengths, and powers of the channels' root mean square, around a given shift."""
        prefix = "shift " if bool((shift != 0).any()) else ""
        largest = torch.maximum(self.high - shift, shift - self.low).clamp_min(1e-6)
        rms = (self.deviation.square() + (self.mean - shift).square()).sqrt().clamp_min(1e-6)
        weight = self.weight.clamp_min(1e-6)
        smooth = [
            self._change(f"{prefix}smooth {a}", largest.pow(a) / weight.pow(1.0 - a), shift)
            for a in _STRENGTHS
        ]
        return [*smooth, *(self._change(f"{prefix}rms {p}", rms.pow(p), shift) for p in _POWERS)]

    def repq(self) -> Change:
        """RepQ-ViT's: every channel gets one range, around zero where a shift is possible."""
        middle = torch.where(
            self.site.shiftable.to(self.low.device), (self.low + self.high) / 2, torch.zeros_like(self.low)
        )
        largest = torch.maximum(self.high - middle, middle - self.low).clamp_min(1e-6)
        return self._change("repq", largest, middle)
