"""What torch.nn.functional does not give: each compared with the same thing composed from torch."""

import pytest
import torch
import torch.nn.functional as TF

from torch_naiveconv import functional as F


def integers(*shape, dtype=torch.float64):
    return torch.randint(-5, 6, shape).to(dtype)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_per_side(dims):
    x, w = integers(2, 3, *(6,) * dims), integers(4, 3, *(3,) * dims)
    pairs = tuple((i, 2 - i) for i in range(dims))
    flat = [p for pair in reversed(pairs) for p in pair]
    expected = getattr(TF, f"conv{dims}d")(TF.pad(x, flat), w, stride=2)
    assert torch.equal(getattr(F, f"conv{dims}d")(x, w, stride=2, padding=pairs), expected)
    pooled = getattr(TF, f"max_pool{dims}d")(TF.pad(x, flat, value=float("-inf")), 2)
    assert torch.equal(getattr(F, f"max_pool{dims}d")(x, 2, padding=pairs), pooled)
    y, wt = integers(2, 3, *(4,) * dims), integers(3, 2, *(3,) * dims)
    whole = getattr(TF, f"conv_transpose{dims}d")(y, wt, stride=2)
    for i, (before, after) in enumerate(pairs):
        whole = whole.narrow(2 + i, before, whole.shape[2 + i] - before - after)
    ours = getattr(F, f"conv_transpose{dims}d")(y, wt, stride=2, padding=pairs)
    assert torch.equal(ours, whole)


def test_same_padding_equals_torchs_for_stride_1():
    x, w = integers(1, 2, 7, 8), integers(3, 2, 4, 3)
    for dilation in (1, 2):
        assert torch.equal(
            F.conv2d(x, w, padding="same", dilation=dilation),
            TF.conv2d(x, w, padding="same", dilation=dilation),
        )


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_mode(mode, dims):
    x = integers(2, 2, *(5,) * dims).requires_grad_()
    w = integers(3, 2, *(3,) * dims)
    pairs = ((2, 1),) * dims
    ours = getattr(F, f"conv{dims}d")(x, w, padding=pairs, padding_mode=mode)
    padded = TF.pad(x, [2, 1] * dims, mode=mode)
    torchs = getattr(TF, f"conv{dims}d")(padded, w)
    assert torch.equal(ours, torchs)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, torchs)]
    assert torch.equal(*gradients)


def test_symmetric_padding_repeats_the_edge():
    x = torch.arange(1.0, 4).view(1, 1, 3)
    out = F.conv1d(x, torch.ones(1, 1, 1), padding=3, padding_mode="symmetric")
    assert out[0, 0].tolist() == [3, 2, 1, 1, 2, 3, 3, 2, 1]


def test_pool_padding_of_any_size():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    out, index = F.max_pool2d(x, 2, padding=4, return_indices=True)
    assert out.shape == (1, 1, 5, 5)
    assert out[0, 0, 2, 2] == 3 and index[0, 0, 2, 2] == 3
    assert out[0, 0, 0, 0] == float("-inf") and index[0, 0, 0, 0] == -1
    x = x.requires_grad_()
    F.max_pool2d(x, 2, padding=4).nan_to_num(neginf=0).sum().backward()
    assert x.grad[0, 0].tolist() == [[0, 0], [0, 1]]
    assert F.max_pool1d(torch.ones(1, 1, 2, dtype=torch.int8), 1, padding=1).tolist() == [
        [[-128, 1, 1, -128]]
    ]


INTEGER_TYPES = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
]


@pytest.mark.parametrize("dtype", INTEGER_TYPES, ids=str)
def test_integer_convolution_is_modular(dtype):
    limits = torch.iinfo(dtype)
    x = torch.randint(max(limits.min, -(2**31)), min(limits.max, 2**31), (2, 4, 6, 6))
    w = torch.randint(max(limits.min, -(2**31)), min(limits.max, 2**31), (6, 2, 3, 3))
    x, w = x.to(dtype), w.to(dtype)
    columns = TF.unfold(x.double(), 3, padding=1).long().view(2, 2, 18, 36)
    exact = (w.long().view(2, 1, 3, 18, 1) * columns.transpose(0, 1).unsqueeze(2)).sum(3)
    expected = exact.permute(1, 0, 2, 3).reshape(2, 6, 6, 6)
    for impl in F.implementations("conv2d"):
        out = F.conv2d(x, w, padding=1, groups=2, impl=impl)
        assert torch.equal(out.long(), expected.to(dtype).long())
        g = F.conv_grad_weight(x, w.shape, out, padding=1, groups=2, impl=impl)
        assert g.dtype == dtype
        back = F.conv_grad_input(x.shape, w, out, padding=1, groups=2, impl=impl)
        assert back.dtype == dtype and back.shape == x.shape


def test_bool_pooling():
    x = torch.tensor([[[True, False, False, False, True, True]]])
    assert F.max_pool1d(x, 2).tolist() == [[[True, False, True]]]
    assert F.max_pool1d(x, 2, return_indices=True)[1].tolist() == [[[0, 2, 4]]]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_convolution(dtype):
    def gaussian(*shape):
        return (
            torch.complex(integers(*shape), integers(*shape, dtype=torch.float64))
            .to(dtype)
            .requires_grad_()
        )

    x, w, b = gaussian(2, 4, 5, 5), gaussian(6, 2, 3, 3), gaussian(6)
    ours = F.conv2d(x, w, b, padding=1, groups=2)
    torchs = TF.conv2d(x, w, b, padding=1, groups=2)
    assert torch.equal(ours, torchs)
    for a, c in zip(
        torch.autograd.grad(ours.abs().square().sum(), (x, w, b)),
        torch.autograd.grad(torchs.abs().square().sum(), (x, w, b)),
        strict=True,
    ):
        assert bool(((a - c).abs() <= 1e-6 * c.abs().max()).all())
    wt, bt = gaussian(4, 3, 3, 3), gaussian(6)
    assert torch.equal(
        F.conv_transpose2d(x, wt, bt, 2, 1, 1, 2), TF.conv_transpose2d(x, wt, bt, 2, 1, 1, 2)
    )
