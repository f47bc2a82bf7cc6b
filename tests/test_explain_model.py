"""The table of a model's layers, and the matrix of a convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torch_naiveconv as tn
from torch_naiveconv import functional as F


class Residual(nn.Module):
    """A branch of two 3x3 convolutions beside the identity, added in place."""

    def __init__(self):
        super().__init__()
        self.first = tn.Conv2d(4, 4, 3, padding=1)
        self.second = tn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.after = nn.Conv2d(4, 4, 3, stride=2)

    def forward(self, x):
        y = x.clone()
        y += self.second(torch.relu(self.first(x)))
        return self.after(y)


def seen(model, size):
    """How many inputs of each axis move the middle output."""
    for p in model.parameters():
        nn.init.ones_(p)
    x = torch.ones(size, requires_grad=True)
    y = model.eval()(x)
    middle = (0, 0, *(s // 2 for s in y.shape[2:]))
    (grad,) = torch.autograd.grad(y[middle], x)
    hit = grad.abs().sum(1)[0] > 0
    return tuple(int(hit.any(1 - axis).sum()) for axis in range(2))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2), nn.Conv2d(2, 2, (3, 5), stride=2)),
        nn.Sequential(nn.Conv2d(1, 1, 3, stride=2), nn.AvgPool2d(3, 2), nn.Conv2d(1, 1, 3)),
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Residual()),
        nn.Sequential(nn.Conv2d(1, 1, 4, stride=4), nn.ConvTranspose2d(1, 1, 2, stride=2)),
        nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(4)),
    ],
)
def test_receptive_field_is_what_gradients_reach(model):
    size = (1, 1, 50, 50)
    assert tn.explain(model, size)[-1].receptive_field == seen(model, size)


def test_table_of_a_small_network():
    model = nn.Sequential(
        tn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), tn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )
    model.train()
    table = tn.explain(model, (2, 3, 8, 8))
    conv, relu, pool, _flatten, linear = table
    assert model.training and all(not m._forward_hooks for m in model.modules())
    assert conv.output_size == (2, 8, 8, 8) and conv.parameters == 8 * 27 + 8
    assert conv.formula == "floor((8 + 2 * 1 - 1 * (3 - 1) - 1) / 1) + 1 = 8"
    assert conv.flops == 2 * (2 * 8 * 64) * 27 + 2 * 8 * 64
    assert pool.flops == 4 * 2 * 8 * 16 and pool.bytes == 4 * 2 * 8 * 16
    assert linear.flops == 2 * 2 * 10 * 128 + 20 and linear.receptive_field is None
    assert [layer.contract for layer in table] == ["yes", "exact", "yes", "exact", "no"]
    assert relu.kind == "ReLU" and str(table).splitlines()[0].split()[0] == "layer"
    assert len(str(table).splitlines()) == 9


def test_formula_of_a_transposed_layer_and_of_unequal_axes():
    model = nn.Sequential(
        nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=1), nn.MaxPool2d((3, 2))
    )
    first, second = tn.explain(model, (1, 1, 4, 4))
    assert first.formula == "(4 - 1) * 2 - 2 * 1 + 1 * (3 - 1) + 1 + 1 = 8"
    assert second.formula.count("floor") == 2 and second.output_size == (1, 1, 2, 4)


def test_input_size_must_hold_the_batch():
    with pytest.raises(ValueError, match="batch included"):
        tn.explain(nn.Conv2d(1, 1, 3), (8, 8))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_matrix_equals_convolution_and_its_transpose_the_gradient(data):
    dims = data.draw(st.integers(1, 3))
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups = draw(1, 2)
    kernel = [draw(1, 3) for _ in range(dims)]
    size = [draw(3, 6) for _ in range(dims)]
    options = {
        "stride": tuple(draw(1, 3) for _ in range(dims)),
        "padding": tuple((draw(0, 2), draw(2, 3)) for _ in range(dims)),
        "dilation": tuple(draw(1, 2) for _ in range(dims)),
        "groups": groups,
    }
    generator = torch.Generator().manual_seed(draw(0, 1000))

    def integers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).double()

    weight = integers(2 * groups, 2, *kernel)
    x = integers(1, 2 * groups, *size)
    y = getattr(F, f"conv{dims}d")(x, weight, **options)
    matrix = tn.conv_matrix(weight, x.shape[1:], **options)
    assert torch.equal(matrix @ x.flatten(), y.flatten())
    grad = integers(*y.shape)
    dx = F.conv_grad_input(x.shape, weight, grad, **options)
    assert torch.equal(matrix.T @ grad.flatten(), dx.flatten())


def test_matrix_holds_a_row_in_the_order_of_the_terms():
    weight = torch.arange(1.0, 19).view(1, 2, 3, 3)
    matrix = tn.conv_matrix(weight, (2, 3, 3))
    assert matrix.shape == (1, 18) and torch.equal(matrix.values(), weight.flatten())


def test_matrix_is_differentiable_by_the_weight():
    weight = torch.ones(1, 1, 2, 2, requires_grad=True)
    x = torch.arange(9.0)
    (tn.conv_matrix(weight, (1, 3, 3)) @ x).sum().backward()
    expected = F.conv_grad_weight(x.view(1, 1, 3, 3), weight.shape, torch.ones(1, 1, 2, 2))
    assert torch.equal(weight.grad, expected)


def test_matrix_refuses_what_the_convolution_refuses():
    with pytest.raises(ValueError, match="no output on spatial axis 0"):
        tn.conv_matrix(torch.ones(1, 1, 3, 3), (1, 2, 2))
    with pytest.raises(ValueError, match="channels"):
        tn.conv_matrix(torch.ones(1, 1, 3, 3), (2, 4, 4))
