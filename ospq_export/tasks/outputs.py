"""What a network's output means: logits of its classes, or a single logit that stands for two."""

from __future__ import annotations

from ospq_export.errors import InputError
from ospq_export.tasks.comparison import two_classes
from ospq_export.tasks.statistics import FloatArray


class Outputs:
    """Turns whatever an execution returns into a logit for each class.

    Attributes:
        used: the decision threshold, once a network with a single logit was met; None for all others.
    """

    def __init__(self, threshold: float | None) -> None:
        """Remember the threshold.

        Args:
            threshold: a single logit above it stands for the second class; None takes 0.
        """
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
