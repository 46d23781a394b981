"""Outlier-injected twins: the float function of a network, in constants that per-tensor quantization collapses on (ours).

At each site (see `channels`) a few channels of the producer grow by a large factor and the readers' columns shrink by it:
LayerNorm outputs, and v with the attention's output. Equalization can undo the factors, but has to find channels and factors from
activations, beside the outliers that the network has by itself. The residual stream cannot carry injected factors: the LayerNorms
that read it normalise over all channels, so a factor on some of them changes the function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ospq_export.errors import InputError
from ospq_export.graph.capture import capture
from ospq_export.graph.equalization import Site, find_sites, rescale


def inject_outliers(
    captured: fx.GraphModule, *, share: float = 0.03, factor: float = 64.0, seed: int = 0
) -> list[str]:
    """Let a few channels of every site grow, in place; the float function stays the same.

    Args:
        captured: from `capture`.
        share: of a site's free channels, at least one.
        factor: the largest growth; each chosen channel grows by a factor between its root and itself, drawn log-uniformly.
        seed: of the choice of channels and factors.

    Returns:
        Module paths of the producers that were changed, in graph order.

    Raises:
        ValueError: share is not in (0, 1], or factor is below 1.
        InputError: the network has no site.
    """
    if not 0.0 < share <= 1.0 or factor < 1.0:
        raise ValueError(f"share {share} must lie in (0, 1], factor {factor} be at least 1")
    sites = find_sites(captured.graph)
    if not sites:
        raise InputError(
            "no channels of this network can be rescaled freely",
            fix="outliers can only be injected where linears read a LayerNorm",
        )
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        rescale(captured, site, _growth(site, share, factor, generator).reciprocal())
    return [site.producer.meta["module_path"] for site in sites]


def _growth(site: Site, share: float, factor: float, generator: torch.Generator) -> Tensor:
    free = site.free.nonzero().flatten()
    count = max(1, round(share * len(free)))
    chosen = free[torch.randperm(len(free), generator=generator)[:count]]
    growth = torch.ones(len(site.free), dtype=torch.float64)
    exponents = 0.5 + 0.5 * torch.rand(count, generator=generator, dtype=torch.float64)
    growth[chosen] = factor**exponents
    return growth


def twin_state_dict(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    share: float = 0.03,
    factor: float = 64.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The state dictionary of a model's twin: saved as a checkpoint, it makes the twin an ordinary model.

    Args:
        model: from `create_model`; it is not changed.
        input_size: (channels, height, width) in pixels.
        share: see `inject_outliers`.
        factor: see `inject_outliers`.
        seed: see `inject_outliers`.

    Raises:
        InputError: the model cannot be captured, has no site, or a constant that grows is not a parameter of its own
            (a folded BatchNorm, an assembled bias).
    """
    captured = capture(model, input_size)
    before = {name: value.clone() for name, value in captured.named_buffers()}
    inject_outliers(captured, share=share, factor=factor, seed=seed)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, value in captured.named_buffers():
        if torch.equal(value, before[name]):
            continue
        if name not in state:
            raise InputError(
                f"{name} is computed from several parameters; it cannot be written back into a state dictionary",
                where=type(model).__name__,
                fix="inject the outliers into the captured graph instead",
            )
        state[name] = value.detach().clone()
    return state
