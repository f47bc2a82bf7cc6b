"""torch.func and forward mode: every transform, and transforms of transforms, against torch."""

import itertools

import pytest
import torch
import torch.nn.functional as TF
from torch import func
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import torch_naiveconv as tn
from torch_naiveconv import functional as F

torch.manual_seed(0)
X = torch.randn(2, 2, 5, 4, dtype=torch.float64)
W = torch.randn(2, 2, 2, 2, dtype=torch.float64)


def unpooled(module, x):
    return module.max_unpool2d(*module.max_pool2d(x, 2, return_indices=True), 2, output_size=(5, 4))


# name: (function of a module of functions and a tensor, the tensor)
FUNCTIONS = {
    "conv by weight": (lambda m, t: m.conv2d(X, t, stride=2, padding=1), W),
    "conv by input": (lambda m, t: m.conv2d(t, W, dilation=2), X),
    "conv_transpose": (lambda m, t: m.conv_transpose2d(t, W, stride=2, padding=1), X),
    "max_pool": (lambda m, t: m.max_pool2d(t, 2, 1), X),
    "a network": (lambda m, t: m.max_pool2d(m.conv2d(X, t).tanh(), 2, 1), W),
    "max_unpool": (unpooled, X),
    # Not linear in t: forward over forward needs the product of the two tangents.
    "conv by both": (lambda m, t: m.conv2d(t[:1], t, bias=t.sum((1, 2, 3))), W),
    "conv_transpose by both": (lambda m, t: m.conv_transpose2d(t[:1, :, :1], t), W),
}


def cubed(f):
    return lambda t: f(t).pow(3).sum()


def reverse_over(transform):
    """Plain autograd.grad of what a transform returns."""

    def run(f, t):
        t = t.clone().requires_grad_()
        return torch.autograd.grad(transform(f, t).pow(2).sum(), t)[0]

    return run


def nested_jvp(f, levels):
    for _ in range(levels):
        f = lambda t, f=f: func.jvp(f, (t,), (t.cos(),))[1]  # noqa: E731
    return f


TRANSFORMS = {
    "grad": lambda f, t: func.grad(cubed(f))(t),
    "vjp": lambda f, t: func.vjp(f, t)[1](f(t))[0],
    "jvp": lambda f, t: torch.stack(func.jvp(f, (t,), (t + 1,))),
    "linearize": lambda f, t: func.linearize(f, t)[1](t + 1),
    "jacrev": lambda f, t: func.jacrev(f)(t),
    "jacfwd": lambda f, t: func.jacfwd(f)(t),
    "hessian": lambda f, t: func.hessian(cubed(f))(t),
    "reverse of reverse": lambda f, t: func.jacrev(func.jacrev(cubed(f)))(t),
    "forward of forward": lambda f, t: func.jacfwd(func.jacfwd(cubed(f)))(t),
    "reverse of forward": lambda f, t: func.jacrev(func.jacfwd(cubed(f)))(t),
    "vmap": lambda f, t: func.vmap(f)(torch.stack([t, t + 1, t * 2])),
    "vmap of vmap": lambda f, t: func.vmap(func.vmap(f))(t.expand(2, 3, *t.shape)),
    "jvp of jvp": lambda f, t: func.jvp(lambda u: func.jvp(f, (u,), (u + 1,))[1], (t,), (t.cos(),))[
        1
    ],
    "jvp of jvp of jvp": lambda f, t: nested_jvp(f, 3)(t),
    "vmap of grad": lambda f, t: func.vmap(func.grad(cubed(f)))(torch.stack([t, t + 1])),
    "vmap of hessian": lambda f, t: func.vmap(func.hessian(cubed(f)))(torch.stack([t, t + 1])),
    "autograd of grad": reverse_over(lambda f, t: func.grad(cubed(f))(t)),
    "autograd of vmap": reverse_over(lambda f, t: func.vmap(f)(torch.stack([t, t + 1]))),
}


@pytest.mark.parametrize(("function", "transform"), list(itertools.product(FUNCTIONS, TRANSFORMS)))
def test_transform(function, transform):
    f, t = FUNCTIONS[function]
    ours = TRANSFORMS[transform](lambda u: f(F, u), t)
    torchs = TRANSFORMS[transform](lambda u: f(TF, u), t)
    torch.testing.assert_close(ours, torchs)


DIMS = [
    dims for dims in itertools.product((None, 0, -1), repeat=3) if any(d is not None for d in dims)
]


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_vmap_over_every_choice_of_arguments(name, dims):
    """Input, weight and bias mapped or not, any axis, batched inside or not, and gradients."""
    tensors = [X, W, torch.randn(2, dtype=torch.float64)]
    stacked = [
        t if d is None else torch.stack([t, t + 1, t * 2], d)
        for t, d in zip(tensors, dims, strict=True)
    ]

    def results(module):
        def call(*arguments):
            return getattr(module, name)(*arguments, stride=2, padding=1)

        yield func.vmap(call, dims, -1)(*stacked)
        yield func.vmap(lambda x, w, b: call(x[0], w, b), dims)(*stacked)
        yield from func.vmap(func.grad(lambda *a: call(*a).pow(3).sum(), (0, 1, 2)), dims)(*stacked)

    for ours, torchs in zip(results(F), results(TF), strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", ["vmap", "vmap of grad"])
def test_vmap_over_nothing(function, transform):
    """A mapped dimension of 0, which torch refuses or gets wrong."""
    f, t = FUNCTIONS[function]
    call = (lambda u: f(F, u)) if transform == "vmap" else func.grad(cubed(lambda u: f(F, u)))
    assert func.vmap(call)(t.expand(0, *t.shape)).shape == (0, *call(t).shape)


def test_vmap_is_folded_into_groups_and_batch():
    """One call of the operator for all slices, not a loop."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(str(op))
            return op(*args, **(kwargs or {}))

    names: list[str] = []
    with Calls():
        func.vmap(lambda w: F.conv2d(X, w))(torch.stack([W] * 4))
        func.vmap(lambda x: F.max_pool2d(x, 2))(torch.stack([X] * 4))
    assert names.count("torch_naiveconv.conv.default") == 1
    assert names.count("torch_naiveconv.max_pool.default") == 1


def test_per_sample_gradients_of_a_model():
    model = torch.nn.Sequential(tn.Conv2d(2, 3, 3), torch.nn.ReLU(), tn.MaxPool2d(2)).double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(p, sample):
        return func.functional_call(model, p, (sample[None],)).square().sum()

    each = func.vmap(func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        alone = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(model.parameters()))
        for name, expected in zip(parameters, alone, strict=True):
            torch.testing.assert_close(each[name][i], expected)


def test_forward_mode():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(W, W + 1)
        ours = forward_ad.unpack_dual(F.conv2d(X, dual)).tangent
        torchs = forward_ad.unpack_dual(TF.conv2d(X, dual)).tangent
    torch.testing.assert_close(ours, torchs)


def test_a_direct_call_of_the_operator_keeps_its_tangent():
    """What the graph of an exported program does."""

    def raw(w):
        return torch.ops.torch_naiveconv.conv(X, w, None, [1, 1, 0, 0, 0, 0, 1, 1], 1, "auto")

    for transform in (TRANSFORMS["jvp"], TRANSFORMS["hessian"], TRANSFORMS["jacfwd"]):
        torch.testing.assert_close(transform(raw, W), transform(lambda w: TF.conv2d(X, w), W))
