"""Classification: the output is a logit for each class, or one that stands for two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ospq_export.tasks.base import Outputs, Task
from ospq_export.tasks.comparison import compare


def class_logits(output: Tensor) -> Tensor:
    """Logits whose softmax gives every class's probability: of one output x, whose probability is its sigmoid, (x, 0).

    Args:
        output: (..., K) float.

    Returns:
        (..., K), or (..., 2) where K is 1: the softmax over one number is 1, whatever the number.
    """
    return torch.cat([output, torch.zeros_like(output)], -1) if output.shape[-1] == 1 else output


def kl_divergence(output: Tensor, target: Tensor) -> Tensor:
    """KL(target || output) of the class probabilities in nats, averaged over all but the last dimension (logits)."""
    log_p, log_q = F.log_softmax(class_logits(target), -1), F.log_softmax(class_logits(output), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def total_variation(output: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Half of the sum of |softmax(output / T) - softmax(target / T)|: in [0, 1], averaged over all but the last dimension.

    Of one output, |sigmoid(output / T) - sigmoid(target / T)|.

    Its spread over images, relative to its mean, is about half of the KL divergence's, so that few images say more; a
    temperature T above 1 lets classes speak that are not near the top, and lessens it further.
    """
    found, wanted = (class_logits(logits / temperature).softmax(-1) for logits in (output, target))
    return (found - wanted).abs().sum(-1).mean() / 2


class Classify(Task):
    """Logits (B, K) float32; labels are class numbers."""

    name = "classify"
    divergence = staticmethod(kl_divergence)
    distance = staticmethod(total_variation)
    compare = staticmethod(compare)

    def sampled_loss(self, output: Tensor, generator: Generator, temperature: float) -> Tensor:
        """Cross entropy of labels drawn from the softened probabilities; of one output Bernoulli's, by its sigmoid."""
        logits = class_logits(output / temperature)
        labels = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)
        return F.cross_entropy(logits, labels.squeeze(1).to(logits.device), reduction="sum")

    def reader(self, threshold: float | None) -> Outputs:
        """A logit for each class; `threshold` decides where a network has a single one."""
        return Outputs(threshold)


CLASSIFY = Classify()
TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFY,)}
