"""Quantizer modules: of activations, of weights, and the biases that a quantized network may have of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, fx, nn

from ospq_export.formats.base import Format, Neighbours, Range
from ospq_export.formats.kernels import inverse_rectified_sigmoid, random_kept, rectified_sigmoid


class Mode(StrEnum):
    """What a quantizer does with its tensor."""

    FLOAT = "float"
    OBSERVE = "observe"
    QUANTIZE = "quantize"
    LEARN = "learn"


class ActivationQuantizer(nn.Module):
    """Fake-quantizer of one activation tensor, per tensor.

    Attributes:
        name: of the first operator that reads the tensor, with the operand: "blocks.0.attn.qkv.input".
        format: of the codes; with the levels that a search has found.
        may_shift: whether an offset can be deployed (every reader is a linear or an unpadded convolution).
        scale, offset: float32 scalars, in the units of the tensor.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, name: str, format_: Format, may_shift: bool) -> None:
        super().__init__()
        self.name, self.format, self.may_shift = name, format_, may_shift
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("offset", torch.tensor(0.0))
        self.mode = Mode.FLOAT
        self.observer: _Observer | None = None
        self.drop_probability = 0.0
        self.delta: nn.Parameter | None = None
        self.offset_delta: nn.Parameter | None = None
        self.logarithmic = False

    def set_range(self, found: Range) -> None:
        """Take over a searched range."""
        self.format = found.format
        self.scale.fill_(found.scale)
        self.offset.fill_(found.offset)

    def start_learning(self, *, logarithmic: bool, offsets: bool = False) -> list[nn.Parameter]:
        """Make the scale learnable, as scale + delta or scale * exp(delta), and an offset, in steps of the scale.

        All deltas start at 0. A format whose scales are computed from the values has nothing to learn.
        """
        if not self.format.learns_scale:
            return []
        self.delta = nn.Parameter(torch.zeros_like(self.scale))
        self.logarithmic = logarithmic
        if not offsets or not self.format.has_offset:
            return [self.delta]
        self.offset_delta = nn.Parameter(torch.zeros_like(self.offset))
        return [self.delta, self.offset_delta]

    def settle(self) -> None:
        """Keep what was learned as constants."""
        with torch.no_grad():
            if self.offset_delta is not None:
                self.offset.add_(self.offset_delta * self.scale)
            self.scale.copy_(self.current_scale())
        self.delta, self.offset_delta, self.drop_probability = None, None, 0.0

    def current_scale(self) -> Tensor:
        """float32 scalar, at least 1e-8 or a thousandth of what it was before learning."""
        if self.delta is None:
            return self.scale
        moved = self.scale * self.delta.exp() if self.logarithmic else self.scale + self.delta
        return torch.maximum(moved, (self.scale * 1e-3).clamp_max(1e-8))

    @property
    def used_offset(self) -> Tensor | None:
        """The offset, None where the format has none."""
        if not self.format.has_offset:
            return None
        return self.offset if self.offset_delta is None else self.offset + self.offset_delta * self.scale

    def codes(self, x: Tensor) -> Tensor:
        """The levels of x, float32."""
        return self.format.nearest(x, self.scale, self.used_offset)

    def forward(self, x: Tensor) -> Tensor:
        """Pass, record or fake-quantize x, as the mode says; float32, the shape of x."""
        if self.mode is Mode.FLOAT:
            return x
        if self.mode is Mode.OBSERVE:
            assert self.observer is not None
            self.observer(x)
            return x
        if x.dtype is torch.bfloat16:
            # What a product gave under autocast; codes of 8 bits want more digits than it has.
            x = x.float()
        kept = random_kept(x, self.drop_probability) if self.mode is Mode.LEARN else None
        return self.format.fake_quantize(x, self.current_scale(), self.used_offset, kept)


class _Observer:
    """Keeps a bounded random sample of the values of a tensor over several batches, and their exact extremes."""

    def __init__(self, per_batch: int, seed: int) -> None:
        self.per_batch = per_batch
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        flat = x.detach().flatten()
        if flat.numel() > self.per_batch:
            picks = torch.randint(flat.numel(), (self.per_batch,), generator=self.generator).to(flat.device)
            tail = min(16, flat.numel())
            extremes = flat.topk(tail).values, flat.topk(tail, largest=False).values
            flat = torch.cat([flat[picks], *extremes])
        self.kept.append(flat.cpu())

    def values(self) -> Tensor:
        """Everything kept, (n,)."""
        return torch.cat(self.kept)


class WeightQuantizer(nn.Module):
    """Fake-quantizer of one weight.

    Attributes:
        format: of the codes.
        scale: float32, of the format's `granularity.scale_shape`, in the units of the weight.
        tensor_scale: float32 scalar where the format has one, else None; see `Scales`.
        codes: of the format's `storage`, the weight's shape; what is deployed.
        fitted: the weight that is rounded in place of the float network's; see `calibrate.reconstruct.compensation`.
        soft: the softly rounded weight where a caller computes it for a whole slice at once; else it is computed from V.
    """

    scale: Tensor
    tensor_scale: Tensor | None
    codes: Tensor

    def __init__(self, name: str, format_: Format, constant: str, weight: Tensor) -> None:
        super().__init__()
        self.name, self.format, self.constant = name, format_, constant
        shape = format_.granularity.scale_shape(weight.shape)
        self.register_buffer("scale", torch.ones(shape, device=weight.device))
        tensor_scale = torch.ones((), device=weight.device) if format_.has_tensor_scale else None
        self.register_buffer("tensor_scale", tensor_scale)
        self.register_buffer("codes", torch.zeros_like(weight, dtype=format_.storage))
        self.mode = Mode.FLOAT
        self.v: nn.Parameter | None = None
        self.around: Neighbours | None = None
        self.fitted: Tensor | None = None
        self.soft: Tensor | None = None

    def round_to_nearest(self, weight: Tensor) -> None:
        """Search the scale and take the nearest codes."""
        found = self.format.search_scale(weight)
        self.scale.copy_(found.scale)
        if self.tensor_scale is not None and found.tensor_scale is not None:
            self.tensor_scale.copy_(found.tensor_scale)
        self.codes.copy_(self.format.encode(self.format.nearest(weight, self.spread_scale())))

    def spread_scale(self) -> Tensor:
        """The scale so that it broadcasts with the weight."""
        return self.format.granularity.spread(self.scale, self.codes.shape)

    def start_learning(self, weight: Tensor) -> nn.Parameter:
        """Make the rounding learnable, starting where W^ = W (AdaRound): h(V) is W's position between its neighbours."""
        goal = weight if self.fitted is None else self.fitted
        self.around = self.format.neighbours(goal, self.spread_scale())
        self.v = nn.Parameter(inverse_rectified_sigmoid(self.around.position))
        return self.v

    def settle(self) -> None:
        """Harden: the upper neighbour where h(V) >= 1/2, else the lower one."""
        assert self.v is not None and self.around is not None
        up = rectified_sigmoid(self.v.detach()) >= 0.5
        self.codes.copy_(self.format.encode(torch.where(up, self.around.upper, self.around.lower)))
        self.v = self.around = self.soft = None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the mode says: float, dequantized codes, or softly rounded while learning."""
        if self.mode in (Mode.FLOAT, Mode.OBSERVE):
            return weight
        if self.mode is Mode.LEARN and self.soft is not None:
            return self.soft
        scale = self.spread_scale()
        if self.mode is Mode.LEARN and self.v is not None and self.around is not None:
            # W^ = s (lower + h(V) (upper - lower)): for integers AdaRound's eq. 22.
            lower, upper = self.around.lower, self.around.upper
            return scale * (lower + rectified_sigmoid(self.v) * (upper - lower))
        return self.format.dequantize(self.format.decode(self.codes).to(scale.dtype), scale)


class CorrectedBias(nn.Module):
    """A bias that the quantized network may have of its own: float, never quantized.

    Attributes:
        name: of the operator, with ".bias".
        constant: name of the float network's bias.
        value: float32 (out_channels,), the quantized network's bias.
    """

    value: Tensor

    def __init__(self, name: str, constant: str, bias: Tensor) -> None:
        super().__init__()
        self.name, self.constant = name, constant
        self.register_buffer("value", bias.detach().clone())
        self.mode = Mode.FLOAT

    def forward(self, bias: Tensor) -> Tensor:
        """The float network's bias, or the quantized network's own; float32 (out_channels,)."""
        return bias if self.mode in (Mode.FLOAT, Mode.OBSERVE) else self.value


@dataclass
class QuantizedGraph:
    """A captured network with quantizers in it; the float network is the same module in Mode.FLOAT.

    `substituted` says of operators why they have not the format that was chosen for their role.
    """

    module: fx.GraphModule
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    weights: dict[str, WeightQuantizer] = field(default_factory=dict)
    biases: dict[str, CorrectedBias] = field(default_factory=dict)
    substituted: dict[str, str] = field(default_factory=dict)

    def set_mode(self, mode: Mode) -> None:
        """Switch every quantizer."""
        set_mode(self.module, mode)

    def _live(self) -> Iterator[Tensor]:
        """Every tensor that calibration can change."""
        for a in self.activations.values():
            yield from (a.scale, a.offset)
        for w in self.weights.values():
            yield from w.buffers()
        for b in self.biases.values():
            yield b.value

    def state(self) -> list[Tensor]:
        """A copy of everything that calibration can change."""
        return [tensor.clone() for tensor in self._live()]

    def load_state(self, state: list[Tensor]) -> None:
        """Put back what `state` returned."""
        for live, saved in zip(self._live(), state, strict=True):
            live.copy_(saved)


def quantizers_of(module: nn.Module) -> Iterator[ActivationQuantizer | WeightQuantizer]:
    """All quantizers in a network or a slice."""
    return (m for m in module.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer))


def own_quantizers(piece: fx.GraphModule) -> list[ActivationQuantizer | WeightQuantizer]:
    """The quantizers of a slice that no earlier slice has settled."""
    foreign = {piece.get_submodule(name) for name in piece.meta.get("foreign", ())}
    return [quantizer for quantizer in quantizers_of(piece) if quantizer not in foreign]


def set_mode(module: nn.Module, mode: Mode) -> None:
    """Switch every quantizer in a network or a slice."""
    for part in module.modules():
        if isinstance(part, ActivationQuantizer | WeightQuantizer | CorrectedBias):
            part.mode = mode
