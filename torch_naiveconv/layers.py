"""Layers of well-known networks, the shapes that ``python -m torch_naiveconv bench`` times."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .ops import conv_output_size

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ConvLayer:
    """A convolution: batch, channels in, image, channels out, and the arguments of conv1d to 3d."""

    name: str
    batch: int
    channels: int
    size: Sizes
    filters: int
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def output_size(self) -> Sizes:
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(conv_output_size(i, k, s, p, p, d) for i, k, s, p, d in axes)

    @property
    def multiply_adds(self) -> int:
        """Of the forward pass, and of each of the gradients."""
        taps = self.channels // self.groups * prod(self.kernel)
        return self.batch * self.filters * prod(self.output_size) * taps


@dataclass(frozen=True)
class PoolLayer:
    """A max-pooling: batch, channels, image, and the arguments of max_pool1d to 3d."""

    name: str
    batch: int
    channels: int
    size: Sizes
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    ceil_mode: bool

    @property
    def dims(self) -> int:
        return len(self.size)


CONV_LAYERS = [
    ConvLayer("resnet50.conv1", 8, 3, (224, 224), 64, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    ConvLayer("resnet50.l1.1x1a", 8, 64, (56, 56), 64, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ConvLayer("resnet50.l1.3x3", 8, 64, (56, 56), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvLayer("resnet50.l1.1x1b", 8, 64, (56, 56), 256, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ConvLayer("resnet50.l2.3x3s2", 8, 128, (56, 56), 128, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    ConvLayer("resnet50.l2.down", 8, 256, (56, 56), 512, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    ConvLayer("resnet50.l3.3x3", 8, 256, (14, 14), 256, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvLayer("resnet50.l4.3x3", 8, 512, (7, 7), 512, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvLayer("resnet50.l4.3x3.b1", 1, 512, (7, 7), 512, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvLayer("vgg16.conv1_1", 2, 3, (224, 224), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvLayer("vgg16.conv1_2", 2, 64, (224, 224), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvLayer("vgg16.conv5_1", 4, 512, (14, 14), 512, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvLayer("mobilenetv2.dw.s1", 8, 144, (56, 56), 144, (3, 3), (1, 1), (1, 1), (1, 1), 144),
    ConvLayer("mobilenetv2.dw.s2", 8, 192, (28, 28), 192, (3, 3), (2, 2), (1, 1), (1, 1), 192),
    ConvLayer("mobilenetv2.expand", 8, 24, (56, 56), 144, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ConvLayer("efficientnet.dw5", 8, 672, (14, 14), 672, (5, 5), (1, 1), (2, 2), (1, 1), 672),
    ConvLayer("convnext.stem", 8, 3, (224, 224), 96, (4, 4), (4, 4), (0, 0), (1, 1), 1),
    ConvLayer("convnext.dw7", 8, 96, (56, 56), 96, (7, 7), (1, 1), (3, 3), (1, 1), 96),
    ConvLayer("resnext.g32", 8, 128, (56, 56), 128, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    ConvLayer("deeplab.d12", 2, 256, (33, 33), 256, (3, 3), (1, 1), (12, 12), (12, 12), 1),
    ConvLayer("unet.in", 1, 1, (256, 256), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ConvLayer("unet.out", 1, 64, (256, 256), 2, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ConvLayer("cs231n.3layer", 50, 3, (32, 32), 32, (7, 7), (1, 1), (3, 3), (1, 1), 1),
    ConvLayer("cs231n.fast", 100, 3, (31, 31), 25, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    ConvLayer("lenet.c2", 64, 6, (14, 14), 16, (5, 5), (1, 1), (0, 0), (1, 1), 1),
    ConvLayer("wav2vec2.f1", 1, 512, (7999,), 512, (3,), (2,), (0,), (1,), 1),
    ConvLayer("conformer.dw31", 8, 256, (400,), 256, (31,), (1,), (15,), (1,), 256),
    ConvLayer("r3d18.l1", 1, 64, (8, 56, 56), 64, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
]

POOL_LAYERS = [
    PoolLayer("resnet.3x3s2", 8, 64, (112, 112), (3, 3), (2, 2), (1, 1), (1, 1), False),
    PoolLayer("vgg.2x2.224", 2, 64, (224, 224), (2, 2), (2, 2), (0, 0), (1, 1), False),
    PoolLayer("vgg.2x2.28", 8, 512, (28, 28), (2, 2), (2, 2), (0, 0), (1, 1), False),
    PoolLayer("squeezenet.ceil", 8, 96, (111, 111), (3, 3), (2, 2), (0, 0), (1, 1), True),
    PoolLayer("inception.3x3s1", 8, 192, (28, 28), (3, 3), (1, 1), (1, 1), (1, 1), False),
    PoolLayer("spp.5", 1, 512, (20, 20), (5, 5), (1, 1), (2, 2), (1, 1), False),
    PoolLayer("spp.13", 1, 512, (20, 20), (13, 13), (1, 1), (6, 6), (1, 1), False),
    PoolLayer("cs231n.2x2", 100, 32, (32, 32), (2, 2), (2, 2), (0, 0), (1, 1), False),
    PoolLayer("audio.k4s4", 8, 128, (16000,), (4,), (4,), (0,), (1,), False),
    PoolLayer("c3d.222", 1, 128, (16, 56, 56), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), False),
    PoolLayer("i3d.333s2", 1, 64, (16, 56, 56), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), False),
]
