"""Few channels per group, and the bias gradient: every vector row returns naive's bits."""

import random

import pytest
import torch
from tensors import FLOATS, LAYOUTS, assert_same_bits, in_layout, threads, values
from test_conv_rows import FAST, check

from torch_naiveconv import functional as F

SAME3 = (3, 1, 1, 1, 1)  # kernel, stride, dilation, before, after

# name: N, C, K, groups, axes
NAMED = {
    "depthwise": (2, 35, 35, 35, [(12, *SAME3), (21, *SAME3)]),
    "whole vectors": (2, 64, 64, 64, [(9, *SAME3), (16, *SAME3)]),
    "one task per row of taps": (3, 5, 5, 5, [(30, *SAME3), (30, *SAME3)]),
    "channel multiplier": (2, 6, 18, 6, [(10, *SAME3), (11, *SAME3)]),
    "several to one": (2, 36, 12, 12, [(10, *SAME3), (9, *SAME3)]),
    "four to four": (2, 32, 32, 8, [(13, *SAME3), (14, *SAME3)]),
    "three to five": (2, 21, 35, 7, [(7, *SAME3), (8, *SAME3)]),
    "two large groups": (1, 40, 14, 2, [(9, *SAME3), (9, *SAME3)]),
    "seven by seven": (1, 17, 17, 17, [(15, 7, 1, 1, 3, 3)] * 2),
    "groups of terms cut rows of taps": (1, 7, 7, 7, [(17, 13, 1, 1, 6, 6), (15, 11, 1, 1, 5, 5)]),
    "strided": (2, 18, 18, 18, [(15, 3, 2, 1, 1, 1), (18, 3, 2, 1, 1, 0)]),
    "strided, four to four": (2, 32, 32, 8, [(13, 3, 2, 1, 1, 1), (14, 3, 2, 1, 1, 1)]),
    "strided, 7 x 5 taps": (2, 20, 20, 20, [(15, 7, 2, 1, 3, 3), (19, 5, 2, 1, 2, 2)]),
    "strided, 5 x 7 taps": (2, 20, 20, 20, [(15, 5, 2, 1, 2, 2), (19, 7, 2, 1, 3, 3)]),
    "phases without taps": (1, 9, 9, 9, [(13, 2, 4, 1, 0, 1), (14, 1, 3, 1, 0, 0)]),
    "dilated": (1, 20, 20, 20, [(16, 3, 1, 4, 4, 4), (19, 5, 1, 2, 3, 5)]),
    "stride equal to dilation": (1, 8, 8, 8, [(12, 3, 2, 2, 2, 2), (19, 4, 2, 2, 2, 2)]),
    "kernel larger than the image": (2, 10, 10, 10, [(3, 7, 1, 1, 3, 3), (2, 5, 1, 1, 2, 2)]),
    "long": (1, 3, 3, 3, [(3001, 31, 1, 1, 15, 15)]),
    "wide": (1, 4, 4, 4, [(6, *SAME3), (1500, *SAME3)]),
    "volume": (1, 10, 20, 10, [(5, *SAME3), (6, 2, 2, 1, 1, 0), (7, *SAME3)]),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_named(name, dtype):
    draw = random.Random(f"{name} {dtype}")
    for kind in ("normal", draw.choice(["tiny", "wild"])):
        check(draw, dtype, kind, *NAMED[name])


def test_every_remainder():
    """Rows of one to 24 pixels, blocks of one to 24 channels."""
    for size in range(1, 25):
        draw = random.Random(size)
        channels = 1 + 7 * size % 24
        axes = [(3, *SAME3), (size, *SAME3)]
        check(draw, draw.choice(FLOATS), "normal", 2, 2 * channels, 2 * channels, channels, axes)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("row", FAST)
def test_square_kernels(row, kernel, dtype):
    """Every number of vectors in a row, rows of padding only, bands of a tall image; in both
    formats, with weights that are not finite too (padding times infinity is NaN)."""
    for case, width in enumerate([2, 5, 8, 9, 14, 17, 25, 33, 41, 50]):
        draw = random.Random(f"{case} {kernel} {dtype}")
        generator = torch.Generator().manual_seed(case)
        kind = ["normal", "tiny", "wild"][case % 3]
        channels, height = draw.randint(1, 40), draw.choice([1, 2, 3, 7, 14, 15])
        if case == 5 and kernel == 3:
            channels, height = 2, 900
        pad, stride = (draw.randint(0, kernel) for _ in range(2)), draw.choice([1, 1, 2])
        shape = {"stride": stride, "padding": tuple(pad), "groups": channels}
        if height + 2 * shape["padding"][0] < kernel or width + 2 * shape["padding"][1] < kernel:
            shape["padding"] = (kernel // 2, kernel // 2)
        x = values(generator, (2, channels, height, width), dtype, kind)
        w = values(generator, (channels, 1, kernel, kernel), dtype, draw.choice(["normal", kind]))
        out = F.conv2d(x, w, **shape, impl="naive")
        g = values(generator, out.shape, dtype, kind)
        back = F.conv_grad_input(x.shape, w, g, **shape, impl="naive")
        for layout in (torch.contiguous_format, torch.channels_last):
            a, b = (t.contiguous(memory_format=layout) for t in (x, g))
            with threads(draw.choice([1, 2])):
                got = F.conv2d(a, w, **shape, impl=row)
                got_back = F.conv_grad_input(x.shape, w, b, **shape, impl=row)
            what = f"{row} {dtype} {kind} {tuple(x.shape)} {kernel} {shape} {layout}"
            assert_same_bits(got, out, what)
            assert_same_bits(got_back, back, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", range(24))
@pytest.mark.parametrize("row", FAST)
def test_depthwise_channels_last(row, case, dtype):
    """What is read in place: sides of rows, strides and their phases, dilation, groups of terms
    that end within a row, images smaller than the kernel, numbers that are not finite."""
    draw, generator = random.Random(case), torch.Generator().manual_seed(case)
    channels = draw.choice([8, 16, 17, 24, 35])
    if case % 6 == 5:
        layout, conv, most = torch.channels_last_3d, F.conv3d, [4, 5, 9]
    else:
        layout, conv, most = torch.channels_last, F.conv2d, [draw.choice([3, 9, 16]), 33]
        if case % 6 == 4:
            most = [3, 300]
    axes = []
    while len(axes) < len(most):
        size, kernel = draw.randint(1, most[len(axes)]), draw.choice([1, 2, 3, 3, 4, 5, 7, 9])
        stride, dilation = draw.choice([1, 1, 2, 2, 3]), draw.choice([1, 1, 1, 2])
        before, after = draw.randint(0, kernel), draw.randint(0, kernel)
        if size + before + after > dilation * (kernel - 1):
            axes.append((size, kernel, stride, dilation, (before, after)))
    size, kernel, stride, dilation, padding = (list(column) for column in zip(*axes, strict=True))
    kind, weights = draw.choice([("normal",) * 2, ("tiny",) * 2, ("wild", "normal"), ("wild",) * 2])
    shape = {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels}
    x = values(generator, (2, channels, *size), dtype, kind).contiguous(memory_format=layout)
    w = values(generator, (channels, 1, *kernel), dtype, weights)
    bias = values(generator, (channels,), dtype, kind)
    out = conv(x, w, bias, **shape, impl="naive")
    g = values(generator, out.shape, dtype, kind).contiguous(memory_format=layout)
    back = F.conv_grad_input(x.shape, w, g, **shape, impl="naive")
    weight = F.conv_grad_weight(x, w.shape, g, **shape, impl="naive")
    what = f"{row} {dtype} {kind} {tuple(x.shape)} {axes}"
    with threads(draw.choice([1, 2])):
        assert_same_bits(conv(x, w, bias, **shape, impl=row), out, what)
        assert_same_bits(F.conv_grad_input(x.shape, w, g, **shape, impl=row), back, what)
        assert_same_bits(F.conv_grad_weight(x, w.shape, g, **shape, impl=row), weight, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1)])
@pytest.mark.parametrize("row", FAST)
def test_grad_weight_of_many_rows(row, kernel, stride, dtype):
    """More rows than a band holds, so that a group of terms goes on in the next one; two blocks of
    channels side by side, and one that overlaps the block before it; kinds of numbers in turn."""
    for case, channels in enumerate([64, 40, 81]):
        generator = torch.Generator().manual_seed(case)
        kind = ["normal", "tiny", "wild"][(case + kernel + stride) % 3]
        x = values(generator, (1, channels, 120, 43), dtype, kind)
        shape = {"stride": stride, "padding": (kernel // 2 + 1, kernel // 2), "groups": channels}
        size = ((x.shape[i] + 2 * shape["padding"][i - 2] - kernel) // stride + 1 for i in (2, 3))
        g = values(generator, (1, channels, *size), dtype, kind)
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
        weight = (channels, 1, kernel, kernel)
        expected = F.conv_grad_weight(x, weight, g, **shape, impl="naive")
        for count in (1, 2):
            with threads(count):
                got = F.conv_grad_weight(x, weight, g, **shape, impl=row)
            assert_same_bits(got, expected, f"{row} {dtype} {kind} {channels} {kernel} {stride}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("row", FAST)
def test_grad_bias(row, dtype):
    for case, size in enumerate([(1, 1), (5, 7), (31, 33), (128,), (700,), (9, 8, 11)]):
        draw, generator = random.Random(case), torch.Generator().manual_seed(case)
        for kind in ("normal", "tiny", "wild"):
            grad = values(generator, (2, draw.randint(1, 40), *size), dtype, kind)
            grad = in_layout(grad, draw.choice(LAYOUTS))
            with threads(draw.choice([1, 3])):
                got = F.conv_grad_bias(grad, impl=row)
            expected = F.conv_grad_bias(grad, impl="naive")
            assert_same_bits(got, expected, f"{row} {dtype} {kind} {tuple(grad.shape)}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("row", FAST)
def test_totals_go_on(row, dtype):
    """Two samples at once, or the second resuming the total of the first."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (values(generator, (2, 18, 9, 10), dtype, "normal") for _ in range(2))
    shape, wide = (18, 1, 3, 3), torch.promote_types(dtype, torch.float32)

    def gradient(samples, total):
        arguments = {"padding": 1, "groups": 18, "impl": row}
        return F.conv_grad_weight(x[samples], shape, grad[samples], total=total, **arguments)

    first = gradient(slice(0, 1), torch.zeros(shape, dtype=wide))
    both = gradient(slice(0, 2), torch.zeros(shape, dtype=wide))
    assert_same_bits(gradient(slice(1, 2), first), both, row)
