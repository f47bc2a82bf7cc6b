"""Train a small CNN on scikit-learn's handwritten digits (1797 real 8x8 images).

    python examples/train_digits.py
    python examples/train_digits.py --device cuda
    torchrun --nproc-per-node 2 examples/train_digits.py      (DDP; gloo on a CPU)

Prints the accuracy on held-out images and the SHA-256 of the trained weights, shows that the
convolution and pooling layers return the same bits with 1 and with 2 threads, and saves a picture
of the loss, the filters and the feature maps.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import torch_naiveconv as tn


def digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels: a fifth held out, the same for everyone."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit('this example needs scikit-learn and matplotlib: pip install ".[examples]"')
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1).div(16).to(device)
    labels = torch.from_numpy(data.target).long().to(device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(device)
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    return images[training], labels[training], images[held_out], labels[held_out]


def network() -> nn.Sequential:
    return nn.Sequential(
        tn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        tn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        tn.MaxPool2d(2),
        tn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        tn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel: the held-out digits are not centred the same way."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, len(images)), generator=generator).to(images.device)
    rows = (down.view(-1, 1) + torch.arange(8, device=images.device)).view(-1, 1, 8, 1)
    columns = (right.view(-1, 1) + torch.arange(8, device=images.device)).view(-1, 1, 1, 8)
    samples = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    return padded[samples, 0, rows, columns].view(-1, 1, 8, 8)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int, rank: int, world: int
) -> list[float]:
    """Plain SGD with momentum; every process takes its share of each batch."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    losses = []
    bar = tqdm(total=steps, desc="training", unit="step", disable=rank != 0, file=sys.stderr)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for first in range(0, len(order) - batch + 1, batch):
            chosen = order[first : first + batch]
            x = shifted(images[chosen], generator)[rank::world]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels[chosen][rank::world])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
    bar.close()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def sha256(tensors: Iterator[Tensor] | list[Tensor]) -> str:
    """Of the bytes of tensors, one after another."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layer_bits(model: nn.Sequential, images: Tensor, count: int) -> dict[str, str]:
    """The SHA-256 of each layer's output and gradients with `count` threads.

    The input of every layer is the same whatever `count` is, so that only the layer itself counts.
    """
    hashes = {}
    x = images
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Flatten):
            break
        with threads(1):
            following = layer(x).detach()
        if type(layer).__module__.startswith("torch_naiveconv"):
            with threads(count):
                leaf = x.clone().requires_grad_()
                output = layer(leaf)
                gradients = torch.autograd.grad(
                    output, [leaf, *layer.parameters()], torch.ones_like(output)
                )
            hashes[f"{index} {layer}"] = sha256([output, *gradients])
        x = following
    return hashes


def picture(model: nn.Sequential, losses: list[float], image: Tensor, path: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print('no picture: pip install ".[examples]" brings matplotlib')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with torch.no_grad():
        first = model[1](model[0](image))[0].cpu()
    filters = model[0].weight.detach()[:, 0].cpu()
    figure = plt.figure(figsize=(10, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    left, right = top.subfigures(1, 2, width_ratios=[3, 1])
    axes = left.subplots()
    axes.plot(losses, color="0.75", label="each step")
    mean = [sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1])
            for i in range(len(losses))]  # fmt: skip
    axes.plot(mean, color="tab:blue", label="mean of 20 steps")
    axes.set(xlabel="step", ylabel="cross-entropy", yscale="log", title="training loss")
    axes.legend()
    axes = right.subplots()
    axes.imshow(image[0, 0].cpu(), cmap="gray")
    axes.set(title="a held-out digit", xticks=[], yticks=[])
    for part, planes, title, cmap in [
        (0, filters, "the 32 filters of the first layer (3x3)", "RdBu"),
        (1, first, "and what each makes of the digit, after ReLU", "viridis"),
    ]:
        panel = bottom.subfigures(1, 2)[part]
        panel.suptitle(title, fontsize=10)
        limit = float(planes.abs().max())
        for axes, plane in zip(panel.subplots(4, 8).flat, planes, strict=True):
            axes.imshow(plane, cmap=cmap, vmin=-limit if part == 0 else 0, vmax=limit)
            axes.axis("off")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--picture", default="digits.png", metavar="FILE")
    arguments = parser.parse_args()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not tn.implementations("conv2d", "cuda"):
            sys.exit("no CUDA library here: see `python -m torch_naiveconv doctor`")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits(device)
    model = network().to(device)
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    losses = train(wrapped, images, labels, arguments.epochs, arguments.batch, rank, world)
    score = accuracy(model, test_images, test_labels)

    good = score > 0.97
    if rank == 0:
        print(f"held-out accuracy: {100 * score:.2f} % of {len(test_images)} images")
        print(f"SHA-256 of the trained weights: {sha256(model.parameters())}")
        if device.type == "cpu":
            one, two = (layer_bits(model, test_images, count) for count in (1, 2))
            for name, digest in one.items():
                verdict = "same bits" if two[name] == digest else "DIFFERENT BITS"
                print(f"1 and 2 threads, forward and backward: {verdict}  layer {name}")
            good = good and one == two
        picture(model, losses, test_images[:1], arguments.picture)
    if world > 1:
        dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
