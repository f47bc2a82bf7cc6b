"""Every vector row of the pooling table returns naive's bits, and torch's values and indices.

The random cases draw dimension, sizes, all arguments, element type, memory format and the number of
threads; small integers make ties, and NaN (several in a window), infinities and signed zeros are
mixed in. `python -m pytest tests/test_pool_rows.py -k "random and 17"` repeats one.
"""

import contextlib
import random

import pytest
import torch

from torch_naiveconv import functional as F
from torch_naiveconv import ops

FAST = [row for row in F.implementations("max_pool2d", "cpu") if row != "naive"]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
INF, NAN = float("inf"), float("nan")


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(t):
    return t.contiguous().view(BITS[t.element_size()])


def assert_same_bits(got, expected, what):
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    differ = (bits(got) != bits(expected)).nonzero()
    assert len(differ) == 0, f"{what}: {len(differ)} of {got.numel()} differ, first {differ[0]}"


def assert_same_up_to_nan(got, expected, what):
    """torch promises that a NaN stays one, not which."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    if got.is_floating_point():
        both = got.isnan() & expected.isnan()
        got, expected = got.masked_fill(both, 0.0), expected.masked_fill(both, 0.0)
    assert_same_bits(got, expected, what)


def values(generator, shape, dtype, kind):
    if kind == "lowest":
        if dtype.is_floating_point:
            return torch.full(shape, -INF).to(dtype)
        return torch.full(shape, 0 if dtype == torch.bool else torch.iinfo(dtype).min, dtype=dtype)
    if kind == "normal" and dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    low = 0 if dtype in (torch.bool, torch.uint8) else -2
    t = torch.randint(low, 2 if dtype == torch.bool else 3, shape, generator=generator)
    if dtype.is_floating_point:
        pick = torch.rand(shape, generator=generator)
        special = torch.tensor([INF, -INF, NAN, -0.0, 1e-40, -INF])
        at = (pick * 20).long()
        t = torch.where(at < 6, special[at.clamp(max=5)], t.float())
    t = t.to(dtype)
    if dtype in (torch.float32, torch.float64, torch.bfloat16) and kind == "ties":
        # NaN of several payloads and signs
        where = bits(t.isnan()).bool() & (torch.rand(shape, generator=generator) < 0.5)
        other = bits(t) ^ (-(2 ** (8 * t.element_size() - 1)) + 5)
        t = torch.where(where, other, bits(t)).view(dtype)
    return t


def draw_axis(draw, size):
    while True:
        kernel = draw.choice([1, 2, 2, 3, 3, 4, 5, 7, 11, 13])
        stride, dilation = draw.choice([1, 1, 2, 2, 3, 4, 5]), draw.choice([1, 1, 1, 2, 3])
        padding = draw.randint(0, kernel // 2)
        if size + 2 * padding >= dilation * (kernel - 1) + 1:
            return kernel, stride, padding, dilation


def draw_case(draw):
    dims = draw.choice([1, 2, 2, 2, 2, 3])
    largest = {1: 200, 2: 45, 3: 12}[dims]
    sizes = [draw.randint(3, largest) for _ in range(dims)]
    axes = [draw_axis(draw, size) for size in sizes]
    kernel, stride, padding, dilation = (list(a) for a in zip(*axes, strict=True))
    channels = draw.choice([1, 2, 3, 5, 16, 33])
    return (
        (draw.choice([1, 2]), channels, *sizes),
        {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "ceil_mode": draw.random() < 0.3,
        },
    )


def functions(shape):
    name = f"max_pool{len(shape) - 2}d"
    return getattr(F, name), getattr(torch.nn.functional, name)


def in_format(draw, t):
    if t.dim() in FORMATS and draw.random() < 0.4:
        return t.contiguous(memory_format=FORMATS[t.dim()])
    return t


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("seed", range(120))
def test_random_forward(seed, row):
    draw = random.Random(seed)
    shape, arguments = draw_case(draw)
    ours, theirs = functions(shape)
    dtype = draw.choice(FLOATS + [torch.float32] * 2 + INTEGERS)
    generator = torch.Generator().manual_seed(seed)
    x = in_format(draw, values(generator, shape, dtype, draw.choice(["ties", "normal", "lowest"])))
    what = f"{shape} {dtype} {arguments}"
    with threads(draw.choice([1, 2, 3])):
        got, chosen = ours(x, **arguments, return_indices=True, impl=row)
        alone = ours(x, **arguments, impl=row)
        last = ours(x, **arguments, return_indices=True, ties="last", impl=row)
    expected, indices = ours(x, **arguments, return_indices=True, impl="naive")
    assert_same_bits(got, expected, what)
    assert_same_bits(chosen, indices, what)
    assert_same_bits(alone, expected, what)
    for a, b in zip(
        last, ours(x, **arguments, return_indices=True, ties="last", impl="naive"), strict=True
    ):
        assert_same_bits(a, b, what)
    if dtype in (torch.float32, torch.float64):
        # torch's own paths for other types and 5-D channels_last have gaps; this one is the rule.
        values_of_torch, indices_of_torch = theirs(x.contiguous(), **arguments, return_indices=True)
        # Where a dilated window misses the input, torch's index is not defined.
        missed = chosen < 0
        assert_same_bits(chosen, indices_of_torch.masked_fill(missed, -1), what)
        assert_same_up_to_nan(got, values_of_torch, what)


@pytest.mark.parametrize("row", FAST)
@pytest.mark.parametrize("seed", range(80))
def test_random_backward(seed, row):
    draw = random.Random(1000 + seed)
    shape, arguments = draw_case(draw)
    ours, theirs = functions(shape)
    dtype = draw.choice([*FLOATS, torch.float32])
    generator = torch.Generator().manual_seed(seed)
    x = in_format(draw, values(generator, shape, dtype, draw.choice(["ties", "normal"])))
    flat, kind = draw.random() < 0.5, draw.choice(["ties", "normal", "normal"])
    what = f"{shape} {dtype} {arguments} flat={flat}"

    def gradients(function, **more):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = function(leaf, **arguments, return_indices=flat, **more)
        out = out[0] if flat else out
        (grad,) = torch.autograd.grad(out, leaf, weights.to(out.dtype))
        return grad

    weights = values(generator, ours(x, **arguments).shape, dtype, kind)
    weights = in_format(draw, weights)
    with threads(draw.choice([1, 2, 3])):
        got = gradients(ours, impl=row)
    assert_same_bits(got, gradients(ours, impl="naive"), what)
    if kind == "normal" and dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(got, gradients(theirs), msg=what)


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
    ((1, 9, 20, 20), 13, 1, 6),
    ((2, 3, 1, 80), (1, 4), (1, 4), 0),
    ((1, 3, 6, 8, 34), 2, 2, 0),
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
    pool, _ = functions(shape)
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
    ours, _ = functions(shape)
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
    with pytest.raises(RuntimeError, match="too small for a window of 289 taps"):
        ops.max_pool_scatter(grad, index.byte(), [19, 19], window, "first", row)
    with pytest.raises(RuntimeError, match="too small for a window of 289 taps"):
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
