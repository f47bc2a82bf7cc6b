"""Models that nobody here wrote, with random weights: converted, they still compute the same.

The packages are for tests only (``pip install --no-deps`` of those named below, and of what they
import); a model is skipped where its package is missing.
"""

import pytest
import torch

import torch_naiveconv as tn


def timm(name, size, **arguments):
    def build():
        package = pytest.importorskip("timm", reason="pip install --no-deps timm huggingface-hub")
        return package.create_model(name, pretrained=False, num_classes=5, **arguments)

    return build, (2, 3, size, size)


def basic_unet():
    nets = pytest.importorskip("monai.networks.nets", reason="pip install --no-deps monai")
    return nets.BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(8,) * 6)


def snac():
    package = pytest.importorskip("snac", reason="pip install --no-deps snac einops")
    return package.SNAC(
        encoder_dim=8,
        encoder_rates=[2, 4],
        decoder_dim=32,
        decoder_rates=[4, 2],
        attn_window_size=None,
        vq_strides=[2, 1],
        codebook_size=16,
        codebook_dim=4,
    ).decoder


def unpooling():
    """A SegNet in small: torch.nn only, the layers that no package above uses."""

    class SegNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = torch.nn.Conv2d(1, 4, 3, padding=1)
            self.pool = torch.nn.MaxPool2d(2, return_indices=True)
            self.unpool = torch.nn.MaxUnpool2d(2)
            self.up = torch.nn.ConvTranspose2d(4, 2, 3, padding=1)

        def forward(self, x):
            return self.up(self.unpool(*self.pool(self.down(x).relu())))

    return SegNet()


MODELS = {
    "ResNet-50": timm("resnet50", 64),
    "ConvNeXt": timm("convnext_atto", 64),
    "MobileNet": timm("mobilenetv3_small_050", 64),
    "U-Net": (basic_unet, (1, 1, 32, 32)),
    "SNAC audio decoder": (snac, (1, 32, 8)),
    "SegNet": (unpooling, (2, 1, 16, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step():
        torch.manual_seed(1)
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        return y.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = step()
    layers = sum(
        type(m) in tn.modules.OURS or hasattr(m, "parametrizations") for m in model.modules()
    )
    tn.convert(model)
    ours = sum(isinstance(m, tuple(tn.modules.TORCHS)) for m in model.modules())
    assert ours == layers > 0
    torch.testing.assert_close(step(), expected, rtol=1e-7, atol=1e-9)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
