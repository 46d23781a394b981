"""What is soft while a slice learns: weights between two levels (AdaRound), activations that stay float by chance (QDrop)."""

from __future__ import annotations

import torch
from torch import Tensor

from ospq_export.formats.kernels import lerp_mask

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
