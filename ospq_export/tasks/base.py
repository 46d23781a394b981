"""What a network's outputs are, and what a good one is: everything that depends on it is asked of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Generator, Tensor

from ospq_export.errors import InputError
from ospq_export.tasks.measure import Measure

Shapes = Mapping[str, Sequence[int]]
"""Shapes of the outputs of one image, by name."""
Tensors = Sequence[Tensor]


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """mean((output - target)^2) over the target's variance; scalar, 0 for equal tensors, 1 for one as wrong as the mean."""
    return (output - target).square().mean() / target.var(correction=0).clamp_min(1e-12)


class Task(ABC):
    """What outputs mean. Codes, noise ratios, slices and the noise floor do not depend on it.

    Attributes:
        name: as a manifest records it.
        about: what its output is, in words, and with how many dimensions for one image; None where it takes any outputs.
        output: what a single output is called that the network does not name.
        measure: what a validation keeps of outputs, and says of them.
    """

    name: ClassVar[str]
    about: ClassVar[tuple[str, int] | None]
    output: ClassVar[str] = "logits"
    measure: ClassVar[Callable[..., Measure]]

    def check(self, shapes: Shapes) -> None:
        """Hold outputs to the task.

        Raises:
            InputError: they are not what it is about.
        """
        if self.about is None:
            return
        if len(shapes) > 1:
            raise InputError(
                f"the network has {len(shapes)} outputs ({', '.join(shapes)}), the task {self.name} is about one",
                where="`task`",
                fix="choose one with `outputs`, or take the task tensors",
            )
        ((name, shape),), (what, dimensions) = shapes.items(), self.about
        if len(shape) != dimensions:
            raise InputError(
                f"the output {name} has the shape {tuple(shape)} for an image, the task {self.name} is about {what}",
                where="`task`",
                fix="take the task tensors, which fits any output",
            )

    @abstractmethod
    def sampled_loss(self, outputs: Tensors, generator: Generator, temperature: float) -> Tensor:
        """The loss whose squared gradient is the Fisher information: of targets drawn from the outputs themselves, summed.

        Args:
            outputs: float32 (B, ...) each.
            generator: draws the targets.
            temperature: softens the outputs' distribution, where they are logits.
        """

    @abstractmethod
    def divergence(self, output: Tensor, target: Tensor) -> Tensor:
        """How far an output is from the float network's, differentiable: what the last slice may be optimised for; scalar."""

    @abstractmethod
    def distance(self, outputs: Tensors, targets: Tensors, temperature: float) -> Tensor:
        """How far outputs are from the float network's, with little chance in it: what trials are judged by; scalar."""
