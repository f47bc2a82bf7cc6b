"""``audit(op, inputs, output)``: is somebody else's result the contract's? Random elements, each
recomputed alone from its own window by the naive implementation, at a small part of the cost.

Start reading at :func:`audit`; ``ELEMENT`` has the function that recomputes one element of each
operation. They cut the problem down to a single element with the same numbering of the terms.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from . import functional as F
from . import ops

Position = tuple[int, ...]


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found: positions with the element expected there and the one found."""

    op: str
    checked: int
    of: int
    wrong: tuple[tuple[Position, Any, Any], ...]

    def __bool__(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        text = (
            f"{self.op}: {self.checked - len(self.wrong)} of {self.checked} elements the same bits"
        )
        text += f" ({self.of} in all)"
        for position, expected, found in self.wrong[:10]:
            text += f"\n  at {position}: expected {expected!r}, found {found!r}"
        return text


def audit(
    op: str | Callable[..., Any],
    inputs: Sequence[Any] | Mapping[str, Any],
    output: Tensor,
    elements: int = 100,
    seed: int = 0,
) -> Audit:
    """Recompute random elements of a result alone, from the definition, and compare their bits.

    Args:
        op: a function of :mod:`functional` or its name: conv1d/2d/3d, conv_transpose1d/2d/3d,
            conv_grad_input, conv_grad_weight, conv_grad_bias, max_pool1d/2d/3d. Batched tensors;
            padding_mode "zeros"; max-pooling without ``return_indices``.
        inputs: the arguments it was called with, positional or by name.
        output: the result to check, of any origin, device and memory format.
        elements: how many elements to draw, without repetition.
        seed: of the draw.

    Returns:
        An :class:`Audit`, true if all elements are the same bits.

    Raises:
        ValueError: an operation that is not listed, or an output of another shape or type.

    >>> x, w = torch.randn(2, 8, 20, 20), torch.randn(16, 8, 3, 3)
    >>> y = F.conv2d(x, w, padding=1)
    >>> print(audit("conv2d", (x, w, None, 1, 1), y))
    conv2d: 100 of 100 elements the same bits (12800 in all)
    >>> bool(audit("conv2d", {"input": x, "weight": w, "padding": 1}, y * 1.0000002, elements=20))
    False
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    kind = name.removesuffix("1d").removesuffix("2d").removesuffix("3d")
    if kind not in ELEMENT:
        raise ValueError(f"no audit of {name!r}; there are {', '.join(ELEMENT)}")
    function = getattr(F, name)
    bind = signature(function).bind
    bound = bind(**inputs) if isinstance(inputs, Mapping) else bind(*inputs)
    bound.apply_defaults()
    given = {
        key: value.detach().cpu() if isinstance(value, Tensor) else value
        for key, value in bound.arguments.items()
    }
    if given.get("padding_mode", "zeros") != "zeros" or given.get("return_indices"):
        raise ValueError("audit takes padding_mode='zeros' and return_indices=False only")
    shape, dtype, element = ELEMENT[kind](given)
    output = output.detach().cpu()
    if tuple(output.shape) != tuple(shape) or output.dtype != dtype:
        raise ValueError(
            f"the output of {name} has the shape {tuple(shape)} and the type {dtype}, not "
            f"{tuple(output.shape)} and {output.dtype}"
        )
    count = output.numel()
    drawn = random.Random(seed).sample(range(count), min(elements, count))
    wrong = []
    for flat in sorted(drawn):
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), output.shape))
        expected, found = element(position).reshape(()), output[position]
        if _bits(expected) != _bits(found):
            wrong.append((position, expected.item(), found.item()))
    return Audit(name, len(drawn), count, tuple(wrong))


def _bits(t: Tensor) -> list[int]:
    return t.reshape(1).contiguous().view(torch.uint8).tolist()


# ---- one element of each operation -------------------------------------------------------------

Element = Callable[[Position], Tensor]
Result = tuple[Sequence[int], torch.dtype, Element]


# The geometry of a window that stands still, by the number of spatial axes.
ONES = [[1] * dims + [0] * (2 * dims) + [1] * dims for dims in range(4)]


def _window(
    image: Tensor, start: Sequence[int], count: Sequence[int], step: Sequence[int]
) -> Tensor:
    """image[..., start + i * step] for i < count on each spatial axis, +0 outside of the image."""
    inside = torch.ones(())
    for axis in range(len(start)):
        at = start[axis] + step[axis] * torch.arange(count[axis])
        size = image.shape[2 + axis]
        inside = inside.unsqueeze(-1) * ((at >= 0) & (at < size))
        image = image.index_select(2 + axis, at.clamp(0, size - 1))
    return torch.where(inside.bool(), image, torch.zeros((), dtype=image.dtype))


def _conv_arguments(given: Mapping[str, Any], input: Sequence[int], weight: Sequence[int]) -> Any:
    geometry = F._conv_geometry(
        len(input) - 2,
        torch.Size(input),
        torch.Size(weight),
        given["stride"],
        given["padding"],
        given["dilation"],
        given["groups"],
    )
    stride, padding, dilation = ops.split(geometry)
    return stride, padding[::2], dilation, ops.conv_output_sizes(input[2:], weight[2:], geometry)


def _conv(given: Mapping[str, Any]) -> Result:
    x, w, bias, groups = given["input"], given["weight"], given["bias"], given["groups"]
    stride, pad, dilation, out = _conv_arguments(given, x.shape, w.shape)
    dims, per_group = len(out), w.shape[0] // groups

    def element(at: Position) -> Tensor:
        n, k, *o = at
        start = [o[i] * stride[i] - pad[i] for i in range(dims)]
        c = k // per_group * w.shape[1]
        image = _window(x[n : n + 1, c : c + w.shape[1]], start, w.shape[2:], dilation)
        own = None if bias is None else bias[k : k + 1]
        return ops.conv(image, w[k : k + 1], own, ONES[dims], 1, "naive")

    return [x.shape[0], w.shape[0], *out], x.dtype, element


def _input_gradient(
    grad: Tensor, w: Tensor, bias: Tensor | None, size: list[int], geometry: Any, groups: int
) -> Result:
    """By the outputs that one input position may meet; the others add nothing."""
    stride, pad, dilation = geometry
    dims, per_group = len(size), w.shape[0] // groups

    def element(at: Position) -> Tensor:
        n, c, *i = at
        group, channel = divmod(c, w.shape[1])
        filters = slice(group * per_group, (group + 1) * per_group)
        mine, pads = grad[n : n + 1, filters], []
        for a in range(dims):
            reach = i[a] + pad[a] - dilation[a] * (w.shape[2 + a] - 1)
            first = max(-(-reach // stride[a]), 0)
            last = min((i[a] + pad[a]) // stride[a], grad.shape[2 + a] - 1)
            if last < first:
                return _no_terms(w, bias, c)
            mine = mine.narrow(2 + a, first, last - first + 1)
            pads += [i[a] + pad[a] - first * stride[a], 0]
        weight = w[filters, channel : channel + 1]
        own = None if bias is None else bias[c : c + 1]
        return ops.conv_grad_input(
            mine, weight, own, [1] * dims, [*stride, *pads, *dilation], 1, "naive"
        )

    return [grad.shape[0], w.shape[1] * groups, *size], grad.dtype, element


def _no_terms(w: Tensor, bias: Tensor | None, channel: int) -> Tensor:
    """A sum without terms: the bias alone."""
    zero = torch.zeros(1, 1, 1, dtype=w.dtype)
    own = None if bias is None else bias[channel : channel + 1]
    return ops.conv(zero, zero, own, ONES[1], 1, "naive")


def _conv_grad_input(given: Mapping[str, Any]) -> Result:
    size, w, grad = list(given["input_size"]), given["weight"], given["grad_output"]
    stride, pad, dilation, _ = _conv_arguments(given, size, w.shape)
    return _input_gradient(grad, w, None, size[2:], (stride, pad, dilation), given["groups"])


def _conv_transpose(given: Mapping[str, Any]) -> Result:
    grad, w, groups = given["input"], given["weight"], given["groups"]
    size, geometry = F._transposed_geometry(
        grad.dim() - 2,
        grad.shape,
        w.shape,
        given["stride"],
        given["padding"],
        given["output_padding"],
        groups,
        given["dilation"],
    )
    stride, padding, dilation = ops.split(geometry)
    return _input_gradient(grad, w, given["bias"], size, (stride, padding[::2], dilation), groups)


def _conv_grad_weight(given: Mapping[str, Any]) -> Result:
    x, size, grad = given["input"], list(given["weight_size"]), given["grad_output"]
    total, groups = given["total"], given["groups"]
    stride, pad, dilation, out = _conv_arguments(given, x.shape, size)
    dims, per_group = len(out), size[0] // groups

    def element(at: Position) -> Tensor:
        k, channel, *tap = at
        c = k // per_group * size[1] + channel
        start = [tap[i] * dilation[i] - pad[i] for i in range(dims)]
        image = _window(x[:, c : c + 1], start, out, stride)
        own = None if total is None else total[at].reshape([1] * total.dim())
        return ops.conv_grad_weight(
            grad[:, k : k + 1], image, own, [1] * dims, ONES[dims], 1, False, "naive"
        )

    return size, x.dtype if total is None else total.dtype, element


def _conv_grad_bias(given: Mapping[str, Any]) -> Result:
    grad, total = given["grad_output"], given["total"]

    def element(at: Position) -> Tensor:
        own = None if total is None else total[at[0] : at[0] + 1]
        return ops.conv_grad_bias(grad[:, at[0] : at[0] + 1], own, "naive")

    return [grad.shape[1]], grad.dtype if total is None else total.dtype, element


def _max_pool(given: Mapping[str, Any]) -> Result:
    x, ties = given["input"], given["ties"]
    dims = x.dim() - 2
    kernel, stride, padding, dilation, out = F._pool_geometry(
        dims,
        x.shape,
        given["kernel_size"],
        given["stride"],
        given["padding"],
        given["dilation"],
        bool(given["ceil_mode"]),
    )

    def element(at: Position) -> Tensor:
        n, c, *o = at
        image, pads = x[n : n + 1, c : c + 1], []
        for a in range(dims):  # only the part of the window that exists
            start = o[a] * stride[a] - padding[2 * a]
            low = min(max(start, 0), x.shape[2 + a])
            high = min(start + dilation[a] * (kernel[a] - 1) + 1, x.shape[2 + a])
            image = image.narrow(2 + a, low, max(high - low, 0))
            pads += [max(low - start, 0), 0]
        ones = [1] * dims
        window = [*kernel, *ones, *pads, *dilation]
        return ops.max_pool(image, window, ones, ties, "none", "naive")[0]

    return [*x.shape[:2], *out], x.dtype, element


ELEMENT: dict[str, Callable[[Mapping[str, Any]], Result]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "conv_grad_input": _conv_grad_input,
    "conv_grad_weight": _conv_grad_weight,
    "conv_grad_bias": _conv_grad_bias,
    "max_pool": _max_pool,
}
