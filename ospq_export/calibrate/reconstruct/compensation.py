"""Weights fitted to the inputs that the quantized network really has, in closed form, before their rounding is learned (ours).

For each linear of a slice, in order, with x its input in the float network and x^ that in the quantized one,

    W', b' = argmin  sum |W' x^ + b' - (W x + b)|^2  +  ridge |W' - W|^2

over the tokens of some calibration images. What quantization adds to x^ has about the same energy in all directions, the values
themselves have most of theirs in few: W' reads less where there is mostly noise. GPTAQ (Li et al., ICML 2025), too, has
quantized inputs and targets that are not; it corrects codes one column after the other, here rounding is learned afterwards.
A quarter of the images is held out: the ridge is the one under which they err least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from ospq_export.calibrate.reconstruct.activations import FORWARD_BATCH, SliceData
from ospq_export.calibrate.reconstruct.bias import corrected_biases
from ospq_export.calibrate.reconstruct.passes import Passes
from ospq_export.graph.quantizers import CorrectedBias, Mode, WeightQuantizer, own_quantizers, set_mode
from ospq_export.graph.rewrite import parameter

aten = torch.ops.aten
# Of the inputs' mean energy, as GPTQ (Frantar et al., ICLR 2023) damps its Hessian.
_RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_PARTS = 8
_HELD_OUT = 4


def compensate(piece: fx.GraphModule, data: SliceData, device: torch.device) -> None:
    """Fit the weights of a slice's linears to their quantized inputs, and round them to nearest anew.

    Afterwards `WeightQuantizer.fitted` holds what learned rounding starts from, and biases of the quantized network's own have
    changed.

    Args:
        piece: from `extract`; its quantizers hold ranges and nearest codes.
        data: some calibration images.
        device: where the slice runs.
    """
    with torch.no_grad():
        for node, weight, bias in list(_linears(piece)):
            fit = _Fit(piece.get_buffer(weight.constant), _float_bias(piece, node, bias))
            for index, part in enumerate(_parts(data, device)):
                original = _input(piece, part.float_input, part.images, node, Mode.FLOAT)
                quantized = _input(piece, part.quantized_input, part.images, node, Mode.QUANTIZE)
                fit.add(original, quantized, held_out=index % _HELD_OUT == _HELD_OUT - 1)
            found = fit.solve(with_bias=bias is not None)
            if found is not None:
                weight.fitted = found[0]
                weight.round_to_nearest(found[0])
                if bias is not None:
                    bias.value.copy_(found[1])


def _parts(data: SliceData, device: torch.device) -> Iterator[SliceData]:
    size = max(1, min(FORWARD_BATCH, data.images // _PARTS))
    for start in range(0, data.images, size):
        yield data.select(slice(start, start + size)).to(device)


def forget(piece: fx.GraphModule) -> None:
    """Let rounding start from the float network's weights again."""
    for quantizer in own_quantizers(piece):
        if isinstance(quantizer, WeightQuantizer):
            quantizer.fitted = None


def _linears(piece: fx.GraphModule) -> Iterator[tuple[fx.Node, WeightQuantizer, CorrectedBias | None]]:
    """Linears with a quantized weight that they alone read, in order, and their biases where these may change."""
    modules, own = dict(piece.named_modules()), {id(m) for m in own_quantizers(piece)}
    biases = corrected_biases(piece)
    for node in piece.graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = modules.get(str(node.args[1].target))
        if isinstance(weight, WeightQuantizer) and id(weight) in own and len(node.args[1].users) == 1:
            yield node, weight, biases.get(node)


def _float_bias(piece: fx.GraphModule, node: fx.Node, bias: CorrectedBias | None) -> Tensor | None:
    if bias is not None:
        return piece.get_buffer(bias.constant)
    held = parameter(node, 2)
    return None if held is None else piece.get_buffer(str(held.target))


def _input(piece: fx.GraphModule, inputs: Sequence[Tensor], images: int, node: fx.Node, mode: Mode) -> Tensor:
    """What a linear reads, (tokens, in)."""
    set_mode(piece, mode)
    passes = Passes(piece, inputs, images)
    passes.advance(node)
    value: Tensor = passes.env[node.args[0]]  # type: ignore[index]
    return value.flatten(0, -2)


class _Fit:
    """The normal equations of one linear, of the images that are fitted and of those held out; float64."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        outputs, inner = weight.shape
        self.weight, self.bias = weight, bias
        # One column more for the bias: an input that is always 1.
        self.gram = weight.new_zeros(2, inner + 1, inner + 1, dtype=torch.float64)
        self.target = weight.new_zeros(2, outputs, inner + 1, dtype=torch.float64)

    def add(self, x: Tensor, quantized: Tensor, *, held_out: bool) -> None:
        """Rows of the linear's input, (tokens, in) each."""
        rows = torch.nn.functional.pad(quantized, (0, 1), value=1.0)
        self.gram[int(held_out)] += rows.T @ rows
        self.target[int(held_out)] += torch.nn.functional.linear(x, self.weight, self.bias).T @ rows

    def solve(self, *, with_bias: bool) -> tuple[Tensor, Tensor] | None:
        """W' and b', float32; None where nothing is better than W and b.

        Args:
            with_bias: whether b may change.
        """
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        start = torch.cat([self.weight, bias.unsqueeze(1)], 1).double()
        free = len(self.gram[0]) - (not with_bias)
        if not bool(torch.isfinite(self.target).all()):
            return None
        errors = {
            ridge: self._error(self._solution(start, ridge, free, self.gram[0], self.target[0]))
            for ridge in _RIDGES
        }
        best = min(errors, key=errors.__getitem__)
        if not errors[best] < self._error(start):
            return None
        found = self._solution(start, best, free, self.gram.sum(0), self.target.sum(0))
        return found[:, :-1].float(), found[:, -1].float()

    def _solution(self, start: Tensor, ridge: float, free: int, gram: Tensor, target: Tensor) -> Tensor:
        """W and b next to each other, of which the first `free` columns are fitted."""
        damping = torch.full((free,), float(ridge * gram.diagonal()[:-1].mean()), dtype=torch.float64)
        damping[len(gram) - 1 :] = 0.0
        matrix = gram[:free, :free] + torch.diag(damping).to(gram.device)
        # A correction of what there is, so that what stays is taken off the target.
        residual = (target - start @ gram)[:, :free]
        factor, failed = torch.linalg.cholesky_ex(matrix)
        result = start.clone()
        if not bool(failed):
            result[:, :free] += torch.cholesky_solve(residual.T, factor).T
        return result

    def _error(self, weights: Tensor) -> float:
        """Squared error on the images held out, up to a constant."""
        return float(((weights @ self.gram[1] - 2.0 * self.target[1]) * weights).sum())
