"""Evidence for the group length of the contract: errors of float32 sums against float64.

    python tools/evidence_groups.py

Random normal inputs and weights; relative RMS error of torch, of one chain of fused multiply-adds,
of chains of 256, 128 and 64 terms folded left to right, and of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor

from torch_naiveconv import functional as F

FORWARD = [(64, 3), (256, 3), (512, 3), (1024, 1), (3, 7)]  # channels, kernel


def folded(a: Tensor, b: Tensor, group: int, restart: int) -> Tensor:
    """Sums of a * b over the first dimension: chains of ``group`` terms, starting afresh at every
    multiple of ``restart``. A fused step is a float64 one rounded to float32: the product is exact
    there, so it differs from a real one only where the sum falls on a tie (about once in 2^29).
    """
    total = torch.zeros_like(b[0] * a[0])
    chain, used = torch.zeros_like(total), 0
    for term in range(a.shape[0]):
        chain = (a[term].double() * b[term].double() + chain.double()).float()
        used += 1
        if used == group or (term + 1) % restart == 0:
            total, chain, used = total + chain, torch.zeros_like(total), 0
    return total + chain


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def forward(channels: int, kernel: int, size: int = 14, filters: int = 64) -> list[float]:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(1, channels, size, size, generator=generator)
    w = torch.randn(filters, channels, kernel, kernel, generator=generator)
    pad = kernel // 2
    exact = TF.conv2d(x.double(), w.double(), padding=pad)
    patches = TF.unfold(x, kernel, padding=pad)[0]  # terms x positions
    rows = w.view(filters, -1).t()  # terms x filters
    terms = rows.shape[0]
    found = [error(TF.conv2d(x, w, padding=pad), exact)]
    for group in (terms, 256, 128, 64):
        y = folded(rows[:, :, None], patches[:, None, :], group, terms)
        found.append(error(y.view_as(exact), exact))
    return [*found, error(F.conv2d(x, w, padding=pad), exact)]


def weight_gradient(samples: int = 8, size: int = 56, channels: int = 8) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, size, size, generator=generator)
    g = torch.randn(samples, channels, size, size, generator=generator)
    shape = (channels, channels, 3, 3)
    exact = torch.nn.grad.conv2d_weight(x.double(), shape, g.double(), padding=1)
    patches = TF.unfold(x, 3, padding=1).permute(0, 2, 1).flatten(0, 1)  # terms x (channel, tap)
    rows = g.flatten(2).permute(0, 2, 1).flatten(0, 1)  # terms x filters
    found = [error(torch.nn.grad.conv2d_weight(x, shape, g, padding=1), exact)]
    for group, restart in ((rows.shape[0],) * 2, (256, size**2), (128, size**2), (64, size**2)):
        y = folded(rows[:, :, None], patches[:, None, :], group, restart)
        found.append(error(y.view(shape), exact))
    return [*found, error(F.conv_grad_weight(x, shape, g, padding=1), exact)]


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    names = ("torch", "one chain", "256", "128", "64", "this package")
    print(f"{'':34}" + "".join(f"{name:>14}" for name in names))
    for channels, kernel in FORWARD:
        label = f"forward {channels}, {kernel}x{kernel} ({channels * kernel**2} terms)"
        print(f"{label:34}" + "".join(f"{e:14.2e}" for e in forward(channels, kernel)), flush=True)
    label = "weight gradient (25088 terms)"
    print(f"{label:34}" + "".join(f"{e:14.2e}" for e in weight_gradient()))


if __name__ == "__main__":
    main()
