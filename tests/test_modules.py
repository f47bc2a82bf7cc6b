"""Modules: torch's own in everything but the function that computes them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import torch_naiveconv as tn

LAYERS = [
    ("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 9)),
    ("Conv2d", (4, 6, 3), {"padding": "same", "dilation": 2}, (2, 4, 9, 8)),
    ("Conv2d", (4, 6, (3, 2)), {"padding": (1, 2), "padding_mode": "reflect"}, (2, 4, 9, 8)),
    ("Conv3d", (4, 6, 3), {"bias": False}, (1, 4, 5, 5, 5)),
    ("ConvTranspose1d", (4, 6, 3), {"stride": 2}, (2, 4, 5)),
    ("ConvTranspose2d", (4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 5, 4)),
    ("ConvTranspose3d", (4, 6, 2), {"stride": 2, "groups": 2}, (1, 4, 3, 3, 3)),
    ("MaxPool1d", (3,), {"stride": 2}, (2, 4, 9)),
    ("MaxPool2d", (3,), {"stride": 2, "padding": 1, "ceil_mode": True}, (2, 4, 9, 8)),
    ("MaxPool3d", (2,), {}, (1, 4, 5, 5, 5)),
]


def pair(name, args, kwargs):
    torchs = getattr(nn, name)(*args, **kwargs).double()
    with torch.no_grad():
        for p in torchs.parameters():
            p.copy_(torch.randint(-4, 5, p.shape))
    ours = getattr(tn, name)(*args, **kwargs).double()
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), LAYERS)
def test_layer(name, args, kwargs, shape):
    ours, torchs = pair(name, args, kwargs)
    x = torch.randint(-4, 5, shape).double()
    expected = torchs(x)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(torchs)
    assert torch.equal(ours(x), expected)
    assert torch.equal(copy.deepcopy(ours)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), expected)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    saved = io.BytesIO()
    torch.save(ours.state_dict(), saved)
    saved.seek(0)
    torchs.load_state_dict(torch.load(saved))
    converted = tn.convert(torchs)
    assert converted is torchs and type(converted) is getattr(tn, name)
    assert torch.equal(converted(x), expected)
    assert type(tn.convert(converted, back=True)) is getattr(nn, name)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpool_and_output_size(dims):
    x = torch.randn(2, 3, *(7,) * dims)
    pool = getattr(tn, f"MaxPool{dims}d")(2, return_indices=True)
    unpool, torchs = getattr(tn, f"MaxUnpool{dims}d")(2), getattr(nn, f"MaxUnpool{dims}d")(2)
    y, i = pool(x)
    assert torch.equal(unpool(y, i, output_size=x.shape), torchs(y, i, output_size=x.shape))
    up = getattr(tn, f"ConvTranspose{dims}d")(3, 2, 3, stride=2)
    assert up(y, output_size=(8,) * dims).shape[2:] == (8,) * dims


def test_convert_keeps_parameters_hooks_and_strangers():
    class Strange(nn.Conv2d):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), Strange(2, 2, 1), nn.MaxPool2d(2))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    parameters = [id(p) for p in model.parameters()]
    x = torch.randint(-3, 4, (1, 1, 8, 8)).float()
    model.eval()
    before = model(x)
    assert tn.convert(model) is model
    assert [type(m) for m in model] == [tn.Conv2d, nn.BatchNorm2d, Strange, tn.MaxPool2d]
    assert [id(p) for p in model.parameters()] == parameters
    assert torch.allclose(model(x), before, atol=1e-6) and len(seen) == 2
    tn.convert(model, back=True)
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, Strange, nn.MaxPool2d]
    assert "impl" not in vars(model[0])


def test_beyond_torchs_constructors():
    layer = tn.Conv2d(1, 1, 3, stride=2, padding="same", impl="naive")
    assert layer(torch.zeros(1, 1, 6, 7)).shape == (1, 1, 3, 4)
    assert layer.impl == "naive"
    x = torch.tensor([[[1.0, 1.0]]], requires_grad=True)
    tn.MaxPool1d(2, ties="split")(x).sum().backward()
    assert x.grad.tolist() == [[[0.5, 0.5]]]
    assert tn.Conv1d(1, 1, 2, padding=((1, 0),))(torch.zeros(1, 1, 4)).shape == (1, 1, 4)
