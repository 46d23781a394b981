"""What a process of `forks` finds done: imports, and what torch sets up at its first capture."""

import helpers  # noqa: F401
import torch

import ospq_export.demo
import ospq_export.validate  # noqa: F401
from ospq_export.graph.capture import capture

capture(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval(), (1, 2, 2))
