"""Every vector row of the convolution table returns naive's bits, on shapes that meet its edges.

What small drawn shapes (test_drawn_cases.py) do not reach: patches that hold a few channels only,
groups of terms that straddle rows and planes of the image, tiles of every size.
"""

import random

import pytest
import torch
from drawn_cases import Axis, ConvCase, draw_layouts
from tensors import assert_same_bits, threads

from torch_naiveconv import functional as F

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FAST = [row for row in F.implementations("conv2d", "cpu") if row != "naive"]


def check(draw, dtype, kind, n, c, k, groups, axes, layout=None):
    """Every row on one shape; axes: (in, kernel, stride, dilation, before, after) each."""
    ConvCase(
        draw.randrange(2**31),
        dtype,
        n,
        c,
        k,
        groups,
        tuple(Axis(*axis) for axis in axes),
        layouts=(layout,) * 3 if layout else draw_layouts(draw),
        values=(kind,) * 4,
        bias=draw.random() < 0.5,
        threads=draw.choice([1, 2, 3]),
    ).check(FAST)


# name: N, C, K, groups, axes
NAMED = {
    "patch of some channels": (1, 700, 20, 1, [(20, 3, 1, 12, 12, 12)] * 2),
    "patch of some channels, few lanes": (1, 700, 3, 1, [(20, 3, 1, 12, 12, 12)] * 2),
    "groups across planes": (1, 64, 4, 1, [(3, 3, 1, 1, 1, 1), *[(40, 3, 1, 1, 1, 1)] * 2]),
    "groups across long rows": (1, 100, 4, 1, [(3, 1, 1, 1, 0, 0), (2500, 3, 1, 1, 1, 1)]),
    "groups across planes and rows": (
        1,
        64,
        8,
        1,
        [(4, 3, 1, 1, 1, 1), *[(56, 3, 1, 1, 1, 1)] * 2],
    ),
    "many lanes": (1, 3, 300, 1, [(9, 3, 2, 1, 1, 1)] * 2),
    "pointwise": (2, 40, 70, 1, [(13, 1, 1, 1, 0, 0)] * 2),
    "pointwise, strided": (2, 70, 40, 1, [(13, 1, 2, 1, 0, 0)] * 2),
    "phases that share a patch": (2, 3, 40, 1, [(37, 7, 2, 1, 3, 3)] * 2),
    "phases that share patches of some channels": (1, 3, 700, 1, [(50, 5, 3, 1, 2, 1)] * 2),
    # Boxes of one row, of which the last of a sample has none of the second phase.
    "phases of which boxes have none": (3, 2, 8, 1, [(5, 5, 2, 1, 2, 2), (2000, 3, 1, 1, 1, 1)]),
    "phases in fours of which boxes have none": (
        3,
        2,
        8,
        1,
        [(9, 7, 4, 1, 3, 3), (4001, 7, 4, 1, 3, 3)],
    ),
    "phases with gaps": (1, 2, 300, 1, [(40, 5, 2, 2, 3, 0), (41, 4, 3, 1, 1, 2)]),
    "phases of volumes": (1, 1, 150, 1, [(9, 3, 2, 1, 1, 1), *[(20, 3, 2, 1, 1, 1)] * 2]),
    "vectors of pixels, patches of some channels": (2, 3, 300, 1, [(30, 3, 1, 1, 1, 1)] * 2),
    "cut at the padding": (3, 60, 40, 1, [(7, 3, 1, 1, 1, 1)] * 2),
    "volumes cut at the padding": (
        1,
        20,
        20,
        1,
        [(5, 3, 1, 1, 1, 1), (6, 5, 1, 1, 2, 2), (9, 3, 1, 1, 1, 1)],
    ),
    "cut, strided and dilated": (1, 40, 20, 1, [(21, 3, 2, 5, 5, 4), (20, 5, 1, 4, 8, 8)]),
    "cut vectors of pixels": (4, 30, 6, 1, [(16, 5, 1, 1, 2, 2)] * 2),
    "pointwise, planes that crowd the cache": (1, 150, 40, 1, [(56, 1, 1, 1, 0, 0)] * 2),
    "pointwise, channels in pieces": (2, 300, 20, 1, [(28, 1, 1, 1, 0, 0)] * 2),
    "pointwise, rows side by side": (2, 45, 90, 1, [(16, 1, 1, 1, 0, 0), (18, 1, 1, 1, 0, 0)]),
    "phases stored apart": (2, 40, 24, 1, [(33, 3, 2, 1, 1, 1), (70, 3, 2, 1, 1, 1)]),
    "pairs of phases, one shorter": (3, 40, 70, 1, [(21, 3, 2, 1, 1, 1), (45, 5, 2, 1, 2, 2)]),
    "pairs of phases, one channel": (5, 1, 2, 1, [(1, 2, 1, 1, 1, 1), (5, 7, 2, 1, 3, 3)]),
    "pairs of phases, one channel, many": (2, 1, 40, 1, [(9, 3, 2, 1, 1, 1), (7, 3, 2, 1, 1, 1)]),
    "pairs of phases, rows of three": (5, 1, 20, 1, [(12, 5, 1, 1, 1, 0), (3, 2, 2, 1, 1, 3)]),
    "pairs of phases, three by three": (2, 1, 2, 1, [(6, 7, 2, 1, 3, 0), (3, 5, 2, 1, 1, 1)]),
    "a stride longer than the image": (2, 3, 12, 3, [(1, 7, 2, 1, 3, 3), (20, 5, 1, 1, 1, 0)]),
    "planes that crowd the cache": (1, 40, 40, 1, [(32, 3, 1, 1, 1, 1)] * 2),
    "pointwise, every second row": (1, 20, 20, 1, [(20, 1, 2, 1, 0, 0), (56, 1, 2, 1, 0, 0)]),
    "pointwise, every second plane of one row": (
        1,
        16,
        4,
        1,
        [(5, 1, 2, 1, 0, 0), (1, 1, 2, 1, 0, 0), (7, 1, 1, 1, 0, 0)],
    ),
    "one filter, pointwise": (2, 48, 1, 1, [(13, 1, 1, 1, 0, 0), (25, 1, 1, 1, 0, 0)]),
    "one filter, pointwise, a row of padding": (
        2,
        16,
        1,
        1,
        [(12, 1, 3, 1, 1, 0), (32, 1, 1, 1, 0, 0)],
    ),
    "two filters, pointwise": (1, 33, 2, 1, [(16, 1, 1, 1, 0, 0), (24, 1, 1, 1, 0, 0)]),
    "three filters, pointwise": (1, 16, 3, 1, [(300, 1, 1, 1, 0, 0)]),
    "four filters, pointwise": (1, 64, 4, 1, [(8, 1, 1, 1, 0, 0), (32, 1, 1, 1, 0, 0)]),
    "three filters, two groups of terms": (2, 256, 3, 1, [(9, 1, 1, 1, 0, 0), (20, 1, 1, 1, 0, 0)]),
    "pointwise, shifted": (1, 3, 32, 1, [(4, 1, 2, 1, 1, 1), (80, 1, 2, 1, 1, 1)]),
    "shared samples": (5, 3, 25, 1, [(19, 3, 2, 1, 1, 1)] * 2),
    "shared samples of many pixels": (7, 2, 40, 1, [(3, 3, 1, 1, 0, 0), (150, 3, 1, 1, 1, 1)]),
    "whole images": (3, 6, 16, 1, [(14, 5, 1, 1, 0, 0)] * 2),
    "whole images, few lanes": (3, 6, 3, 1, [(20, 3, 1, 1, 0, 0), (40, 3, 1, 2, 0, 0)]),
    "rows in halves": (2, 3, 25, 1, [(31, 3, 2, 1, 1, 1), (35, 3, 2, 1, 2, 0)]),
    "rows in halves, dilated": (2, 2, 9, 1, [(40, 3, 2, 2, 2, 2), (67, 4, 2, 3, 5, 1)]),
    "phases stored in pairs": (2, 3, 20, 1, [(31, 3, 2, 1, 1, 1), (70, 5, 2, 1, 2, 2)]),
    "phases stored in fours": (2, 2, 20, 1, [(21, 4, 4, 1, 0, 0), (83, 7, 4, 1, 3, 3)]),
    "a rest of few rows": (2, 1, 40, 1, [(15, 3, 1, 1, 1, 1)] * 2),
    "few channels, 3x3": (2, 1, 40, 1, [(9, 3, 1, 1, 1, 1), (150, 3, 1, 1, 1, 1)]),
    "few channels, 3x3, part of a vector": (1, 2, 33, 1, [(6, 3, 1, 1, 1, 1), (77, 3, 1, 1, 1, 1)]),
    "few filters, 3x3": (2, 31, 3, 1, [(7, 3, 1, 1, 1, 1), (48, 3, 1, 1, 1, 1)]),
    "few filters, 3x3, short rows": (1, 40, 1, 1, [(1, 3, 1, 1, 1, 1), (13, 3, 1, 1, 1, 1)]),
    "few channels, volumes": (
        1,
        3,
        20,
        1,
        [(3, 3, 1, 1, 1, 1), (5, 3, 1, 1, 1, 1), (40, 3, 1, 1, 1, 1)],
    ),
    "strides larger than the kernel": (2, 20, 20, 1, [(17, 2, 5, 1, 0, 0)] * 2),
    "windows that touch": (3, 3, 40, 1, [(28, 4, 4, 1, 0, 0), (36, 4, 4, 1, 0, 0)]),
    "windows that touch, in groups": (3, 6, 20, 2, [(18, 2, 2, 1, 0, 0), (40, 8, 8, 1, 0, 0)]),
    "windows that touch, channels in blocks": (1, 20, 3, 1, [(64 * 130, 64, 64, 1, 0, 0)]),
    "windows that touch, in a row": (2, 5, 9, 1, [(8 * 700, 8, 8, 1, 0, 0)]),
    "windows that touch, volumes": (
        2,
        5,
        70,
        1,
        [(4, 2, 2, 1, 0, 0), (10, 2, 2, 1, 0, 0), (22, 2, 2, 1, 0, 0)],
    ),
    "windows that touch, a group for each term": (
        8,
        2,
        4,
        1,
        [(16, 16, 16, 1, 0, 0), (256, 16, 16, 1, 0, 0)],
    ),
    "windows that touch, more taps than a group": (
        8,
        2,
        4,
        1,
        [(14, 14, 14, 1, 0, 0), (224, 14, 14, 1, 0, 0)],
    ),
    "kernel larger than the image": (2, 20, 20, 1, [(3, 7, 1, 1, 3, 3)] * 2),
    "neighbours, rows of three": (2, 16, 16, 1, [(5, 3, 1, 1, 1, 1), (28, 3, 1, 1, 1, 1)]),
    "neighbours, rows of five": (2, 11, 13, 1, [(7, 5, 1, 1, 0, 0), (29, 5, 1, 1, 2, 2)]),
    "neighbours, rows of seven": (2, 6, 9, 1, [(7, 7, 1, 1, 3, 3), (18, 7, 1, 1, 0, 0)]),
    "neighbours, a rest of each size": (
        1,
        5,
        8,
        1,
        [(2, 2, 1, 1, 0, 0), (2, 1, 1, 1, 0, 0), (31, 3, 1, 1, 1, 1)],
    ),
    "pointwise, few rows of a gradient": (
        2,
        80,
        2,
        1,
        [(1, 1, 1, 1, 0, 0), (40 * 70, 1, 1, 1, 0, 0)],
    ),
    "pointwise, 64 lanes": (1, 70, 64, 1, [(10, 1, 1, 1, 0, 0), (21, 1, 1, 1, 0, 0)]),
    "pointwise, 65 lanes": (1, 70, 65, 1, [(10, 1, 1, 1, 0, 0), (21, 1, 1, 1, 0, 0)]),
    "two groups of terms that slide": (2, 28, 28, 4, [(15, 3, 1, 1, 1, 1), (33, 3, 1, 1, 1, 1)]),
    "two groups of terms that slide, 5x5": (2, 4, 4, 2, [(9, 5, 2, 1, 2, 2), (37, 5, 2, 1, 2, 2)]),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", [None, "contiguous", "channels_last"])
@pytest.mark.parametrize("name", NAMED)
def test_named(name, layout, dtype):
    check(random.Random(name), dtype, "normal", *NAMED[name], layout)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_number_of_windows_that_touch(layout, dtype):
    for windows in range(1, 70):
        axes = [(4, 4, 4, 1, 0, 0), (4 * windows, 4, 4, 1, 0, 0)]
        draw, batch, channels = random.Random(windows), 128 // windows + 1, windows % 5 + 1
        values = ("normal", "tiny", "wild")[windows % 3]
        check(draw, dtype, values, batch, channels, 1 + windows // 3, 1, axes, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_every_row_of_neighbours(kernel, layout):
    """Image rows from one pixel to beyond two tiles of neighbours, whose rest other tiles take."""
    for width in range(1, 32):
        draw = random.Random(width)
        pad = draw.randrange(kernel)
        axes = [(3, 2, 1, 1, 0, 0), (width, kernel, 1, 1, pad, kernel - 1 - pad)]
        values = ("normal", "tiny", "wild")[width % 3]
        for dtype in (torch.float32, torch.float64):
            check(draw, dtype, values, 2, 7 + width, 1 + width % 16, 1, axes, layout)


def test_every_remainder():
    """Rows and lanes from one to beyond the largest tile, in both orders of the two sizes."""
    for size in range(1, 51):
        axes = [(1, 1, 1, 1, 0, 0), (size, 1, 1, 1, 0, 0)]
        draw = random.Random(size)
        check(draw, torch.float32, "normal", 1, 5, 51 - size, 1, axes)
        check(draw, torch.float64, "normal", 1, 51 - size, size, 1, axes)


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_weights_that_are_not_finite(row, bad):
    """Taps of the input gradient that meet no output must not turn them into NaN."""
    w = torch.ones(20, 20, 3, 3)
    w[0, 0, 0, 0] = bad
    g = torch.ones(1, 20, 6, 6)
    sizes = ((1, 20, 6, 6), w, g)
    expected = F.conv_grad_input(*sizes, padding=1, impl="naive")
    got = F.conv_grad_input(*sizes, padding=1, impl=row)
    assert expected.isfinite().any() and not expected.isfinite().all()
    assert_same_bits(got, expected, row)


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_weights_that_meet_padding_alone(row, bad):
    """Padding is data of the forward pass, and nothing to the input gradient."""
    x, w = torch.ones(1, 2, 1, 8, 20), torch.ones(2, 2, 3, 3, 3)
    w[0, 0, 0, 1, 1] = bad
    expected = F.conv3d(x, w, padding=1, impl="naive")
    assert expected[0, 0].isnan().all() and expected[0, 1].isfinite().all()
    assert_same_bits(F.conv3d(x, w, padding=1, impl=row), expected, row)
    expected = F.conv_grad_input(x.shape, w, x, padding=1, impl="naive")
    assert expected.isfinite().all()
    assert_same_bits(F.conv_grad_input(x.shape, w, x, padding=1, impl=row), expected, row)


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [(0, 0), (0, 5), (2, 2), (5, 5)])
def test_gradients_that_are_not_finite(row, bad, place):
    """A tap that reads padding where the gradient is not finite is NaN in the weight gradient."""
    x, g = torch.ones(1, 20, 6, 6), torch.ones(1, 20, 6, 6)
    x[0, :, 3:] = 0.0
    g[0, 7, place[0], place[1]] = bad
    expected = F.conv_grad_weight(x, (20, 20, 3, 3), g, padding=1, impl="naive")
    assert not expected[7].isfinite().all() and expected[6].isfinite().all()
    assert_same_bits(F.conv_grad_weight(x, (20, 20, 3, 3), g, padding=1, impl=row), expected, row)


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize(
    ("channels", "filters", "size", "kernel"), [(3, 20, 20, 5), (7, 256, 23, 13)]
)
def test_samples_shared_by_threads(row, channels, filters, size, kernel):
    """Few rows: threads share the samples, but not if the totals are more than one block."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, size, size, generator=generator)
    g = torch.randn(3, filters, *[size - kernel + 1] * 2, generator=generator)
    shape = (filters, channels, kernel, kernel)
    expected = F.conv_grad_weight(x, shape, g, impl="naive")
    for count in (1, 2, 3):
        with threads(count):
            assert_same_bits(F.conv_grad_weight(x, shape, g, impl=row), expected, (row, count))


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("width", [2, 18, 34, 66])
def test_halves_of_a_row_behind_one_pad(row, width):
    """Stride 2 keeps a row in two halves; a pad in front moves the last vector of the first one."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 3, 6, 4, width, generator=generator)
    w = torch.randn(1, 3, 3, 1, 2, generator=generator)
    padding = [(0, 0), (0, 0), (1, 0)]
    for channels in (1, 4):
        arguments = x, w.expand(channels, -1, -1, -1, -1).contiguous(), None, (1, 1, 2), padding
        expected = F.conv3d(*arguments, impl="naive")
        assert_same_bits(F.conv3d(*arguments, impl=row), expected, (row, channels))


@pytest.mark.parametrize("row", FAST)
def test_bias_of_minus_zero(row):
    """A flushed total of -0 stays -0 where a tap meets no output, and a bias of -0 shows it."""
    g, w = torch.full((1, 31, 1), -0.0), torch.ones(31, 20, 3)
    g[0, 0], w[0, :, 0] = 2.0**-63, 2.0**-63  # the total is 2^-126,
    g[0, 11], w[11, :, 0] = -1.5 * 2.0**-63, 2.0**-63  # then -2^-127, flushed to -0,
    for channel in (22, 23):  # then -0 + (-0 + -0)
        g[0, channel], w[channel, :, 0] = -(2.0**-100), 2.0**-100
    arguments = [t.bfloat16() for t in (g, w, torch.full((20,), -0.0))]
    expected = F.conv_transpose1d(*arguments, impl="naive")
    assert expected[0, 0, 0] == 0 and torch.signbit(expected[0, :, 0]).all()
    assert_same_bits(F.conv_transpose1d(*arguments, impl=row), expected, row)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "stride", "groups"),
    [
        (64, 64, 1, 1, 1),
        (8, 8, 3, 1, 1),
        (64, 40, 3, 2, 1),
        (3, 20, 7, 2, 1),
        (3, 70, 5, 1, 1),
        (32, 32, 5, 1, 8),
        (40, 40, 7, 1, 40),
        (35, 35, 7, 4, 35),
        (40, 40, 9, 2, 40),
    ],
)
def test_totals_flushed_to_minus_zero(channels, filters, kernel, stride, groups, row, layout):
    """Without a bias, too, a total that the second group flushed to -0 gets a +0."""
    above, below = 1.5 * 2.0**-126, -(2.0**-125)  # terms 0 and 40
    shape = {"stride": stride, "padding": kernel // 2, "groups": groups}
    taps = kernel * kernel
    x = torch.ones(2, channels, 29, 28)
    w = torch.zeros(filters, channels // groups, taps)
    w.flatten(1)[:, 0], w.flatten(1)[:, 40] = above, below
    back = torch.zeros(groups, filters // groups, channels // groups, taps)
    back[:, 0, :, 0], back[:, 40 // taps, :, 40 % taps] = above, below
    w = w.unflatten(2, (kernel, kernel)).bfloat16()
    back = back.flatten(0, 1).unflatten(2, (kernel, kernel)).bfloat16()
    x = x.bfloat16().contiguous(memory_format=layout)
    ones = torch.ones_like(F.conv2d(x, w, **shape, impl="naive"))
    g = torch.zeros(ones.shape)
    g[0].flatten(1)[:, 0], g[0].flatten(1)[:, 40] = above, below
    g = g.bfloat16().contiguous(memory_format=layout)
    for run in (
        lambda row: F.conv2d(x, w, **shape, impl=row),
        lambda row: F.conv_grad_input(x.shape, back, ones, **shape, impl=row),
        lambda row: F.conv_grad_weight(x, w.shape, g, **shape, impl=row),
    ):
        expected = run("naive")
        zeros = expected == 0
        assert zeros.any() and not torch.signbit(expected[zeros]).any()
        assert_same_bits(run(row), expected, (row, layout))
