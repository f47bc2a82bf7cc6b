"""channels_last in, channels_last out; gradients with the strides of what they are gradients of."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_naiveconv as tn
from torch_naiveconv import functional as F


def formats(dims):
    return (torch.contiguous_format, torch.channels_last if dims == 2 else torch.channels_last_3d)


def run(f, x, *weights):
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    y = f(*leaves)
    return y, torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("w_last", [False, True])
def test_convolution(dims, x_last, w_last, compiled):
    f = {2: F.conv2d, 3: F.conv3d}[dims]
    if compiled:
        torch._dynamo.reset()
        f = torch.compile(f, backend="aot_eager", fullgraph=True)
    last = formats(dims)
    x = torch.randn(2, 3, *(6,) * dims).contiguous(memory_format=last[x_last])
    w = torch.randn(4, 3, *(3,) * dims).contiguous(memory_format=last[w_last])
    y, (grad_x, grad_w) = run(f, x, w)
    assert y.is_contiguous(memory_format=last[x_last])
    assert grad_x.stride() == x.stride()
    assert grad_w.stride() == w.stride()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("last", [False, True])
def test_pooling(last, compiled):
    f = lambda t: F.max_pool2d(t, 2)  # noqa: E731
    if compiled:
        torch._dynamo.reset()
        f = torch.compile(f, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=formats(2)[last])
    y, (grad,) = run(f, x)
    assert y.is_contiguous(memory_format=formats(2)[last])
    assert grad.stride() == x.stride()
    _, index = F.max_pool2d(x, 2, return_indices=True)
    assert index.stride() == y.stride()


def test_the_format_goes_through_a_model():
    model = torch.nn.Sequential(
        tn.Conv2d(3, 4, 3), torch.nn.ReLU(), tn.MaxPool2d(2), tn.Conv2d(4, 5, 1)
    )
    model = model.to(memory_format=torch.channels_last)
    y = model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    f = lambda x, w: F.max_pool2d(F.conv2d(x, w), 2)  # noqa: E731
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    got = (
        run(lambda *args: checkpoint(f, *args, use_reentrant=reentrant) * 1, x, w)
        if not reentrant
        else None
    )
    expected = run(f, x, w)
    if reentrant:  # works with backward only
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        checkpoint(f, *leaves, use_reentrant=True).square().sum().backward()
        got = (expected[0], [leaf.grad for leaf in leaves])
    assert torch.equal(got[0], expected[0])
    assert all(map(torch.equal, got[1], expected[1]))
