"""A model as a table, one line a layer: sizes with their formula, cost, and what is promised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from .modules import OURS, TORCHS

# Layers that copy or choose values, so that nothing is rounded.
EXACT = (nn.ReLU, nn.ReLU6, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ADAPTIVE = tuple(
    getattr(nn, f"Adaptive{kind}Pool{d}d") for kind in ("Avg", "Max") for d in (1, 2, 3)
)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True)
class Field:
    """How far one element looks into the input, and the input's step from it to its neighbour."""

    size: tuple[float, ...]
    step: tuple[float, ...]


@dataclass(frozen=True)
class Layer:
    """One line of the table; None where a column does not apply.

    flops counts a multiplication, an addition or a comparison as one. bytes is the memory of the
    layer's output. receptive_field is in input elements, one number an axis. contract is "yes" (the
    layer's bits are promised), "after convert()", "exact" (nothing is rounded) or "no".
    """

    name: str
    kind: str
    output_size: tuple[int, ...]
    formula: str
    receptive_field: tuple[int, ...] | None
    flops: int | None
    parameters: int
    bytes: int
    contract: str


class Table(list[Layer]):
    """The layers in the order in which they ran; prints as a table with totals."""

    def __str__(self) -> str:
        head = ("layer", "output", "size", "sees", "FLOPs", "parameters", "memory", "contract")
        rows = [
            (
                f"{layer.name} {layer.kind}".strip(),
                " x ".join(map(str, layer.output_size)),
                layer.formula,
                " x ".join(map(str, layer.receptive_field)) if layer.receptive_field else "",
                "" if layer.flops is None else short(layer.flops),
                short(layer.parameters),
                short(layer.bytes) + "B",
                layer.contract,
            )
            for layer in self
        ]
        flops = sum(layer.flops or 0 for layer in self)
        memory = sum(layer.bytes for layer in self)
        parameters = sum(layer.parameters for layer in self)
        total = ("total", "", "", "", short(flops), short(parameters), short(memory) + "B", "")
        widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows, total)
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def short(count: int) -> str:
    """Three digits and a unit: 1234567 is '1.23 M'."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count} "


def per_axis(value: Any, dims: int) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * dims


class Fields(TorchFunctionMode):
    """Carries the receptive field along every operation: the widest of its tensors'."""

    def __init__(self) -> None:
        super().__init__()
        self.of = WeakTensorKeyDictionary()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        known = [field for t in tensors((args, kwargs)) if (field := self.of.get(t)) is not None]
        if known:
            size = tuple(max(sizes) for sizes in zip(*(f.size for f in known), strict=True))
            for t in tensors(result):
                if t.dim() == len(size) + 2:
                    self.of[t] = Field(size, known[0].step)
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_formula(layer: Any, in_: Sequence[int], out: Sequence[int]) -> str:
    """The output size with its numbers filled in, one axis if all are alike."""
    dims = len(in_)
    kernel, stride, dilation = (
        per_axis(getattr(layer, name, 1), dims) for name in ("kernel_size", "stride", "dilation")
    )
    if isinstance(layer.padding, str):
        lines = [f"{layer.padding}: {o}" for o in out]
    else:
        pad = per_axis(layer.padding, dims)
        if isinstance(layer, TRANSPOSED):
            lines = [
                f"({in_[i]} - 1) * {stride[i]} - 2 * {pad[i]} + {dilation[i]} * ({kernel[i]} - 1) "
                f"+ {layer.output_padding[i]} + 1 = {out[i]}"
                for i in range(dims)
            ]
        else:
            rounding = "ceil" if getattr(layer, "ceil_mode", False) else "floor"
            lines = [
                f"{rounding}(({in_[i]} + 2 * {pad[i]} - {dilation[i]} * ({kernel[i]} - 1) - 1) / "
                f"{stride[i]}) + 1 = {out[i]}"
                for i in range(dims)
            ]
    return lines[0] if len(set(lines)) == 1 else ", ".join(lines)


def field_after(layer: Any, before: Field, in_: Sequence[int], out: Sequence[int]) -> Field:
    dims = len(before.size)
    if isinstance(layer, ADAPTIVE):
        windows = [
            max(-(-(o + 1) * in_[i] // out[i]) - o * in_[i] // out[i] for o in range(out[i]))
            for i in range(dims)
        ]
        size = [before.size[i] + (windows[i] - 1) * before.step[i] for i in range(dims)]
        return Field(tuple(size), tuple(before.step[i] * in_[i] / out[i] for i in range(dims)))
    kernel, stride, dilation = (
        per_axis(getattr(layer, name, 1), dims) for name in ("kernel_size", "stride", "dilation")
    )
    if isinstance(layer, TRANSPOSED):  # at most ceil(window / stride) inputs reach an output
        reach = [(dilation[i] * (kernel[i] - 1)) // stride[i] for i in range(dims)]
        step = [before.step[i] / stride[i] for i in range(dims)]
    else:
        reach = [dilation[i] * (kernel[i] - 1) for i in range(dims)]
        step = [before.step[i] * stride[i] for i in range(dims)]
    size = [before.size[i] + reach[i] * before.step[i] for i in range(dims)]
    return Field(tuple(size), tuple(step))


def count_flops(layer: Any, input: Tensor, output: Tensor) -> int | None:
    if isinstance(layer, (*CONVS, *TRANSPOSED)):
        spread = input if isinstance(layer, TRANSPOSED) else output
        products = spread.numel() * (layer.weight.numel() // layer.weight.shape[0])
        return 2 * products + (output.numel() if layer.bias is not None else 0)
    if isinstance(layer, POOLS):
        taps = math.prod(per_axis(layer.kernel_size, input.dim() - 2))
        return output.numel() * taps
    if isinstance(layer, nn.Linear):
        products = output.numel() * layer.in_features
        return 2 * products + (output.numel() if layer.bias is not None else 0)
    return None


def contract(layer: nn.Module) -> str:
    if type(layer) in TORCHS:
        return "yes"
    if type(layer) in OURS:
        return "after convert()"
    return "exact" if isinstance(layer, EXACT) else "no"


def explain(model: nn.Module, input_size: Sequence[int]) -> Table:
    """Runs a model once and describes every layer that ran.

    The receptive field ("sees") is followed through every operation, so it is right at branches
    and sums too: the widest path counts.

    Args:
        model: any module; it runs in eval mode, without gradients, on zeros of its own type.
        input_size: the shape of its input, batch included.

    Returns:
        A list of :class:`Layer` that prints as a table.

    Raises:
        ValueError: no batch and channels in front of input_size.

    >>> import torch_naiveconv as tn
    >>> from torch import nn
    >>> model = nn.Sequential(tn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    >>> table = explain(model, (1, 1, 8, 8))
    >>> table[0].formula
    'floor((8 + 2 * 1 - 1 * (3 - 1) - 1) / 2) + 1 = 4'
    >>> [layer.receptive_field for layer in table], [layer.contract for layer in table]
    ([(3, 3), (3, 3), (5, 5)], ['yes', 'exact', 'after convert()'])
    """
    if len(input_size) < 3:
        raise ValueError(f"input_size must be (N, C, ...), the batch included, got {input_size!r}")
    parameter = next(model.parameters(), torch.empty(0))
    dims = len(input_size) - 2
    fields = Fields()
    table = Table()

    def look(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, result: Any) -> None:
            inputs, outputs = tensors(args), tensors(result)
            if not inputs or not outputs:
                return
            input, output = inputs[0], outputs[0]
            windowed = isinstance(layer, (*CONVS, *TRANSPOSED, *POOLS))
            sizes = input.shape[2:], output.shape[2:]
            before, field = fields.of.get(input), fields.of.get(output)
            if before is not None and (windowed or isinstance(layer, ADAPTIVE)):
                field = fields.of[output] = field_after(layer, before, *sizes)
            table.append(
                Layer(
                    name=name,
                    kind=type(layer).__name__,
                    output_size=tuple(output.shape),
                    formula=size_formula(layer, *sizes) if windowed else "",
                    receptive_field=tuple(math.ceil(size) for size in field.size)
                    if field
                    else None,
                    flops=count_flops(layer, input, output),
                    parameters=sum(p.numel() for p in layer.parameters(recurse=False)),
                    bytes=output.numel() * output.element_size(),
                    contract=contract(layer),
                )
            )

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    x = torch.zeros(*input_size, dtype=parameter.dtype, device=parameter.device)
    fields.of[x] = Field((1,) * dims, (1,) * dims)
    try:
        with torch.no_grad(), fields:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return table
