"""torch.compile: one graph, no recompilation per shape, the eager bits, and transforms inside."""

import pytest
import torch
from torch import func
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import torch_naiveconv as tn
from torch_naiveconv import functional as F

SHAPES = [(2, 4, 9, 11), (3, 4, 12, 10), (5, 4, 17, 8), (4, 4, 20, 12)]
W = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))

FUNCTIONS = {
    "conv": lambda x, w: F.conv2d(x, w, stride=2, padding=1),
    "conv same": lambda x, w: F.conv2d(x, w, padding="same"),
    "conv reflect": lambda x, w: F.conv2d(x, w, padding=1, padding_mode="reflect"),
    "conv without batch": lambda x, w: F.conv2d(x[0], w),
    "conv_transpose": lambda x, w: F.conv_transpose2d(x, w.transpose(0, 1), stride=2, padding=1),
    "max_pool": lambda x, w: F.max_pool2d(x * w[0, 0, 0, 0], 3, 2, 1, ceil_mode=True),
    "max_pool of everything": lambda x, w: F.max_pool2d(x * w[0, 0, 0, 0], x.shape[-2:]),
    "max_unpool": lambda x, w: F.max_unpool2d(
        *F.max_pool2d(x * w[0, 0, 0, 0], 2, return_indices=True), 2, output_size=x.shape
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_all_shapes(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FUNCTIONS[name], backend=counter, fullgraph=True, dynamic=True)
    for shape in SHAPES:
        x, w = torch.randn(shape, requires_grad=True), W.clone().requires_grad_()
        got, expected = compiled(x, w), FUNCTIONS[name](x, w)
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
        grad = torch.randn_like(got)
        got = torch.autograd.grad(got, (x, w), grad)
        expected = torch.autograd.grad(expected, (x, w), grad)
        assert all(map(torch.equal, got, expected))
    assert counter.frame_count == 1


def test_the_default_backend():
    torch.manual_seed(0)
    model = torch.nn.Sequential(tn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), tn.MaxPool2d(2))
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_autograd(name):
    """An eager forward whose backward is compiled."""
    x, w = torch.randn(SHAPES[0], requires_grad=True), W.clone().requires_grad_()
    FUNCTIONS[name](x, w).square().sum().backward()
    expected = x.grad, w.grad
    x.grad = w.grad = None
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        FUNCTIONS[name](x, w).square().sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(w.grad, expected[1])


def network(w):
    x = torch.linspace(-1, 1, 2 * 4 * 5 * 4, dtype=w.dtype).view(2, 4, 5, 4).sin()
    return F.max_pool2d(F.conv2d(x, w).tanh(), 2, 1)


TRANSFORMS = {
    "grad": func.grad(lambda w: network(w).pow(3).sum()),
    "jvp": lambda w: func.jvp(network, (w,), (w + 1,))[1],
    "vmap": lambda w: func.vmap(network)(torch.stack([w, w + 1])),
    "vmap of grad": lambda w: func.vmap(func.grad(lambda v: network(v).pow(3).sum()))(
        torch.stack([w, w + 1])
    ),
    "hessian": func.hessian(lambda w: network(w).pow(3).sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside(name):
    """Right or an error, never silently wrong: compilers lose derivatives in silence elsewhere."""
    w = W[:2, :, :2, :2].double()
    got = torch.compile(TRANSFORMS[name], backend="aot_eager", fullgraph=True)(w)
    torch.testing.assert_close(got, TRANSFORMS[name](w))


def test_transforms_outside():
    """torch refuses to trace these in one graph, and runs them eagerly otherwise."""
    w = W[:2, :, :2, :2].double()
    compiled = torch.compile(network, backend="aot_eager")
    got = func.jvp(compiled, (w,), (w + 1,))[1]
    torch.testing.assert_close(got, TRANSFORMS["jvp"](w))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reduce_overhead():
    layer = tn.Conv2d(3, 4, 3, device="cuda")
    x = torch.randn(2, 3, 8, 8, device="cuda")
    expected = layer(x)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # recorded, then replayed as a CUDA graph
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(x), expected)
