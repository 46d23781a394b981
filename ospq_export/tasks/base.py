"""What a network's output is, and what a good one is: everything that depends on it is asked of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Generator, Tensor

from ospq_export.errors import InputError
from ospq_export.tasks.comparison import Comparison, two_classes
from ospq_export.tasks.statistics import FloatArray, IntArray


class Outputs:
    """Turns whatever an execution returns into a logit for each class.

    Attributes:
        threshold: a single logit above it stands for the second class; None takes 0.
        used: the decision threshold, once a network with a single logit was met; None for all others.
    """

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self.used: float | None = None

    def __call__(self, output: FloatArray) -> FloatArray:
        """Logits (B, K), K >= 2, from an output (B, K), K >= 1.

        Raises:
            InputError: a threshold was given for a network with a logit for each class.
        """
        if output.shape[1] > 1:
            if self.threshold is not None:
                raise InputError(
                    f"the network has {output.shape[1]} logits, the largest one decides",
                    where="`decision_threshold`",
                    fix="leave it out: it is for networks with a single logit",
                )
            return output
        self.used = self.threshold or 0.0
        return two_classes(output, self.used)


class Task(ABC):
    """What outputs mean. Codes, noise ratios, slices and the noise floor do not depend on it.

    Attributes:
        name: as a manifest records it.
    """

    name: ClassVar[str]

    @abstractmethod
    def sampled_loss(self, output: Tensor, generator: Generator, temperature: float) -> Tensor:
        """The loss whose squared gradient is the Fisher information: of targets drawn from the output itself, summed.

        Args:
            output: float32 (B, ...).
            generator: draws the targets.
            temperature: softens the output's distribution.
        """

    @abstractmethod
    def divergence(self, output: Tensor, target: Tensor) -> Tensor:
        """How far an output is from the float network's, differentiable: what the last slice may be optimised for; scalar."""

    @abstractmethod
    def distance(self, output: Tensor, target: Tensor, temperature: float) -> Tensor:
        """How far an output is from the float network's, with little chance in it: what trials are judged by; scalar."""

    @abstractmethod
    def reader(self, threshold: float | None) -> Outputs:
        """What turns whatever an execution returns into what `compare` takes."""

    @abstractmethod
    def compare(
        self,
        reference: tuple[str, FloatArray],
        deployed: tuple[str, FloatArray],
        labels: IntArray,
        ids: Sequence[str],
    ) -> Comparison:
        """All statistics of a deployed execution against a reference; arguments as `comparison.compare` has them."""
