"""Bad input raises an error that names the argument, its value, the formula and the fix."""

import pytest
import torch

from torch_naiveconv import functional as F

X, W = torch.zeros(2, 4, 6, 6), torch.zeros(6, 4, 3, 3)
NESTED = torch.nested.nested_tensor([torch.zeros(4, 6, 6), torch.zeros(4, 5, 5)])


def conv(x=X, w=W, *args, **kwargs):
    return lambda: F.conv2d(x, w, *args, **kwargs)


def pool(*args, **kwargs):
    return lambda: F.max_pool2d(X, *args, **kwargs)


def transposed(*args, **kwargs):
    return lambda: F.conv_transpose2d(X, torch.zeros(4, 6, 3, 3), *args, **kwargs)


BAD = [
    (conv(torch.zeros(6, 6)), ValueError, r"input must be 3-D or 4-D, got 2-D of shape \(6, 6\)"),
    (conv(w=torch.zeros(6, 4, 3)), ValueError, "weight must be 4-D, got 3-D"),
    (conv(w=torch.zeros(6, 3, 3, 3)), ValueError, r"input has 4 channels .* expects 3 \* 1 = 3"),
    (conv(w=torch.zeros(5, 2, 3, 3), groups=2), ValueError, "groups=2 must divide the 5 filters"),
    (conv(groups=0), ValueError, "groups must be at least 1, got 0"),
    (conv(groups=-1), ValueError, "groups must be at least 1, got -1"),
    (conv(groups=1.0), TypeError, "groups must be an int"),
    (conv(stride=0), ValueError, "stride must be between 1 and"),
    (conv(stride=(1, -2)), ValueError, r"stride must be between 1 .* got \(1, -2\)"),
    (conv(stride=(1, 2, 3)), ValueError, "stride must be an int or a tuple of 2 ints"),
    (conv(stride=1.5), TypeError, "stride must be an int .* got 1.5"),
    (conv(stride=(1.0, 2)), TypeError, "stride must be an int"),
    (conv(stride=True), TypeError, "stride must be an int"),
    (conv(dilation=0), ValueError, "dilation must be between 1"),
    (conv(dilation=4), ValueError, r"no output .*\(kernel 3 - 1\).* = -2"),
    (conv(dilation=2**49), ValueError, "dilation must be between"),
    (conv(padding=-1), ValueError, "padding must be between 0"),
    (conv(padding=2**60), ValueError, "padding must be between 0"),
    (conv(padding="full"), ValueError, "padding must be 'same', 'valid'"),
    (conv(padding=((1, 2),)), ValueError, "2 \\(before, after\\) pairs"),
    (conv(padding=((1, 2, 3), (1, 1))), ValueError, "pairs"),
    (conv(padding_mode="mirror"), ValueError, "padding_mode must be one of"),
    (conv(padding=6, padding_mode="reflect"), ValueError, "too large for padding_mode='reflect'"),
    (conv(padding=2**40, stride=1), ValueError, "over 2\\*\\*62 elements"),
    (conv(bias=torch.zeros(5)), ValueError, "bias has 5 elements, but weight has 6 filters"),
    (conv(bias=torch.zeros(6, 1)), ValueError, "bias must be 1-D"),
    (conv(bias=torch.zeros(6).double()), TypeError, "bias is torch.float64, but input is"),
    (conv(w=W.double()), TypeError, r"weight\.to\(input\.dtype\)"),
    (conv(X.bool(), W.bool()), TypeError, "input is torch.bool, which is not supported"),
    (conv(X.to_sparse()), TypeError, "to_dense"),
    (conv(w=W.to_sparse()), TypeError, "weight must be a dense tensor"),
    (conv(bias=torch.zeros(6).to_sparse()), TypeError, "bias must be a dense tensor"),
    (conv(NESTED), TypeError, "input must not be nested"),
    (
        conv(X.to(torch.float8_e5m2), W.to(torch.float8_e5m2)),
        TypeError,
        "float8_e5m2, which is not",
    ),
    (conv(X.to(torch.complex32), W.to(torch.complex32)), TypeError, "complex32, which is not"),
    (lambda: F.max_pool2d(NESTED, 2), TypeError, "input must not be nested"),
    (lambda: F.max_pool2d(X.to_sparse(), 2), TypeError, "to_dense"),
    (lambda: F.max_unpool2d(NESTED, X.long(), 2), TypeError, "input must not be nested"),
    (lambda: F.conv_transpose2d(NESTED, W), TypeError, "input must not be nested"),
    (conv("image"), TypeError, "input must be a Tensor, got str"),
    (conv(w=torch.zeros(6, 4, 0, 3)), ValueError, "empty kernel"),
    (conv(torch.zeros(2, 4, 0, 6), padding=3), ValueError, "no output on spatial axis 0"),
    (conv(torch.zeros(2, 4, 2, 2)), ValueError, "floor.*= 0"),
    (conv(w=W.to("meta")), ValueError, "weight is on meta, but input is on cpu"),
    (conv(impl="fastest"), ValueError, "impl='fastest' cannot run on cpu here; choose one of"),
    (transposed(output_padding=1), ValueError, "output_padding 1 .* smaller than stride 1"),
    (transposed(padding="same"), ValueError, "must be numbers"),
    (transposed(padding=9), ValueError, "no output"),
    (transposed(torch.zeros(4)), ValueError, "bias has 4 elements.* makes 6 channels"),
    (transposed(groups=3), ValueError, "groups=3 must divide the 4 input channels"),
    (transposed(stride=2**48, padding=0), ValueError, "no output|2\\*\\*62"),
    (pool(0), ValueError, "kernel_size must be between 1"),
    (pool(2, stride=0), ValueError, "stride must be between 1"),
    (pool(2, padding=-1), ValueError, "padding must be between 0"),
    (pool(2, dilation=0), ValueError, "dilation must be between 1"),
    (pool(9), ValueError, "no output .*kernel 9 - 1.* = 0"),
    (pool((2, 2, 2)), ValueError, "kernel_size must be an int or a tuple of 2 ints"),
    (pool(2, padding="same"), TypeError, "padding must be an int"),
    (pool(2**20, padding=2**21), ValueError, "2\\*\\*31 taps"),
    (pool(2, ties="random"), ValueError, "ties must be one of first, last, all, split"),
    (pool(2, return_indices=True, ties="all"), ValueError, "no indices"),
    (lambda: F.max_pool2d(X.to(torch.complex64), 2), TypeError, "not supported"),
    (lambda: F.max_unpool2d(X, X.long()[:1], 2), ValueError, "must have the shape of input"),
    (lambda: F.max_unpool2d(X, X, 2), TypeError, "indices is torch.float32"),
    (lambda: F.max_unpool2d(X, X.long() + 144, 2), RuntimeError, r"outside .* \[0, 144\)"),
    (lambda: F.max_unpool2d(X, X.long() - 1, 2), RuntimeError, "outside of the output plane"),
    (lambda: F.max_unpool2d(X, X.long(), 2, output_size=(20, 12)), ValueError, "must lie between"),
    (lambda: F.max_unpool2d(X, X.long(), 2, output_size=(12,)), ValueError, "2 sizes"),
    (lambda: F.conv_grad_weight(X, W.shape, X), ValueError, "grad_output has the shape"),
    (lambda: F.conv_grad_input((1, 4, 6), W, X), ValueError, "one rank"),
    (
        lambda: F.conv_grad_weight(X, (6, 4, 3, 3), torch.zeros(2, 6, 4, 4), total=torch.zeros(6)),
        ValueError,
        "total must have the shape",
    ),
    (lambda: F.max_pool_grad_input(X, X, 2), ValueError, "pooling's output"),
    (lambda: F.implementations("conv4d"), ValueError, "no function called 'conv4d'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_hand_made_operator_calls_do_not_read_out_of_bounds():
    """Below the checks: sizes that contradict the tensors raise or stay inside of them."""
    from torch_naiveconv import ops

    x, w = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
    for arguments in [
        ([0, 1, 0, 0, 0, 0, 1, 1], 1),
        ([1, 1, -1, -1, -1, -1, 1, 1], 1),
        ([1, 1, 0, 0, 0, 0, 1, 1], 0),
        ([1, 1, 0, 0, 0, 0, 1, 1], 2),
        ([1, 1, 0, 0, 0, 0, 1], 1),
        ([1, 1, 0, 0, 0, 0, 1, 1, 1], 1),
        ([], 1),
        ([2**60, 1, 0, 0, 0, 0, 1, 1], 1),
    ]:
        with pytest.raises(RuntimeError):
            ops.conv(x, w, None, *arguments, "auto")
    grad = ops.conv_grad_input(
        torch.ones(1, 3, 50, 50), w, None, [4, 4], [1, 1, 0, 0, 0, 0, 1, 1], 1, "auto"
    )
    assert grad.shape == x.shape and bool(grad.isfinite().all())
    for index in (torch.full((1, 2, 2, 2), 200, dtype=torch.uint8), torch.full((1, 2, 2, 2), 999)):
        window = [2] * 4 + [0] * 4 + [1] * 2
        gathered = ops.max_pool_gather(x, index, [2, 2], window, "first", "auto")
        assert torch.equal(gathered, torch.zeros(1, 2, 2, 2))
        ops.max_pool_scatter(gathered, index, [4, 4], window, "first", "auto")
    with pytest.raises(RuntimeError, match="no CPU implementation called 'nope'"):
        ops.conv(x, w, None, [1, 1, 0, 0, 0, 0, 1, 1], 1, "nope")


def test_indices_that_a_gradient_needs():
    from torch_naiveconv import ops

    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    window = [2] * 4 + [0] * 4 + [1] * 2
    out, _ = ops.max_pool(x, window, [2, 2], "first", "none", "auto")
    with pytest.raises(RuntimeError, match="indices='none'"):
        out.sum().backward()
