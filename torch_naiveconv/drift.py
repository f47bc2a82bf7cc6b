"""``drift(model, x)``: where torch's layers depart from the contract's bits, and from their own.

The model runs as it is, with its convolution and max-pooling layers converted, on one thread, and
in another memory format; the outputs of its layers are compared in ulps. Start at :func:`drift`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .modules import convert

COMPARISONS = {
    "contract": "torch's layers, and this package's",
    "threads": "torch's layers on several threads, and on one",
    "format": "torch's layers on contiguous, and on channels_last tensors",
    "own threads": "this package's layers on several threads, and on one",
    "own format": "this package's layers on contiguous, and on channels_last tensors",
}


@dataclass(frozen=True)
class Difference:
    """Share of the elements whose bits differ, and the largest distance in ulps."""

    share: float
    ulps: int


@dataclass
class Layer:
    """One call of one layer: its name in the model, and its output's differences by comparison."""

    name: str
    type: str
    differences: dict[str, Difference] = field(default_factory=dict)


@dataclass
class Drift:
    """What :func:`drift` found, one :class:`Layer` per call, in the order of the calls."""

    layers: list[Layer]
    threads: int

    def first(self, comparison: str = "contract") -> Layer | None:
        """The first layer whose output differs, or None."""
        return next((a for a in self.layers if a.differences[comparison].share > 0), None)

    def __str__(self) -> str:
        width = max([len(a.name) for a in self.layers] + [5])
        kinds = max([len(a.type) for a in self.layers] + [4])
        text = f"{'layer':{width}} {'type':{kinds}}"
        text += "".join(f"{name:>20}" for name in COMPARISONS)
        for a in self.layers:
            text += f"\n{a.name:{width}} {a.type:{kinds}}"
            for name in COMPARISONS:
                d = a.differences[name]
                cell = f"{100 * d.share:.1f} %, {d.ulps} ulp" if d.share else "-"
                text += f"{cell:>20}"
        for name, meaning in COMPARISONS.items():
            first = self.first(name)
            where = "never" if first is None else f"first in {first.name} ({first.type})"
            text += f"\n{name}: {meaning} ({self.threads} threads): depart {where}"
        return text

    def plot(self, path: str | Path) -> None:
        """Save a picture: the share of differing elements, layer by layer (needs matplotlib)."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
        styles = {"contract": "-", "threads": "--", "format": ":", "own threads": "-"}
        for name, meaning in COMPARISONS.items():
            shares = [100 * a.differences[name].share for a in self.layers]
            wide = 3 if name.startswith("own") else 1.6
            axes.plot(shares, styles.get(name, ":"), label=meaning, linewidth=wide)
        axes.set_xlabel("layer, in the order of the calls")
        axes.set_ylabel("elements whose bits differ (%)")
        axes.set_ylim(-2, 102)
        axes.set_title("Where a model's bits depart")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def drift(model: nn.Module, x: Any) -> Drift:
    """Compare a model's layers with the contract's, and with themselves on other terms.

    Every layer without children is a row, and its output is what it became through all layers
    before it, torch's own (normalisation, linear) included; those differ between memory formats
    too. The model runs in eval mode without gradients and is left as it was.

    Args:
        model: any module; copied, not changed.
        x: its input, a tensor, or a tuple of its arguments. Floating-point tensors with 4 or 5
            dimensions are also given in channels_last.

    Returns:
        A :class:`Drift`: ``print`` it for a table, ``first()`` for the first layer that departs,
        ``plot(path)`` for a picture.

    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    >>> found = drift(model, torch.randn(1, 8, 16, 16))
    >>> [layer.type for layer in found.layers]
    ['Conv2d', 'ReLU', 'MaxPool2d']
    >>> found.first("own threads") is None
    True
    """
    arguments = x if isinstance(x, tuple) else (x,)
    training = copy.deepcopy(model).eval()
    converted = convert(copy.deepcopy(training))
    layers, outputs = _run(training, arguments)
    _, ours = _run(converted, arguments)
    with _one_thread():
        _, torch_one = _run(training, arguments)
        _, ours_one = _run(converted, arguments)
    last = tuple(_channels_last(a) for a in arguments)
    _, torch_last = _run(training, last)
    _, ours_last = _run(converted, last)
    pairs = {
        "contract": (outputs, ours),
        "threads": (outputs, torch_one),
        "format": (outputs, torch_last),
        "own threads": (ours, ours_one),
        "own format": (ours, ours_last),
    }
    for number, layer in enumerate(layers):
        for name, (a, b) in pairs.items():
            layer.differences[name] = difference(a[number], b[number])
    return Drift(layers, torch.get_num_threads())


def difference(a: Tensor, b: Tensor) -> Difference:
    """The elements of two tensors of one floating-point type that are not the same bits.

    The distance in ulps counts the numbers between two; -0 and +0 are one apart, NaN beyond inf.

    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000005]))
    Difference(share=0.5, ulps=2)
    """
    if a.numel() == 0:
        return Difference(0.0, 0)
    a, b = _ordered(a), _ordered(b)
    apart = a != b
    # as float64, since two 64-bit patterns may be more than 2^63 apart
    ulps = (a.double() - b.double()).abs() if a.abs().max() > 2**52 else (a - b).abs()
    return Difference(float(apart.double().mean()), int(ulps.max()))


def _ordered(t: Tensor) -> Tensor:
    """The bits of a floating-point tensor as integers that ascend as its values do."""
    size = t.element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = t.detach().cpu().contiguous().view(integer).to(torch.int64)
    magnitude = bits & (2 ** (8 * size - 1) - 1)
    return torch.where(bits < 0, -1 - magnitude, magnitude)


def _channels_last(t: Any) -> Any:
    if isinstance(t, Tensor) and t.is_floating_point() and t.dim() in (4, 5):
        kind = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
        return t.to(memory_format=kind)
    return t


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _run(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[list[Layer], list[Tensor]]:
    """The calls of the layers without children, and their floating-point outputs."""
    layers: list[Layer] = []
    outputs: list[Tensor] = []
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.is_floating_point():
            layers.append(Layer(names[module] or "(model)", type(module).__name__))
            outputs.append(first.clone())  # a later layer may work in place

    handles = [
        module.register_forward_hook(record)
        for module in model.modules()
        if next(module.children(), None) is None
    ]
    try:
        model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return layers, outputs
