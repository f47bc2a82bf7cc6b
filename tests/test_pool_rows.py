"""Every vector row of the pooling table returns naive's bits: ties, seams, indices made by hand.

Drawn calls are those of test_drawn_cases.py.
"""

import pytest
import torch
from tensors import FLOATS, INF, NAN, assert_same_bits, bits, threads, values

from torch_naiveconv import functional as F
from torch_naiveconv import ops

FAST = [row for row in F.implementations("max_pool2d", "cpu") if row != "naive"]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


# Sizes at the seams of the gradient kernels: rows shorter and longer than a vector, one left over.
SEAMS = [
    ((3, 5, 28, 28), 2, 2, 0),
    ((2, 3, 9, 34), 2, 2, 0),
    ((2, 3, 9, 16), 2, 2, 1),
    ((2, 7, 20, 111), 3, 2, 0),
    ((2, 7, 21, 112), 3, 2, 1),
    ((2, 3, 12, 28), 3, 1, 1),
    ((1, 2, 3, 4), 3, 1, 1),
    ((2, 3, 20, 20), 5, 1, 2),
    ((1, 9, 20, 20), 5, 1, 2),
    ((2, 3, 17, 31), 5, 1, (0, 4)),
    ((1, 3, 50, 700), 5, 1, (4, 1)),
    ((1, 9, 20, 20), 13, 1, 6),
    ((2, 3, 1, 80), (1, 4), (1, 4), 0),
    ((1, 3, 6, 8, 34), 2, 2, 0),
    ((2, 3, 4, 9, 17), (1, 5, 5), 1, (0, 2, 2)),
    ((1, 5, 5, 9, 28), 3, 2, 1),
    ((2, 3, 11, 29), 3, 1, 1),
    ((2, 3, 10, 41), 2, 1, 1),
    ((2, 3, 9, 40), 2, 2, 1),
    ((2, 19, 9, 11), 2, 2, 0),
    ((1, 17, 6, 7, 9), 2, 2, 0),
]


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "flat"])
@pytest.mark.parametrize("seam", SEAMS)
def test_gradient_at_the_seams(seam, layout, row):
    shape, kernel, stride, padding = seam
    pool = getattr(F, f"max_pool{len(shape) - 2}d")
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    for dtype in FLOATS:
        x = values(generator, shape, dtype, "ties")
        if layout == "channels_last":
            x = x.contiguous(memory_format=FORMATS[x.dim()])
        x.requires_grad_()
        got = []
        for impl in (row, "naive"):
            ceil = layout == "contiguous"
            out = pool(x, kernel, stride, padding, 1, ceil, layout == "flat", impl=impl)
            out = out[0] if layout == "flat" else out
            if not got:
                weights = values(generator, out.shape, dtype, "ties")
            got.append(torch.autograd.grad(out, x, weights)[0])
        assert_same_bits(*got, (seam, dtype))


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("shape", [(1, 5, 9, 10), (1, 3, 5, 4, 6), (2, 11, 13, 21)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 1, 2)]
)
def test_indices_made_by_hand(shape, kernel, stride, padding, row):
    """No offset reads or writes out of bounds, and one that names no tap is nobody's."""
    dims = len(shape) - 2
    ours = getattr(F, f"max_pool{dims}d")
    generator = torch.Generator().manual_seed(0)
    out = ours(torch.zeros(shape), kernel, stride, padding)
    grad = torch.randn(out.shape, generator=generator)
    window = [kernel] * dims + [stride] * dims + [padding] * 2 * dims + [1] * dims
    for dtype, low, high in [
        (torch.uint8, 0, 256),
        (torch.int16, -9, 200),
        (torch.int32, -(2**31), 2**31),
    ]:
        index = torch.randint(low, high, out.shape, generator=generator).to(dtype)
        index = torch.where(
            torch.rand(out.shape, generator=generator) < 0.5, index, index % kernel**dims
        )
        for image in (index, index.contiguous(memory_format=FORMATS[index.dim()])):
            arguments = (grad, image, list(shape[2:]), window, "first")
            got = ops.max_pool_scatter(*arguments, row)
            assert_same_bits(got, ops.max_pool_scatter(*arguments, "naive"), dtype)
    far = torch.randint(-(2**62), 2**62, out.shape, generator=generator)
    near = torch.randint(-5, shape[-1] * shape[-2], out.shape, generator=generator)
    for index in (far, near):
        got = ops.max_pool_scatter(grad, index, list(shape[2:]), window, "first", row)
        assert got.isfinite().all()


@pytest.mark.parametrize("row", [*FAST, "naive"])
def test_offsets_of_a_type_too_small(row):
    """A byte cannot name 17 x 17 taps; the lookup lists one of them for each of its values."""
    window = [17, 17, 1, 1, 0, 0, 0, 0, 1, 1]
    grad, image = torch.ones(1, 8, 3, 3), torch.ones(1, 8, 19, 19)
    index = torch.full(grad.shape, 2, dtype=torch.int16)
    scattered = ops.max_pool_scatter(grad, index, [19, 19], window, "first", row)
    gathered = ops.max_pool_gather(image, index, [3, 3], window, "first", row)
    assert scattered.sum() == gathered.sum() == 72
    message = "index is uint8, too small for a window of 289 taps: pass int16"
    with pytest.raises(RuntimeError, match=message):
        ops.max_pool_scatter(grad, index.byte(), [19, 19], window, "first", row)
    with pytest.raises(RuntimeError, match=message):
        ops.max_pool_gather(image, index.byte(), [3, 3], window, "first", row)


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("channels_last", [False, True])
def test_ties(row, channels_last):
    """The rules of docs/max_pool.md, in every row."""

    def pool(rows, **arguments):
        x = torch.tensor(rows)[None, None].repeat(1, 3, 1, 1)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        out, index = F.max_pool2d(x, 2, return_indices=True, impl=row, **arguments)
        assert bits(out[:, :1]).equal(bits(out[:, 2:]))
        return out[0, 1].flatten(), index[0, 1].flatten().tolist()

    equal = [[1.0, 7.0, 0.0, -0.0], [7.0, 7.0, -1.0, 0.0]]
    assert pool(equal)[1] == [1, 2]
    assert not pool(equal)[0][1].signbit()
    assert pool(equal, ties="last")[1] == [5, 7]
    assert pool([[NAN, 2.0, NAN, 1.0], [NAN, 3.0, INF, NAN]])[1] == [4, 7]
    out, index = pool([[-INF, -INF], [-INF, -INF]])
    assert out.tolist() == [-INF] and index == [0]


@pytest.mark.parametrize("row", FAST)
def test_window_without_a_tap(row):
    """kernel 2, dilation 4: the middle windows step over an input of three."""
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    for dtype in (torch.float32, torch.int32):
        got = F.max_pool1d(x.to(dtype), 2, 1, 1, 4, return_indices=True, impl=row)
        want = F.max_pool1d(x.to(dtype), 2, 1, 1, 4, return_indices=True, impl="naive")
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b, dtype)


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("kernel", [(3, 3), (40, 31)])
def test_large_window_and_plane(row, kernel):
    """More than one tile in both directions, one channel, several threads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 3, (1, 1, 90, 5000), generator=generator).float()

    def both(impl):
        leaf = x.clone().requires_grad_()
        out = F.max_pool2d(leaf, kernel, 2, 1, impl=impl)
        (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        return out.detach(), grad

    with threads(2):
        got = both(row)
    # The specification would take minutes for the large window: another row stands for it.
    for a, b in zip(got, both("naive" if kernel == (3, 3) else FAST[-1]), strict=True):
        assert_same_bits(a, b, kernel)


@pytest.mark.parametrize("row", FAST)
def test_double_backward(row):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    for n in (2, 0):
        sample = x[:n].detach().requires_grad_()
        assert torch.autograd.gradgradcheck(
            lambda t: F.max_pool2d(t, 3, 2, 1, impl=row), sample, nondet_tol=0.0
        )
