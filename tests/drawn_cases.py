"""Random calls, each drawn from one number, that every row of a table must answer as naive does.

``draw_conv(seed)`` and ``draw_pool(seed)`` return a case: all its arguments, as plain fields, so
that what is printed of one repeats it, and it can be made smaller by hand:

    ConvCase(seed=17, dtype=torch.float32, ..., threads=2).check(["avx2"])

``test_drawn_cases.py`` runs some of them, ``tools/draw_cases.py`` as many as there is time for.
"""

import random
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from tensors import (
    FLOATS,
    INTEGERS,
    assert_same_bits,
    bits,
    in_layout,
    spoil_memory,
    threads,
    values,
)

from torch_naiveconv import functional as F
from torch_naiveconv import ops


class Axis(NamedTuple):
    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    @property
    def out(self):
        """0 where no window fits."""
        out = ops.conv_output_size(
            self.size, self.kernel, self.stride, self.before, self.after, self.dilation
        )
        return max(out, 0)


def column(axes, name):
    return [getattr(axis, name) for axis in axes]


def geometry(axes):
    """Stride, padding and dilation, as the operators take them."""
    pads = [pad for axis in axes for pad in (axis.before, axis.after)]
    return [*column(axes, "stride"), *pads, *column(axes, "dilation")]


def compare(case, row, name, call, expected):
    """One call of a row, tensor by tensor against what naive returned."""
    for result in expected:
        spoil_memory(result)
    what = f"{name} of row {row}, {case}\n"
    try:
        results = call(row)
    except RuntimeError as error:
        raise AssertionError(f"{what}: {error}") from error
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got, want, what)


class Case:
    """What both kinds of case share: their fields are their own."""

    def check(self, rows):
        """Every call of ``calls()``, a function of a row each; returns what naive gave them."""
        calls = self.calls()
        expected = {name: call("naive") for name, call in calls.items()}
        with threads(self.threads):
            for row in rows:
                for name, call in calls.items():
                    compare(self, row, name, call, expected[name])
        return expected


# ---- convolution -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvCase(Case):
    seed: int  # of the values
    dtype: torch.dtype
    batch: int
    channels: int
    filters: int
    groups: int
    axes: tuple[Axis, ...]
    layouts: tuple[str, str, str] = ("contiguous",) * 3  # of input, weight and grad_output
    values: tuple[str, str, str, str] = ("normal",) * 4  # and of the bias
    bias: bool = False
    total: bool = False  # does the weight gradient go on from one?
    channels_last: bool = False  # the weight gradient
    threads: int = 1

    @property
    def work(self):
        """Of naive: it asks every tap at every output, or at every input."""
        taps_and_pixels = prod(axis.kernel * max(axis.out, axis.size) for axis in self.axes)
        return self.batch * self.channels * self.filters // self.groups * taps_and_pixels

    def calls(self):
        """A function of a row for each operator."""
        weight_size = self.filters, self.channels // self.groups, *column(self.axes, "kernel")
        shapes = (
            (self.batch, self.channels, *column(self.axes, "size")),
            weight_size,
            (self.batch, self.filters, *column(self.axes, "out")),
        )
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(shape, kind="normal", layout="contiguous", dtype=self.dtype):
            return in_layout(values(generator, shape, dtype, kind), layout)

        x, w, g = map(drawn, shapes, self.values[:3], self.layouts)
        forward_bias = drawn((self.filters,), self.values[3]) if self.bias else None
        backward_bias = drawn((self.channels,), self.values[3]) if self.bias else None
        total = drawn(weight_size, dtype=ops.total_dtype(self.dtype)) if self.total else None
        where = geometry(self.axes), self.groups
        size, kernel = column(self.axes, "size"), column(self.axes, "kernel")
        return {
            "forward": lambda row: [ops.conv(x, w, forward_bias, *where, row)],
            "grad_input": lambda row: [
                ops.conv_grad_input(g, w, backward_bias, size, *where, row),
            ],
            "grad_weight": lambda row: [
                ops.conv_grad_weight(g, x, total, kernel, *where, self.channels_last, row)
            ],
            "grad_bias": lambda row: [ops.conv_grad_bias(g, None, row)],
        }


def draw_channels(draw):
    """Channels and filters of a group, and groups."""
    kind = draw.choice(["dense"] * 3 + ["few"] * 3 + ["depthwise"] * 3 + ["multiplier", "grouped"])
    if kind in ("dense", "few"):
        pair = [
            draw.choice([8, 16, 20, 32, 48, 64, 96, 130, draw.randint(1, 130)]),
            draw.choice([1, 1, 2, 3, 4] if kind == "few" else [8, 16, 32, draw.randint(5, 100)]),
        ]
        draw.shuffle(pair)
        return *pair, draw.choice([1, 1, 1, 1, 2, 3])
    groups = draw.choice([2, 3, 8, 16, 17, 32, 40, draw.randint(2, 70)])
    several = draw.randint(2, 5)
    if kind == "depthwise":
        return 1, 1, groups
    if kind == "multiplier":
        return *draw.choice([(1, several), (several, 1)]), groups
    return several, draw.choice([several, draw.randint(2, 5)]), groups


def draw_size(draw, dims):
    largest = {1: 300, 2: 56, 3: 20}[dims]
    sizes = [5, 7, 8, 12, 13, 16, 17, 20, 28, 32, 33, 48, 56]
    size = draw.choice([1, draw.randint(1, 4), *[draw.choice(sizes)] * 4, draw.randint(1, largest)])
    return min(size, largest)


def draw_conv_axes(draw, dims):
    """Axes of one kernel or of several, each as the usual layers have it or with what may be; or
    windows that touch each other."""
    if draw.random() < 0.06:
        kernels = [draw.choice([1, 2, 2, 4, 4, 8, 14, 16]) for _ in range(dims)]
        return tuple(
            Axis(draw.randint(1, 40 // kernel + 1) * kernel, kernel, kernel) for kernel in kernels
        )
    kernels = [1, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7]
    shared, steps = draw.choice(kernels), draw.choice([1, 1, 2])
    of_one = draw.random() < 0.7
    axes = []
    for _ in range(dims):
        size = draw_size(draw, dims)
        kernel = shared if of_one else draw.choice(kernels)
        half = kernel // 2
        if draw.random() < 0.6:
            axes.append(Axis(size, kernel, steps, 1, half, half))
            continue
        any_two = draw.randint(0, kernel + 1), draw.randint(0, kernel + 1)
        before, after = draw.choice(
            [(0, 0), (half, half), (1, 0), (0, 1), (kernel - 1, kernel - 1), any_two]
        )
        stride = draw.choice([1, 1, 2, 2, 3, 4, draw.randint(1, 9)])
        size = draw.choice([1, size, size])
        axes.append(Axis(size, kernel, stride, draw.choice([1, 1, 2, 3]), before, after))
    return tuple(axes)


def draw_layouts(draw):
    """One for all tensors, or one for each."""
    each = [draw.choice(["contiguous", "channels_last", "transposed", "gaps"]) for _ in range(3)]
    layout = draw.choice(["contiguous", "contiguous", "channels_last", "channels_last", None])
    return (layout,) * 3 if layout else tuple(each)


def draw_values(draw):
    """Of input, weight, grad_output and bias: nothing special, or in one of them, or in all."""
    kinds = ["normal"] * 4
    where = draw.choice([[], [], [0], [1], [1], [2], range(4)])
    for i in where:
        kinds[i] = draw.choice(["tiny", "wild", "spots", "spots"])
    return tuple(kinds)


def draw_conv(seed):
    draw = random.Random(seed)
    most = draw.choice([3e5, 1e6, 3e6, 1e7])  # work
    while True:
        channels, filters, groups = draw_channels(draw)
        batch = draw.choice([1, 1, 2, 3, 5])
        axes = draw_conv_axes(draw, draw.choice([1, 2, 2, 2, 3]))
        if draw.random() < 0.02:
            batch, channels, filters = draw.choice(
                [(0, channels, filters), (batch, 0, filters), (batch, channels, 0)]
            )
        elif any(axis.out == 0 for axis in axes):
            continue
        case = ConvCase(
            seed,
            draw.choice([torch.float32] * 3 + FLOATS),
            batch,
            channels * groups,
            filters * groups,
            groups,
            axes,
            draw_layouts(draw),
            draw_values(draw),
            bias=draw.random() < 0.4,
            total=draw.random() < 0.3,
            channels_last=draw.random() < 0.3,
            threads=draw.choice([1, 2, 3]),
        )
        if case.work <= most:
            return case


# ---- max-pooling -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolCase(Case):
    seed: int  # of the values
    dtype: torch.dtype
    batch: int
    channels: int
    axes: tuple[Axis, ...]
    ceil_mode: bool = False
    ties: str = "first"
    layouts: tuple[str, str, str] = ("contiguous",) * 3  # of input, grad_output and indices
    values: tuple[str, str] = ("normal",) * 2  # of input and grad_output
    by_hand: torch.dtype = torch.int16  # of the offsets made by hand
    threads: int = 1

    @property
    def shape(self):
        return self.batch, self.channels, *column(self.axes, "size")

    @property
    def taps(self):
        return prod(column(self.axes, "kernel"))

    def output_size(self):
        """ValueError if there is no output."""
        *_, size = F._pool_geometry(
            len(self.axes),
            self.shape,
            column(self.axes, "kernel"),
            column(self.axes, "stride"),
            [(axis.before, axis.after) for axis in self.axes],
            column(self.axes, "dilation"),
            self.ceil_mode,
        )
        return size

    def input(self):
        generator = torch.Generator().manual_seed(self.seed)
        return in_layout(values(generator, self.shape, self.dtype, self.values[0]), self.layouts[0])

    def calls(self):
        """A function of a row for each operator and each kind of index."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        window = [*column(self.axes, "kernel"), *geometry(self.axes)]
        in_size, out_size = column(self.axes, "size"), self.output_size()
        out_shape = self.batch, self.channels, *out_size
        summed = torch.float32 if self.dtype == torch.bool else self.dtype
        x = self.input()
        g = in_layout(values(generator, out_shape, summed, self.values[1]), self.layouts[1])

        def forward(kind):
            return lambda row: ops.max_pool(x, window, out_size, self.ties, kind, row)

        offsets, positions = (forward(kind)("naive")[1] for kind in ("offset", "flat"))
        made = offsets_by_hand(generator, out_shape, self.by_hand, self.taps)
        # No window's choice in some planes: where those gradients go is open, but not to others.
        wrong = torch.rand(out_shape[:2], generator=generator) < 0.5
        partly = torch.where(
            wrong.view(*out_shape[:2], *[1] * len(in_size)),
            positions_by_hand(generator, out_shape, prod(in_size)),
            positions,
        )

        def scatter(index, planes=slice(None)):
            index = in_layout(index, self.layouts[2])
            return lambda row: [
                ops.max_pool_scatter(g, index, in_size, window, self.ties, row)[planes]
            ]

        def gather(index):
            index, back = in_layout(index, self.layouts[2]), x.to(summed)
            return lambda row: [ops.max_pool_gather(back, index, out_size, window, self.ties, row)]

        return {
            "forward": forward("none"),
            "forward with offsets": forward("offset"),
            "forward with positions": forward("flat"),
            "scatter by offsets": scatter(offsets),
            "scatter by positions": scatter(positions),
            "scatter by offsets made by hand": scatter(made),
            "scatter by positions, made by hand in other planes": scatter(partly, ~wrong),
            "gather by offsets": gather(offsets),
            "gather by positions": gather(positions),
            "gather by offsets made by hand": gather(made),
            "gather by positions made by hand": gather(partly),
        }

    def check(self, rows):
        expected = super().check(rows)
        with threads(self.threads):
            check_unpool(self, *expected["forward with positions"])
        return expected


def offsets_by_hand(generator, shape, dtype, taps):
    """Any number of the type, half of them such that a window may have that tap."""
    info = torch.iinfo(dtype)
    wild = torch.randint(info.min, info.max + 1, shape, generator=generator)
    near = torch.randint(0, min(taps, info.max) + 1, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, wild, near).to(dtype)


def positions_by_hand(generator, shape, inputs):
    """Any int64, half of them in the plane or close to it."""
    limit = torch.iinfo(torch.int64)
    far = torch.randint(limit.min, limit.max, shape, generator=generator)
    near = torch.randint(-9, inputs + 9, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, far, near)


def check_unpool(case, pooled, positions):
    """max_unpool and its gradient beside assignments of numpy: of several to a place the last."""
    if bool((positions < 0).any()):  # a window without a tap
        return
    in_size = column(case.axes, "size")
    flat, index = bits(pooled).flatten(2).numpy(), positions.flatten(2).contiguous().numpy()
    image = np.zeros((*flat.shape[:2], prod(in_size)), flat.dtype)
    chosen = np.zeros_like(flat)
    for plane in np.ndindex(flat.shape[:2]):
        image[plane][index[plane]] = flat[plane]
        last = np.zeros(prod(in_size), np.int64)
        last[index[plane]] = np.arange(index.shape[2])
        own = last[index[plane]] == np.arange(index.shape[2])
        chosen[plane] = np.where(own, image[plane][index[plane]], 0)
    shape = *pooled.shape[:2], *in_size
    for name, got, want in [
        ("max_unpool", ops.max_unpool(pooled, positions, in_size), image.reshape(shape)),
        (
            "max_unpool's gradient",
            ops.max_unpool_gather(
                torch.from_numpy(image.reshape(shape)).view(pooled.dtype), positions
            ),
            chosen.reshape(pooled.shape),
        ),
    ]:
        assert_same_bits(got, torch.from_numpy(want).view(pooled.dtype), f"{name} of {case}\n")


def draw_pool_axis(draw, largest):
    size = draw.choice([1, 2, 3, 4, 7, 8, 16, 17, 32, draw.randint(1, largest)])
    kernel = draw.choice([1, 2, 2, 3, 3, 4, 5, 7, 11, 13])
    stride = draw.choice([1, 1, 2, 2, 2, 3, 4, kernel, draw.randint(1, 9)])
    before = draw.randint(0, kernel // 2)
    after = draw.choice([before, before, draw.randint(0, kernel)])
    return Axis(min(size, largest), kernel, stride, draw.choice([1, 1, 1, 2, 3]), before, after)


def draw_pool_axes(draw, dims):
    """Every axis by itself, or one window for all."""
    largest = {1: 400, 2: 60, 3: 14}[dims]
    axes = [draw_pool_axis(draw, largest) for _ in range(dims)]
    if draw.random() < 0.5:
        _, *window = axes[0]
        axes = [Axis(axis.size, *window) for axis in axes]
    return tuple(axes)


def draw_pool(seed):
    draw = random.Random(seed)
    most = draw.choice([1e4, 1e5, 3e5, 1e6])  # taps of all windows
    while True:
        axes = draw_pool_axes(draw, draw.choice([1, 2, 2, 2, 2, 3]))
        least = ops.offset_dtype(prod(column(axes, "kernel")))
        case = PoolCase(
            seed,
            draw.choice([torch.float32] * 3 + FLOATS * 2 + [draw.choice([*INTEGERS, torch.bool])]),
            draw.choice([1, 1, 2, 3, 0 if draw.random() < 0.1 else 1]),
            draw.choice([1, 2, 3, 5, 8, 9, 16, 17, 33, 64, draw.randint(1, 70)]),
            axes,
            draw.random() < 0.3,
            draw.choice(["first", "first", "last"]),
            draw_layouts(draw),
            (
                draw.choice(["normal", "ties", "ties", "spots", "lowest"]),
                draw.choice(["normal", "normal", "tiny", "wild", "spots", "ties"]),
            ),
            draw.choice([least, least, torch.int32]),
            draw.choice([1, 2, 3]),
        )
        try:
            size = case.output_size()
        except ValueError:  # no output
            continue
        if case.batch * case.channels * prod(size) * case.taps <= most:
            return case


DRAW = {"conv": draw_conv, "pool": draw_pool}


def rows_of(op):
    """What to compare with naive: the choice that calls make by themselves, and every other row."""
    return ["auto", *ops.rows(op, "cpu")[:-1]]
