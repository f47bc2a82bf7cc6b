"""Every row returns one result: for any threads, batch and memory format, and naive's.

Hard values are everywhere: subnormals, signed zeros, infinities and NaN.
"""

import pytest
import torch
from tensors import FLOATS, INTEGERS, same, threads

from torch_naiveconv import functional as F


def values(shape, dtype, seed, hard=False):
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=generator).to(dtype)
    t = torch.randn(shape, generator=generator)
    if hard:
        smallest = torch.finfo(dtype).tiny
        special = torch.tensor([0.0, -0.0, smallest / 4, -smallest / 8, smallest, -1.0, 1.0])
        pick = torch.randint(0, 3 * len(special), shape, generator=generator)
        t = torch.where(pick < len(special), special[pick % len(special)], t)
    return t.to(dtype)


def everything(x, w, b, g, impl=None):
    arguments = {"stride": 2, "padding": 1, "groups": 2, "impl": impl}
    return [
        F.conv2d(x, w, b, **arguments),
        F.conv_grad_input(x.shape, w, g, **arguments),
        F.conv_grad_weight(x, w.shape, g, **arguments),
        F.conv_grad_bias(g, impl=impl),
    ]


def problem(dtype, hard=True):
    x = values((3, 12, 11, 14), dtype, 1, hard)
    w = values((10, 6, 3, 3), dtype, 2, hard)
    b = values((10,), dtype, 3, hard)
    g = values((3, 10, 6, 7), dtype, 4, hard)
    return x, w, b, g


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@pytest.mark.parametrize("impl", F.implementations("conv2d"))
def test_threads(dtype, impl):
    tensors = problem(dtype)
    with threads(1):
        one = everything(*tensors, impl)
    for count in (2, 3):
        with threads(count):
            assert all(map(same, one, everything(*tensors, impl)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("impl", F.implementations("conv2d"))
def test_a_batch_and_its_samples(dtype, impl):
    x, w, b, g = problem(dtype)
    whole = everything(x, w, b, g, impl)
    for n in range(len(x)):
        alone = everything(x[n : n + 1], w, b, g[n : n + 1], impl)
        assert same(whole[0][n : n + 1], alone[0])
        assert same(whole[1][n : n + 1], alone[1])


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@pytest.mark.parametrize("impl", F.implementations("conv2d"))
def test_memory_format(dtype, impl):
    x, w, b, g = problem(dtype)
    contiguous = everything(x, w, b, g, impl)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, w, g)]
    channels_last = everything(last[0], last[1], b, last[2], impl)
    assert all(map(same, contiguous, channels_last))
    assert channels_last[0].is_contiguous(memory_format=torch.channels_last)
    assert channels_last[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["input", "weight", "grad_output"])
def test_non_finite_operands_in_every_row(dtype, value, where):
    x, w, b, g = problem(dtype)
    {"input": x, "weight": w, "grad_output": g}[where].view(-1)[17] = value
    naive = everything(x, w, b, g, "naive")
    for impl in F.implementations("conv2d"):
        assert all(map(same, naive, everything(x, w, b, g, impl)))


def test_nan_is_canonical():
    x, w, b, g = problem(torch.float32)
    x.view(torch.int32).view(-1)[5] = -1  # a negative NaN with a payload
    for t in everything(x, w, b, g):
        nan = t[t.isnan()]
        assert bool((nan.view(torch.int32) == 0x7FC00000).all())
    assert F.conv2d(x, w, b, 2, 1, groups=2).isnan().any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("impl", F.implementations("conv2d"))
def test_the_weight_gradient_resumes(dtype, impl):
    x, w, _b, g = problem(dtype)
    total = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    arguments = {"stride": 2, "padding": 1, "groups": 2, "impl": impl}
    zeros = torch.zeros(w.shape, dtype=total)
    whole = F.conv_grad_weight(x, w.shape, g, total=zeros, **arguments)
    first = F.conv_grad_weight(x[:1], w.shape, g[:1], total=zeros, **arguments)
    both = F.conv_grad_weight(x[1:], w.shape, g[1:], total=first, **arguments)
    assert same(whole, both) and whole.dtype == total
    assert same(whole.to(dtype), F.conv_grad_weight(x, w.shape, g, **arguments))
    bias = F.conv_grad_bias(g[:2], total=torch.zeros(10, dtype=total), impl=impl)
    assert same(
        F.conv_grad_bias(g[2:], total=bias, impl=impl).to(dtype), F.conv_grad_bias(g, impl=impl)
    )


@pytest.mark.parametrize("impl", F.implementations("max_pool2d"))
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool], ids=str)
def test_pooling(dtype, impl):
    x = values((2, 5, 13, 11), dtype, 5, True)
    with threads(1):
        one = F.max_pool2d(x, 3, 2, 1, return_indices=True, impl=impl)
    with threads(2):
        two = F.max_pool2d(x, 3, 2, 1, return_indices=True, impl=impl)
    last = F.max_pool2d(
        x.contiguous(memory_format=torch.channels_last), 3, 2, 1, return_indices=True, impl=impl
    )
    alone = F.max_pool2d(x[1:], 3, 2, 1, return_indices=True, impl=impl)
    for i in range(2):
        assert same(one[i], two[i]) and same(one[i], last[i]) and same(one[i][1:], alone[i])
    assert last[0].is_contiguous(memory_format=torch.channels_last)
