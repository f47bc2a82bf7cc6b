"""Every number of a page, computed by this library: tensors, and each sum step by step.

A *scene* is one call with its gradients. Its *views* (output, grad_input, ...) have one list of
*steps* per element of their result: the terms in the contract's order with the running sum, the
cuts between groups, the bias. A running sum is the library's own sum of the terms so far, and the
last one is compared, bit for bit, with what the call itself returned.

A scene is made of lists, strings and numbers only, so that it is also the page's JSON. Shapes are
5-D, (N, C, D, H, W), as in the specification; positions of the input count the padding ring too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import functional as F
from .. import ops

GROUP = 128  # group_length of csrc/spec/arithmetic.h for float32 and float64
MAX_STEPS = 100_000  # beyond it a page is slow to open; the numbers would still be right

Array = np.ndarray[Any, Any]
Scene = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One spatial axis; the formulas of csrc/spec/shape.h."""

    size: int
    out: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    def input_of(self, o: int, k: int) -> int:
        return o * self.stride - self.before + k * self.dilation

    def output_of(self, i: int, k: int) -> int:
        distance = i + self.before - k * self.dilation
        o = distance // self.stride
        return o if distance >= 0 and distance % self.stride == 0 and o < self.out else -1

    def ring(self) -> range:
        """The input positions with those of the padding, and of taps behind it (ceil_mode)."""
        reach = self.input_of(self.out - 1, self.kernel - 1) + 1
        return range(-self.before, max(self.size + self.after, reach))


def axes_of(
    in_: list[int], out: list[int], kernel: list[int], stride: Any, padding: Any, dilation: Any
) -> list[Axis]:
    """Always three: unit axes in front."""
    axes = [
        Axis(in_[i], out[i], kernel[i], stride[i], dilation[i], *padding[2 * i : 2 * i + 2])
        for i in range(len(in_))
    ]
    return [Axis(1, 1, 1)] * (3 - len(axes)) + axes


# ---- numbers as text ----------------------------------------------------------------------------


def text(x: Any) -> str:
    """The shortest decimal that reads back as the same float: '0.1', '-3', 'nan'."""
    return str(x).removesuffix(".0")


def bits(values: Array) -> list[str]:
    words = values.view({4: np.uint32, 8: np.uint64}[values.itemsize])
    return [f"{int(word):0{2 * values.itemsize}x}" for word in words.ravel()]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bits(a.contiguous().numpy()) == bits(b.contiguous().numpy())


def check_bits(name: str, shown: Tensor, *results: Tensor) -> None:
    """A page that would end at other bits than the library's must not be made."""
    for result in results:
        if not same_bits(shown.reshape(-1), result.reshape(-1)):
            raise AssertionError(f"the steps of {name} do not end at the library's bits")


# ---- tensors ------------------------------------------------------------------------------------


def lift(t: Tensor) -> Tensor:
    """(N, C, ...) to (N, C, D, H, W)."""
    return t.reshape(*t.shape[:2], *(1,) * (5 - t.dim()), *t.shape[2:])


def drawn(label: str, t: Tensor, axes: list[Axis] | None = None, fill: str = "0") -> dict[str, Any]:
    """A tensor as the page draws it; with `axes`, inside its padding ring."""
    t = lift(t).contiguous()
    values = np.array([text(x) for x in t.numpy().ravel()], dtype=object).reshape(t.shape)
    words = np.array(bits(t.numpy()), dtype=object).reshape(t.shape)
    origin = [0, 0, 0]
    if axes is not None:
        origin = [-axis.ring().start for axis in axes]
        size = [len(axis.ring()) for axis in axes]
        inside = tuple(slice(o, o + n) for o, n in zip(origin, t.shape[2:], strict=True))
        for_all = (slice(None), slice(None), *inside)
        ringed = np.full([*t.shape[:2], *size], fill, dtype=object)
        ringed_words = np.full(ringed.shape, "", dtype=object)
        ringed[for_all], ringed_words[for_all] = values, words
        values, words = ringed, ringed_words
    return {
        "label": label,
        "shape": list(values.shape),
        "origin": origin,
        "inside": list(t.shape[2:]),
        "values": values.ravel().tolist(),
        "bits": words.ravel().tolist(),
    }


def flat(shape: Any, *position: int) -> int:
    index = 0
    for size, p in zip(shape, position, strict=True):
        index = index * size + p
    return index


# ---- ordered sums of products, by the library ---------------------------------------------------


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row sums of a * b for (groups, rows, terms): one chain a group, the groups folded.

    It is the weight gradient of a 1-wide convolution with one channel a row and one sample a group.
    """
    rows = a.shape[1]
    return F.conv_grad_weight(a, (rows, 1, 1), b, groups=rows, impl="naive").reshape(rows)


@dataclass
class Terms:
    """The reductions of one view: operand positions (rows, terms), -1 where a term is missing."""

    a: Array
    b: Array
    segments: list[tuple[int, int]]


def cut(count: int, samples: int = 1) -> list[tuple[int, int]]:
    """Groups of consecutive terms; they start afresh at each sample."""
    return [
        (sample * count + start, sample * count + min(start + GROUP, count))
        for sample in range(samples)
        for start in range(0, count, GROUP)
    ]


def take(values: Tensor, index: Array) -> Tensor:
    """values[index], and +0 where the index is -1."""
    extended = torch.cat([values.reshape(-1), values.new_zeros(1)])
    return extended[torch.from_numpy(index)]


def sums(
    terms: Terms, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> tuple[list[list[Any]], Tensor]:
    """The steps of every row, and where they end."""
    x, y = take(a, terms.a), take(b, terms.b)
    rows = x.shape[0]
    products = [texts(dot(x[None, :, t : t + 1], y[None, :, t : t + 1])) for t in range(x.shape[1])]
    steps: list[list[Any]] = [[] for _ in range(rows)]
    length = max(end - start for start, end in terms.segments)
    folded_x = x.new_zeros(len(terms.segments), rows, length)
    folded_y = torch.zeros_like(folded_x)
    total = torch.zeros(rows, dtype=x.dtype)
    for group, (start, end) in enumerate(terms.segments):
        for t in range(start, end):
            chain = texts(dot(x[None, :, start : t + 1], y[None, :, start : t + 1]))
            for row in range(rows):
                i, j = int(terms.a[row, t]), int(terms.b[row, t])
                if i < 0:
                    steps[row].append(["skip", i, j])
                else:
                    steps[row].append(["term", i, j, products[t][row], chain[row]])
        folded_x[group, :, : end - start] = x[:, start:end]
        folded_y[group, :, : end - start] = y[:, start:end]
        total = dot(folded_x[: group + 1], folded_y[: group + 1])
        for row, value in enumerate(texts(total)):
            steps[row].append(["cut", value])
    if bias is not None:
        total = total + bias
        for row, (value, sum_) in enumerate(zip(texts(bias), texts(total), strict=True)):
            steps[row].append(["bias", value, sum_])
    return steps, total


def texts(t: Tensor) -> list[str]:
    return [text(x) for x in t.numpy().ravel()]


def limit(count: int) -> None:
    if count > MAX_STEPS:
        raise ValueError(
            f"the page would hold {count} steps, more than {MAX_STEPS}: use a smaller input, fewer "
            "channels or a smaller batch"
        )


# ---- convolution --------------------------------------------------------------------------------


def positions(shape: Any) -> Any:
    return product(*(range(size) for size in shape))


def output_terms(
    axes: list[Axis], groups: int, input: Any, ringed: Any, weight: Any, output: Any
) -> Terms:
    """conv_output_at of csrc/spec/conv.h: terms (ic, kd, kh, kw); padding is data."""
    a, b = [], []
    group_in, group_out = weight[1], weight[0] // groups
    for n, oc, *o in positions(output):
        row_a, row_b = [], []
        for ic, *k in positions(weight[1:]):
            i = [x.input_of(o[j], k[j]) - x.ring().start for j, x in enumerate(axes)]
            row_a.append(flat(ringed, n, oc // group_out * group_in + ic, *i))
            row_b.append(flat(weight, oc, ic, *k))
        a.append(row_a)
        b.append(row_b)
    return Terms(np.array(a), np.array(b), cut(len(a[0])))


def grad_input_terms(axes: list[Axis], groups: int, input: Any, weight: Any, output: Any) -> Terms:
    """conv_grad_input_at: terms (oc, kd, kh, kw); a tap that meets no output adds nothing."""
    a, b = [], []
    group_in, group_out = weight[1], weight[0] // groups
    for n, c, *i in positions(input):
        row_a, row_b = [], []
        first = c // group_in * group_out
        for oc, *k in positions((group_out, *weight[2:])):
            o = [x.output_of(i[j], k[j]) for j, x in enumerate(axes)]
            row_a.append(-1 if min(o) < 0 else flat(output, n, first + oc, *o))
            row_b.append(flat(weight, first + oc, c % group_in, *k))
        a.append(row_a)
        b.append(row_b)
    return Terms(np.array(a), np.array(b), cut(len(a[0])))


def grad_weight_terms(
    axes: list[Axis], groups: int, ringed: Any, weight: Any, output: Any
) -> Terms:
    """conv_grad_weight_at: per sample the terms (od, oh, ow); padding is data."""
    a, b = [], []
    group_in, group_out = weight[1], weight[0] // groups
    for oc, ic, *k in positions(weight):
        row_a, row_b = [], []
        for n, *o in positions((output[0], *output[2:])):
            i = [x.input_of(o[j], k[j]) - x.ring().start for j, x in enumerate(axes)]
            row_a.append(flat(output, n, oc, *o))
            row_b.append(flat(ringed, n, oc // group_out * group_in + ic, *i))
        a.append(row_a)
        b.append(row_b)
    return Terms(np.array(a), np.array(b), cut(len(a[0]) // output[0], output[0]))


def grad_bias_terms(output: Any) -> Terms:
    """conv_grad_bias_at: the weight gradient of an input that is 1 everywhere."""
    rows = [
        [flat(output, n, oc, *o) for n, *o in positions((output[0], *output[2:]))]
        for oc in range(output[1])
    ]
    a = np.array(rows)
    return Terms(a, np.zeros_like(a), cut(a.shape[1] // output[0], output[0]))


def ring_pad(t: Tensor, axes: list[Axis]) -> Tensor:
    """Zeros around, so that positions in the ring can be read."""
    t = lift(t)
    out = t.new_zeros(*t.shape[:2], *(len(axis.ring()) for axis in axes))
    d, h, w = (slice(-x.ring().start, -x.ring().start + x.size) for x in axes)
    out[:, :, d, h, w] = t
    return out


def view(key: str, label: str, result: str, operands: list[str], steps: Any, **more: Any) -> Scene:
    return {
        "key": key,
        "label": label,
        "kind": "sum",
        "result": result,
        "operands": operands,
        "steps": steps,
        **more,
    }


def size_formula(axis: Axis, ceil: bool = False) -> str:
    rounding = "ceil" if ceil else "floor"
    return (
        f"{rounding}(({axis.size} + {axis.before} + {axis.after} - {axis.dilation} * "
        f"({axis.kernel} - 1) - 1) / {axis.stride}) + 1 = {axis.out}"
    )


def transposed_formula(axis: Axis) -> str:
    extra = axis.size - (
        (axis.out - 1) * axis.stride - axis.before - axis.after
        + axis.dilation * (axis.kernel - 1) + 1
    )  # fmt: skip
    return (
        f"({axis.out} - 1) * {axis.stride} - {axis.before} - {axis.after} + {axis.dilation} * "
        f"({axis.kernel} - 1) + {extra} + 1 = {axis.size}"
    )


def sizes(axes: list[Axis], dims: int, formula: Any) -> list[str]:
    """The formula once an axis, once only where all axes agree."""
    names = ("depth", "height", "width")
    lines = [(names[i], formula(axes[i])) for i in range(3 - dims, 3)]
    if len({line for _, line in lines}) == 1:
        return [f"output size = {lines[0][1]}"]
    return [f"output {name} = {line}" for name, line in lines]


def shape_text(t: Tensor) -> str:
    return " x ".join(str(size) for size in t.shape)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Scene:
    """The scene of conv1d, conv2d or conv3d, and of their gradients.

    Args:
        input, weight, bias, stride, padding, dilation, groups: those of :func:`functional.conv2d`.
        grad_output: the gradient that arrives at the output; ones if None.

    >>> scene = conv(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), None)
    >>> [view["key"] for view in scene["views"]]
    ['output', 'grad_input', 'grad_weight']
    >>> scene["views"][0]["steps"][0][-2:]  # the last term, and the group's cut
    [['term', 4, 3, '1', '4'], ['cut', '4']]
    """
    dims = input.dim() - 2
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    function = getattr(F, f"conv{dims}d")
    output = function(input, weight, bias, **arguments)
    geometry = F._conv_geometry(dims, input.shape, weight.shape, stride, padding, dilation, groups)
    axes = axes_of(
        list(input.shape[2:]), list(output.shape[2:]), list(weight.shape[2:]), *ops.split(geometry)
    )
    if grad_output is None:
        grad_output = torch.ones_like(output)
    grad_input = F.conv_grad_input(input.shape, weight, grad_output, **arguments)
    grad_weight = F.conv_grad_weight(input, weight.shape, grad_output, **arguments)
    maps = conv_maps(axes, groups, input, weight, output)
    out_steps, out_end = sums(maps["output"], ring_pad(input, axes), weight, channel(bias, output))
    check_bits("output", out_end, output, function(input, weight, bias, **arguments, impl="naive"))
    steps, end = sums(maps["grad_input"], grad_output, weight)
    check_bits("grad_input", end, grad_input)
    weight_steps, weight_end = sums(maps["grad_weight"], grad_output, ring_pad(input, axes))
    check_bits("grad_weight", weight_end, grad_weight)
    tensors = {
        "input": drawn("input", input, axes),
        "weight": drawn("weight", weight),
        "output": drawn("output", output),
        "grad_output": drawn("output's gradient", grad_output),
        "grad_input": drawn("input's gradient", grad_input, axes, fill=""),
        "grad_weight": drawn("weight's gradient", grad_weight),
    }
    views = [
        view("output", "Output", "output", ["input", "weight"], out_steps),
        view(
            "grad_input",
            "Input's gradient",
            "grad_input",
            ["grad_output", "weight"],
            ringed_rows(steps, tensors["grad_input"]),
        ),
        view(
            "grad_weight",
            "Weight's gradient",
            "grad_weight",
            ["grad_output", "input"],
            weight_steps,
            samples=input.shape[0],
        ),
    ]
    if bias is not None:
        views.append(bias_view(tensors, bias, grad_output))
    return {
        "function": f"conv{dims}d",
        "dims": dims,
        "dtype": str(input.dtype).removeprefix("torch."),
        "call": call(f"conv{dims}d", input, weight, arguments),
        "facts": sizes(axes, dims, size_formula),
        "tensors": tensors,
        "views": views,
    }


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Scene:
    """The scene of a transposed convolution: the maps of :func:`conv` in other roles.

    Its output is the input gradient of the convolution that it transposes, its input gradient that
    convolution's output.

    >>> scene = conv_transpose(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), None, stride=2)
    >>> scene["facts"]
    ['output size = (2 - 1) * 2 - 0 - 0 + 1 * (2 - 1) + 0 + 1 = 4']
    """
    dims = input.dim() - 2
    arguments = {
        "stride": stride,
        "padding": padding,
        "output_padding": output_padding,
        "groups": groups,
        "dilation": dilation,
    }
    function = getattr(F, f"conv_transpose{dims}d")
    x, w = input.clone().requires_grad_(), weight.clone().requires_grad_()
    output = function(x, w, bias, **arguments)
    size, geometry = F._transposed_geometry(
        dims, input.shape, weight.shape, stride, padding, output_padding, groups, dilation
    )
    axes = axes_of(size, list(input.shape[2:]), list(weight.shape[2:]), *ops.split(geometry))
    if grad_output is None:
        grad_output = torch.ones_like(output)
    grad_input, grad_weight = torch.autograd.grad(output, (x, w), grad_output)
    output = output.detach()
    maps = conv_maps(axes, groups, output, weight, input)
    ringed = ring_pad(grad_output, axes)
    out_steps, out_end = sums(maps["grad_input"], input, weight, channel(bias, output))
    check_bits("output", out_end, output, function(input, weight, bias, **arguments, impl="naive"))
    in_steps, in_end = sums(maps["output"], ringed, weight)
    check_bits("grad_input", in_end, grad_input)
    weight_steps, weight_end = sums(maps["grad_weight"], input, ringed)
    check_bits("grad_weight", weight_end, grad_weight)
    tensors = {
        "input": drawn("input", input),
        "weight": drawn("weight", weight),
        "output": drawn("output", output, axes, fill=""),
        "grad_output": drawn("output's gradient", grad_output, axes),
        "grad_input": drawn("input's gradient", grad_input),
        "grad_weight": drawn("weight's gradient", grad_weight),
    }
    views = [
        view(
            "output", "Output", "output", ["input", "weight"],
            ringed_rows(out_steps, tensors["output"]),
        ),
        view(
            "grad_input", "Input's gradient", "grad_input", ["grad_output", "weight"], in_steps
        ),
        view(
            "grad_weight", "Weight's gradient", "grad_weight", ["input", "grad_output"],
            weight_steps, samples=input.shape[0],
        ),
    ]  # fmt: skip
    if bias is not None:
        views.append(bias_view(tensors, bias, grad_output, ring=axes))
    return {
        "function": f"conv_transpose{dims}d",
        "dims": dims,
        "dtype": str(input.dtype).removeprefix("torch."),
        "call": call(f"conv_transpose{dims}d", input, weight, arguments),
        "facts": sizes(axes, dims, transposed_formula),
        "tensors": tensors,
        "views": views,
    }


def conv_maps(
    axes: list[Axis], groups: int, input: Tensor, weight: Tensor, output: Tensor
) -> dict[str, Terms]:
    """The terms of a convolution's output and of its two gradients."""
    x, w, y = lift(input).shape, lift(weight).shape, lift(output).shape
    ringed = (*x[:2], *(len(axis.ring()) for axis in axes))
    weights = w.numel()
    limit(
        y.numel() * (weights // w[0])
        + x.numel() * (weights // w[1] // groups)
        + weights * (y.numel() // y[1])
    )
    return {
        "output": output_terms(axes, groups, x, ringed, w, y),
        "grad_input": grad_input_terms(axes, groups, x, w, y),
        "grad_weight": grad_weight_terms(axes, groups, ringed, w, y),
    }


def bias_view(
    tensors: dict[str, Any], bias: Tensor, grad_output: Tensor, ring: list[Axis] | None = None
) -> Scene:
    """Adds the bias and its gradient to the tensors."""
    grad_bias = F.conv_grad_bias(grad_output)
    terms = grad_bias_terms(lift(grad_output).shape)
    steps, end = sums(terms, grad_output, torch.ones(1, dtype=bias.dtype))
    check_bits("grad_bias", end, grad_bias)
    if ring is not None:  # the page counts the positions of this tensor inside its ring
        where = inside_positions(tensors["grad_output"])
        for row in steps:
            for step in row:
                if step[0] == "term":
                    step[1] = where[step[1]]
    tensors["bias"] = drawn("bias", bias.reshape(1, -1, 1))
    tensors["grad_bias"] = drawn("bias's gradient", grad_bias.reshape(1, -1, 1))
    return view(
        "grad_bias", "Bias's gradient", "grad_bias", ["grad_output"], steps,
        samples=grad_output.shape[0],
    )  # fmt: skip


def channel(bias: Tensor | None, output: Tensor) -> Tensor | None:
    """The bias of every output element."""
    if bias is None:
        return None
    return bias.view(1, -1, *(1,) * (output.dim() - 2)).expand(output.shape).reshape(-1)


def inside_positions(tensor: dict[str, Any]) -> list[int]:
    """The positions of a ringed tensor's own elements, in their order."""
    shape, origin = tensor["shape"], tensor["origin"]
    return [
        flat(shape, n, c, *(i + o for i, o in zip(inner, origin, strict=True)))
        for n, c, *inner in positions((*shape[:2], *tensor["inside"]))
    ]


def ringed_rows(steps: list[Any], tensor: dict[str, Any]) -> list[Any]:
    """One row per drawn position: None in the ring."""
    rows: list[Any] = [None] * len(tensor["values"])
    for row, where in zip(steps, inside_positions(tensor), strict=True):
        rows[where] = row
    return rows


def call(name: str, input: Tensor, weight: Tensor | None, arguments: dict[str, Any]) -> str:
    parts = [f"input {shape_text(input)}"]
    if weight is not None:
        parts.append(f"weight {shape_text(weight)}")
    defaults = {"padding": 0, "output_padding": 0, "ceil_mode": False}
    parts += [f"{k}={v}" for k, v in arguments.items() if v != defaults.get(k, 1)]
    return f"{name}({', '.join(parts)})"


# ---- max-pooling --------------------------------------------------------------------------------

RULES = {
    "first": "the first maximum gets the gradient (torch's rule)",
    "last": "the last maximum gets it",
    "all": "every maximum gets the whole gradient",
    "split": "every maximum gets an equal share",
}


def article_grad_input(
    axes: list[Axis], input: Tensor, output: Tensor, grad_output: Tensor
) -> Tensor:
    """What the article's listing computes: dx[window] = (x[window] == max) * dout, assigned."""
    x, y, g = lift(input), lift(output), lift(grad_output)
    dx = torch.zeros_like(x)
    for n, c, *o in positions(y.shape):
        window = tuple(
            [i for k in range(a.kernel) if 0 <= (i := a.input_of(o[j], k)) < a.size]
            for j, a in enumerate(axes)
        )
        at = np.ix_([n], [c], *window)
        dx[at] = (x[at] == y[n, c, o[0], o[1], o[2]]) * g[n, c, o[0], o[1], o[2]]
    return dx.reshape(input.shape)


def max_pool(
    input: Tensor, grad_output: Tensor | None = None, *, title: str = "", **arguments: Any
) -> Scene:
    """The scene of max_pool1d, 2d or 3d under the four tie rules.

    Args:
        input: (N, C, ...).
        grad_output: the gradient that arrives at the output; ones if None.
        title: what is special about these values.
        arguments: kernel_size, stride, padding, dilation, ceil_mode.

    >>> scene = max_pool(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 1, 1), 8.0), kernel_size=2)
    >>> {rule: scene["tensors"]["grad_input_" + rule]["values"] for rule in ("first", "split")}
    {'first': ['8', '0', '0', '0'], 'split': ['2', '2', '2', '2']}
    >>> scene["tensors"]["article"]["values"]
    ['8', '8', '8', '8']
    """
    dims = input.dim() - 2
    function = getattr(F, f"max_pool{dims}d")
    options = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, **arguments}
    output = function(input, **options)
    kernel, stride, padding, dilation, size = F._pool_geometry(
        dims, input.shape, options["kernel_size"], options["stride"], options["padding"],
        options["dilation"], options["ceil_mode"],
    )  # fmt: skip
    axes = axes_of(list(input.shape[2:]), list(size), kernel, stride, padding, dilation)
    if grad_output is None:
        grad_output = torch.ones_like(output)
    windows = lift(output).numel()
    limit(windows * int(np.prod(kernel)) * 5)
    tensors = {
        "input": drawn("input", input, axes, fill=""),
        "output": drawn("output", output),
        "grad_output": drawn("output's gradient", grad_output),
    }
    scan_steps = scans(axes, input, output, ringed_shape=tensors["input"]["shape"])
    views = [view("output", "Output", "output", ["input"], scan_steps, kind="scan")]
    for rule, meaning in RULES.items():
        key = f"grad_input_{rule}"
        grad_input = F.max_pool_grad_input(input, grad_output, **options, ties=rule)
        naive = F.max_pool_grad_input(input, grad_output, **options, ties=rule, impl="naive")
        tensors[key] = drawn(f"gradient, ties = {rule}", grad_input, axes, fill="")
        steps, end = routes(axes, input, grad_output, options, rule)
        check_bits(key, end, grad_input, naive)
        views.append(
            view(
                key, f"Gradient, ties={rule}", key, ["grad_output", "input"],
                ringed_rows(steps, tensors[key]), kind="route", rule=meaning,
                winners=winners(input, output, options, rule, tensors["input"]),
            )
        )  # fmt: skip
    tensors["article"] = drawn(
        "the article's assignment", article_grad_input(axes, input, output, grad_output), axes, ""
    )
    return {
        "function": f"max_pool{dims}d",
        "title": title,
        "dims": dims,
        "dtype": str(input.dtype).removeprefix("torch."),
        "call": call(
            f"max_pool{dims}d",
            input,
            None,
            {**arguments, "stride": stride[0] if len(set(stride)) == 1 else tuple(stride)},
        ),
        "facts": sizes(axes, dims, lambda axis: size_formula(axis, options["ceil_mode"])),
        "tensors": tensors,
        "views": views,
        "compare": {"right": "grad_input_first", "others": [*list(RULES)[1:]], "wrong": "article"},
    }


def scans(axes: list[Axis], input: Tensor, output: Tensor, ringed_shape: Any) -> list[Any]:
    """Each window in (kd, kh, kw) order with its best value so far: the library's own pooling of
    the taps seen, as a 1-D window."""
    x, shape = lift(input), lift(output).shape
    rows = []
    for n, c, *o in positions(shape):
        steps: list[Any] = []
        seen: list[Tensor] = []
        at: list[int] = []
        for k in positions([axis.kernel for axis in axes]):
            i = [axis.input_of(o[j], k[j]) for j, axis in enumerate(axes)]
            where = flat(
                ringed_shape, n, c, *(p - a.ring().start for p, a in zip(i, axes, strict=True))
            )
            if not all(0 <= p < axis.size for p, axis in zip(i, axes, strict=True)):
                steps.append(["skip", where, -1])
                continue
            seen.append(x[n, c, i[0], i[1], i[2]])
            at.append(where)
            taps = torch.stack(seen).view(1, 1, -1)
            best, index = F.max_pool1d(taps, len(seen), return_indices=True)
            leader = at[int(index)]
            steps.append(["look", where, leader, text(best.numpy().ravel()[0])])
        if seen:
            check_bits("output", best, lift(output)[n, c, o[0], o[1], o[2]].reshape(1))
        rows.append(steps)
    return rows


def one_hot_windows(values: Tensor) -> Tensor:
    """(windows, N, C, ...): row i holds values at window i and 0 elsewhere."""
    return torch.diag(values.reshape(-1)).view(-1, *values.shape)


def grads_of(input: Tensor, grads: Tensor, options: Any, rule: str) -> Tensor:
    """The input gradient for each of several output gradients, in one call."""
    count = grads.shape[0]
    repeated = input.expand(count, *input.shape).flatten(0, 1)
    out = F.max_pool_grad_input(repeated, grads.flatten(0, 1), **options, ties=rule, impl="naive")
    return out.view(count, -1)


def winners(
    input: Tensor, output: Tensor, options: Any, rule: str, drawn_input: dict[str, Any]
) -> list[list[int]]:
    """For each window the drawn positions that it chose: where a gradient of 1 arrives."""
    where = inside_positions(drawn_input)
    hits = grads_of(input, one_hot_windows(torch.ones_like(output)), options, rule)
    return [[where[int(i)] for i in row.nonzero()] for row in hits]


def routes(
    axes: list[Axis], input: Tensor, grad_output: Tensor, options: Any, rule: str
) -> tuple[list[Any], Tensor]:
    """For each input the windows that span it, in order, with what each gives and the running sum:
    the library's gradient when only the windows so far have one."""
    shape = lift(grad_output).shape
    ones = one_hot_windows(torch.ones_like(grad_output))
    chose = grads_of(input, ones, options, rule)
    gives = grads_of(input, one_hot_windows(grad_output), options, rule)
    upto = torch.ones(len(ones), len(ones)).tril().bool().view(ones.shape)
    none = torch.zeros_like(grad_output)
    sofar = grads_of(input, torch.where(upto, grad_output, none), options, rule)
    x = lift(input)
    rows: list[Any] = [[] for _ in range(x.numel())]
    for window, (n, c, *o) in enumerate(positions(shape)):
        for k in positions([axis.kernel for axis in axes]):
            i = [axis.input_of(o[j], k[j]) for j, axis in enumerate(axes)]
            if all(0 <= p < axis.size for p, axis in zip(i, axes, strict=True)):
                at = flat(x.shape, n, c, *i)
                if chose[window, at] != 0:
                    values = gives[window, at].numpy(), sofar[window, at].numpy()
                    rows[at].append(["add", window, *(text(value) for value in values)])
                else:
                    rows[at].append(["pass", window])
    return rows, sofar[-1]
