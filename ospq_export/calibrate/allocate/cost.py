"""What formats cost: average bits, and time on a GPU by its published rates.

Time is estimated by the roofline model (Williams, Waterman and Patterson, CACM 52, 2009): an operator takes as long as its
multiply-adds at the rate of its format, or its bytes at the memory's, whichever is longer. What is ours: an attention that its
format keeps from being one kernel moves its matrix through memory; a result that goes from a kernel of one type into one of
another, through element-wise operators alone, is read and written once more. Kernel launches and caches are left out, so that a
share of FP16's time says more than a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ospq_export.calibrate.allocate.operators import FLOAT_BITS, Attention, Operator, stored_bits
from ospq_export.calibrate.allocate.programme import converts
from ospq_export.engines.rates import HALF, Gpu
from ospq_export.formats.choice import FLOAT, named
from ospq_export.onnx.lint.attention import fuses

_BYTES = FLOAT_BITS // 8
# The matrix of an attention that is no single kernel: written and read as scores, and again as probabilities.
_MATRIX_PASSES = 4


def average_bits(operators: Sequence[Operator], formats: Mapping[str, str]) -> float:
    """Bits of weights and activations, each weighed by the multiply-adds that read it.

    Args:
        operators: of the network.
        formats: by operator.
    """
    total = sum(o.macs for o in operators)
    return sum(o.macs * o.bits(formats[o.name]) for o in operators) / total


@dataclass(frozen=True)
class Roofline:
    """Times of operators on a GPU.

    Attributes:
        gpu: whose rates they are.
        batch: images at once.
    """

    gpu: Gpu
    batch: int = 1

    def seconds(self, operator: Operator, wanted: str) -> float:
        """Of one operator in a format."""
        weight, activation = operator.format_names(wanted)
        rate = self.gpu.rates[engine_type(activation)] * 1e12
        stored = operator.weights * _deployed_bits(weight, weight=True) / 8
        read, written, attention = operator.inputs, operator.outputs, operator.attention
        moved = 0.0
        if attention is not None:
            # In one kernel the matrix, the first product's result and the second one's operand, stays on the chip.
            read -= 0 if attention.is_first else attention.matrix
            written -= attention.matrix if attention.is_first else 0
            if not _is_one_kernel(activation, attention):
                moved = attention.matrix * _BYTES * _MATRIX_PASSES / 2
        moved += read * _deployed_bits(activation, weight=False) / 8 + written * _BYTES
        data = stored + self.batch * moved
        return max(2 * self.batch * operator.macs / rate, data / (self.gpu.bandwidth * 1e9))

    def conversion(self, producer: Operator) -> float:
        """Of reading a result once more to write it for a kernel of another type."""
        return self.batch * producer.outputs * (_BYTES + 1) / (self.gpu.bandwidth * 1e9)

    def total(self, operators: Sequence[Operator], formats: Mapping[str, str]) -> float:
        """Of a whole network, seconds."""
        by_name = {o.name: o for o in operators}
        total = sum(self.seconds(o, formats[o.name]) for o in operators)
        for o in operators:
            source = by_name.get(o.source or "")
            if source and converts(kind_of(source, formats[source.name]), kind_of(o, formats[o.name])):
                total += self.conversion(source)
        return total

    def share(self, operators: Sequence[Operator], formats: Mapping[str, str]) -> float:
        """A network's time over that of all operators in FP16."""
        return self.total(operators, formats) / self.total(operators, dict.fromkeys(formats, FLOAT))


def engine_type(name: str) -> str:
    """What an engine multiplies a format as; what is left in float as FP16."""
    return HALF if name == FLOAT else named(name, weight=False).engine_type


def kind_of(operator: Operator, wanted: str) -> str:
    """What an engine multiplies an operator as when a format is wanted."""
    return engine_type(operator.format_names(wanted)[1])


def _is_one_kernel(name: str, attention: Attention) -> bool:
    bits = FLOAT_BITS if name == FLOAT else named(name, weight=False).bits
    return fuses(engine_type(name), bits, attention.keys, attention.head_size)


def _deployed_bits(name: str, *, weight: bool) -> float:
    """Integers of fewer than 8 bits are multiplied, and lie in engines, as INT8."""
    bits = stored_bits(name, weight=weight)
    return max(bits, 8.0) if name.startswith("int") else bits
