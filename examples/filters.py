"""Grayscale and edges by convolution, on scikit-learn's two sample photographs.

    python examples/filters.py [-o filters.png]

First as the course's image demo does it, with two filters written by hand; then the same
photographs through a first layer that was learned: it tells patches of one from those of the other.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import torch_naiveconv as tn
from torch_naiveconv import cs231n

SIZE = 200  # of the square photographs
PATCH = 24


def photographs() -> np.ndarray:
    """The two photographs, cut square and halved: float64 (2, 3, SIZE, SIZE), 0 to 255."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        sys.exit('this example needs scikit-learn and matplotlib: pip install ".[examples]"')
    squares = []
    for image in load_sample_images().images:
        top, left = (image.shape[0] - 2 * SIZE) // 2, (image.shape[1] - 2 * SIZE) // 2
        square = image[top : top + 2 * SIZE, left : left + 2 * SIZE].astype(np.float64)
        squares.append(square.reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1))
    return np.stack(squares)


def written_filters() -> tuple[np.ndarray, np.ndarray]:
    """The demo's two filters (2, 3, 3, 3) and its bias, which is an integer array."""
    weight = np.zeros((2, 3, 3, 3))
    weight[0, :, 1, 1] = 0.3, 0.6, 0.1  # gray: a mix of the channels at the centre tap
    weight[1, 2] = [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]  # horizontal edges of the blue channel
    return weight, np.array([0, 128])


def gray_and_edges(images: np.ndarray) -> np.ndarray:
    weight, bias = written_filters()
    out, _ = cs231n.conv_forward_fast(images, weight, bias, {"stride": 1, "pad": 1})
    naive, _ = cs231n.conv_forward_naive(images, weight, bias, {"stride": 1, "pad": 1})
    assert np.array_equal(out, naive), "the fast layer must return the loop's bits"
    return np.asarray(out)


def learned_layer(images: Tensor, steps: int) -> tuple[nn.Conv2d, float]:
    """A first layer of 6 filters, 7x7, and how often its network names a new patch's photograph."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        tn.Conv2d(3, 6, 7, stride=2, padding=3),
        nn.ReLU(),
        tn.MaxPool2d(2),
        tn.Conv2d(6, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def patches(count: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(2, (count,), generator=generator)
        corner = torch.randint(SIZE - PATCH, (count, 2), generator=generator).tolist()
        cut = [
            images[n, :, top : top + PATCH, left : left + PATCH]
            for n, (top, left) in zip(which.tolist(), corner, strict=True)
        ]
        patch = torch.stack(cut)
        return patch - patch.mean((2, 3), keepdim=True), which  # no hint from the mean colour

    for _ in tqdm(range(steps), desc="learning the first layer", file=sys.stderr):
        x, which = patches(64)
        loss = nn.functional.cross_entropy(model(x), which)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, which = patches(1000)
        right = (model(x).argmax(1) == which).float().mean().item()
    return model[0], right


def draw(images: np.ndarray, written: np.ndarray, layer: nn.Conv2d, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with torch.no_grad():
        learned = layer(torch.from_numpy(images).float() / 255).numpy()
    filters = layer.weight.detach().numpy()
    columns = 3 + len(filters)
    figure, axes = plt.subplots(3, columns, figsize=(1.7 * columns, 5.2))
    for ax in axes.flat:
        ax.axis("off")
    for row, image in enumerate(images):
        axes[row, 0].imshow(image.transpose(1, 2, 0) / 255)
        axes[row, 1].imshow(written[row, 0], cmap="gray", vmin=0, vmax=255)
        axes[row, 2].imshow(written[row, 1], cmap="gray")
        for i, plane in enumerate(learned[row]):
            axes[row, 3 + i].imshow(plane, cmap="gray")
    titles = ["original", "gray", "edges", *(f"learned {i}" for i in range(len(filters)))]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    axes[2, 2].text(1, 0.5, "learned filters:", ha="right", fontsize=10)
    for i, kernel in enumerate(filters):
        low, high = kernel.min(), kernel.max()
        axes[2, 3 + i].imshow((kernel.transpose(1, 2, 0) - low) / (high - low))
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-o", "--output", default="filters.png")
    parser.add_argument("--steps", type=int, default=250, help="of learning (default 250)")
    arguments = parser.parse_args(argv)
    images = photographs()
    written = gray_and_edges(images)
    print("gray and edges: the fast layer and the naive loop returned the same bits")
    layer, right = learned_layer(torch.from_numpy(images).float() / 255, arguments.steps)
    print(f"learned layer: names the photograph of {right:.1%} of 1000 new patches")
    draw(images, written, layer, arguments.output)
    print(f"picture: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
