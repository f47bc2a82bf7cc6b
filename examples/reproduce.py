"""Train twice under different conditions and compare hashes: they must be equal, and are.

    python examples/reproduce.py

One training uses all threads, whole batches and contiguous tensors; the other one thread, batches
in three parts whose weight gradients are continued (the *resume* promise), channels_last tensors.
Every sum over more than one sample or pixel is a function of torch_naiveconv; torch's own work is
elementwise, or within one sample (the softmax). Exit status 1 if a hash differs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from train_digits import digits, sha256, threads

from torch_naiveconv import functional as F

PADDING = (1, 1, 0)  # of the three convolutions; the last, 2x2, is the classifier


@dataclass(frozen=True)
class Conditions:
    name: str
    threads: int
    parts: int
    memory_format: torch.memory_format


CONDITIONS = (
    Conditions("whole batches", torch.get_num_threads(), 1, torch.contiguous_format),
    Conditions("one thread, parts, channels_last", 1, 3, torch.channels_last),
)


def forward(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """conv-relu-pool, conv-relu-pool, conv: the logits, and what the backward pass needs."""
    kept = []
    for weight, padding in zip(weights[:2], PADDING, strict=False):
        y = F.conv2d(x, weight, padding=padding).relu()
        kept.append((x, y))
        x = F.max_pool2d(y, 2)
    kept.append((x, x))
    return F.conv2d(x, weights[2]), kept


def backward(
    grad: Tensor, kept: list[tuple[Tensor, Tensor]], weights: list[Tensor], totals: list[Tensor]
) -> list[Tensor]:
    """The totals of the weight gradients, continued with this part of the batch."""
    totals = list(totals)
    for layer in (2, 1, 0):
        x, y = kept[layer]
        if layer < 2:
            grad = F.max_pool_grad_input(y, grad, 2) * (y > 0)
        padding = PADDING[layer]
        totals[layer] = F.conv_grad_weight(
            x, weights[layer].shape, grad, padding=padding, total=totals[layer]
        )
        grad = F.conv_grad_input(x.shape, weights[layer], grad, padding=padding)
    return totals


def train(
    conditions: Conditions, images: Tensor, labels: Tensor, batch: int = 64
) -> dict[str, str]:
    """One epoch of SGD: the hashes of what it computed."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 1, 3, 3), (32, 16, 3, 3), (10, 32, 2, 2)]
    weights = [
        (torch.randn(shape, generator=generator) / (shape[1] * shape[2] * shape[3]) ** 0.5).to(
            memory_format=conditions.memory_format
        )
        for shape in shapes
    ]
    hashes = {}
    steps = range(0, len(images) - batch + 1, batch)
    for first in tqdm(steps, desc=conditions.name, unit="step", file=sys.stderr):
        totals = [torch.zeros(shape) for shape in shapes]
        logits = []
        x, y = images[first : first + batch], labels[first : first + batch]
        for part, wanted in zip(x.chunk(conditions.parts), y.chunk(conditions.parts), strict=True):
            part = part.contiguous(memory_format=conditions.memory_format)
            out, kept = forward(part, weights)
            grad = out.flatten(1).softmax(1) - torch.nn.functional.one_hot(wanted, 10)
            totals = backward(grad.view(out.shape) / batch, kept, weights, totals)
            logits.append(out)
        if first == 0:
            hashes["logits of the first batch"] = sha256([torch.cat(logits)])
            hashes["weight gradients of the first batch"] = sha256(totals)
        weights = [w - 0.2 * total for w, total in zip(weights, totals, strict=True)]
    hashes["weights after one epoch"] = sha256(weights)
    return hashes


def main() -> int:
    images, labels, _, _ = digits(torch.device("cpu"))
    results = []
    for conditions in CONDITIONS:
        with threads(conditions.threads):
            results.append(train(conditions, images, labels))
    equal = True
    for what, expected in results[0].items():
        print(what)
        for conditions, hashes in zip(CONDITIONS, results, strict=True):
            print(f"  {hashes[what][:32]}  {conditions.name}, {conditions.threads} threads")
            equal = equal and hashes[what] == expected
    print("all must be equal, and", "are" if equal else "are NOT")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
