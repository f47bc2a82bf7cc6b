"""gradcheck, gradgradcheck and torch.nn.functional over the table of the check command."""

import pytest
import torch

from torch_naiveconv import functional as F
from torch_naiveconv.commands import check

EVERYTHING = list(check.everything())


@pytest.mark.parametrize("name", list(check.CHECKS))
@pytest.mark.parametrize(
    ("device", "impl", "case"), EVERYTHING, ids=[f"{d}-{i}-{c}" for d, i, c in EVERYTHING]
)
def test_case(name, device, impl, case):
    check.CHECKS[name](case, impl, device)


@pytest.mark.parametrize("ties", F.TIES)
def test_every_tie_rule_has_derivatives(ties):
    x = torch.randperm(72).double().view(1, 2, 6, 6).requires_grad_()
    function = lambda t: F.max_pool2d(t, 3, 2, 1, ties=ties)  # noqa: E731
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("ties", "expected"),
    [
        ("first", [[0, 12, 0], [0, 0, 0]]),
        ("last", [[0, 0, 0], [0, 0, 12]]),
        ("all", [[0, 12, 12], [0, 12, 12]]),
        ("split", [[0, 3, 3], [0, 3, 3]]),
    ],
)
def test_tie_rules(ties, expected):
    x = torch.tensor([[[[0.0, 5, 5], [0, 5, 5]]]], requires_grad=True)
    F.max_pool2d(x, (2, 3), ties=ties).backward(torch.full((1, 1, 1, 1), 12.0))
    assert x.grad[0, 0].tolist() == expected


def test_max_unpool():
    y = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    indices = F.max_pool2d(torch.randn(2, 2, 6, 6), 2, return_indices=True)[1]
    function = lambda t: F.max_unpool2d(t, indices, 2)  # noqa: E731
    assert torch.autograd.gradcheck(function, y, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, y)


def test_max_unpool_with_one_index_twice():
    """The last value stays, and the derivative is that of what was computed."""
    y = torch.tensor([[[1.0, 2, 3]]], dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[[4, 0, 4]]])
    out = F.max_unpool1d(y, indices, 2)
    assert out.tolist() == [[[2, 0, 0, 0, 3, 0]]]
    assert torch.autograd.gradcheck(lambda t: F.max_unpool1d(t, indices, 2), y)


def test_gradients_by_themselves_are_differentiable():
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    total = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    for function, inputs in [
        (lambda g, w: F.conv_grad_input((2, 4, 5), w, g, groups=2), (g, w)),
        (lambda x, g, t: F.conv_grad_weight(x, (4, 2, 3), g, groups=2, total=t), (x, g, total)),
        (lambda g: F.conv_grad_bias(g), (g,)),
        (lambda g: F.max_pool_grad_input(torch.arange(40.0).view(2, 4, 5), g, 3, 1), (g,)),
    ]:
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_of_an_empty_batch():
    x = torch.zeros(0, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(
        F.max_pool2d(F.conv2d(x, w), 2).square().sum(), w, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), w, allow_unused=True)
    assert torch.equal(second, torch.zeros_like(w))
    assert torch.autograd.gradgradcheck(lambda t: F.max_pool2d(t, 2), x)
