"""Networks that take images of any size, for the tests of ranges of sizes."""

import torch
import torch.nn.functional as F
from torch import nn


class Convolutions(nn.Module):
    """A residual block between a stem and a head, as a ResNet has it."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Attention over as many tokens as the images have patches, with an interpolated position embedding."""

    def __init__(self, width=16, positions=3):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, width, 8, 8), nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.randn(1, width, positions, positions))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x)
        x = x + F.interpolate(self.positions, x.shape[2:], mode="bilinear")
        x = self.norm(x.flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))
