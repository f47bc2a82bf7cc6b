"""torch.library.opcheck, all of its tests, for every operator."""

import pytest
import torch

import torch_naiveconv  # noqa: F401  (registers the operators)

OPS = torch.ops.torch_naiveconv


def t(*shape, channels_last=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_()


CONV = [2, 1, 1, 0, 1, 1, 1, 2]  # stride, padding pairs, dilation
POOL = [2, 3, 2, 1, 1, 0, 1, 1, 1, 1]  # kernel_size first
POOLED = [4, 7]  # of a 7 x 7 image
X, W, B, Y = t(2, 4, 7, 7), t(6, 2, 3, 2), t(6), t(2, 6, 3, 7)
CL = t(2, 4, 7, 7, channels_last=True)
P = t(2, 4, *POOLED)
OFFSET = OPS.max_pool(X.detach(), POOL, POOLED, "first", "offset", "auto")[1]
FLAT = OPS.max_pool(X.detach(), POOL, POOLED, "first", "flat", "auto")[1]

CASES = {
    "conv": (X, W, B, CONV, 2, "auto"),
    "conv, channels_last": (CL, W, None, CONV, 2, "auto"),
    "conv, 1-D": (t(2, 4, 9), t(6, 4, 3), None, [2, 1, 1, 1], 1, "naive"),
    "conv, 3-D": (t(1, 2, 4, 4, 4), t(2, 2, 2, 2, 2), None, [1] * 3 + [0] * 6 + [1] * 3, 1, "auto"),
    "conv_grad_input": (Y, W, t(4), [7, 7], CONV, 2, "auto"),
    "conv_grad_weight": (Y, X, None, [3, 2], CONV, 2, False, "auto"),
    "conv_grad_weight, channels_last": (Y, X, None, [3, 2], CONV, 2, True, "auto"),
    "conv_grad_weight, resumed": (Y, X, t(6, 2, 3, 2), [3, 2], CONV, 2, False, "auto"),
    "conv_grad_bias": (Y, None, "auto"),
    "max_pool": (X, POOL, POOLED, "first", "offset", "auto"),
    "max_pool, flat": (CL, POOL, POOLED, "last", "flat", "auto"),
    "max_pool, split": (X, POOL, POOLED, "split", "offset", "auto"),
    "max_pool_scatter": (P, OFFSET, [7, 7], POOL, "first", "auto"),
    "max_pool_scatter, flat": (P, FLAT, [7, 7], POOL, "first", "auto"),
    "max_pool_scatter, split": (P, X.detach(), [7, 7], POOL, "split", "auto"),
    "max_pool_gather": (X, OFFSET, POOLED, POOL, "first", "auto"),
    "max_unpool": (P, FLAT, [7, 7]),
    "max_unpool_gather": (t(2, 4, 7, 7), FLAT),
}
# Without indices there is nothing to differentiate by; and several winners have no index.
FORWARD_ONLY = {
    "max_pool, none": (X.detach(), POOL, POOLED, "first", "none", "auto"),
    "cpu_conv_rows": (),
    "cpu_fma_peak": ("generic", False),
    "cpu_pool_rows": (),
}
CASES["max_pool, split"] = (*CASES["max_pool, split"][:-2], "none", "auto")


def check(name, arguments):
    op = getattr(OPS, name.split(",")[0]).default
    if not any(isinstance(argument, torch.Tensor) for argument in arguments):
        assert op(*arguments)
        return
    result = torch.library.opcheck(op, arguments)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("name", CASES)
def test_operator(name):
    check(name, CASES[name])


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_operator_without_derivative(name):
    check(name, FORWARD_ONLY[name])


def test_every_operator_is_here():
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torch_naiveconv::")
    }
    on_cpu = {name for name in names if not name.startswith("cuda_")}
    assert on_cpu == {name.split(",")[0] for name in (*CASES, *FORWARD_ONLY)}
