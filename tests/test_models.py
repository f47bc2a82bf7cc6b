"""Models that nobody here wrote, with random weights: converted, they still compute the same.

The packages are for tests only; a model is skipped where its package is missing, and the reason
says how to install it. (timm, and others that ask for torchvision, are not among them: torchvision
binds one torch.)
"""

import pytest
import torch

import torch_naiveconv as tn


def transformers(name, **arguments):
    """A model of the transformers package: its configuration class, and then itself."""

    def build():
        package = pytest.importorskip("transformers", reason="pip install transformers")
        base = name.removesuffix("Model").removesuffix("ForImageClassification")
        configuration = getattr(package, f"{base}Config")(**arguments)
        return getattr(package, name)(configuration)

    return build


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


WAV2VEC = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
CONVNEXT = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]}
MODELS = {
    "ResNet-50": (transformers("ResNetForImageClassification"), (1, 3, 64, 64)),
    "ConvNeXt": (transformers("ConvNextForImageClassification", **CONVNEXT), (2, 3, 64, 64)),
    "MobileNetV2": (
        transformers("MobileNetV2ForImageClassification", depth_multiplier=0.35),
        (2, 3, 64, 64),
    ),
    "wav2vec 2.0": (transformers("Wav2Vec2Model", **WAV2VEC), (1, 2000)),
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
        y = y if isinstance(y, torch.Tensor) else y[0]
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
