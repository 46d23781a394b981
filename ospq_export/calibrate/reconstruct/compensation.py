"""Weights fitted to the inputs that the quantized network really has, in closed form, before their rounding is learned (ours).

For each linear of a slice, in order, with x its input in the float network and x^ that in the quantized one,

    W', b' = argmin  sum |W' x^ + b' - (W x + b)|^2  +  ridge |W' - W|^2

over the tokens of some calibration images. What quantization adds to x^ has about the same energy in all directions, the values
themselves have most of theirs in few: W' reads less where there is mostly noise. GPTAQ (Li et al., ICML 2025), too, has
quantized inputs and targets that are not; it corrects codes one column after the other, here rounding is learned afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ospq_export.calibrate.reconstruct.activations import FORWARD_BATCH, SliceData
from ospq_export.calibrate.reconstruct.passes import Passes
from ospq_export.graph.quantizers import CorrectedBias, Mode, WeightQuantizer, own_quantizers, set_mode

aten = torch.ops.aten
# Of the inputs' mean energy, as GPTQ (Frantar et al., ICLR 2023) damps its Hessian.
_RIDGE = 0.01


def compensate(piece: fx.GraphModule, data: SliceData, device: torch.device) -> None:
    """Fit the weights of a slice's linears to their quantized inputs, and round them to nearest anew.

    Afterwards `WeightQuantizer.fitted` holds what learned rounding starts from, and biases of the quantized network's own have
    changed.

    Args:
        piece: from `extract`; its quantizers hold ranges and nearest codes.
        data: some calibration images.
        device: where the slice runs.
    """
    linears = list(_linears(piece))
    if not linears:
        return
    parts = [
        data.select(slice(start, start + FORWARD_BATCH)).to(device)
        for start in range(0, data.images, FORWARD_BATCH)
    ]
    with torch.no_grad():
        originals = [Passes(piece, part.float_input, part.images) for part in parts]
        quantized = [Passes(piece, part.quantized_input, part.images) for part in parts]
        for node, weight, bias in linears:
            fit = _Fit(piece.get_buffer(weight.constant), _float_bias(piece, node, bias))
            for original, other in zip(originals, quantized, strict=True):
                fit.add(_input(piece, original, node, Mode.FLOAT), _input(piece, other, node, Mode.QUANTIZE))
            found = fit.solve(with_bias=bias is not None)
            if found is not None:
                weight.fitted = found[0]
                weight.round_to_nearest(found[0])
                if bias is not None:
                    bias.value.copy_(found[1])


def forget(piece: fx.GraphModule) -> None:
    """Let rounding start from the float network's weights again."""
    for quantizer in own_quantizers(piece):
        if isinstance(quantizer, WeightQuantizer):
            quantizer.fitted = None


def _linears(piece: fx.GraphModule) -> Iterator[tuple[fx.Node, WeightQuantizer, CorrectedBias | None]]:
    """Linears with a quantized weight that they alone read, in order, and their biases where these may change."""
    modules, own = dict(piece.named_modules()), {id(m) for m in own_quantizers(piece)}
    for node in piece.graph.nodes:
        if node.target is not aten.linear.default:
            continue
        weight, bias = (modules.get(str(getattr(a, "target", None))) for a in (*node.args[1:3], None)[:2])
        if isinstance(weight, WeightQuantizer) and id(weight) in own and len(node.args[1].users) == 1:
            yield node, weight, bias if isinstance(bias, CorrectedBias) else None


def _float_bias(piece: fx.GraphModule, node: fx.Node, bias: CorrectedBias | None) -> Tensor | None:
    if bias is not None:
        return piece.get_buffer(bias.constant)
    source = node.args[2] if len(node.args) > 2 else None
    return piece.get_buffer(str(source.target)) if isinstance(source, fx.Node) else None


def _input(piece: fx.GraphModule, passes: Passes, node: fx.Node, mode: Mode) -> Tensor:
    set_mode(piece, mode)
    passes.advance(node)
    value: Tensor = passes.env[node.args[0]]  # type: ignore[index]
    return value.flatten(0, -2)


class _Fit:
    """The normal equations of one linear; float64 sums of float32 products."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        inner = weight.shape[1]
        self.weight, self.bias = weight, bias
        # One column more for the bias: an input that is always 1.
        self.gram = torch.zeros(inner + 1, inner + 1, dtype=torch.float64, device=weight.device)
        self.target = torch.zeros(len(weight), inner + 1, dtype=torch.float64, device=weight.device)

    def add(self, x: Tensor, quantized: Tensor) -> None:
        """Rows of the linear's input, (tokens, in) each."""
        rows = torch.nn.functional.pad(quantized, (0, 1), value=1.0)
        self.gram += (rows.T @ rows).double()
        self.target += (torch.nn.functional.linear(x, self.weight, self.bias).T @ rows).double()

    def solve(self, *, with_bias: bool) -> tuple[Tensor, Tensor] | None:
        """W' and b', float32; None where there is no solution."""
        held = torch.zeros(len(self.weight), dtype=torch.float64, device=self.weight.device)
        if self.bias is not None:
            held = self.bias.double()
        start = torch.cat([self.weight.double(), held.unsqueeze(1)], 1)
        size = self.gram.shape[0] if with_bias else self.gram.shape[0] - 1
        ridge = _RIDGE * self.gram.diagonal()[:-1].mean()
        damping = torch.zeros(size, dtype=torch.float64, device=self.gram.device)
        damping[: self.gram.shape[0] - 1] = ridge
        gram = self.gram[:size, :size] + torch.diag(damping)
        # A correction of what there is: where the bias must stay, its part is taken off the target.
        residual = (self.target - start @ self.gram)[:, :size]
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed) or not bool(torch.isfinite(residual).all()):
            return None
        start[:, :size] += torch.cholesky_solve(residual.T, factor).T
        return start[:, :-1].float(), start[:, -1].float()
