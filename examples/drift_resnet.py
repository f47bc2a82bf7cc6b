"""Where a ResNet-18 on torch's layers departs from reproducible bits, and from itself.

    python examples/drift_resnet.py [picture.png]

Random weights (seeded), one random 128x128 image; prints the table of torch_naiveconv.drift and
saves its picture.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from torch_naiveconv import drift


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.short = (
            nn.Conv2d(channels, filters, 1, stride, bias=False) if stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.short(x)).relu()


def resnet18() -> nn.Sequential:
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [
        Block(widths[max(i - 1, 0)], width, 2 if width > widths[max(i - 1, 0)] else 1)
        for i, width in enumerate(widths)
    ]
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 1000),
    )


def main() -> None:
    torch.manual_seed(0)
    found = drift(resnet18(), torch.randn(1, 3, 128, 128))
    print(found)
    path = sys.argv[1] if len(sys.argv) > 1 else "drift.png"
    found.plot(path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
