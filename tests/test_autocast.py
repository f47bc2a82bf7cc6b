"""Autocast: the region's type, as for torch's own convolutions, and GradScaler."""

import pytest
import torch
import torch.nn.functional as TF

import torch_naiveconv as tn
from torch_naiveconv import functional as F

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
def test_types_follow_the_region(device, dtype, given):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, device=device, dtype=given)
    w = torch.randn(4, 3, 3, 3, device=device, dtype=given, requires_grad=True)
    b = torch.randn(4, device=device, dtype=given)
    v = torch.randn(3, 4, 2, 2, device=device, dtype=given)
    with torch.autocast(device, dtype=dtype):
        for ours, torchs in (
            (F.conv2d(x, w, b), TF.conv2d(x, w, b)),
            (F.conv_transpose2d(x, v), TF.conv_transpose2d(x, v)),
            (F.max_pool2d(x, 2), TF.max_pool2d(x, 2)),
        ):
            assert ours.dtype == torchs.dtype
            # torch may add the windows of a transposed convolution in the 16-bit type
            torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=1e-1)
        F.conv2d(x, w, b).float().sum().backward()
        with torch.autocast(device, enabled=False):
            assert F.conv2d(x, w, b).dtype == given
    assert w.grad.dtype == given


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_types_only_inside(device):
    x = torch.randn(1, 1, 4, 4, device=device, dtype=torch.bfloat16)
    w = torch.randn(1, 1, 2, 2, device=device)
    with pytest.raises(TypeError, match="convert one of them"):
        F.conv2d(x, w)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert F.conv2d(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(tn.Conv2d(1, 2, 3), torch.nn.ReLU(), tn.MaxPool2d(2)).to(device)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    with torch.autocast(device, dtype=torch.float16):
        loss = model(torch.randn(2, 1, 8, 8, device=device)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = [b - 0.1 * p.grad for b, p in zip(before, model.parameters(), strict=True)]
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)
    assert scaler.get_scale() == 64.0


def test_devices_without_autocast():
    assert F.conv2d(
        torch.ones(1, 1, 4, 4, device="meta"), torch.ones(1, 1, 2, 2, device="meta")
    ).shape == (1, 1, 3, 3)
